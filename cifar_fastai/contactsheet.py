"""Pictures of what a recipe's augmentation does to images, and what the corruptions do."""

from pathlib import Path

import numpy as np
import torch

from cifar_fastai import figures
from cifar_fastai.augment import Streams, augment, mix
from cifar_fastai.cache import load_data
from cifar_fastai.corruptions import KINDS, SEVERITIES, corrupt
from cifar_fastai.recipes import Recipe
from cifar_fastai.sources import ImageData

MAX_ROWS, VARIATIONS = 10, 11


def write_contact_sheet(source, recipe: Recipe, path: Path, seed: int = 42) -> Path:
    """A training image of each class (of the first ten), as it is and as it comes out of the augmentation eleven times."""
    data = load_data(source, recipe.size)
    rows = _first_of_each_class(data)
    images = torch.from_numpy(data.images[rows]).permute(0, 3, 1, 2)
    columns = [images, *_variations(images, torch.tensor(rows), data, recipe, seed)]
    columns = [images.round().byte().permute(0, 2, 3, 1).numpy() for images in columns]
    title = f"Recipe {recipe.name}: training images and what its augmentation makes of them"
    names = [data.classes[data.labels[row]] for row in rows]
    path.write_bytes(figures.png(figures.contact_sheet, columns, names, title))
    return path


def write_corruptions(source, size: int, path: Path) -> Path:
    """The first training image as it is and after every kind of corruption (rows), at severity 1 to 5."""
    image = load_data(source, size).images[:1]
    columns = [np.concatenate([corrupt(image, kind, severity) for kind in KINDS]) for severity in SEVERITIES]
    names = [kind.replace("_", " ") for kind in KINDS]
    title = "A training image and its corruptions, by severity"
    columns = [image.repeat(len(KINDS), axis=0), *columns]
    path.write_bytes(figures.png(figures.contact_sheet, columns, names, title))
    return path


def _first_of_each_class(data: ImageData) -> list[int]:
    _, rows = np.unique(data.labels[: data.n_train], return_index=True)
    return rows[:MAX_ROWS].tolist()


def _variations(images: torch.Tensor, rows: torch.Tensor, data: ImageData, recipe: Recipe, seed: int):
    """One batch after the other, each as if in a new epoch."""
    streams, random = Streams(seed), np.random.default_rng(seed)
    fill = torch.tensor(data.channel_stats[0]) * 255
    for epoch in range(VARIATIONS):
        varied = augment(images, recipe, streams, rows=rows, epoch=epoch, fill=fill)
        yield mix(varied.float(), recipe, random)[0] if recipe.mixup or recipe.cutmix else varied
