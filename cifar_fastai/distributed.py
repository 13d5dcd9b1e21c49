"""Several processes that train one network: each computes its part of every batch, and all take the same step.

They are started by torchrun or `accelerate launch`, on one machine or several, and hold the same weights, statistics and
losses after every step: whatever a callback decides by them, all decide. fastai's own way (`fastai.distributed`) needs a
GPU, lets the batch grow with the number of processes, and wraps the network in DistributedDataParallel, which does not bear
layers that are frozen at first.
"""

import os
import shlex
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
from fastai.callback.core import Callback
from torch import Tensor
from torch import distributed as dist

from cifar_fastai.augment import Augment
from cifar_fastai.errors import ProcessLost, UserError, first_line

TIMEOUT = timedelta(minutes=10)  # with a process that lives and says nothing; the end of one is noticed at once


class Processes:
    """The processes of a training; this one is number `rank` of `size`, counted from 0.

    Every method that speaks of all has to be called by all, and raises ProcessLost if one of them has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def way_on(self, folder: Path) -> str:
        """The command that goes on with a run by as many processes on one machine."""
        launcher = ["python"] if self.size == 1 else ["torchrun", "--standalone", "--nproc-per-node", str(self.size)]
        return shlex.join([*launcher, "-m", "cifar_fastai", "train", "--resume", str(folder)])

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over all."""
        self._add_up(tensor)
        tensor /= self.size

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self._add_up(sums)
        return sums.tolist()

    def highest(self, number: int) -> int:
        """The highest of all."""
        if self.size == 1:
            return number
        box = torch.tensor(int(number))
        with _noticing_ends():
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def gather(self, value) -> list:
        """Everyone's value, by rank."""
        values = [value] * self.size
        if self.size > 1:
            with _noticing_ends():
                dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable):
        """What the first one makes, or its UserError."""
        if self.size == 1:
            return make()
        box = [None]
        if self.first:
            try:
                box = [make()]
            except UserError as error:
                box = [error]
        with _noticing_ends():
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def check_same(self, value: str) -> None:
        """Raises UserError if not all have the same value."""
        values = self.gather(value)
        if strangers := [str(rank) for rank, other in enumerate(values) if other != values[0]]:
            raise UserError(
                f"Process {', '.join(strangers)} has other data or options than process 0: start all of them with the same "
                "command, on the same data."
            )

    def _add_up(self, tensor: Tensor) -> None:
        if self.size > 1:
            with _noticing_ends():
                dist.all_reduce(tensor)


ALONE = Processes()


def n_started() -> int:
    """How many processes were started to train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1  # some clusters set the size for all programs


def check_alone(what: str) -> None:
    """Raises UserError if several processes were started to train together, which this is not for."""
    if n_started() > 1:
        raise UserError(f"{what} is for one process: start it without torchrun or accelerate.")


@contextmanager
def joined(device: str):
    """Within it, this process is one of those that torchrun or `accelerate launch` started: gives the Processes.

    All but the first are silent on standard output. A process that was started plainly is alone, and nothing happens. Raises
    UserError if the others are out of reach, or if there is no GPU for each.
    """
    size = n_started()
    if size == 1:
        yield ALONE
        return
    rank = int(os.environ["RANK"])
    _choose_gpu(device, int(os.environ.get("LOCAL_RANK", rank)))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"Process {rank} of {size} cannot reach the others ({first_line(error)}).") from None
    hidden = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE")}  # or fastai would gather every loss by itself
    try:
        with Path(os.devnull).open("w") as nowhere, nullcontext() if rank == 0 else redirect_stdout(nowhere):
            yield Processes(rank, size)
    finally:
        os.environ.update(hidden)
        dist.destroy_process_group()


def _choose_gpu(device: str, place: int) -> None:
    """place: number of this process on its machine."""
    if device == "mps":
        raise UserError("Several processes train on CUDA devices or on CPUs, not on mps: start one, or give --device cpu.")
    if device == "cuda":
        n_gpus = torch.cuda.device_count()
        if place >= n_gpus:
            raise UserError(f"There is no GPU for process {place + 1} of this machine, which has {n_gpus}: start no more.")
        torch.cuda.set_device(place)


@contextmanager
def _noticing_ends():
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"Another process of this training has ended or fell silent ({first_line(error)}).") from None


class TrainTogether(Callback):
    """Makes one training of that of all `learn.processes`: each has its part of every batch, and all make the same step.

    What one process would do, they do too, up to the rounding of sums, except where images of a batch have to do with each
    other: BatchNorm normalises, and mixup and CutMix mix, within the part of each process.
    """

    order = 20  # before all that keeps weights or records losses

    def before_fit(self):
        processes = self.processes
        if (bs := self.dls.train.bs) % processes.size:
            raise UserError(
                f"A batch of {bs} images cannot be divided among {processes.size} processes: choose another --bs."
            )
        self._divide(processes.rank, processes.size)
        if not processes.first:
            torch.manual_seed(torch.initial_seed() + processes.rank)  # dropout's masks; the weights are drawn already
        weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(processes.from_first(lambda: weights))

    def before_step(self):
        """Average the gradients, and with them, in one message, BatchNorm's running statistics and the loss."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        parts = [*gradients, *statistics, self.loss.detach()]
        message = torch.cat([part.flatten() for part in parts])
        self.processes.average(message)
        for part, mean in zip(parts, message.split([part.numel() for part in parts]), strict=True):
            part.copy_(mean.view_as(part))

    def after_validate(self):
        for metric in (self.recorder.loss, *self.metrics):
            metric.total, metric.count = self.processes.total(float(metric.total), metric.count)

    def after_fit(self):
        self._divide(0, 1)

    def _divide(self, rank: int, size: int):
        for dl in self.dls.loaders:
            dl.share = slice(rank, None, size)
        for tfm in self.dls.train.after_batch.fs:
            if isinstance(tfm, Augment):
                tfm.share = (rank, size)
