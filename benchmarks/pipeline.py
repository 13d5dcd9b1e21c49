"""The cost of the data pipeline: ours against stock fastai and torchvision, on the same images with the same augmentation.

    CIFAR10_DATA=… python benchmarks/pipeline.py [--data SOURCE] [--images 4000] [--rounds 3] [--json FILE]

Images a second that reach the training loop, ready for the network, for the augmentation of two recipes:

- fastai: image files, `ImageBlock`, `aug_transforms` on whole batches, and a worker a core, which is its default;
- torchvision: the same files, `transforms.v2` image by image, and a `DataLoader` with a worker a core;
- ours: `dataloaders()`, in one process.

They take turns, so that a machine whose speed wanders slows all; figures are medians of the rounds, and each ratio is the
median of the rounds' ratios. Then, for ours alone: images a second on one core, the pipeline's share of the time of `fit`
with the model `base`, the time from `dataloaders()` to the first batch once the data is prepared, and the memory that
preparing the data and an epoch of batches take, the images themselves included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import cifar_fastai.compat  # noqa: F401  before torchvision

# isort: split
import torch
from fastai.data.transforms import Normalize
from fastai.vision.augment import CropPad, PadMode, RandomCrop, Saturation, aug_transforms
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cifar_fastai import create_learner, dataloaders, fit, get_recipe
from cifar_fastai.cache import load_data
from cifar_fastai.data import BatchDL
from cifar_fastai.run import hardware, versions
from cifar_fastai.sources import ImageData

CORES = len(os.sched_getaffinity(0))
RECIPES = ("fast", "classic-sgd")
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


# --- three pipelines ---------------------------------------------------------------------------------------------


def ours(folder: Path, recipe):
    return dataloaders(folder, recipe).train


def fastai(folder: Path, recipe):
    return fastai_loaders(folder, recipe).train


def fastai_loaders(folder: Path, recipe) -> ImageDataLoaders:
    if recipe.crop_pad:
        item_tfms = [CropPad(32 + 2 * recipe.crop_pad, pad_mode=PadMode.Reflection), RandomCrop(32)]
        batch_tfms = aug_transforms(max_rotate=0, max_zoom=1, max_lighting=0, max_warp=0)
    else:
        item_tfms = []
        batch_tfms = aug_transforms(
            max_rotate=recipe.rotate, min_zoom=1 - recipe.scale, max_zoom=1 + recipe.scale, max_warp=recipe.perspective,
            max_lighting=recipe.brightness, p_affine=1, p_lighting=1, xtra_tfms=[Saturation(recipe.saturation, p=1.0)],
        )  # fmt: skip
    batch_tfms = [*batch_tfms, Normalize.from_stats(MEAN, STD, cuda=False)]
    tfms = {"item_tfms": item_tfms, "batch_tfms": batch_tfms}
    return ImageDataLoaders.from_folder(folder, valid="test", bs=recipe.bs, num_workers=CORES, device="cpu", **tfms)


def torchvision(folder: Path, recipe):
    if recipe.crop_pad:
        tfms = [v2.RandomCrop(32, padding=recipe.crop_pad, padding_mode="reflect"), v2.RandomHorizontalFlip()]
    else:
        move = (recipe.translate, recipe.translate)
        tfms = [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(recipe.rotate, translate=move, scale=(1 - recipe.scale, 1 + recipe.scale)),
            v2.RandomPerspective(recipe.perspective, p=1.0),
            v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation),
        ]
    tfms += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    files = ImageFolder(folder / "train", v2.Compose(tfms))
    return DataLoader(files, recipe.bs, shuffle=True, num_workers=CORES, drop_last=True, persistent_workers=True)


def images_a_second(loader) -> float:
    """Over at least two epochs and two seconds, after a first epoch that warms up."""
    for _ in loader:
        pass
    n, epochs, start = 0, 0, time.perf_counter()
    while epochs < 2 or time.perf_counter() - start < 2:
        n += sum(len(x) for x, _ in loader)
        epochs += 1
    return n / (time.perf_counter() - start)


def write_files(data: ImageData, folder: Path, n: int) -> None:
    """The first n training images as PNG files, and some test images, in folders by class."""
    for split, rows in (("train", range(min(n, data.n_train))), ("test", range(data.n_train, data.n_train + 200))):
        for row in rows:
            path = folder / split / data.classes[data.labels[row]] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[row]).save(path)


def compare(folder: Path, name: str, rounds: int) -> dict:
    recipe = get_recipe(name, bs=min(get_recipe(name).bs, 512))
    pipelines = {pipeline.__name__: pipeline(folder, recipe) for pipeline in (ours, fastai, torchvision)}
    speeds = {which: [] for which in pipelines}
    for number in range(rounds):
        for which, loader in pipelines.items():
            speeds[which].append(images_a_second(loader))
        print(f"{name}, round {number + 1}: " + ", ".join(f"{which} {all_[-1]:,.0f}" for which, all_ in speeds.items()))
    ratios = {
        f"over_{other}": statistics.median(a / b for a, b in zip(speeds["ours"], speeds[other], strict=True))
        for other in ("fastai", "torchvision")
    }
    torch.set_num_threads(1)
    on_one_core = statistics.median(images_a_second(pipelines["ours"]) for _ in range(rounds))
    torch.set_num_threads(CORES)
    return {"images_per_second": speeds, **ratios, "images_per_second_on_one_core": on_one_core}


# --- ours alone --------------------------------------------------------------------------------------------------


@contextmanager
def time_in_loaders():
    """Gives a list to which the seconds spent waiting for batches are added."""
    spent, plain = [], BatchDL.__iter__

    def timed(loader):
        batches = plain(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            spent.append(time.perf_counter() - start)
            if batch is None:
                return
            yield batch

    BatchDL.__iter__ = timed
    try:
        yield spent
    finally:
        BatchDL.__iter__ = plain


def share_of_fit(folder: Path) -> float:
    recipe = get_recipe("fast", epochs=1, bs=256, lr=0.1)
    learn = create_learner(dataloaders(folder, recipe), recipe, seed=0)
    with time_in_loaders() as spent, learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        fit(learn, recipe)
        return sum(spent) / (time.perf_counter() - start)


def seconds_to_first_batch(source) -> list[float]:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        next(iter(dataloaders(source, get_recipe("fast")).train))
        seconds.append(time.perf_counter() - start)
    return seconds


MEMORY = """
import sys
from cifar_fastai import dataloaders, get_recipe
from cifar_fastai.run import peak_memory_mb
before = peak_memory_mb("cpu")
for x, y in (dls := dataloaders(sys.argv[1], get_recipe("fast"))).train: pass
print(dls.data.images.nbytes / 1e6, peak_memory_mb("cpu") - before)
"""


def memory(source) -> dict:
    """10^6 bytes: the images, and the growth of the process from the end of the imports over an epoch of batches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        command, found = [sys.executable, "-c", MEMORY, str(source)], {}
        for start in ("first_start", "second_start"):
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found["images"], found[start] = map(float, done.stdout.split())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("CIFAR10_DATA", "digits"))
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_files(load_data(options.data), folder, options.images)
        result = {name: compare(folder, name, options.rounds) for name in RECIPES}
        result["share_of_fit_base"] = statistics.median(share_of_fit(folder) for _ in range(options.rounds))
    result["seconds_to_first_batch"] = seconds_to_first_batch(options.data)
    result["memory_mb"] = memory(options.data)
    result |= {"data": load_data(options.data).source, "images": options.images, "cores": CORES}
    result |= {"hardware": hardware("cpu"), "versions": versions()}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
