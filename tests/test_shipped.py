"""What comes with the repository: the export, the results, and what the README says of them."""

import dataclasses
import json
import os
import re
from statistics import mean

import numpy as np
import pytest
from conftest import ROOT, call

from cifar_fastai import Classifier
from cifar_fastai.artifacts import load_export
from cifar_fastai.cache import load_data
from cifar_fastai.recipes import get_recipe

EXPORT = ROOT / "exports" / "cifar10"
RUNS = {path.parent.name: json.loads(path.read_text()) for path in (ROOT / "results").glob("*/metrics.json")}
SHIPPED = RUNS["cpu-float32"]


def test_the_export_loads_and_is_small():
    export = load_export(EXPORT)
    assert len(export.classes) == 10 and not (EXPORT / "export.pkl").exists()
    listed = json.loads((EXPORT / "MANIFEST.json").read_text())["files"]
    assert set(listed) == {path.name for path in EXPORT.iterdir()} - {"MANIFEST.json"}
    assert sum(path.stat().st_size for path in EXPORT.iterdir()) < 30_000_000


def test_the_exports_figures_are_those_of_its_run():
    config = json.loads((EXPORT / "config.json").read_text())
    assert {key: SHIPPED[key] for key in config["test"]} == config["test"]
    assert config["training"]["git_commit"] == SHIPPED["git_commit"]
    figures = (f"{SHIPPED[key] * 100:.2f} %" for key in ("test_accuracy", "test_accuracy_tta"))
    words = "It gets {} of the test images right, {} with TTA.".format(*figures)
    assert words in " ".join((ROOT / "README.md").read_text().split())


def test_what_ships_has_the_lowest_validation_loss():
    on_the_same_images = [run for run in RUNS.values() if run["data"]["fingerprint"] == SHIPPED["data"]["fingerprint"]]
    assert SHIPPED["valid_loss"] == min(run["valid_loss"] for run in on_the_same_images)


@pytest.mark.parametrize("name", ["cpu", "slim", "short", "fast", "classic-sgd", "classic-adam"])
def test_the_readme_and_the_recipe_quote_their_runs(name):
    runs = [run for folder, run in RUNS.items() if folder.split("-seed")[0] == name]  # further seeds in folders of their own
    figures = [f"{mean(run[key] for run in runs) * 100:.2f} %" for key in ("test_accuracy", "test_accuracy_tta")]
    readme = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    recipes = call("train.py", "--recipe", "help", cwd=ROOT).stdout
    words = " on CIFAR-10's test split, ".join(figures)
    assert f"{words} with TTA (JPEG copy, {runs[0]['epochs_run']} epochs, n={len(runs)}, results/{name})" in recipes
    minutes = f"{mean(run['train_seconds'] for run in runs) / 60:.0f} min"
    cells = [runs[0]["epochs_run"], *figures, minutes, "JPEG copy", len(runs)]
    assert readme.endswith("| " + " | ".join(map(str, cells)) + " |")
    assert all((run["epochs_run"], run["data"]["encoding"]) == (runs[0]["epochs_run"], "JPEG") for run in runs)


@pytest.mark.parametrize("name", ["guide-crops", "guide-numbers"])
def test_the_guide_quotes_its_run(name):
    run = RUNS[name]
    n, (low, high) = sum(row["support"] for row in run["per_class"].values()), run["test_accuracy_interval"]
    guide = " ".join((ROOT / "docs" / "your-own-images.md").read_text().split()).replace(" %", "%")
    assert f"[figures](../results/{name})" in guide and f"seed {run['seed']}, " in guide
    assert f"{run['test_accuracy']:.1%} of the {n} " in guide and f"95% interval {low:.1%} to {high:.1%}" in guide


def test_the_readme_and_the_recipe_quote_the_digits():
    runs, readme = [run for run in RUNS.values() if run["data"]["source"] == "digits"], (ROOT / "README.md").read_text()
    accuracy = mean(run["test_accuracy"] for run in runs)
    assert sorted(run["seed"] for run in runs) == [42, 43, 44, 45, 46] and accuracy >= 0.99
    assert all(run["train_seconds"] < 600 and "dirty" not in run["git_commit"] for run in runs)
    assert f"[{accuracy * 100:.1f} % right](results/digits), the mean of five seeds" in " ".join(readme.split())
    assert get_recipe("digits").measured.startswith(f"{accuracy * 100:.2f} % on the held-out fifth of scikit-learn's digits")
    config = json.loads((ROOT / "results" / "digits" / "config.json").read_text())
    assert f"&& {config['command']}\n" in readme and config["data"] == "digits", "the first command, without a network"
    own = {field: config["recipe"][field] for field in config["recipe"] if field != "measured"}
    now = dataclasses.asdict(get_recipe("digits"))
    assert {field: list(now[field]) if isinstance(now[field], tuple) else now[field] for field in own} == own


def test_the_page_on_scaling_quotes_the_messages():
    result = json.loads((ROOT / "results" / "together.json").read_text())
    page = " ".join((ROOT / "docs" / "scaling.md").read_text().split())
    assert f"the short message takes {result['short_ms']:.2f} ms" in page
    for model in ("small", "base", "large"):
        share, mb = f"{result[model]['share'] * 100:.1f} %", f"({result[model]['mb']:.1f} MB"
        assert re.search(rf"{share}[^%]* for `{model}` {re.escape(mb)}", page)


def test_the_readme_quotes_what_compiling_brings():
    result = json.loads((ROOT / "results" / "compiled.json").read_text())
    small, base, large = (f"{result[model]['plain_over_compiled']:.2f}" for model in ("small", "base", "large"))
    words = f"a step of `small` is {small} times as fast, one of `base` {base} and one of `large` {large} times"
    assert words in " ".join((ROOT / "README.md").read_text().split())


def test_the_readme_quotes_what_keeping_memory_brings():
    cases = json.loads((ROOT / "results" / "allocator.json").read_text())["cases"]
    small, base, large_batches, deep_24, deep = (f"{case['plain_over_kept']:.2f} times" for case in cases)
    words = f"a step of `small` is {small} as fast for it, one of `base` {base}, in batches of 1024 images {large_batches}, "
    words += f"and one of `deep` {deep}, on images of 24 pixels {deep_24}"
    assert words in " ".join((ROOT / "README.md").read_text().split())


def test_the_readme_quotes_the_ablation():
    runs = json.loads((ROOT / "results" / "ablation.json").read_text())["runs"]
    base, readme = {run["seed"]: run["accuracy_tta"] for run in runs["as it is"]}, (ROOT / "README.md").read_text()
    for name, each in runs.items():
        gains = [(run["accuracy_tta"] - base[run["seed"]]) * 100 for run in each]
        against = "" if name == "as it is" else f"{np.mean(gains):+.2f}"
        by_seed = against and ", ".join(f"{gain:+.2f}" for gain in gains)
        accuracy = np.mean([run["accuracy_tta"] for run in each]) * 100
        assert f"| {name} | {accuracy:.2f} % | {against} | {by_seed} |" in readme


def test_the_readme_quotes_what_bfloat16_gains():
    rows = json.loads((ROOT / "results" / "precision.json").read_text())["trainings"]
    gains = {(row["model"], row["side"]): f"{row['bfloat16_over_float32']:.2f} times" for row in rows}
    base, small, full = gains["base", 32], gains["deep", 24], gains["deep", 32]
    words = f"{base} as fast with it for `base` and {full} for `deep`, on images of 24 pixels {small} "
    assert words in " ".join((ROOT / "README.md").read_text().split())


def test_the_resume_proof_is_quoted():
    trainings = json.loads((ROOT / "results" / "resume.json").read_text())["trainings"].values()
    kills, in_a_save = (sum(each[key] for each in trainings) for key in ("kills", "in a save"))
    text = " ".join((ROOT / "SECURITY.md").read_text().split())
    assert f"{kills} SIGKILLs" in text and f"{in_a_save} of them inside a save" in text
    assert not any(each["different"] for each in trainings)


def test_the_readme_quotes_the_serving():
    result = json.loads((ROOT / "results" / "serving.json").read_text())
    crowd, soak, batch = result["concurrent"][-1], result["soak"], result["v1_predict_batch"]
    alone, api, gradio = (result[way]["p50_ms"] for way in ("classifier_predict", "v1_predict", "gradio_call"))
    words = [
        f"the page is ready after {result['page_ready_seconds']:.1f} s",
        f"one picture takes {alone:.1f} ms in `Classifier.predict`, {api:.1f} ms through `/v1/predict`",
        f"and {gradio:.0f} ms through Gradio's endpoint",
        f"{batch['files']:,} files in one request are answered at {batch['images_per_second']:.0f} a second",
        f"{crowd['clients']} clients at once, each with pictures of its own, got all {crowd['requests']:,} answers",
        f"none lost or swapped, half of them within {crowd['p50_ms']:.0f} ms, 95 % within {crowd['p95_ms']:.0f} ms",
        f"after {soak['requests']:,} requests the server's memory was what it had been",
    ]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert all(each in readme for each in words)
    assert not any(each[key] for each in (crowd, soak) for key in ("lost", "wrong")) and not batch["wrong"]
    assert abs(soak["resident_mb_after"] - soak["resident_mb_before"]) < 5


def test_the_results_quote_the_fitting():
    kinds = json.loads((ROOT / "results" / "fitting.json").read_text())["validation"]
    framed = [kind["ways"] for name, kind in kinds.items() if name.startswith("framed")]
    means = (np.mean([ways[f"{way} bicubic"]["accuracy"] for ways in framed]) for way in ("half", "crop", "squash"))
    half, crop, squash = (f"{mean * 100:.1f} %" for mean in means)
    words = f"that gets {half} right in the mean; the centred square {crop}, the whole picture pressed {squash}"
    assert words in " ".join((ROOT / "results" / "README.md").read_text().split())


@pytest.mark.parametrize("model", ["small", "base", "deep", "large"])
def test_the_readme_quotes_the_throughput(model):
    result = json.loads((ROOT / "results" / f"throughput-{model}.json").read_text())
    speeds = [f"{np.median(speeds):.0f}" for speeds in result["images_per_second"].values()]
    ratios = [
        f"{result['over_by_hand']:.2f}",
        f"{result['over_fastai']:.2f}",
        f"{result['share_of_convolutions'] * 100:.0f} %",
    ]
    rows = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{model}` |")]
    assert [cell.strip() for cell in rows[0][2:8]] == [*speeds, *ratios]


def test_the_readme_quotes_the_pipeline():
    result, readme = json.loads((ROOT / "results" / "pipeline.json").read_text()), (ROOT / "README.md").read_text()
    for name in ("fast", "classic-sgd"):
        figures = result[name]
        speeds = [f"{np.median(speeds):,.0f}" for speeds in figures["images_per_second"].values()]
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` ("))
        assert [cell.strip() for cell in row.split("|")[2:6]] == [*speeds, f"{figures['over_fastai']:.1f}"]
    assert f"gives {result['fast']['images_per_second_on_one_core']:,.0f} images a second" in readme
    assert f"takes {result['share_of_fit_base'] * 100:.1f} % of the time" in readme
    assert f"it takes {np.median(result['seconds_to_first_batch']):.2f} s" in readme


@pytest.mark.real_data
@pytest.mark.skipif(not os.environ.get("CIFAR10_DATA"), reason="CIFAR10_DATA is not set")
def test_the_export_reproduces_its_score():
    data = load_data(os.environ["CIFAR10_DATA"])
    if data.fingerprint != SHIPPED["data"]["fingerprint"]:
        pytest.fail("CIFAR10_DATA holds other pixels than the export was measured on")
    classifier, predicted = Classifier(EXPORT), []
    for batch in np.array_split(data.images[data.n_train :], 20):
        predicted += [next(iter(answer)) for answer in classifier.predict_batch(batch)]
    truth = [data.classes[label] for label in data.labels[data.n_train :]]
    accuracy = np.mean([a == b for a, b in zip(predicted, truth, strict=True)])
    assert accuracy == pytest.approx(SHIPPED["test_accuracy"], abs=0.0005)
