"""From a trained learner to every figure: each split is predicted once, and all else is computed from that."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from torch import Tensor, nn

from cifar_fastai import figures, metrics
from cifar_fastai.explain import grad_cam, overlay
from cifar_fastai.models import TTA_VIEWS, Views, familiarity, tta_logits
from cifar_fastai.terminal import cell, shortened
from cifar_fastai.training import Training

N_TOP_LOSSES, N_SHOWN = 15, 24
SHOWN_SEED = 0


@dataclass(frozen=True)
class Predictions:
    """The outcome of one pass over a labelled split of N images and C classes, on the CPU."""

    logits: Tensor  # (N, C)
    tta: Tensor  # (N, C), logits with test-time augmentation
    labels: Tensor  # (N,)
    familiarity: Tensor  # (N,), see models.familiarity
    temperature: float = 1.0  # by which logits are divided before they become probabilities

    @property
    def probabilities(self) -> Tensor:
        return (self.logits / self.temperature).softmax(dim=1)

    @property
    def predicted(self) -> Tensor:
        return self.logits.argmax(dim=1)

    @property
    def losses(self) -> Tensor:
        """Cross-entropy of each image, without label smoothing."""
        return metrics.losses(self.logits / self.temperature, self.labels)

    @property
    def accuracy(self) -> float:
        return metrics.accuracy(self.logits, self.labels)


def predict(learn: Learner, dl, views: Views = TTA_VIEWS) -> Predictions:
    """Predict every image of a labelled loader, plain and with test-time augmentation, in one pass over it. views: as for
    `tta_logits`."""
    return predict_batches(learn.model, ((x.as_subclass(Tensor), y.as_subclass(Tensor)) for x, y in dl), views=views)


@torch.no_grad()
def predict_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    temperature: float = 1.0,
    views: Views = TTA_VIEWS,
) -> Predictions:
    """The same for batches of normalised images and labels."""
    model.eval()
    outputs = []
    for x, y in batches:
        maps = model.maps(x)
        plain = model.classify(maps)
        parts = (plain, tta_logits(model, x, views, plain), y, familiarity(maps))
        outputs.append([part.cpu() for part in parts])
    return Predictions(*(torch.cat(parts) for parts in zip(*outputs, strict=True)), temperature)


class Interpretation(ClassificationInterpretation):
    """fastai's ClassificationInterpretation over predictions that were made already; it runs no model."""

    def __init__(self, learn: Learner, dl, predictions: Predictions):
        super().__init__(learn, dl, predictions.losses)
        self.predictions = predictions

    def confusion_matrix(self) -> np.ndarray:
        """Counts (C, C), rows true and columns predicted."""
        return metrics.confusion_matrix(self.predictions.predicted, self.predictions.labels, len(self.vocab))


def split_figures(test: Predictions, classes) -> dict:
    """The figures of metrics.json that speak of the test split."""
    n, labels, uncalibrated = len(test.labels), test.labels, replace(test, temperature=1.0)
    matrix = metrics.confusion_matrix(test.predicted, labels, len(classes))
    per_class = metrics.per_class(matrix, classes)
    accuracy_tta = metrics.accuracy(test.tta, labels)
    return {
        "test_accuracy": test.accuracy,
        "test_accuracy_interval": metrics.wilson_interval(test.accuracy, n),
        "test_accuracy_tta": accuracy_tta,
        "test_accuracy_tta_interval": metrics.wilson_interval(accuracy_tta, n),
        "test_top2_accuracy": metrics.accuracy(test.logits, labels, k=2),
        "temperature": test.temperature,
        "test_loss": test.losses.mean().item(),
        "test_loss_uncalibrated": uncalibrated.losses.mean().item(),
        "ece": metrics.calibration_error(test.probabilities, labels),
        "ece_uncalibrated": metrics.calibration_error(uncalibrated.probabilities, labels),
        "reliability": metrics.reliability(test.probabilities, labels),
        "per_class_accuracy": {name: figures_["recall"] for name, figures_ in per_class.items()},
        "per_class": per_class,
        "confusion_matrix": matrix.tolist(),
        "confused_pairs": metrics.confused_pairs(matrix, classes),
        "risk_coverage": metrics.risk_coverage(test.probabilities, labels),
    }


def draw_training(learn: Learner, training: Training, folder: Path) -> None:
    """The pictures of how the training went."""
    figures.draw(
        folder / "loss_curve.png", figures.loss_curve, training.history, training.train_accuracies, training.best_epoch
    )
    figures.draw(folder / "lr_schedule.png", figures.lr_schedule, training.lrs, len(learn.dls.train))
    figures.draw(folder / "samples.png", _samples, learn.dls, list(learn.dls.vocab))


def evaluate(learn: Learner, folder: Path, views: Views = TTA_VIEWS) -> tuple[dict, Predictions]:
    """Predict validation and test split once each; leave predictions.csv in `folder` and return the figures, and the
    predictions of the test split for `draw_evaluation`.

    The validation split gives the temperature by which confidences are calibrated; the test split decides nothing. views: of
    test-time augmentation, as for `tta_logits`.
    """
    classes = list(learn.dls.vocab)
    valid, test = (predict(learn, dl, views) for dl in (learn.dls.valid, learn.dls.test))
    temperature = metrics.fit_temperature(valid.logits, valid.labels)
    valid, test = replace(valid, temperature=temperature), replace(test, temperature=temperature)
    found = split_figures(test, classes)
    found |= {
        "valid_accuracy": valid.accuracy,
        "valid_accuracy_interval": metrics.wilson_interval(valid.accuracy, len(valid.labels)),
        "valid_loss": valid.losses.mean().item(),
        "classes": classes,
        "unfamiliar_below": (threshold := metrics.unfamiliar_below(valid.familiarity)),
        "false_alarm_rate": (test.familiarity < threshold).double().mean().item(),
    }
    _write_predictions(folder / "predictions.csv", test, classes)
    return found, test


def draw_evaluation(learn: Learner, found: dict, test: Predictions, folder: Path) -> None:
    """The pictures of what `evaluate` found. The network is needed once more, for Grad-CAM."""
    classes, data = found["classes"], learn.dls.data
    interpretation = Interpretation(learn, learn.dls.test, test)
    before = metrics.reliability(replace(test, temperature=1.0).probabilities, test.labels)
    after, errors = found["reliability"], (found["ece_uncalibrated"], found["ece"])
    for name, picture, *arguments in (
        ("confusion_matrix", figures.confusion_matrix, interpretation.confusion_matrix(), classes),
        ("per_class_accuracy", figures.per_class_accuracy, found["per_class_accuracy"], test.accuracy),
        ("reliability", figures.reliability, before, after, *errors),
        ("risk_coverage", figures.risk_coverage, *_ranked(test)),
        ("top_losses", _top_losses, learn, interpretation, classes),
        ("confident_mistakes", _confident_mistakes, data, test, classes),
        ("predictions", _random_predictions, data, test, classes),
        ("filters", _first_filters, learn.model),
    ):
        figures.draw(folder / f"{name}.png", picture, *arguments)


def _ranked(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Confidences from the highest down, and whether each prediction is right."""
    confidences, order = predictions.probabilities.amax(dim=1).sort(descending=True)
    return confidences.numpy(), (predictions.predicted == predictions.labels)[order].numpy()


def _write_predictions(path: Path, predictions: Predictions, classes: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "predicted", "confidence"])
        confidences = predictions.probabilities.amax(dim=1)
        rows = zip(predictions.labels, predictions.predicted, confidences, strict=True)
        for index, (label, predicted, confidence) in enumerate(rows):
            writer.writerow([index, cell(classes[label]), cell(classes[predicted]), f"{confidence:.6f}"])


def _top_losses(learn: Learner, interpretation: Interpretation, classes: list[str]):
    """The worst test images, beside each of them where the network saw its answer."""
    data, predictions = learn.dls.data, interpretation.predictions
    _, places = interpretation.top_losses(min(N_TOP_LOSSES, data.n_test))
    rows = data.n_train + places.numpy()
    (x,) = learn.dls.test_dl(rows, bs=len(rows)).one_batch()
    answers = predictions.predicted[places].to(x.device)
    heat = grad_cam(learn.model, x.as_subclass(Tensor), answers).cpu()
    images = data.images[rows]
    gap = np.full((*images.shape[:2], max(1, data.size // 16), 3), 255, np.uint8)
    captions = [f"{caption}, loss {predictions.losses[i]:.1f}" for caption, i in _captions(predictions, places, classes)]
    title = "The test images it was most wrong about, and where it saw what it answered (Grad-CAM)"
    return figures.image_grid(np.concatenate([images, gap, overlay(images, heat)], axis=2), captions, title, columns=3)


def _confident_mistakes(data, predictions: Predictions, classes: list[str]):
    confidences = predictions.probabilities.amax(dim=1)
    wrong = (predictions.predicted != predictions.labels).nonzero()[:, 0]
    places = wrong[confidences[wrong].argsort(descending=True)][:N_SHOWN]
    title = f"Of {len(wrong):,} mistakes in {data.n_test:,} answers, the most confident" if len(wrong) else "No mistakes"
    return _test_images(data, predictions, places, classes, title)


def _random_predictions(data, predictions: Predictions, classes: list[str]):
    random = torch.Generator().manual_seed(SHOWN_SEED)
    places = torch.randperm(data.n_test, generator=random)[:N_SHOWN]
    right = int((predictions.predicted == predictions.labels)[places].sum())
    return _test_images(data, predictions, places, classes, f"{len(places)} test images by chance: {right} right")


def _test_images(data, predictions: Predictions, places: Tensor, classes: list[str], title: str):
    captions = [caption for caption, _ in _captions(predictions, places, classes)]
    return figures.image_grid(data.images[data.n_train + places.numpy()], captions, title)


def _captions(predictions: Predictions, places: Tensor, classes: list[str]):
    """What each of these images is, and what it was taken for with which confidence; and its place in the split."""
    confidences = predictions.probabilities.amax(dim=1)
    for i in places.tolist():
        label, answer = (
            shortened(classes[place], figures.LONGEST_NAME) for place in (predictions.labels[i], predictions.predicted[i])
        )
        taken = "right" if predictions.labels[i] == predictions.predicted[i] else f"taken for {answer}"
        yield f"{label}\n{taken}, {confidences[i]:.0%}", i


def _first_filters(model: nn.Module):
    """Those of the first convolution, (N, 3, h, w)."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return figures.filters(first.weight.detach().cpu().numpy())


def _samples(dls, classes: list[str]):
    x, y = dls.train.decode(dls.train.one_batch())
    images = x[:N_SHOWN].as_subclass(Tensor).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    captions = [shortened(classes[label], figures.LONGEST_NAME) for label in y[:N_SHOWN]]
    return figures.image_grid(images, captions, "Training images as augmented")
