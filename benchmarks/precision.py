"""What bfloat16 gains on this CPU: images a second of `train()` in it, against float32, in one run.

    python benchmarks/precision.py [--models base deep] [--rounds 6] [--json FILE]

Each network is trained by the recipe it is for, an epoch in turn: in float32, in bfloat16 with the filters' gradients left
to oneDNN, and in bfloat16 as it is (convolutions.py). Figures are medians of the rounds' ratios. What is known
so far is of a CPU that multiplies whole tiles (AMX).
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from throughput import Ours, random_images

from cifar_fastai import convolutions, get_recipe
from cifar_fastai.learner import is_grouped
from cifar_fastai.run import hardware, versions

TRAININGS = {  # network, side of the images in pixels: recipe, training images and some more
    ("small", 32): ("classic-sgd", 2200),
    ("base", 32): ("cpu", 1200),
    ("deep", 24): ("cpu", 1200),
    ("deep", 32): ("cpu", 900),
    ("large", 32): ("cpu", 600),
    ("resnet18", 96): ("transfer", 150),
    ("efficientnet_lite0", 96): ("transfer", 150),  # timm's; its convolutions over neighbouring pixels are depthwise
}


def measure(model: str, side: int, rounds: int) -> dict:
    name, n_images = TRAININGS[model, side]
    recipe = get_recipe(name, model=model, epochs=1)
    if name == "transfer":
        recipe = replace(recipe, pretrained=False, frozen_epochs=0, input_size=side)
    elif side != 32:
        recipe = replace(recipe, start_size=side, grow_pct=0.99)
    data = random_images(n_images)
    float32, bfloat16 = (Ours(data, replace(recipe, precision=precision)) for precision in ("float32", "bfloat16"))
    speeds: dict[str, list[float]] = {"float32": [], "bfloat16_onednn": [], "bfloat16": []}
    for number in range(rounds + 1):
        seen = {"float32": float32.epoch(), "bfloat16": bfloat16.epoch()}
        with mock.patch.object(convolutions, "NARROW", 0):
            seen["bfloat16_onednn"] = bfloat16.epoch()
        if number:  # the first round warms up
            for kind, speed in seen.items():
                speeds[kind].append(speed)
    gains = {
        f"{kind}_over_float32": statistics.median(a / b for a, b in zip(speeds[kind], speeds["float32"], strict=True))
        for kind in ("bfloat16_onednn", "bfloat16")
    }
    grouped = is_grouped(float32.learn.model)  # for which "auto" leaves bfloat16 alone
    return {"model": model, "side": side, "recipe": name, "grouped": grouped, "images_per_second": speeds, **gains}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = sorted({model for model, _ in TRAININGS})
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    rows = []
    for model, side in [training for training in TRAININGS if training[0] in options.models]:
        row = measure(model, side, options.rounds)
        rows.append(row)
        print(
            f"{model} at {side} pixels: bfloat16 / float32 {row['bfloat16_over_float32']:.2f}, "
            f"with oneDNN's own gradients {row['bfloat16_onednn_over_float32']:.2f}",
            flush=True,
        )
    if options.json:
        able = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 cannot tell
        capabilities = {key: able.get(key) for key in ("amx_bf16", "avx512_bf16")}
        result = {"trainings": rows, **capabilities, "hardware": hardware("cpu"), "versions": versions()}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
