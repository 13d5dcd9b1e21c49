"""Training throughput: our whole `train()` against a hand-written PyTorch loop on the same work.

    python benchmarks/throughput.py [--model small] [--bs 128] [--rounds 5] [--json FILE]

Both train the same network on the same images with the same augmentation, loss and optimizer, and both keep a running
loss. They take turns, an epoch each, so that a machine whose speed wanders slows both; the figure is the median of the
rounds' ratios. Ours is timed with everything `train.py` does in its training phase: fastai's loop, scheduler, recorder,
history and progress line.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from cifar_fastai import create_learner, dataloaders, get_recipe
from cifar_fastai.artifacts import normalize
from cifar_fastai.augment import Streams, augment
from cifar_fastai.models import create_model
from cifar_fastai.run import hardware, versions
from cifar_fastai.sources import ImageData
from cifar_fastai.training import train


def random_images(n_train: int, n_test: int = 100) -> ImageData:
    random = np.random.default_rng(0)
    n = n_train + n_test
    images, labels = random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10
    return ImageData("random", images, labels, tuple("abcdefghij"), n_train, "lossless")


class HandWritten:
    """The loop that a PyTorch user would write, with the pipeline's own batch functions and nothing of fastai."""

    def __init__(self, data: ImageData, recipe, rows: list[int]):
        self.recipe, self.rows = recipe, torch.tensor(rows)
        self.images, self.labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        self.mean, self.std = data.channel_stats
        self.streams = Streams(0)
        self.model = create_model(recipe.model, len(data.classes))
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        if recipe.optimizer == "adam":
            self.optimizer = torch.optim.Adam(weights, recipe.lr, weight_decay=recipe.wd)
        else:
            self.optimizer = torch.optim.SGD(weights, recipe.lr, recipe.moms[0], weight_decay=recipe.wd, nesterov=True)

    def epoch(self) -> float:
        """Images a second over one epoch."""
        self.model.train()
        start, running, bs = time.perf_counter(), 0.0, self.recipe.bs
        order = self.rows[torch.randperm(len(self.rows))]
        n_batches = len(order) // bs
        for batch in order[: n_batches * bs].split(bs):
            x = augment(self.images[batch].permute(0, 3, 1, 2), self.recipe, self.streams)
            logits = self.model(normalize(x, self.mean, self.std))
            loss = F.cross_entropy(logits, self.labels[batch], label_smoothing=self.recipe.label_smoothing)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            running = 0.98 * running + 0.02 * loss.item()
        return n_batches * bs / (time.perf_counter() - start)


def measure(model: str, bs: int, rounds: int, images: int) -> dict:
    name = "fast" if model == "base" else "classic-adam"
    recipe = get_recipe(name, model=model, bs=bs, epochs=1)
    data = random_images(images)
    dls = dataloaders(data, recipe)
    learn = create_learner(dls, recipe, seed=0)
    by_hand = HandWritten(data, recipe, list(dls.train.dataset.items))

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "checkpoints").mkdir()
            return train(learn, recipe, Path(folder), io.StringIO()).images_per_second

    pairs = []
    for number in range(rounds + 1):
        turns = [ours, by_hand.epoch]
        speeds = {turn: turn() for turn in (turns if number % 2 else turns[::-1])}
        if number:  # the first round warms up
            pairs.append((speeds[ours], speeds[by_hand.epoch]))
            print(f"round {number}: ours {pairs[-1][0]:.0f}, by hand {pairs[-1][1]:.0f} images a second", flush=True)
    return {
        "model": model,
        "recipe": name,
        "batch_size": bs,
        "images_per_second": {"ours": [a for a, _ in pairs], "by_hand": [b for _, b in pairs]},
        "median_ratio": statistics.median(a / b for a, b in pairs),
        "hardware": hardware("cpu"),
        "versions": versions(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--bs", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=6400, help="training images, of which four fifths are trained on")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    result = measure(options.model, options.bs, options.rounds, options.images)
    print(f"{options.model}, batch {options.bs}: ours / by hand = {result['median_ratio']:.3f} (median of {options.rounds})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
