"""Writes the figures of results/ into the pages that quote them: python tools/quote_results.py [--check]

Makes anew what stands between `<!-- results: NAME -->` and `<!-- end -->`. NAME is one of the TABLES, or a figure within a
sentence as `str.format` names it: `{short[test_accuracy]:.2%}` is the `test_accuracy` in results/short/metrics.json, and
`{serving[page_ready_seconds]:.1f}` the `page_ready_seconds` in results/serving.json. --check changes nothing, names the
pages with other figures, and exits with 1 if there are any.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean, median, stdev

from cifar_fastai.recipes import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "SECURITY.md", "results/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
QUOTE = re.compile(r"<!-- results: (.+?) -->(.*?)<!-- end -->", re.DOTALL)


class Results(dict):
    """What lies in results/, by name: the metrics of a run, the means of its seeds by `<name>*`, or a benchmark's file."""

    def __missing__(self, name: str):
        if name.endswith("*"):
            runs = seeds_of(name[:-1])
            return {key: mean(run[key] for run in runs) for key, value in runs[0].items() if isinstance(value, float)}
        run, file = ROOT / "results" / name / "metrics.json", ROOT / "results" / f"{name}.json"
        self[name] = json.loads((run if run.exists() else file).read_bytes())
        return self[name]


results = Results()


def seeds_of(name: str) -> list[dict]:
    """The metrics of a recipe's runs: the first seed's in a folder of its name, further ones in `<name>-seed<number>`."""
    folders = {path.parent.name for path in (ROOT / "results").glob(f"{name}*/metrics.json")}
    return [results[folder] for folder in sorted(folders) if re.fullmatch(rf"{re.escape(name)}(-seed\d+)?", folder)]


def table(head: str, rows) -> str:
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def spread(values: list[float]) -> str:
    """A share in percent: the mean, and the standard deviation where there are three and more."""
    return f"{mean(values):.2%}" + (f" ± {stdev(values) * 100:.2f}" if len(values) >= 3 else "")


# --- tables ------------------------------------------------------------------------------------------------------


def recipes() -> str:
    """The recipes that were trained on CIFAR-10, best first."""
    rows = []
    for name, recipe in RECIPES.items():
        runs = seeds_of(name)
        if not runs or len(runs[0]["classes"]) != 10 or runs[0]["data"]["source"] == "digits":
            continue
        plain, tta = ([run[key] for run in runs] for key in ("test_accuracy", "test_accuracy_tta"))
        data = "JPEG copy" if runs[0]["data"]["encoding"] == "JPEG" else "CIFAR-10"
        minutes = f"{mean(run['train_seconds'] for run in runs) / 60:.0f} min"
        size = f"{runs[0]['n_params'] / 1e6:.1f} M"
        figures = (spread(plain), spread(tta), minutes, data, len(runs))
        rows.append((mean(tta), (f"`{name}`", recipe.about, size, runs[0]["epochs_run"], *figures)))
    head = "recipe | what it is | parameters | epochs | test accuracy | with TTA | time | data | n"
    return table(head, (row for _, row in sorted(rows, reverse=True)))


def ablation() -> str:
    runs = results["ablation"]["runs"]
    base = {run["seed"]: run["accuracy_tta"] for run in runs["as it is"]}
    rows = []
    for name, each in runs.items():
        gains = [(run["accuracy_tta"] - base[run["seed"]]) * 100 for run in each]
        by_seed = ("", "") if name == "as it is" else (f"{mean(gains):+.2f}", ", ".join(f"{gain:+.2f}" for gain in gains))
        rows.append((name, f"{mean(run['accuracy_tta'] for run in each):.2%}", *by_seed))
    return table("the recipe | accuracy | against as it is, points | each seed", rows)


def throughput() -> str:
    rows = []
    for model in ("small", "base", "deep", "large"):
        found = results[f"throughput-{model}"]
        speeds = (f"{median(speeds):.0f}" for speeds in found["images_per_second"].values())
        ratios = (f"{found[key]:.2f}" for key in ("over_by_hand", "over_fastai"))
        link = f"[`{model}`](../results/throughput-{model}.json)"
        rows.append((link, *speeds, *ratios, f"{found['share_of_convolutions']:.0%}"))
    head = "model | `train.py` | loop by hand | stock fastai, files | ours / by hand | ours / fastai"
    return table(f"{head} | of the convolutions' own speed", rows)


def allocator() -> str:
    cases = results["allocator"]["cases"]
    rows = [(f"`{c['model']}`", c["side"], c["batch_size"], f"{c['plain_over_kept']:.2f}") for c in cases]
    return table("model | side, pixels | batch | times as fast", rows)


def compiled() -> str:
    gains = {model: results["compiled"][model]["plain_over_compiled"] for model in ("small", "base", "large")}
    return table("model | times as fast", ((f"`{model}`", f"{gain:.2f}") for model, gain in gains.items()))


def precision() -> str:
    rows = [(f"`{r['model']}`", r["side"], f"{r['bfloat16_over_float32']:.2f}") for r in results["precision"]["trainings"]]
    return table("model | side, pixels | bfloat16 / float32, images a second", rows)


def pipeline() -> str:
    rows = []
    for name, what in (("fast", "flip, translation"), ("classic-sgd", "affine, perspective, colour")):
        speeds = (f"{median(speeds):,.0f}" for speeds in results["pipeline"][name]["images_per_second"].values())
        rows.append((f"`{name}` ({what})", *speeds, f"{results['pipeline'][name]['over_fastai']:.1f}"))
    return table("augmentation of | ours | stock fastai, files | torchvision, files | ours / fastai", rows)


def serving() -> str:
    found = results["serving"]
    ways = (
        ("one picture, `Classifier.predict`", "classifier_predict"),
        ("one picture, `/v1/predict`", "v1_predict"),
        ("one picture, Gradio's endpoint", "gradio_call"),
    )
    rows = [(what, *(f"{found[key][f'p{p}_ms']:.1f} ms" for p in (50, 95, 99))) for what, key in ways]
    for crowd in (*found["concurrent"], found["soak"]):
        what = f"{crowd['requests']:,} requests by {crowd['clients']} clients, {crowd['lost']} lost, {crowd['wrong']} wrong"
        rows.append((what, *(f"{crowd[f'p{p}_ms']:.0f} ms" for p in (50, 95, 99))))
    return table("what | half within | 95 % within | 99 % within", rows)


def together() -> str:
    rows = [
        (f"`{model}`", f"{results['together'][model]['mb']:.1f} MB", f"{results['together'][model]['share']:.1%}")
        for model in ("small", "base", "large")
    ]
    return table("model | message | of forward and backward", rows)


def fitting() -> str:
    kinds = results["fitting"]["validation"]
    framed = [kind["ways"] for name, kind in kinds.items() if name.startswith("framed")]
    ways = (("half", "half of each"), ("crop", "the centred square"), ("squash", "the whole picture, pressed"))
    return table(
        "photos made square by | right, mean of three kinds of framing",
        ((words, f"{mean(kind[f'{way} bicubic']['accuracy'] for kind in framed):.1%}") for way, words in ways),
    )


def choice() -> str:
    rows = []
    for name, words in (
        ("cpu-sgd", "SGD, `base`; formerly `cpu`"),
        ("cpu-muon", "Muon at 0.2 of the learning rate, `base`"),
        ("cpu-muon-cutout", "that with a cutout of 8 pixels"),
        ("cpu-float32", "that with `deep`"),
        ("cpu", "that in bfloat16, growing over 70 %"),
        ("slim", "that with a narrower network"),
    ):
        run = results[name]
        test = f"{run['test_accuracy']:.2%}, {run['test_accuracy_tta']:.2%}"
        rows.append((f"`{name}`", words, f"{run['valid_accuracy']:.2%}", f"{run['valid_loss']:.3f}", test))
    return table("run | recipe | validation accuracy | loss | test accuracy, with TTA", rows)


def tampering() -> str:
    rows = []
    for what, words in (
        ("flips", "one byte of any file changed"),
        ("cuts", "a file cut short"),
        ("resealed flips", "one byte changed, and the manifest made to fit"),
    ):
        counts = results["tamper"][what].values()
        figures = [sum(file.get(key, 0) for file in counts) for key in ("refused", "without effect", "with effect")]
        rows.append((words, *(f"{figure:,}" for figure in (sum(figures), *figures))))
    return table("exports with | tried | refused | without effect | with effect", rows)


def kills() -> str:
    trainings = results["resume"]["trainings"]
    rows = [(name, each["kills"], each["in a save"], len(each["different"])) for name, each in trainings.items()]
    return table("training | SIGKILLs | of them inside a save | differences after resuming", rows)


def pictures() -> str:
    rows = []
    for name, kind in results["fuzz-images"]["structured"]["kinds"].items():
        seconds = (f"{kind.get(key, 0):.2f} s" for key in ("seconds_read", "seconds_refused"))
        rows.append((name, kind["read"], kind["refused"], *seconds, f"{kind['memory_mb']:.0f} MB"))
    return table("built with many or large | read | refused | slowest read | slowest refused | most memory", rows)


TABLES = {
    make.__name__: make
    for make in (recipes, ablation, throughput, allocator, compiled, precision, pipeline, serving, together, fitting, choice)
} | {"tampering": tampering, "kills": kills, "pictures": pictures}


def quoted(text: str) -> str:
    """A page with the figures of results/ in their places. Raises KeyError for what is not there."""

    def renew(match: re.Match) -> str:
        name = match[1]
        new = name.format_map(results) if "{" in name else TABLES[name]()
        spaced = re.sub(r"(?<=\d)%", " %", new)
        spaced = f"\n{spaced}\n" if name in TABLES else spaced  # a table needs empty lines around it
        return f"<!-- results: {name} -->{spaced}<!-- end -->"

    return QUOTE.sub(renew, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page holds other figures")
    check, stale = parser.parse_args().check, 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        if (new := quoted(text)) != text:
            stale += 1
            print(f"{page}: {'its figures are not those of results/' if check else 'figures renewed'}")
            if not check:
                (ROOT / page).write_text(new, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
