"""Figures of merit of a classifier, from its logits or probabilities (N, C) and the labels (N,), all on the CPU."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

N_BINS = 15  # of equal width, for everything about calibration
Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
FALSE_ALARMS = 0.05  # share of the validation images that count as unfamiliar
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of the images whose label is among the k highest scores."""
    return (scores.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def with_interval(share: float, interval) -> str:
    """Both in percent."""
    return "{:.2%} (95 % interval {:.2%} to {:.2%})".format(share, *interval)


def wilson_interval(share: float, n: int) -> list[float]:
    """The 95 % interval of a share seen in n independent trials: E. B. Wilson, JASA 22, 1927."""
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def mean_interval(values: np.ndarray) -> list[float]:
    """The 95 % interval of the mean of independent values (N,), by the central limit theorem."""
    half = Z_95 * values.std() / math.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image (N,), in nats, without label smoothing."""
    return F.cross_entropy(logits, labels, reduction="none")


def confusion_matrix(predicted: Tensor, labels: Tensor, n_classes: int) -> np.ndarray:
    """Counts (C, C), rows true and columns predicted."""
    pairs = labels * n_classes + predicted
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes).numpy()


def per_class(matrix: np.ndarray, classes) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support (number of images) of each class; 0 where nothing was predicted or there."""
    right, supports, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    precisions, recalls = right / np.maximum(predicted, 1), right / np.maximum(supports, 1)
    f1s = 2 * right / np.maximum(predicted + supports, 1)
    rows = zip(precisions.tolist(), recalls.tolist(), f1s.tolist(), supports.tolist(), strict=True)
    names = ("precision", "recall", "f1", "support")
    return {name: dict(zip(names, row, strict=True)) for name, row in zip(classes, rows, strict=True)}


def confused_pairs(matrix: np.ndarray, classes, most: int = 10) -> list[dict]:
    """The commonest mistakes: the class, what it was taken for, how often, and for what share of its images."""
    mistakes = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    pairs = [(int(place // len(matrix)), int(place % len(matrix))) for place in order]
    return [
        {"class": classes[i], "taken_for": classes[j], "count": int(mistakes[i, j]), "share": float(mistakes[i, j] / total)}
        for i, j in pairs
        if mistakes[i, j] and (total := matrix[i].sum())
    ]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature by which to divide the logits for the lowest loss: C. Guo et al., https://arxiv.org/abs/1706.04599.

    To be fitted on images that were not trained on. It changes no prediction, only how sure the network says it is. Of n
    images the labels count as certain to (n + 1) / (n + 2) only, so that few images without a mistake do not make the
    network certain: J. Platt, Probabilistic Outputs for Support Vector Machines, 1999.
    """
    n, n_classes = logits.shape
    doubt = n_classes / (n_classes - 1) / (n + 2)
    logits, log_temperature = logits.double(), torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels, label_smoothing=doubt)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_temperature.exp().item()


def unfamiliar_below(familiarity: Tensor) -> float:
    """The familiarity (N,), of validation images, below which a picture is called unlike the training images."""
    return familiarity.double().quantile(FALSE_ALARMS).item()


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart in a bin of `reliability`, by their images."""
    bins = reliability(probabilities, labels)
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / len(labels)


def reliability(probabilities: Tensor, labels: Tensor) -> list[dict]:
    """Of each bin of confidence that holds images: how many, their mean confidence and their accuracy."""
    confidences, predicted = probabilities.max(dim=1)
    right = (predicted == labels).double()
    bins = (confidences * N_BINS).long().clamp(max=N_BINS - 1)
    rows = []
    for number in range(N_BINS):
        if (inside := bins == number).any():
            row = {"confidence": confidences[inside].mean().item(), "accuracy": right[inside].mean().item()}
            rows.append({"count": int(inside.sum()), **row})
    return rows


def risk_coverage(probabilities: Tensor, labels: Tensor) -> list[dict]:
    """For thresholds of confidence: the share of the images that reach it, and the accuracy over those (None if none)."""
    confidences, predicted = probabilities.max(dim=1)
    right = (predicted == labels).double()
    rows = []
    for threshold in THRESHOLDS:
        counted = confidences >= threshold
        share = counted.double().mean().item()
        rows.append({"threshold": threshold, "coverage": share, "accuracy": right[counted].mean().item() if share else None})
    return rows
