"""What training together costs: the messages of a step between processes, beside the step itself.

    torchrun --standalone --nproc-per-node 2 benchmarks/together.py

Medians over 5 repetitions. The message of a step holds a float for each weight; the short one agrees on saving.
"""

import statistics
import time

import torch
from torch.nn import functional as F

from cifar_fastai.distributed import joined
from cifar_fastai.models import MODELS, count_parameters, create_model

REPETITIONS, IMAGES = 5, 128


def median_ms(work) -> float:
    times = []
    for _ in range(REPETITIONS + 2):
        since = time.perf_counter()
        work()
        times.append((time.perf_counter() - since) * 1000)
    return statistics.median(times[2:])  # the first two allocate


def main():
    with joined("cpu") as processes:
        images = torch.randn(IMAGES // processes.size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (len(images),))
        print(f"{processes.size} processes, {torch.get_num_threads()} threads each; {IMAGES} images a step, divided")
        print(f"short message  {median_ms(lambda: processes.highest(1)):8.2f} ms")
        for name in MODELS:
            model = create_model(name, 10)
            message = torch.zeros(count_parameters(model))
            step = median_ms(lambda model=model: F.cross_entropy(model(images), labels).backward())
            sent = median_ms(lambda message=message: processes.average(message))
            print(f"{name:<6} {len(message) * 4 / 1e6:6.1f} MB: message {sent:8.2f} ms, forward and backward {step:8.1f} ms")


if __name__ == "__main__":
    main()
