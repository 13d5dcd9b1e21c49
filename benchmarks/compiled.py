"""Whether torch.compile pays in training: a step, forward and backward, as it is and compiled, in turn.

    python benchmarks/compiled.py [--device cpu] [--bs 128] [--rounds 15] [--json FILE]

Above 1 the compiled network is the faster one. What compiling itself takes is left out.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from cifar_fastai.models import MODELS, create_model
from cifar_fastai.run import git_commit, hardware, versions


def seconds(network, images, labels) -> float:
    """Of a step, its result awaited."""
    since = time.perf_counter()
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    loss.item()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - since


def measure(name: str, device: str, bs: int, rounds: int) -> dict:
    network = create_model(name, 10).to(device, memory_format=torch.channels_last)
    compiled = torch.compile(copy.deepcopy(network))
    images = torch.randn(bs, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (bs,), device=device)
    pairs = [(seconds(network, images, labels), seconds(compiled, images, labels)) for _ in range(rounds + 2)][2:]
    ratio = statistics.median(plain / fast for plain, fast in pairs)
    return {"plain_over_compiled": ratio, "seconds_of_steps": pairs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bs", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    result = {"batch_size": options.bs, "hardware": hardware(options.device), "versions": versions()}
    result["git_commit"] = git_commit()
    for name in MODELS:
        result[name] = measure(name, options.device, options.bs, options.rounds)
        print(f"{name:<6} compiled, a step is {result[name]['plain_over_compiled']:.2f} times as fast", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
