"""What each trick of a recipe is worth: the recipe as it is, and then without one after the other.

    CIFAR10_DATA=… python benchmarks/ablation.py [--recipe cpu] [--epochs 8] [--seeds 2] [--only NAME …] [--json FILE]

Accuracy on the validation split after the last epoch, plain and with TTA; the test split is never looked at. Every variant
is trained with the same seeds, so with the same validation split and initial weights. The file is rewritten after every
run, and what it holds already is not run again: several evenings can fill one table. A difference of less than twice the
standard error of the difference means nothing.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from cifar_fastai import create_learner, dataloaders, fit, get_recipe, metrics
from cifar_fastai.evaluation import predict
from cifar_fastai.run import git_commit, hardware, versions

VARIANTS = {
    "as it is": {},
    "random flip": {"flip": "random"},
    "no cutout": {"cutout": 0},
    "translation by 2": {"crop_pad": 2},
    "no label smoothing": {"label_smoothing": 0.0},
    "no lookahead": {"lookahead_steps": 0},
    "bias rate as any other": {"bias_lr_factor": 1.0},
    "no whitening": {"whiten": False, "whiten_bias_epochs": 0},
    "no identity start": {"dirac": False},
    "full size throughout": {"start_size": 0},
    "mixup": {"mixup": 0.2},
    "CutMix": {"cutmix": 1.0},
    "trivial augment": {"trivial_augment": True},
}


def measure(source, recipe, seed: int) -> dict:
    dls = dataloaders(source, recipe, seed)
    learn = create_learner(dls, recipe, seed=seed)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        fit(learn, recipe)
    seconds = time.perf_counter() - start
    valid = predict(learn, dls.valid)
    accuracy_tta = metrics.accuracy(valid.tta, valid.labels)
    return {"seed": seed, "valid_accuracy": valid.accuracy, "valid_accuracy_tta": accuracy_tta, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("CIFAR10_DATA", "digits"))
    parser.add_argument("--recipe", default="cpu")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="keep the figures in this file, and add to what is there")
    options = parser.parse_args()
    settings = {"data": Path(options.data).name, "recipe": options.recipe, "epochs": options.epochs}
    result = {**settings, "runs": {}, "hardware": hardware("cpu"), "versions": versions(), "git_commit": git_commit()}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
        assert settings.items() <= result.items(), f"{options.json} holds runs of other settings"
    for seed in range(options.seeds):
        for name in options.only:
            runs = result["runs"].setdefault(name, [])
            if seed in [run["seed"] for run in runs]:
                continue
            recipe = get_recipe(options.recipe, epochs=options.epochs, **VARIANTS[name])
            runs.append(measure(options.data, recipe, seed))
            accuracies = [run["valid_accuracy_tta"] for run in runs]
            seconds = statistics.mean(run["seconds"] for run in runs)
            print(f"{name:<24} {statistics.mean(accuracies):.2%} with TTA, n={len(runs)}, {seconds:.0f} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
