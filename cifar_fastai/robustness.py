"""How a classifier bears corrupted images: its accuracy by kind and severity, over a fixed sample of the test split."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cifar_fastai import metrics
from cifar_fastai.corruptions import GROUPS, KINDS, SEVERITIES, corrupt
from cifar_fastai.sources import ImageData
from cifar_fastai.terminal import say

SAMPLE, SEED = 1000, 0  # images, and what they and their corruptions are drawn with
BATCH = 250  # images predicted at once


def judge(scores: Callable[[Tensor], Tensor], data: ImageData, labels: np.ndarray) -> dict:
    """The figures of corruptions.json, which are also said: accuracies of plain predictions, without TTA.

    scores: gives (N, C) on the CPU for uint8 images (N, 3, size, size). labels: of the test split, as `scores` numbers the
    classes.
    """
    rows = sample_rows(labels, SAMPLE, SEED)
    images, labels = data.images[data.n_train + rows], labels[rows]
    say("data", f"{len(rows):,} of {data.n_test:,} test images of {data.source} ({data.encoding}), drawn with seed {SEED}")
    clean = _right(scores, images, labels)
    say("severity", _row("", [*map(str, SEVERITIES), "mean"]))
    right = {}
    for kind in KINDS:
        corrupted = (corrupt(images, kind, severity, SEED) for severity in SEVERITIES)
        right[kind] = np.stack([_right(scores, each, labels) for each in corrupted])
        shares = [*right[kind].mean(axis=1), right[kind].mean()]
        say("", _row(kind, [f"{share:.1%}" for share in shares]))
    found = _figures(clean, right)
    say("clean", f"accuracy {metrics.with_interval(found['clean_accuracy'], found['clean_accuracy_interval'])}")
    mean = metrics.with_interval(found["mean_corruption_accuracy"], found["mean_corruption_accuracy_interval"])
    say("mean", f"corruption accuracy {mean}, {found['drop'] * 100:.2f} points below clean")
    say("worst", f"{found['worst_kind']}, {found['kind_accuracy'][found['worst_kind']]:.2%}")
    about = {"source": data.source, "encoding": data.encoding, "n_images": len(rows), "n_test": data.n_test, "seed": SEED}
    return about | found


def sample_rows(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n rows in ascending order, drawn at random, each class in proportion to its size; all rows if there are no more."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    ranks = np.concatenate([np.arange(count) for count in counts])
    places = (ranks + 0.5) / counts[labels[by_class]]  # of each image within its class, 0 to 1: the first n are taken
    return np.sort(by_class[np.argsort(places, kind="stable")[:n]])


def _right(scores: Callable[[Tensor], Tensor], images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each image, uint8 (N, size, size, 3), is recognised."""
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH)
    return torch.cat([scores(batch).argmax(dim=1) for batch in batches]).numpy() == labels


def _figures(clean: np.ndarray, right: dict[str, np.ndarray]) -> dict:
    """From whether each image (N,) is recognised clean, and under each kind and severity (5, N)."""
    means = {kind: float(flags.mean()) for kind, flags in right.items()}
    by_severity = {kind: flags.mean(axis=1).tolist() for kind, flags in right.items()}
    each_image = np.mean(list(right.values()), axis=(0, 1))  # the share of its corruptions that it is recognised under
    return {
        "clean_accuracy": float(clean.mean()),
        "clean_accuracy_interval": metrics.wilson_interval(float(clean.mean()), len(clean)),
        "mean_corruption_accuracy": float(each_image.mean()),
        "mean_corruption_accuracy_interval": metrics.mean_interval(each_image),
        "drop": float(clean.mean() - each_image.mean()),
        "worst_kind": min(means, key=means.get),
        "kind_accuracy": means,
        "accuracy": {group: {f.__name__: by_severity[f.__name__] for f in functions} for group, functions in GROUPS.items()},
    }


def _row(head: str, cells: list[str]) -> str:
    return f"{head:<18}" + "".join(f"{cell:>8}" for cell in cells)
