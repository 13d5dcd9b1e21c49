"""What training together costs: the messages of a step between processes, beside the step itself.

    torchrun --standalone --nproc-per-node 2 benchmarks/together.py [--json FILE]

Medians over 15 repetitions. The message of a step holds a float for each weight; the short one agrees on saving.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from cifar_fastai.distributed import joined
from cifar_fastai.models import MODELS, count_parameters, create_model
from cifar_fastai.run import git_commit, hardware, versions

REPETITIONS, IMAGES = 15, 128


def median_ms(work) -> float:
    times = []
    for _ in range(REPETITIONS + 2):
        since = time.perf_counter()
        work()
        times.append((time.perf_counter() - since) * 1000)
    return statistics.median(times[2:])  # the first two allocate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with joined("cpu") as processes:
        images = torch.randn(IMAGES // processes.size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (len(images),))
        print(f"{processes.size} processes, {torch.get_num_threads()} threads each; {IMAGES} images a step, divided")
        result = {"processes": processes.size, "images": IMAGES, "short_ms": median_ms(lambda: processes.highest(1))}
        print(f"short message  {result['short_ms']:8.2f} ms")
        for name in MODELS:
            model = create_model(name, 10)
            message = torch.zeros(count_parameters(model))
            step = median_ms(lambda model=model: F.cross_entropy(model(images), labels).backward())
            sent = median_ms(lambda message=message: processes.average(message))
            result[name] = {"mb": message.nbytes / 1e6, "message_ms": sent, "step_ms": step, "share": sent / step}
            print(f"{name:<6} {message.nbytes / 1e6:6.1f} MB: message {sent:8.2f} ms, forward and backward {step:8.1f} ms")
        if options.json and processes.first:
            result |= {"hardware": hardware("cpu"), "versions": versions(), "git_commit": git_commit()}
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
