"""Training throughput: our whole `train()` against a hand-written PyTorch loop and against stock fastai.

    python benchmarks/throughput.py [--model small] [--bs 128] [--rounds 6] [--json FILE]

All three train the same network on the same images with the recipe's augmentation, loss and optimizer, each in a process of
its own (for `train()` changes the allocator's settings), an epoch in turn, so that a machine whose speed wanders slows all;
figures are medians of the rounds, and each ratio is the median of the rounds' ratios.

- ours: timed with everything `train.py` does in its training phase: fastai's loop, scheduler, recorder, history, progress;
- by hand: the loop that a PyTorch user would write around the pipeline's own batch functions, nothing of fastai in it;
- fastai: the same images as PNG files, `ImageDataLoaders` with a worker a core, `fit_one_cycle`.

In the same rounds it measures what the machine can do: the network's own 3 x 3 convolutions by themselves, forward and
backward, and products of matrices. GFLOP/s count a multiply-add as two.
"""

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, set_start_method
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam
from pipeline import fastai_loaders, write_files
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cifar_fastai import create_learner, dataloaders, get_recipe
from cifar_fastai.artifacts import normalize
from cifar_fastai.augment import Streams, augment
from cifar_fastai.models import create_model
from cifar_fastai.run import hardware, versions
from cifar_fastai.sources import ImageData
from cifar_fastai.training import ReuseMemory, train

RECIPES = {"small": "classic-adam", "base": "cpu", "deep": "cpu", "large": "cpu"}
GEMM_SIDE = 2048


def random_images(n_train: int, n_test: int = 200) -> ImageData:
    random = np.random.default_rng(0)
    n = n_train + n_test
    images, labels = random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10
    return ImageData("random", images, labels, tuple("abcdefghij"), n_train, "lossless")


class Ours:
    def __init__(self, data: ImageData, recipe):
        self.recipe = recipe
        self.learn = create_learner(dataloaders(data, recipe), recipe, seed=0)

    def epoch(self) -> float:
        """Images a second over one epoch."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "checkpoints").mkdir()
            return train(self.learn, self.recipe, Path(folder), io.StringIO()).images_per_second


class HandWritten:
    def __init__(self, data: ImageData, recipe):
        self.recipe, self.rows = recipe, torch.tensor(dataloaders(data, recipe).train.dataset.items)
        self.images, self.labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        self.mean, self.std = data.channel_stats
        self.streams = Streams(0)
        self.model = create_model(recipe.model, len(data.classes))
        if recipe.model != "small":
            self.model.stem.weight.requires_grad = False  # it whitens, and is not trained
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        if recipe.optimizer == "adam":
            self.optimizer = torch.optim.Adam(weights, recipe.lr / recipe.div, weight_decay=recipe.wd)
        else:
            self.optimizer = torch.optim.SGD(
                weights, recipe.lr / recipe.div, recipe.moms[0], weight_decay=recipe.wd, nesterov=True
            )

    def epoch(self) -> float:
        self.model.train()
        start, running, bs = time.perf_counter(), 0.0, self.recipe.bs
        order = self.rows[torch.randperm(len(self.rows))]
        n_batches = len(order) // bs
        for batch in order[: n_batches * bs].split(bs):
            x = augment(self.images[batch].permute(0, 3, 1, 2), self.recipe, self.streams, rows=batch)
            logits = self.model(normalize(x, self.mean, self.std))
            loss = F.cross_entropy(logits, self.labels[batch], label_smoothing=self.recipe.label_smoothing)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            running = 0.98 * running + 0.02 * loss.item()
        return n_batches * bs / (time.perf_counter() - start)


class StockFastai:
    def __init__(self, data: ImageData, recipe, folder: Path):
        write_files(data, folder, data.n_train)
        self.recipe, self.loaders = recipe, fastai_loaders(folder, recipe)
        model, loss = (
            create_model(recipe.model, len(data.classes)),
            CrossEntropyLossFlat(label_smoothing=recipe.label_smoothing),
        )
        optimizer = {"adam": Adam, "sgd": SGD}[recipe.optimizer]
        self.learn = Learner(self.loaders, model, loss, optimizer, metrics=accuracy, wd=recipe.wd)

    def epoch(self) -> float:
        clock = Clock()
        with self.learn.no_bar(), self.learn.no_logging():
            self.learn.fit_one_cycle(1, self.recipe.lr / self.recipe.div, cbs=clock)
        return len(self.loaders.train) * self.recipe.bs / clock.seconds


class Clock(Callback):
    """Times the training phase."""

    def before_train(self):
        self.start = time.perf_counter()

    def after_train(self):
        self.seconds = time.perf_counter() - self.start


class Convolutions:
    """The network's 3 x 3 convolutions one after the other, each forward and backward on inputs of its own."""

    def __init__(self, model: nn.Module, bs: int):
        self.layers, handles = [], []

        def keep(layer, inputs, _):
            x = torch.randn(bs, *inputs[0].shape[1:]).to(memory_format=torch.channels_last).requires_grad_()
            self.layers.append((layer, x))

        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels > 3:
                handles.append(module.register_forward_hook(keep))
        model.eval()(torch.randn(1, 3, 32, 32))
        for handle in handles:
            handle.remove()
        with FlopCounterMode(display=False) as counter:
            self.once()
        self.flops = counter.get_total_flops()

    def once(self):
        for layer, x in self.layers:
            y = layer(x)
            y.backward(y.detach())

    def gflops_per_second(self) -> float:
        return _rate(self.once, self.flops)


def gemm_gflops_per_second() -> float:
    a, b = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
    return _rate(lambda: a @ b, 2 * GEMM_SIDE**3)


def _rate(work, flops: int, least: float = 2.0) -> float:
    work()
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < least:
        work()
        n += 1
    return n * flops / (time.perf_counter() - start) / 1e9


def training_flops(model: nn.Module, bs: int) -> float:
    """Of an image, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(bs, 3, 32, 32)).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() / bs


class Elsewhere:
    """A contestant in a process of its own. The arguments make it there."""

    def __init__(self, *arguments):
        self.process = ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=arguments)

    def epoch(self) -> float:
        return self.process.submit(_epoch).result()


def _start(kind, *arguments):
    set_start_method(None, force=True)  # a DataLoader's workers start in the way that is usual here
    global contestant  # of this process
    contestant = kind(*arguments)


def _epoch() -> float:
    return contestant.epoch()


def measure(model: str, bs: int, rounds: int, n_images: int, folder: Path) -> dict:
    # At full size, as most of the work of a training is, and with an optimizer and a precision that all three have.
    same = {"start_size": 0, "flip": "random", "cutout": 0, "precision": "float32"}
    recipe = get_recipe(RECIPES[model], model=model, bs=bs, epochs=1, **same)
    if recipe.optimizer == "muon":
        recipe = replace(recipe, optimizer="sgd")
    data = random_images(n_images)
    contestants = {
        "ours": Elsewhere(Ours, data, recipe),
        "by_hand": Elsewhere(HandWritten, data, recipe),
        "fastai": Elsewhere(StockFastai, data, recipe, folder),
    }
    ReuseMemory().keep()  # here too, or the convolutions alone would be slower than in training
    network = create_model(model, 10)
    convolutions, flops = Convolutions(network, bs), training_flops(network, bs)
    speeds, rates = {name: [] for name in contestants}, {"convolutions": [], "gemm": []}
    orders = list(itertools.permutations(contestants))  # each finds memory and caches as the one before it left them
    for number in range(rounds + 1):
        order = orders[number % len(orders)]
        seen = {name: contestants[name].epoch() for name in order}
        seen |= {"convolutions": convolutions.gflops_per_second(), "gemm": gemm_gflops_per_second()}
        if number:  # the first round warms up
            for name, value in seen.items():
                (speeds if name in speeds else rates)[name].append(value)
            print(f"round {number}: " + ", ".join(f"{name} {value:.0f}" for name, value in seen.items()), flush=True)

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    achieved = [speed * flops / 1e9 for speed in speeds["ours"]]
    return {
        "model": model,
        "recipe": recipe.name,
        "batch_size": bs,
        "images_per_second": speeds,
        "over_by_hand": ratio(speeds["ours"], speeds["by_hand"]),
        "over_fastai": ratio(speeds["ours"], speeds["fastai"]),
        "training_gflop_per_image": flops / 1e9,
        "gflops_per_second": {"ours": achieved, **rates},
        "share_of_convolutions": ratio(achieved, rates["convolutions"]),
        "share_of_gemm": ratio(achieved, rates["gemm"]),
        "hardware": hardware("cpu"),
        "versions": versions(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small", choices=RECIPES)
    parser.add_argument("--bs", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6, help="best a multiple of 6: in so many orders they take turns")
    parser.add_argument("--images", type=int, default=6400, help="training images, of which some are held out")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.model, options.bs, options.rounds, options.images, Path(folder))
    rate = statistics.median(result["gflops_per_second"]["ours"])
    print(
        f"{options.model}, batch {options.bs}, medians of {options.rounds} rounds: "
        f"ours / by hand {result['over_by_hand']:.2f}, ours / fastai {result['over_fastai']:.2f}; {rate:.0f} GFLOP/s, "
        f"{result['share_of_convolutions']:.0%} of the convolutions alone, {result['share_of_gemm']:.0%} of matrix products"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
