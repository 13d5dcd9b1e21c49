"""What each trick of a recipe is worth: the recipe as it is, and then without one after the other.

    CIFAR10_DATA=… python benchmarks/ablation.py [--recipe FILE] [--images 15000] [--epochs 8] [--seeds 2] [--json FILE]

So that a table takes hours and not weeks, the trainings are short: --images of the training split, --epochs epochs. They
are judged, plain and with TTA, on --judge other images of the training split; the test split is never looked at. A trick
that needs long trainings to pay can look worse here than it is.

Every variant is trained with the same seeds, so on the same images from the same initial weights, and compared with the
recipe as it is, in float32, seed by seed. The file is rewritten after every run, and what it holds already is not run again:
several evenings can fill one table.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from cifar_fastai import create_learner, dataloaders, fit, get_recipe, metrics
from cifar_fastai.cache import load_data
from cifar_fastai.evaluation import predict
from cifar_fastai.run import git_commit, hardware, versions
from cifar_fastai.sources import ImageData
from cifar_fastai.training import ReuseMemory

BASE = "as it is"
VARIANTS = {
    BASE: {},
    "SGD instead of Muon": {"optimizer": "sgd"},
    "half of Muon's rate": {"muon_lr_factor": 0.1},
    "a third convolution": {"model": "deep"},
    "random flip": {"flip": "random"},
    "translation by 4": {"crop_pad": 4},
    "no label smoothing": {"label_smoothing": 0.0},
    "no lookahead": {"lookahead_steps": 0},
    "bias rate as any other": {"bias_lr_factor": 1.0},
    "no whitening": {"whiten": False, "whiten_bias_epochs": 0},
    "no identity start": {"dirac": False},
    "full size throughout": {"start_size": 0},
    "cutout of 8 pixels": {"cutout": 8},
    "mixup": {"mixup": 0.2},
    "CutMix": {"cutmix": 1.0},
    "trivial augment": {"trivial_augment": True},
    "bfloat16": {"precision": "bfloat16"},
}


def without_test_split(data: ImageData, n: int, n_judge: int, seed: int) -> ImageData:
    """n images of the training split to train on, and n_judge others of it in place of the test split."""
    rows = np.random.default_rng(seed).permutation(data.n_train)[: n + n_judge]
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows], n_train=n)


def measure(data: ImageData, recipe, seed: int) -> dict:
    dls = dataloaders(data, recipe, seed)
    learn = create_learner(dls, recipe, seed=seed)
    start = time.process_time()
    with learn.no_bar(), learn.no_logging():
        fit(learn, recipe, [ReuseMemory()])
    seconds = time.process_time() - start
    judged = predict(learn, dls.test)
    tta = metrics.accuracy(judged.tta, judged.labels)
    figures = {"accuracy": judged.accuracy, "accuracy_tta": tta, "cpu_seconds": seconds}
    return {"seed": seed, **figures, "git_commit": git_commit(), "hardware": hardware("cpu")}


def line(name: str, runs: list[dict], base: list[dict]) -> str:
    """A row of the table: accuracy with TTA, and how much more than the recipe as it is by the same seeds."""
    by_seed = {run["seed"]: run["accuracy_tta"] for run in base}
    gains = [run["accuracy_tta"] - by_seed[run["seed"]] for run in runs]
    accuracy = statistics.mean(run["accuracy_tta"] for run in runs)
    seconds = statistics.mean(run["cpu_seconds"] for run in runs)
    each = ", ".join(f"{gain:+.2%}" for gain in gains)
    return f"{name:<24} {accuracy:.2%} with TTA, {statistics.mean(gains):+.2%} ({each}), {seconds:.0f} s of the processor"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("CIFAR10_DATA", "digits"))
    parser.add_argument("--recipe", default="short")
    parser.add_argument("--images", type=int, default=15_000)
    parser.add_argument("--judge", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="keep the figures in this file, and add to what is there")
    options = parser.parse_args()
    settings = {"data": Path(options.data).name, "recipe": Path(options.recipe).name}
    settings |= {name: getattr(options, name) for name in ("images", "judge", "epochs")}
    result = {**settings, "runs": {}, "hardware": hardware("cpu"), "versions": versions()}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
        assert settings.items() <= result.items(), f"{options.json} holds runs of other settings"
    source = load_data(options.data, 32)
    names = [BASE, *(name for name in options.only if name != BASE)]  # what the others are compared with comes first
    for seed in range(options.seeds):
        data = without_test_split(source, options.images, options.judge, seed)
        for name in names:
            runs = result["runs"].setdefault(name, [])
            if seed not in [run["seed"] for run in runs]:
                fields = {"epochs": options.epochs, "precision": "float32"} | VARIANTS[name]
                recipe = get_recipe(options.recipe, **fields)
                runs.append(measure(data, recipe, seed))
                if options.json:
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
            print(line(name, runs, result["runs"][BASE]), flush=True)


if __name__ == "__main__":
    main()
