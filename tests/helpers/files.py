"""Files that tests make: pictures, and what must not be opened."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from cifar_fastai.download import Archive

COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 40), "red": (210, 30, 20)}
RUN_FILES = (
    "checkpoints confident_mistakes.png config.json confusion_matrix.png filters.png history.csv loss_curve.png "
    "lr_schedule.png metrics.json per_class_accuracy.png predictions.csv predictions.png recipe.toml reliability.png "
    "report.html risk_coverage.png samples.png top_losses.png"
).split()


class Canary:
    """Something whose pickle writes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def archive_of(path: Path, mirrors: tuple[str, ...]) -> Archive:
    """What the downloader has to know of a file."""
    data = path.read_bytes()
    digests = (hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest())
    return Archive(path.name, len(data), *digests, mirrors)


def write_pictures(folder: Path, n_train=20, n_test=4, size=32) -> Path:
    """train/<colour>/<number>.png and test/…, each its colour with noise: learnable, and lossless."""
    noise = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(n):
                pixels = np.clip(noise.normal(colour, 25, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{name}-{number:03}.png")
    return folder
