"""Finished runs side by side: their figures, and whether the differences between them are larger than chance.

The test split is used to judge runs, never to order or choose them: runs are sorted by validation accuracy, and the first
is what the others are held against. (Not by validation loss, which depends on how sure a recipe makes its network.)
"""

import csv
import io
import json
import math
import re
import shlex
import statistics
import textwrap
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, ttest_ind

from cifar_fastai import figures
from cifar_fastai.errors import UserError, first_line
from cifar_fastai.manifest import MB, read_limited
from cifar_fastai.metrics import per_class, wilson_interval
from cifar_fastai.pretrained import FROM_SCRATCH
from cifar_fastai.recipes import DESCRIPTION, Recipe
from cifar_fastai.report import escape, page, picture, table
from cifar_fastai.runfolder import read_finished
from cifar_fastai.schema import HIGHEST_LOSS
from cifar_fastai.terminal import printable, say

ALPHA = 0.05  # a difference is called larger than chance if its p, corrected for the number of comparisons, lies below
CIRCUMSTANCES = ("data", "subset", "seed", "device", "processes", "initial_weights")  # of config.json, beside the recipe
OTHERS = {"lr_find.json": "find-lr", "trials.csv": "tune", "study.journal": "tune"}  # by which folders of theirs are known
NO_VALUE = "-"
CSV_LIMIT = 100 * MB


def compare(folders: list[Path], out: Path) -> Path:
    """Print a comparison of finished runs and write it, with curves and details, as an HTML page; returns `out`.

    Raises UserError for fewer than two runs, and for one whose files are missing or damaged.
    """
    runs = open_runs(folders)
    summary, details = sections(runs)
    try:  # before anything is printed, since a reader may leave early
        out.write_text(_html(runs, summary, details), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}. Choose another --out.") from None
    print("\n\n".join(as_text(_printable(section)) for section in summary), end="\n\n")
    say("page", out)
    return out


# --- reading runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a finished run's folder says."""

    folder: Path
    label: str  # the folder's name without the time, or as much of the path as tells the runs apart
    config: dict
    metrics: dict
    history: list[dict]  # an epoch a row: epoch, valid_loss, accuracy
    predictions: list[tuple[str, str]] | None  # label and predicted class of each test image; None where not kept

    @property
    def test_data(self) -> tuple[str, int]:
        """Equal for runs that were tested on the same images."""
        return self.metrics["data"]["fingerprint"], self.metrics["data"]["n_test"]

    @property
    def right(self) -> np.ndarray:
        """bool (n_test,), whether each test image was recognised. For a run whose predictions are there."""
        return np.array([label == predicted for label, predicted in self.predictions])

    @property
    def hyperparameters(self) -> dict:
        return {name: value for name, value in self.config["recipe"].items() if name not in DESCRIPTION}

    @property
    def configuration(self) -> str:
        """Equal for runs that differ in nothing but the seed."""
        where = {name: self.config.get(name) for name in ("subset", "device")}
        where |= {"processes": self.config.get("processes", 1), "weights": self.config.get("initial_weights", FROM_SCRATCH)}
        return json.dumps([self.hyperparameters, where, self.test_data], sort_keys=True)


def open_runs(folders: list[Path]) -> list[Run]:
    """The runs, highest validation accuracy first. Passed over, and said so, are files, and what find-lr and tune left."""
    others = {path: "file" for path in folders if path.is_file()}
    others |= {
        path: f"folder of {command}'s" for path in folders for file, command in OTHERS.items() if (path / file).exists()
    }
    for path, kind in others.items():
        say("note", f"{path} is a {kind}, not a run folder: left out")
    folders = [path for path in folders if path not in others]
    for place, path in enumerate(folders):
        if not path.is_dir():
            raise UserError(f"There is no run folder {path}.")
        if path.resolve() in [other.resolve() for other in folders[:place]]:
            raise UserError(f"{path} is given twice.")
    if len(folders) < 2:
        raise UserError(f"A comparison takes at least two run folders, not {len(folders)}.")
    read = [(path, *read_finished(path, whole=False)) for path in folders]
    names = [path.resolve().name for path in folders]
    without_time = [re.sub(r"^\d{8}-\d{6}-", "", name) for name in names]
    labels = _distinct(without_time, names, [str(path) for path in folders])
    runs = [
        Run(path, label, config, metrics, _history(path), _predictions(path, metrics))
        for label, (path, config, metrics) in zip(labels, read, strict=True)
    ]
    return sorted(runs, key=lambda run: -run.metrics["valid_accuracy"])


def _distinct(*kinds: list[str]) -> list[str]:
    """The first kind of names by which all can be told apart."""
    return next(names for names in kinds if len(set(names)) == len(names))


def _history(folder: Path) -> list[dict]:
    rows = _csv(folder / "history.csv", {"epoch": int, "valid_loss": float, "accuracy": float})
    if rows is None:
        raise UserError(f"{folder} is no finished run: history.csv is missing.")
    if not rows or not all(math.isfinite(value) for row in rows for value in row.values()):
        raise UserError(f"{folder}/history.csv is damaged ({'a figure is not finite' if rows else 'no epoch in it'}).")
    sound = (0 <= row["valid_loss"] <= HIGHEST_LOSS and 0 <= row["accuracy"] <= 1 for row in rows)
    if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)) or not all(sound):
        raise UserError(f"{folder}/history.csv is damaged (epochs, losses or accuracies that cannot be).")
    return rows


def _predictions(folder: Path, metrics: dict) -> list[tuple[str, str]] | None:
    path = folder / "predictions.csv"
    rows = _csv(path, {"index": int, "label": str, "predicted": str})
    if rows is None:
        return None
    pairs, n = [(row["label"], row["predicted"]) for row in rows], metrics["data"]["n_test"]
    n_right = sum(label == predicted for label, predicted in pairs)
    if [row["index"] for row in rows] != list(range(n)) or n_right != round(metrics["test_accuracy"] * n):
        raise UserError(
            f"{path} does not fit the run's metrics.json: {n_right:,} of {len(pairs):,} images right, against "
            f"{metrics['test_accuracy']:.2%} of {n:,}. Make both anew: `python -m cifar_fastai evaluate "
            f"{shlex.quote(str(folder))}`."
        )
    return pairs


def _csv(path: Path, columns: dict) -> list[dict] | None:
    """The named columns, converted, of each row; None if there is no such file."""
    try:
        data = read_limited(path, CSV_LIMIT)
        if len(data) > CSV_LIMIT:
            raise ValueError("it is far too long")
        rows = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))
        return [{name: kind(row[name]) for name, kind in columns.items()} for row in rows]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {first_line(error)}).") from None


# --- chance ------------------------------------------------------------------------------------------------------


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """How many images only the first got right, how many only the second, and p, how likely chance sets them so far apart.

    first, second: bool (N,), whether each of the same N images was recognised. The test is two-sided, and exact: these
    images are coins that fall either way. Q. McNemar, Psychometrika 12, 1947.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, n).pvalue) if n else 1.0


def holm(ps: list[float]) -> list[float]:
    """Each p corrected for there being several: S. Holm, Scandinavian Journal of Statistics 6, 1979."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = highest
    return corrected


@dataclass(frozen=True)
class Seeds:
    """Two runs or more that differ in nothing but the seed."""

    label: str
    runs: list[Run]
    duplicates: list[Run]  # runs of a seed that is there already: no second draw, so they count for nothing

    def values(self, figure: str) -> list[float]:
        return [run.metrics[figure] for run in self.runs]

    def mean(self, figure: str) -> float:
        return statistics.mean(self.values(figure))

    def std(self, figure: str) -> float:
        return statistics.stdev(self.values(figure))


def seed_groups(runs: list[Run]) -> list[Seeds]:
    """The groups of runs with different seeds, highest mean validation accuracy first."""
    alike = {}
    for run in sorted(runs, key=lambda run: run.folder.resolve().name):  # by time, where the names are train.py's
        alike.setdefault(run.configuration, []).append(run)
    groups = []
    for members in alike.values():
        by_seed = {run.config["seed"]: run for run in reversed(members)}
        if len(by_seed) > 1:
            duplicates = [run for run in members if by_seed[run.config["seed"]] is not run]
            label = re.sub(r"-seed\d+$", "", members[0].label)
            groups.append(Seeds(label, list(reversed(by_seed.values())), duplicates))
    labels = _distinct([group.label for group in groups], [group.runs[0].label for group in groups])
    groups = [replace(group, label=label) for group, label in zip(groups, labels, strict=True)]
    return sorted(groups, key=lambda group: -group.mean("valid_accuracy"))


# --- what is shown -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A heading, a table and sentences about it. Either may be missing."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def sections(runs: list[Run]) -> tuple[list[Section], list[Section]]:
    """The summary, which the terminal shows too, and the details. runs: from `open_runs`."""
    summary, details = [], []
    sets = _by_test_data(runs)
    for same in sets:
        data = same[0].metrics["data"]
        images = f"{data['n_test']:,} test images of {data['source']} ({data['encoding']})"
        summary += [_figures(same, images, n_others=len(runs) - len(same)), *_spread(same)]
        if len(same) > 1:
            summary.append(_chance(same))
            details.append(_classes(same, images))
    return [*summary, _costs(runs)], [*details, _differences(runs)]


def _by_test_data(runs: list[Run]) -> list[list[Run]]:
    sets = {}
    for run in runs:
        sets.setdefault(run.test_data, []).append(run)
    for first, *others in sets.values():
        for run in others:
            _check_same_images(first, run)
    return list(sets.values())


def _check_same_images(first: Run, other: Run) -> None:
    if first.metrics["classes"] != other.metrics["classes"]:
        raise UserError(f"{other.folder}/metrics.json is damaged: other classes than {first.folder}'s for the same data.")
    if first.predictions and other.predictions and [a for a, _ in first.predictions] != [b for b, _ in other.predictions]:
        raise UserError(f"{other.folder}/predictions.csv is damaged: other labels than {first.folder}'s for the same data.")


def _figures(runs: list[Run], images: str, n_others: int) -> Section:
    heads = ("run", "validation accuracy", "validation loss", "test accuracy (95 % interval)", "with TTA", "ECE")
    rows = []
    for run in runs:
        metrics = run.metrics
        test = _with_interval(metrics["test_accuracy"], metrics["data"]["n_test"], decimals=2)
        rest = (f"{metrics['test_accuracy_tta']:.2%}", f"{metrics['ece']:.4f}")
        rows.append((run.label, f"{metrics['valid_accuracy']:.2%}", f"{metrics['valid_loss']:.4f}", test, *rest))
    notes = ["Sorted by validation accuracy: the test split judges the runs and chooses none of them."]
    if len({_validation_images(run) for run in runs}) > 1:
        notes.append("Not all were validated on the same images (seed, share or subset differ): small leads mean little.")
    if raw := [run.label for run in runs if "temperature" not in run.metrics]:
        notes.append(f"Not calibrated, so that loss and ECE cannot be held against the others': {', '.join(raw)}.")
    if n_others:
        notes.append("Runs tested on other images (other data, or another size) stand apart: nothing is compared with them.")
    return Section(f"Figures on {images}", heads, rows, notes)


def _validation_images(run: Run) -> str:
    """Equal for runs on the same data that held out the same images."""
    return json.dumps([run.config["seed"], run.config["recipe"].get("valid_pct"), run.config.get("subset")])


def _with_interval(share: float, n: int, decimals: int) -> str:
    low, high = wilson_interval(share, n)
    return f"{share:.{decimals}%} ({100 * low:.{decimals}f} to {100 * high:.{decimals}f})"


def _spread(runs: list[Run]) -> list[Section]:
    """Mean and standard deviation over seeds, and each group against the first; nothing where no group is."""
    groups = seed_groups(runs)
    if not groups:
        return []
    heads = ("several seeds", "n", "validation accuracy", "test accuracy", "with TTA")
    rows = []
    for group in groups:
        columns = ("valid_accuracy", "test_accuracy", "test_accuracy_tta")
        figures_ = (f"{group.mean(key):.2%} ± {100 * group.std(key):.2f}" for key in columns)
        rows.append((group.label, str(len(group.runs)), *figures_))
    notes = ["Mean ± standard deviation over runs that differ in nothing but the seed."]
    if duplicates := [run.label for group in groups for run in group.duplicates]:
        notes.append(f"A seed run before, therefore not counted: {', '.join(duplicates)}.")
    return [Section("Several seeds", heads, rows, [*notes, *_welch_sentences(groups)])]


def _welch_sentences(groups: list[Seeds]) -> list[str]:
    first, *others = groups
    judged = [group for group in others if first.std("test_accuracy") or group.std("test_accuracy")]
    results = [ttest_ind(group.values("test_accuracy"), first.values("test_accuracy"), equal_var=False) for group in judged]
    ps = [float(result.pvalue) for result in results]
    sentences = []
    for group, result, p, corrected in zip(judged, results, ps, holm(ps), strict=True):
        gain = 100 * (group.mean("test_accuracy") - first.mean("test_accuracy"))
        low, high = (100 * float(bound) for bound in result.confidence_interval())
        sentences.append(
            f"{group.label} against {first.label}: {gain:+.2f} points of test accuracy (95 % interval {low:+.2f} to "
            f"{high:+.2f}), by Welch's t-test {_verdict(gain, p, corrected, len(ps))}."
        )
    silent = [group.label for group in others if group not in judged]
    return sentences + [f"{label} against {first.label}: no spread among the seeds to judge by." for label in silent]


def _chance(runs: list[Run]) -> Section:
    """Each run against the first, image by image, as far as their predictions are there."""
    first, *others = [run for run in runs if run.predictions is not None] or [None]
    results = [mcnemar(first.right, run.right) for run in others]
    ps = [p for _, _, p in results]
    notes = [
        f"{run.label} against {first.label}: {only_run:,} images that only {run.label} gets right, {only_first:,} that only "
        f"{first.label} does; {_verdict(only_run - only_first, p, corrected, len(ps))}."
        for run, (only_first, only_run, p), corrected in zip(others, results, holm(ps), strict=True)
    ]
    if notes:
        notes.append(
            "McNemar's exact test on the same test images, without TTA. It judges these trained networks; whether a recipe "
            "is better than another takes several seeds of both."
        )
    if missing := [run.label for run in runs if run.predictions is None]:
        notes.append(f"Without predictions.csv, therefore not compared image by image: {', '.join(missing)}.")
    return Section("Larger than chance?", (), [], notes)


def _verdict(gain: float, p: float, corrected: float, n: int) -> str:
    """p in words. gain: above zero for better; corrected: p corrected for n comparisons."""
    correction = f", with Holm's correction for {n} comparisons {_p(corrected)}" if n > 1 else ""
    verdict = f"{'better' if gain > 0 else 'worse'} by more than chance" if corrected < ALPHA else "chance can explain it"
    return f"{_p(p)}{correction}: {verdict}"


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.0001 else "p < 0.0001"


def _costs(runs: list[Run]) -> Section:
    heads = ("run", "model", "recipe", "epochs (best)", "parameters", "training", "images/s", "peak memory")
    rows = []
    for run in runs:
        metrics, recipe, memory = run.metrics, run.config["recipe"], run.metrics.get("peak_memory_mb")
        epochs = f"{metrics['epochs_run']} ({metrics['best_epoch']})"
        time = f"{metrics['train_seconds']:,.0f} s"
        memory = f"{memory:,.0f} MB" if memory is not None else NO_VALUE
        costs = (f"{metrics['n_params']:,}", time, f"{metrics['images_per_second']:,.0f}", memory)
        rows.append((run.label, recipe["model"], recipe["name"], epochs, *costs))
    notes = []
    if len({str(run.metrics.get("hardware")) for run in runs}) > 1:
        notes.append("Not all ran on the same hardware, so times and speeds do not compare.")
    return Section("Networks and costs", heads, rows, notes)


def _classes(runs: list[Run], images: str) -> Section:
    """The first run's recall of each class with its interval, and by how many points the others differ."""
    first, *others = (per_class(np.array(run.metrics["confusion_matrix"]), run.metrics["classes"]) for run in runs)
    rows = []
    for name, figures_ in first.items():
        recall, n = figures_["recall"], figures_["support"]
        gaps = (f"{100 * (other[name]['recall'] - recall):+.1f}" for other in others)
        rows.append((name, _with_interval(recall, n, decimals=1) if n else NO_VALUE, *gaps))
    note = "The first run's recall with its 95 % interval, and the others' difference from it in points."
    return Section(f"Classes of {images}", ("class", *(run.label for run in runs)), rows, [note])


def _differences(runs: list[Run]) -> Section:
    """Every setting in which two runs differ. One that a run did not record counts as the recipes' default."""
    settings = [_settings(run) for run in runs]
    defaults = {field.name: field.default for field in fields(Recipe)}
    rows = []
    for name in dict.fromkeys(name for one in settings for name in one):
        if len({json.dumps(one.get(name, defaults.get(name))) for one in settings}) > 1:
            values = (one.get(name, NO_VALUE) for one in settings)
            rows.append((name, *(value if isinstance(value, str) else json.dumps(value) for value in values)))
    notes = [f"{NO_VALUE}: not recorded by the version that made the run."] if any(NO_VALUE in row for row in rows) else []
    if not rows:
        notes.append("Nothing that was recorded differs.")
    return Section("Where the configurations differ", ("setting", *(run.label for run in runs)), rows, notes)


def _settings(run: Run) -> dict:
    chosen = {name: run.config[name] for name in CIRCUMSTANCES if name in run.config}
    commit = re.sub(r"(?<=^\w{10})\w+", "", str(run.metrics.get("git_commit")))  # ten digits, and "-dirty" where it is
    made_by = {"hardware": run.metrics.get("hardware"), "git_commit": commit, **run.config["versions"]}
    return {**run.hyperparameters, **chosen, **made_by}


def _printable(section: Section) -> Section:
    """Its cells and sentences hold names of folders, data and classes."""
    rows = [tuple(map(printable, row)) for row in section.rows]
    heads, notes = tuple(map(printable, section.heads)), list(map(printable, section.notes))
    return Section(printable(section.title), heads, rows, notes)


def as_text(section: Section) -> str:
    """The section for a terminal, its columns aligned."""
    lines = [section.title]
    if section.rows:
        widths = [max(map(len, column)) for column in zip(section.heads, *section.rows, strict=True)]
        for row in (section.heads, *section.rows):
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    wrapped = (textwrap.fill(note, 110, initial_indent="  ", subsequent_indent="    ") for note in section.notes)
    return "\n".join([*lines, *wrapped])


def _as_html(section: Section) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in section.notes)
    rows = f'<div class="figures">{table(section.heads, section.rows)}</div>' if section.rows else ""
    return f"<h2>{escape(section.title)}</h2>{rows}{notes}"


def _html(runs: list[Run], summary: list[Section], details: list[Section]) -> str:
    title = f"Comparison of {len(runs)} runs"
    command = shlex.join(["python", "-m", "cifar_fastai", "compare", *(str(run.folder) for run in runs)])
    parts = [
        f"<h1>{title}</h1>",
        "<p>TTA: test-time augmentation, the average over those views of an image that its recipe allows. "
        "ECE: expected calibration error.</p>",
        *map(_as_html, summary),
        *map(_curves, _by_test_data(runs)),
        *map(_as_html, details),
        f"<h2>Repeat it</h2><pre>{escape(command)}</pre>",
    ]
    return page(title, "\n".join(parts))


def _curves(runs: list[Run]) -> str:
    """Everyone's curves; runs that differ in nothing but the seed share a line's colour and name."""
    names = {run.label: run.label for run in runs}
    for group in seed_groups(runs):
        names |= {run.label: f"{group.label} ({len(group.runs)} seeds)" for run in (*group.runs, *group.duplicates)}
    lines = [(names[run.label], run.history) for run in runs]
    curves = figures.png_if_possible("the curves", figures.curves, lines, dpi=150)
    if curves is None:
        return ""
    caption = f"Validation by epoch, on {runs[0].metrics['data']['source']}"
    differ = len({str(run.config["recipe"].get("label_smoothing")) for run in runs}) > 1
    note = "<p>These losses include each recipe's label smoothing, which raises them: compare the accuracies.</p>"
    return picture(caption, curves) + (note if differ else "")
