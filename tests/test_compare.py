"""Runs held against one another: the statistics against independent computations, the words, and the page."""

import csv
import html
import itertools
import json
import math
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
from helpers.commands import ROOT, call, call_here
from helpers.web import assert_opens_by_itself
from scipy import stats
from sklearn.metrics import confusion_matrix, recall_score

from cifar_fastai import figures
from cifar_fastai.cli import main
from cifar_fastai.compare import holm, mcnemar, open_runs

CLASSES = ["ant", "bee", "cat"]
LABELS = np.arange(300) % 3


def write_run(folder, wrong=(), *, valid=0.9, tta=0.9, seed=1, fingerprint="f", keep_predictions=True, **recipe):
    """A run folder with the files that a comparison reads. wrong: the test images that were taken for the next class."""
    processes = recipe.pop("processes", 1)
    predicted = LABELS.copy()
    predicted[list(wrong)] = (LABELS[list(wrong)] + 1) % 3
    recipe = {"name": "fast", "model": "base", "lr": 0.1, "valid_pct": 0.1, "label_smoothing": 0.0, **recipe}
    config = {"name": "r", "recipe": recipe, "data": "d", "seed": seed, "subset": None, "device": "cpu"}
    config |= {"versions": {"python": "3"}, "processes": processes}
    matrix, shares = confusion_matrix(LABELS, predicted), recall_score(LABELS, predicted, average=None)
    data = {"source": f"photos-{fingerprint}", "encoding": "PNG", "fingerprint": fingerprint, "n_train": 900, "n_valid": 100}
    data |= {"sha256": None, "n_files": 1300}
    metrics = {
        "valid_accuracy": valid, "valid_loss": 0.4, "test_accuracy": float((predicted == LABELS).mean()),
        "test_accuracy_tta": tta, "ece": 0.01, "temperature": 1.0, "n_params": 1000, "epochs_run": 2, "best_epoch": 1,
        "train_seconds": 60, "images_per_second": 500, "peak_memory_mb": 900, "classes": CLASSES, "test_loss": 0.5,
        "confusion_matrix": matrix.tolist(), "per_class_accuracy": dict(zip(CLASSES, shares.tolist(), strict=True)),
        "data": {**data, "n_test": len(LABELS)}, "device": "cpu", "hardware": "here", "seed": seed,
        "versions": {"python": "3"}, "git_commit": "0" * 40,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "history.csv").write_text(f"epoch,train_loss,valid_loss,accuracy\n1,1,0.4,{valid}\n2,1,0.5,0.5\n")
    if keep_predictions:
        with (folder / "predictions.csv").open("w", newline="") as file:
            rows = [(i, CLASSES[LABELS[i]], CLASSES[predicted[i]], 0.9) for i in range(len(LABELS))]
            csv.writer(file).writerows([("index", "label", "predicted", "confidence"), *rows])
    return folder


@pytest.fixture
def compare(tmp_path, capsys):
    """The command in this process: its exit code, what it printed with every gap made one blank, its errors and its page."""

    def run(*folders):
        page = tmp_path / "page.html"
        page.unlink(missing_ok=True)
        code = main(None, ["compare", *map(str, folders), "--out", str(page)])
        printed = capsys.readouterr()
        return code, " ".join(printed.out.split()), printed.err, page.read_text() if page.exists() else ""

    return run


# --- chance ------------------------------------------------------------------------------------------------------


def p_by_counting(only_first, only_second):
    """The share of all falls of n fair coins that are at least as uneven, in exact fractions."""
    n = only_first + only_second
    uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(only_first - only_second))
    return float(Fraction(uneven, 2**n))


@pytest.mark.parametrize(("only_first", "only_second"), [(12, 25), (25, 12), (0, 0), (0, 1), (7, 7), (0, 30), (301, 240)])
def test_mcnemar_by_counting(only_first, only_second):
    outcomes = [(True, False)] * only_first + [(False, True)] * only_second + [(True, True)] * 50 + [(False, False)] * 9
    first, second = np.random.default_rng(0).permutation(outcomes).T
    *counts, p = mcnemar(first, second)
    assert counts == [only_first, only_second]
    assert p == pytest.approx(p_by_counting(only_first, only_second), rel=1e-9)


def test_holm_by_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.03]) == [0.03] and holm([]) == []
    for ps in itertools.permutations([0.001, 0.02, 0.02, 0.5]):  # each p rejected at a level iff its corrected p is below
        for level in (0.0035, 0.03, 0.05, 0.9):
            rejected, left = set(), sorted(range(4), key=lambda i: ps[i])
            while left and ps[left[0]] * len(left) < level:
                rejected.add(left.pop(0))
            assert {i for i, p in enumerate(holm(list(ps))) if p < level} == rejected


def test_each_run_is_held_against_the_first_by_validation(tmp_path, compare):
    """`middle` is best on the test split, which decides nothing."""
    last = write_run(tmp_path / "last", range(28, 81), valid=0.7)
    middle = write_run(tmp_path / "middle", range(25, 52), valid=0.8)
    first = write_run(tmp_path / "first", range(40), valid=0.9)
    code, text, errors, page = compare(last, middle, first)
    assert (code, errors) == (0, "")
    assert re.findall(r"(first|middle|last) \d\d\.00% 0.4", text) == ["first", "middle", "last"]
    p_middle, p_last = p_by_counting(25, 12), p_by_counting(28, 41)
    assert round(p_middle, 3) == 0.047 and p_last > 2 * p_middle  # so Holm doubles the first and leaves the second
    for sentence in (
        "middle against first: 25 images that only middle gets right, 12 that only first does; p = 0.047, with Holm's "
        f"correction for 2 comparisons p = {2 * p_middle:.2g}: chance can explain it.",
        "last against first: 28 images that only last gets right, 41 that only first does; "
        f"p = {p_last:.2g}, with Holm's correction for 2 comparisons p = {p_last:.2g}: chance can explain it.",
    ):
        assert sentence in text and sentence in html.unescape(page)
    _, text, _, _ = compare(middle, first)
    assert "p = 0.047: better by more than chance." in text and "Holm" not in text
    _, text, _, _ = compare(first, write_run(tmp_path / "poor", range(200), valid=0.1))
    assert "0 images that only poor gets right, 160 that only first does; p < 0.0001: worse by more than chance." in text


def test_other_test_images_are_never_compared(tmp_path, compare):
    folders = [write_run(tmp_path / name, range(n), fingerprint=name[0]) for name, n in (("a1", 9), ("a2", 40), ("b1", 1))]
    _, text, _, page = compare(*folders)
    assert re.findall(r"(\w+) against (\w+):", text) == [("a2", "a1")]
    assert text.count("Figures on 300 test images of photos-") == 2
    assert text.count("stand apart: nothing is compared with them") == 2
    assert page.count("<img") == 2 and page.count("<h2>Classes of") == 1


def test_without_predictions_only_the_test_by_images_is_missing(tmp_path, compare):
    bare = write_run(tmp_path / "bare", range(9), valid=0.95, keep_predictions=False)
    kept = [write_run(tmp_path / name, range(n)) for name, n in (("one", 9), ("two", 40))]
    _, text, _, _ = compare(bare, *kept)
    assert "Without predictions.csv, therefore not compared image by image: bare." in text
    assert re.findall(r"(\w+) against (\w+):", text) == [("two", "one")]


# --- seeds -------------------------------------------------------------------------------------------------------


def test_seeds_are_grouped_and_held_against_one_another(tmp_path, compare):
    wrong = {"fast": [45, 66, 54], "slow": [30, 40]}  # fast is first by validation, and behind on the test split
    folders = [
        write_run(tmp_path / f"20260101-00000{place}-{name}-seed{seed}", range(n), seed=seed, lr=lr, valid=valid)
        for name, lr, valid in (("slow", 0.01, 0.8), ("fast", 0.1, 0.9))
        for place, (seed, n) in enumerate(enumerate(wrong[name], start=5))
    ]
    again = write_run(tmp_path / "20260101-000009-again", range(150), seed=5, lr=0.1, valid=0.5)  # fast's first seed
    single = write_run(tmp_path / "20260101-000000-single", range(3), lr=0.5, valid=0.99)
    code, text, _, page = compare(*folders, again, single)
    assert code == 0
    fast, slow = (1 - np.array(wrong[name]) / 300 for name in ("fast", "slow"))
    for name, values in (("fast", fast), ("slow", slow)):
        spread = f"{np.mean(values):.2%} ± {100 * np.std(values, ddof=1):.2f}"
        assert re.search(rf"{name} {len(values)} \d0\.00% ± 0\.00 {re.escape(spread)} 90\.00% ± 0\.00", text)
    assert "A seed run before, therefore not counted: again." in text

    a, b = slow.var(ddof=1) / 2, fast.var(ddof=1) / 3  # B. L. Welch, Biometrika 34, 1947
    degrees = (a + b) ** 2 / (a**2 / 1 + b**2 / 2)
    gap, error = slow.mean() - fast.mean(), math.sqrt(a + b)
    p, half = 2 * stats.t.sf(abs(gap) / error, degrees), stats.t.ppf(0.975, degrees) * error
    interval = f"95 % interval {100 * (gap - half):+.2f} to {100 * (gap + half):+.2f}"
    points = f"{100 * gap:+.2f} points of test accuracy ({interval})"
    sentence = f"slow against fast: {points}, by Welch's t-test p = {p:.2g}: chance can explain it."
    assert sentence in text and "Several seeds" in page
    assert "single against" not in text.split("Larger than chance?")[0]


def test_seeds_without_spread_and_runs_that_differ_in_more_than_the_seed(tmp_path, compare):
    pairs = [
        write_run(tmp_path / f"{name}-seed{seed}", range(n), seed=seed, lr=lr)
        for name, n, lr in (("a", 3, 0.1), ("b", 9, 0.2))
        for seed in (1, 2)
    ]
    _, text, _, _ = compare(*pairs)
    assert "b against a: no spread among the seeds to judge by." in text
    assert "Not all were validated on the same images" in text
    _, text, _, _ = compare(pairs[0], pairs[3])
    assert "Several seeds" not in text


# --- figures -----------------------------------------------------------------------------------------------------


def test_figures_classes_and_settings_of_a_real_run(digits_run, tmp_path, compare):
    """A real run against a copy that gets the class 3 wrong and was made with another learning rate."""
    other = shutil.copytree(digits_run.folder, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "*.png"))
    config, metrics = (json.loads((other / name).read_text()) for name in ("config.json", "metrics.json"))
    with (digits_run.folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels, before = ([row[column] for row in rows] for column in ("label", "predicted"))
    after = ["8" if label == "3" else guess for label, guess in zip(labels, before, strict=True)]
    with (other / "predictions.csv").open("w", newline="") as file:
        changed = [{**row, "predicted": guess} for row, guess in zip(rows, after, strict=True)]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(changed)
    matrix = confusion_matrix(labels, after, labels=metrics["classes"]).tolist()
    n_right = sum(a == b for a, b in zip(labels, after, strict=True))
    metrics |= {"confusion_matrix": matrix, "test_accuracy": n_right / len(rows), "valid_accuracy": 0.1}
    config["recipe"]["lr"] = 0.07
    (other / "config.json").write_text(json.dumps(config))
    (other / "metrics.json").write_text(json.dumps(metrics))

    code, text, errors, page = compare(other, digits_run.folder)
    assert (code, errors) == (0, "")
    low, high = stats.binomtest(n_right, len(rows)).proportion_ci(method="wilson")
    test = f"{n_right / len(rows):.2%} ({100 * low:.2f} to {100 * high:.2f})"
    assert f"other 10.00% {metrics['valid_loss']:.4f} {test}" in text
    n_lost = sum(a == b == "3" for a, b in zip(labels, before, strict=True))
    assert f"0 images that only other gets right, {n_lost} that only digits does; p < 0.0001: worse by more than" in text
    recalls = recall_score(labels, before, labels=metrics["classes"], average=None)
    cells = dict(re.findall(r"<tr><td>(\d)</td><td>([\d.]+%) \(", page))
    assert cells == {name: f"{recall:.1%}" for name, recall in zip(metrics["classes"], recalls, strict=True)}
    assert f"<td>{-100 * recalls[3]:+.1f}</td>" in page and page.count("<td>+0.0</td>") == 9
    settings = page.split("Where the configurations differ")[1]
    assert re.findall(r"<tr><td>(\w+)</td><td>(.*?)</td><td>(.*?)</td></tr>", settings) == [("lr", "0.1", "0.07")]


def test_more_processes_are_more_than_another_seed(tmp_path, compare):
    runs = [write_run(tmp_path / f"r-seed{seed}", range(seed), seed=seed, processes=n) for seed, n in ((1, 1), (2, 2))]
    code, text, _, page = compare(*runs)
    assert code == 0 and "Several seeds" not in text and "<td>processes</td>" in page


def test_folders_of_other_commands_are_left_out(tmp_path, compare):
    runs = [write_run(tmp_path / name, range(9)) for name in ("a", "b")]
    for name, file in (("20260101-find-lr-x", "lr_find.json"), ("tune-x", "study.journal")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    code, text, errors, _ = compare(*sorted(tmp_path.iterdir()))
    assert (code, errors) == (0, "") and len(runs) == 2
    assert "find-lr-x is a folder of find-lr's, not a run folder: left out" in text
    assert "tune-x is a folder of tune's" in text


def test_published_results_are_compared_as_far_as_they_go(tmp_path):
    folders = [ROOT / "results" / name for name in ("README.md", "classic-adam", "classic-sgd", "cpu", "fast")]
    done = call("-m", "cifar_fastai", "compare", *folders, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"^  ([\w-]+) +(\d\d\.\d\d)%  ", done.stdout, flags=re.M)
    assert [name for name, _ in shares] == ["cpu", "fast", "classic-sgd", "classic-adam"]
    assert "README.md is a file, not a run folder: left out" in done.stdout
    assert "Not calibrated" in done.stdout and done.stdout.endswith("page     comparison.html\n")
    page = (tmp_path / "comparison.html").read_text()
    assert "<td>start_size</td><td>24</td><td>-</td>" in page and "<td>size</td>" not in page  # 32 then, as now
    assert "not recorded by the version that made the run" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and len(page) < 1_000_000


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
    first = write_run(tmp_path / "x" / "20260101-000000-run")
    second = write_run(tmp_path / "y" / "20260102-000000-run", seed=2)
    third = write_run(tmp_path / "y" / "20260101-000000-run", seed=3)
    assert [run.label for run in open_runs([first, second])] == [first.name, second.name]
    assert [run.label for run in open_runs([first, third])] == [str(first), str(third)]


def test_curves_by_name():
    rows = [{"epoch": 1, "valid_loss": 2.0, "accuracy": 0.3}, {"epoch": 2, "valid_loss": 1.0, "accuracy": 0.6}]
    better = [{"epoch": 1, "valid_loss": 0.5, "accuracy": 0.8125}]
    figure = figures.curves([("a", rows), ("a", better), ("b", rows), *((f"more {i}", rows) for i in range(26))])
    losses, accuracies = figure.axes
    assert list(losses.lines[0].get_ydata()) == [2.0, 1.0] and list(accuracies.lines[1].get_ydata()) == [0.8125]
    kinds = [(line.get_color(), line.get_linestyle()) for line in losses.lines]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 28 and len(figure.legends[0].texts) == 28
    assert figure.get_suptitle() == "Highest validation accuracy: 81.2%, by a in epoch 1"


@pytest.mark.browser
def test_the_page_in_the_browser(browser, digits_run, tmp_path, compare):
    """Long names, a second set of test images, letters that HTML could take for its own."""
    folders = [write_run(tmp_path / name, range(9), lr=lr) for name, lr in (("long_name_" * 9, 1), ("<img src=x>&", 2))]
    code, *_, page = compare(digits_run.folder, *folders)
    assert code == 0 and "&lt;img src=x&gt;&amp;" in page and "<img src=x" not in page
    assert_opens_by_itself(browser, tmp_path / "page.html", n_pictures=2)


# --- what will not do --------------------------------------------------------------------------------------------


def edit(**changes):
    """A damage: these fields of metrics.json are replaced, or taken out where the value is None."""

    def damage(folder):
        metrics = json.loads((folder / "metrics.json").read_text()) | changes
        kept = {name: value for name, value in metrics.items() if value is not None}
        (folder / "metrics.json").write_text(json.dumps(kept))

    return damage


def replaced(name, content):
    return lambda folder: (folder / name).write_text(content)


def upside_down(name):
    def damage(folder):
        head, *lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([head, *reversed(lines)]))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "bad is no run folder: config.json is missing."),
        (lambda folder: (folder / "history.csv").unlink(), "bad is no finished run: history.csv is missing."),
        (replaced("metrics.json", "{"), "bad/metrics.json is damaged (Expecting"),
        (replaced("metrics.json", "[]"), "bad/metrics.json is damaged (no JSON object)."),
        (replaced("config.json", '{"seed": 1}'), "bad/config.json: name is missing"),
        (edit(valid_accuracy=None), "bad/metrics.json: valid_accuracy is missing"),
        (edit(valid_accuracy="high"), "bad/metrics.json: valid_accuracy must be a share from 0 to 1, not 'high'."),
        (edit(test_accuracy_tta=1.5), "bad/metrics.json: test_accuracy_tta must be a share from 0 to 1, not 1.5."),
        (edit(valid_loss=math.nan), "bad/metrics.json is damaged (NaN is no JSON)."),
        (edit(n_params=0), "bad/metrics.json: n_params must be a whole number from 1 to 10^15, not 0."),
        (edit(data={"source": "d", "encoding": "PNG"}), "bad/metrics.json: data.sha256 is missing."),
        (edit(data=[1]), "bad/metrics.json: data must hold fields, not a list."),
        (edit(confusion_matrix=[[1, 2], [3]]), "bad/metrics.json: confusion_matrix must have a row and a column"),
        (edit(classes=["ant", "cat", "bee"]), "bad/metrics.json is damaged: other classes than"),
        (replaced("history.csv", "epoch,valid_loss,accuracy\n1,high,0.5\n"), "bad/history.csv is damaged (ValueError"),
        (
            replaced("history.csv", "epoch,valid_loss,accuracy\n1,nan,0.5\n"),
            "bad/history.csv is damaged (a figure is not finite).",
        ),
        (replaced("history.csv", "epoch,accuracy\n1,0.5\n"), "bad/history.csv is damaged (KeyError: 'valid_loss')."),
        (replaced("history.csv", "epoch,valid_loss,accuracy\n"), "bad/history.csv is damaged (no epoch in it)."),
        (replaced("predictions.csv", "index,label,predicted\n0,ant,ant\n"), "bad/predictions.csv does not fit the run's"),
        (
            edit(test_accuracy=0.5),
            "bad/predictions.csv does not fit the run's metrics.json: 300 of 300 images right, against 50.00%",
        ),
        (upside_down("predictions.csv"), "bad/predictions.csv does not fit the run's"),
        (
            replaced("predictions.csv", "index,label,predicted\n" + "".join(f"{i},bee,bee\n" for i in range(300))),
            "bad/predictions.csv is damaged: other labels than",
        ),
    ],
)
def test_damaged_runs_are_named(tmp_path, compare, damage, words):
    good, bad = write_run(tmp_path / "good", valid=0.95), write_run(tmp_path / "bad")
    damage(bad)
    code, _, errors, page = compare(good, bad)
    assert code == 2 and words in errors and errors.count("\n") == 1 and errors.startswith("error: ")
    assert page == ""


def test_wrong_usage(tmp_path, compare):
    run = write_run(tmp_path / "run")
    for folders, words in (
        ([run], "A comparison takes at least two run folders, not 1."),
        ([run, run / "metrics.json"], "A comparison takes at least two run folders, not 1."),
        ([run, tmp_path / "nowhere"], f"There is no run folder {tmp_path / 'nowhere'}."),
        ([run, tmp_path / "run" / ".." / "run"], "is given twice."),
    ):
        code, _, errors, _ = compare(*folders)
        assert code == 2 and words in errors and errors.count("\n") == 1
    write_run(tmp_path / "second")
    done = call_here("compare", "run", "second", "--out", "none/page.html", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: none/page.html cannot be written: No such file or directory. Choose another --out.\n"
