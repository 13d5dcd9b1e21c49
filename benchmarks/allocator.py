"""Whether it pays to keep the memory of one training step for the next (`training.ReuseMemory`), on a CPU with glibc.

    python benchmarks/allocator.py [--rounds 5] [--json FILE]

Every measurement is a process of its own, since an allocator's settings cannot be taken back; with and without take turns.
Above 1 the steps that keep their memory are the faster ones.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from cifar_fastai.models import create_model
from cifar_fastai.run import git_commit, hardware, versions
from cifar_fastai.training import ReuseMemory

CASES = (("small", 32, 128), ("base", 32, 128), ("base", 32, 1024), ("deep", 24, 128), ("deep", 32, 128))
STEPS, WARM_UP = 6, 2


def steps(model: str, side: int, bs: int, reuse: bool) -> dict:
    """Seconds and page faults of a step, forward and backward, in this process: the medians of some."""
    if reuse:
        ReuseMemory().keep()
    network = create_model(model, 10)
    images = torch.randn(bs, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (bs,))
    seen = []
    for _ in range(WARM_UP + STEPS):
        faults, since = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        seen.append((time.perf_counter() - since, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    seconds, faults = (statistics.median(values) for values in zip(*seen[WARM_UP:], strict=True))
    return {"seconds": seconds, "page_faults": faults}


def elsewhere(*arguments) -> dict:
    """What `steps` gives in a process of its own."""
    command = [sys.executable, __file__, "--steps", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(model: str, side: int, bs: int, rounds: int) -> dict:
    """Of a model, images of `side` pixels and batches of `bs`."""
    pairs = [(elsewhere(model, side, bs, False), elsewhere(model, side, bs, True)) for _ in range(rounds)]
    ratio = statistics.median(plain["seconds"] / kept["seconds"] for plain, kept in pairs)
    return {"model": model, "side": side, "batch_size": bs, "plain_over_kept": ratio, "plain_and_kept": pairs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--steps", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps:
        return print(json.dumps(steps(*options.steps)))
    cases = []
    for model, side, bs in CASES:
        cases.append(measure(model, side, bs, options.rounds))
        print(
            f"{model}, {side} pixels, batches of {bs}: a step is {cases[-1]['plain_over_kept']:.2f} times as fast",
            flush=True,
        )
    if options.json:
        about = {"hardware": hardware("cpu"), "versions": versions(), "git_commit": git_commit()}
        options.json.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
