"""From a trained learner to every figure: each split is predicted once, and all else is computed from that."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from torch import Tensor
from torch.nn import functional as F

from cifar_fastai import figures
from cifar_fastai.models import tta_logits
from cifar_fastai.training import Training

N_TOP_LOSSES = N_SAMPLES = 18


@dataclass(frozen=True)
class Predictions:
    """The outcome of one pass over a labelled split of N images and C classes, on the CPU."""

    probabilities: Tensor  # (N, C)
    tta: Tensor  # (N, C), with test-time augmentation
    labels: Tensor  # (N,)

    @property
    def predicted(self) -> Tensor:
        return self.probabilities.argmax(dim=1)

    @property
    def confidences(self) -> Tensor:
        return self.probabilities.amax(dim=1)

    @property
    def losses(self) -> Tensor:
        """Cross-entropy of each image, without label smoothing."""
        return F.nll_loss(self.probabilities.clamp_min(1e-12).log(), self.labels, reduction="none")

    @property
    def accuracy(self) -> float:
        return (self.predicted == self.labels).double().mean().item()

    @property
    def accuracy_tta(self) -> float:
        return (self.tta.argmax(dim=1) == self.labels).double().mean().item()


@torch.inference_mode()
def predict(learn: Learner, dl) -> Predictions:
    """Predict every image of a labelled loader, plain and with test-time augmentation, in one pass over it."""
    model = learn.model.eval()
    outputs = []
    for x, y in dl:
        x, y = x.as_subclass(Tensor), y.as_subclass(Tensor)
        plain = model(x)
        outputs.append((plain.softmax(dim=1).cpu(), tta_logits(model, x, plain).softmax(dim=1).cpu(), y.cpu()))
    return Predictions(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


class Interpretation(ClassificationInterpretation):
    """fastai's ClassificationInterpretation over predictions that were made already; it runs no model."""

    def __init__(self, learn: Learner, dl, predictions: Predictions):
        super().__init__(learn, dl, predictions.losses)
        self.predictions = predictions

    def confusion_matrix(self) -> np.ndarray:
        """Counts (C, C), rows true and columns predicted."""
        n_classes = len(self.vocab)
        pairs = self.predictions.labels * n_classes + self.predictions.predicted
        return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes).numpy()


def split_metrics(predictions: Predictions, matrix: np.ndarray, classes) -> dict:
    """The figures of metrics.json that speak of the test split."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    supports = matrix.sum(axis=1)
    recalls = matrix.diagonal() / np.maximum(supports, 1)
    ece = multiclass_calibration_error(predictions.probabilities, predictions.labels, num_classes=len(classes), n_bins=15)
    return {
        "test_accuracy": predictions.accuracy,
        "test_accuracy_tta": predictions.accuracy_tta,
        "test_loss": predictions.losses.mean().item(),
        "per_class_accuracy": {name: float(recall) for name, recall in zip(classes, recalls, strict=True)},
        "confusion_matrix": matrix.tolist(),
        "ece": ece.item(),
    }


def evaluate(learn: Learner, training: Training, folder: Path) -> dict:
    """Predict validation and test split once each; leave tables and pictures in `folder` and return the figures."""
    classes = list(learn.dls.vocab)
    valid, test = predict(learn, learn.dls.valid), predict(learn, learn.dls.test)
    interpretation = Interpretation(learn, learn.dls.test, test)
    matrix = interpretation.confusion_matrix()
    metrics = split_metrics(test, matrix, classes)
    metrics |= {"valid_accuracy": valid.accuracy, "valid_loss": valid.losses.mean().item(), "classes": classes}
    _write_predictions(folder / "predictions.csv", test, classes)
    pictures = {
        "loss_curve": figures.loss_curve(training.history, training.best_epoch),
        "lr_schedule": figures.lr_schedule(training.lrs, len(learn.dls.train)),
        "confusion_matrix": figures.confusion_matrix(matrix, classes),
        "per_class_accuracy": figures.per_class_accuracy(metrics["per_class_accuracy"], test.accuracy),
        "top_losses": _top_losses(interpretation, learn.dls.data, classes),
        "samples": _samples(learn.dls, classes),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return metrics


def _write_predictions(path: Path, predictions: Predictions, classes: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "predicted", "confidence"])
        rows = zip(predictions.labels, predictions.predicted, predictions.confidences, strict=True)
        for index, (label, predicted, confidence) in enumerate(rows):
            writer.writerow([index, classes[label], classes[predicted], f"{confidence:.6f}"])


def _top_losses(interpretation: Interpretation, data, classes: list[str]):
    losses, indices = interpretation.top_losses(min(N_TOP_LOSSES, data.n_test))
    predictions = interpretation.predictions
    captions = [
        f"{classes[predictions.labels[i]]}\ntaken for {classes[predictions.predicted[i]]}\n"
        f"at {predictions.confidences[i]:.0%}, loss {loss:.1f}"
        for loss, i in zip(losses, indices, strict=True)
    ]
    images = data.images[data.n_train + indices.numpy()]
    return figures.image_grid(images, captions, "The test images the network was most wrong about")


def _samples(dls, classes: list[str]):
    x, y = dls.train.decode(dls.train.one_batch())
    images = x[:N_SAMPLES].as_subclass(Tensor).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return figures.image_grid(images, [classes[label] for label in y[:N_SAMPLES]], "Training images as augmented")
