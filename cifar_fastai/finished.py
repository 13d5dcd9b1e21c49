"""What can be done with a training that is over: evaluate it again, export it again, judge an export on other images."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fastai.learner import Learner
from fastai.vision.core import TensorImage
from torch import Tensor

from cifar_fastai import figures
from cifar_fastai.artifacts import Export, check_target
from cifar_fastai.augment import tta_views
from cifar_fastai.cache import load_data
from cifar_fastai.data import EVAL_BATCH, dataloaders
from cifar_fastai.errors import UserError
from cifar_fastai.evaluation import draw_evaluation, evaluate, predict_batches, split_figures
from cifar_fastai.labels import label_of
from cifar_fastai.learner import create_learner
from cifar_fastai.recipes import Recipe
from cifar_fastai.report import write_report
from cifar_fastai.robustness import judge
from cifar_fastai.run import best_weights, export_run, git_commit, pick_device, report_metrics, tell_of_export
from cifar_fastai.runfolder import check_plain, check_same_data, read_finished, read_run, write_json
from cifar_fastai.schema import CORRUPTIONS, EXPORTED_FIGURES, Corruptions, read, to_recipe
from cifar_fastai.sources import ImageData
from cifar_fastai.terminal import say

REPORTED_FIGURES = ("temperature", "unfamiliar_below", "test_top2_accuracy", "ece_uncalibrated", "confused_pairs")


def open_run(folder: Path, source: str | None = None) -> tuple[Learner, Recipe, dict, dict]:
    """A run's learner with its best weights, recipe, config.json and metrics.json.

    source: where the run's data lies now, if not where it lay then. Raises UserError and DataError, the latter too if
    the data is not what the run was trained on.
    """
    check_plain(folder)
    config, metrics = read_finished(folder)
    if (folder / CORRUPTIONS).exists():  # which the report shows
        read(Corruptions, folder / CORRUPTIONS)
    recipe = to_recipe(config["recipe"])
    weights = best_weights(folder, recipe, len(metrics["classes"]))
    data = load_data(source or config["data"], recipe.size)
    check_same_data(data, metrics["data"]["fingerprint"], folder)
    dls = dataloaders(data, recipe, config["seed"], subset=config["subset"], device=torch.device(pick_device(None)))
    learn = create_learner(dls, recipe, seed=config["seed"], blank=True)
    learn.model.load_state_dict(weights)
    return learn, recipe, config, metrics


def evaluate_run(folder: Path, source: str | None = None) -> dict:
    """Evaluate a run's best checkpoint anew: its figures, pictures, metrics.json and report.html are replaced."""
    learn, recipe, config, metrics = open_run(folder, source)
    found, test = evaluate(learn, folder, tta_views(recipe))
    metrics |= found | {"evaluated_at_commit": git_commit()}
    write_json(folder / "metrics.json", metrics)
    draw_evaluation(learn, found, test, folder)
    report_metrics(folder, metrics, config)
    return metrics


def corrupt_run(folder: Path, source: str | None = None) -> dict:
    """Judge a run's best checkpoint on corrupted images and say what came out; returns the figures of `judge`.

    Writes corruptions.json and corruptions.png, and report.html anew with both.
    """
    learn, _, config, metrics = open_run(folder, source)
    _check_evaluated(folder, metrics)
    dls = learn.dls
    learn.model.eval()

    @torch.inference_mode()
    def scores(images: Tensor) -> Tensor:
        (x,) = dls.valid.after_batch((TensorImage(images).to(dls.device),))
        return learn.model(x.as_subclass(Tensor)).cpu()

    found = judge(scores, dls.data, dls.data.labels[dls.data.n_train :])
    write_json(folder / CORRUPTIONS, found)
    figures.draw(folder / "corruptions.png", figures.corruptions, found["accuracy"], found["clean_accuracy"])
    say("report", write_report(folder, metrics, config))
    return found


def reexport_run(folder: Path, exports: Path, name: str | None = None, source: str | None = None) -> Path:
    """Write the export of a run's best checkpoint with the figures of its metrics.json; returns its path.

    name: of the export, the run's by default.
    """
    name = name or read_run(folder)[1]["name"]
    path = check_target(exports, name)
    learn, recipe, _, metrics = open_run(folder, source)
    _check_evaluated(folder, metrics)
    tell_of_export(path, export_run(path, learn, name, recipe, metrics))
    return path


def _check_evaluated(folder: Path, metrics: dict) -> None:
    if not metrics.keys() >= {*REPORTED_FIGURES, *EXPORTED_FIGURES}:
        command = f"python -m cifar_fastai evaluate {shlex.quote(str(folder))}"
        raise UserError(f"{folder} was evaluated by an older version: `{command}` first.")


def pick_split(data: ImageData, split: str | None) -> tuple[str, ImageData]:
    """The name of what is to be judged, and it as the test split of an ImageData of its own.

    split: "train", "valid", "test" or "all"; by default the test split where the source has one, else all. Raises UserError
    if the source has no such split.
    """
    splits = data.splits
    split = split or ("test" if "test" in splits else "all")
    if split not in splits:
        there = ", ".join(f"{name} ({len(rows):,} images)" for name, rows in splits.items())
        raise UserError(f"--split {split}: {data.source} has none. There is: {there}.")
    rows = splits[split]
    return split, replace(data, images=data.images[rows], labels=data.labels[rows], n_train=0, n_valid=0, held_out=False)


def evaluate_export(export: Export, data: ImageData) -> dict:
    """An export's figures on the test split of any data whose classes it knows by name. Raises UserError."""
    labels = _test_labels(export, data)

    def batches():
        for start in range(0, data.n_test, EVAL_BATCH):
            rows = slice(start, start + EVAL_BATCH)
            images = torch.from_numpy(data.images[data.n_train :][rows]).permute(0, 3, 1, 2)
            yield export.normalized(images), torch.from_numpy(labels[rows])

    views = export.config["tta_views"]
    predictions = predict_batches(export.model, batches(), export.config["temperature"], views)
    return split_figures(predictions, export.classes)


def corrupt_export(export: Export, data: ImageData) -> dict:
    """As `judge`, for an export and any data whose classes it knows by name. Raises UserError."""
    return judge(export.scores, data, _test_labels(export, data))


def _test_labels(export: Export, data: ImageData) -> np.ndarray:
    """Of the test split, as the export numbers the classes."""
    labels = data.labels[data.n_train :]
    places = {label_of(name): place for place, name in enumerate(export.classes)}
    if strangers := [name for name in (data.classes[label] for label in np.unique(labels)) if label_of(name) not in places]:
        raise UserError(f"{export.folder} does not know the classes {', '.join(strangers)} of {data.source}.")
    numbers = np.array([places.get(label_of(name), -1) for name in data.classes])
    return numbers[labels]
