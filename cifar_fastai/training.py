"""The training itself: fit_one_cycle inside a run folder, with history, checkpoints, early stopping and progress."""

import csv
import ctypes
import io
import math
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TrackerCallback
from fastai.learner import Learner

from cifar_fastai.checkpoints import BEST, load, save, write_whole
from cifar_fastai.distributed import TrainTogether
from cifar_fastai.errors import TrainingDiverged, UserError
from cifar_fastai.interrupts import Interrupts
from cifar_fastai.learner import fit
from cifar_fastai.recipes import Recipe
from cifar_fastai.resuming import Checkpoints, load_own, load_weights, weights
from cifar_fastai.terminal import in_words, progress_bar

HISTORY_COLUMNS = ("epoch", "train_loss", "valid_loss", "accuracy", "lr", "seconds")
MONITOR = {"monitor": "valid_loss", "comp": np.less}


@dataclass(frozen=True)
class Training:
    """What a training left behind, apart from the weights."""

    history: list[dict]  # one row an epoch, HISTORY_COLUMNS
    train_accuracies: list[float]  # of each epoch: share of the augmented images recognised while they were trained on
    best_epoch: int  # the epoch, counted from 1, whose weights the learner now has
    lrs: list[float]  # learning rate of every step
    seconds: float
    images_per_second: float  # training images, validation time not counted


def train(
    learn: Learner,
    recipe: Recipe,
    folder: Path,
    stream=None,
    cbs=(),
    *,
    resume=False,
    interrupts: Interrupts | None = None,
    config: dict | None = None,
) -> Training:
    """Train `learn`, leave history.csv and checkpoints/ in `folder`, and give the learner its best epoch's weights.

    Best means lowest validation loss. stream: where progress is shown, standard output by default. cbs: more callbacks.
    resume: go on from the last checkpoint in `folder`, if there is one; a training that is over is only loaded.
    interrupts: signals that end the training with Interrupted, once its state is saved. config: the run's configuration,
    kept in the checkpoints. Raises TrainingDiverged when the
    loss is no longer finite; the last finite checkpoints stay. Raises UserError when memory does not suffice, a checkpoint
    is damaged or one of several `learn.processes` has ended. Of these the first alone writes.
    """
    learn.path, learn.model_dir = folder, Path("checkpoints")
    saved = folder / "checkpoints"
    if learn.processes.first:
        saved.mkdir(exist_ok=True)
        if not resume:
            _check_room(learn, saved)
    interrupts = interrupts or Interrupts()
    history, progress = History(folder / "history.csv"), Progress(stream)
    checkpoints = Checkpoints(saved, load_own(saved, learn.processes) if resume else None, interrupts, config)
    keepers = [SaveBest(), EarlyStopping(recipe.patience, stream), checkpoints, ReuseMemory()]
    cbs = [*cbs, history, StopOnDivergence(), *keepers, progress, *([TrainTogether()] if learn.processes.size > 1 else [])]
    notebook_bars = [cb for cb in learn.cbs if isinstance(cb, ProgressCallback)]
    try:
        with learn.removed_cbs(notebook_bars), learn.no_logging(), interrupts.deferred():
            _fit(learn, recipe, cbs)
    finally:
        progress.close()
    return Training(
        history=history.rows,
        train_accuracies=history.train_accuracies,
        best_epoch=min(history.rows, key=lambda row: row["valid_loss"])["epoch"],
        lrs=[float(lr) for lr in learn.recorder.lrs],
        seconds=checkpoints.seconds,
        images_per_second=history.images / history.train_seconds,
    )


def callbacks(recipe: Recipe) -> list[Callback]:
    """For `fit(learn, recipe, cbs=callbacks(recipe))`: SaveModel and EarlyStopping as in a run, without its folder.

    The learner is given the weights of the epoch with the lowest validation loss, which are kept as best.pth in
    `learn.path / learn.model_dir` too; after the recipe's `patience` of epochs without a lower one the training ends.
    """
    return [SaveBest(), EarlyStopping(recipe.patience)]


def seconds_to_train(learn: Learner, recipe: Recipe) -> float:
    """About how long the training would take, by its first steps; 0 if there are too few in an epoch to tell.

    The learner is of no use afterwards. Raises UserError when memory does not suffice.
    """
    progress = Progress(io.StringIO())
    progress.TIMED = 5

    class Stop(Callback):
        order = Progress.order + 1

        def after_batch(self):
            if progress.estimate is not None:
                raise CancelFitException

        def before_validate(self):
            raise CancelFitException

    with learn.no_bar(), learn.no_logging():
        _fit(learn, recipe, [ReuseMemory(), progress, Stop()])
    return progress.estimate or 0.0


def _fit(learn: Learner, recipe: Recipe, cbs: list[Callback]) -> None:
    """`fit`, with a clear error where memory does not suffice, and as `clear_errors`."""
    try:
        with clear_errors(learn):
            return fit(learn, recipe, cbs)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    # The error is gone by here, and with it its traceback, which kept the batch in memory.
    learn.xb = learn.yb = learn.pred = learn.loss = learn.loss_grad = None
    bs = learn.dls.train.bs
    smaller = (bs >> halvings for halvings in range(1, bs.bit_length()))
    n = learn.processes.size
    fitting = next((each for each in smaller if each % n == 0 and _fits_memory(learn, each // n)), None)
    way_out = (
        f"one of {fitting} fits: try --bs {fitting}."
        if fitting
        else "and no smaller one was found to fit: try a smaller --model or --bs."
    )
    raise UserError(f"There is not enough memory for a batch of {bs} images, {way_out}")


def _check_room(learn: Learner, saved: Path) -> None:
    """Raises UserError if a disk has no room for the checkpoints of a network: the best, the last two and one being saved,
    each with an optimizer's state at least as large as the weights."""
    needed = 4 * 2 * sum(value.nbytes for value in learn.model.state_dict().values())
    free = shutil.disk_usage(saved).free
    if free < needed:
        raise UserError(
            f"There is no room for the checkpoints in {saved}, which take about {needed / 1e6:,.0f} MB: "
            f"{free / 1e6:,.0f} MB are free. Make room, or choose another --out."
        )


@contextmanager
def clear_errors(learn: Learner):
    """Raises UserError where torch finds, in the first step, that a batch is too small for BatchNorm to normalise over, and
    TrainingDiverged where a rate is beyond what a weight can hold."""
    try:
        yield
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        raise TrainingDiverged("A step is larger than a number can be: try a lower --lr or --wd.") from None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        least = 2 * learn.processes.size
        raise UserError(
            f"One image at a time is too little for this network's BatchNorm to normalise over: try --bs {least} or more."
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    words = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "bad_alloc",
        "could not create a primitive",  # oneDNN's, when there is no room for a kernel
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _fits_memory(learn: Learner, bs: int) -> bool:
    """Whether a batch of this many images can be had: forth and back through the network with a quarter more, for what
    else a training needs."""
    _return_memory()  # what an attempt before this one has left
    bs += bs // 4
    size = learn.dls.data.size
    learn.model.train()
    try:
        learn.model(torch.zeros(bs, 3, size, size, device=learn.dls.device)).sum().backward()
        return True
    except (RuntimeError, MemoryError, ValueError):  # ValueError: BatchNorm over a single value
        return False
    finally:
        learn.model.zero_grad()


class History(Callback):
    """Collects a row an epoch and keeps them in a CSV file."""

    order = 55  # after Recorder, which computes the figures
    kept = ("rows", "train_accuracies", "images", "train_seconds", "seconds", "right", "seen")
    apart = ("right", "seen")

    def __init__(self, path: Path):
        self.path = path

    def before_fit(self):
        self.rows, self.train_accuracies, self.images, self.train_seconds, self.seconds = [], [], 0, 0.0, 0.0
        self.right, self.seen = 0, 0

    @property
    def seconds(self) -> float:
        """Time spent on this epoch so far."""
        return self.before + time.perf_counter() - self.since

    @seconds.setter
    def seconds(self, value: float):
        self.before, self.since = value, time.perf_counter()

    def before_epoch(self):
        self.since = time.perf_counter()

    def after_batch(self):
        if self.training:
            self.seen += len(self.y)
            self.right += (self.pred.detach().argmax(dim=1) == self.y).sum()  # stays on the device until the epoch's end

    def after_train(self):
        self.train_seconds += self.seconds
        right, seen = self.processes.total(int(self.right), self.seen)
        self.images += int(seen)
        self.train_accuracies.append(right / seen)
        self.right, self.seen = 0, 0

    def after_epoch(self):
        train_loss, valid_loss, accuracy = (float(value) for value in self.recorder.values[-1])
        row = (self.epoch + 1, train_loss, valid_loss, accuracy, float(self.recorder.lrs[-1]), round(self.seconds, 2))
        self.rows.append(dict(zip(HISTORY_COLUMNS, row, strict=True)))
        self.seconds = 0.0
        if not self.processes.first:
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, HISTORY_COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, table.getvalue().encode())


class StopOnDivergence(Callback):
    """Ends the training with TrainingDiverged when a loss is no longer finite, before anything is saved.

    To read a loss is to wait for the device, so it is read every LOOK_STEPS steps and at the end of each epoch: one that was
    not finite stays so when smoothed. By steps and not by time, so that processes that train together end together.
    """

    order = 56  # after Recorder, before the checkpoints
    LOOK_STEPS = 20
    last_loss: float | None = None  # smoothed, as last read

    def after_batch(self):
        if self.training and (self.last_loss is None or self.iter % self.LOOK_STEPS == 0):
            self._look()

    def after_train(self):
        self._look()

    def _look(self):
        self.last_loss = float(self.smooth_loss)
        if not math.isfinite(self.last_loss):
            since = sum(not math.isfinite(loss) for loss in self.recorder.losses)
            self._stop("training", f"step {self.iter + 2 - since}")

    def after_epoch(self):
        if not math.isfinite(self.recorder.values[-1][1]):
            self._stop("validation", "the end")

    def _stop(self, which, where):
        kept = f" The checkpoints of earlier epochs are in {self.learn.path / self.learn.model_dir}." if self.epoch else ""
        raise TrainingDiverged(
            f"The {which} loss became NaN or infinite in epoch {self.epoch + 1}, at {where}: try a lower --lr.{kept}"
        )


class SaveBest(SaveModelCallback):
    """fastai's SaveModelCallback by validation loss, silent: the epoch's own line marks a new best."""

    kept = ("best",)

    def __init__(self):
        super().__init__(**MONITOR)

    @property
    def file(self) -> Path:
        return self.learn.path / self.learn.model_dir / BEST

    def after_epoch(self):
        TrackerCallback.after_epoch(self)
        if self.new_best and self.processes.first:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save(weights(self.learn), self.file)

    def after_fit(self):
        if self.best < math.inf:  # not after a training that ended in its first epoch
            load_weights(self.learn, self.processes.from_first(lambda: load(self.file)))


class ReuseMemory(Callback):
    """Keeps the memory of one step for the next, and gives back to the system after each epoch what is free.

    The C library's allocator (glibc's) returns large blocks to the system as soon as they are freed, and the next step then
    waits for the system to clear them anew, a page at a time: on a CPU that took up to a third of a step's time
    (benchmarks/allocator.py). What it keeps lies scattered, and over a long training would add up to several gigabytes.
    Other C libraries are left as they are.
    """

    order = Checkpoints.order + 1  # what was saved has just been in memory too
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
    LARGE = (1 << 30, 32 << 20)  # bytes from which a block is returned at once; older glibcs take the second alone
    USUAL = 128 << 10  # glibc's own, until it adapts to what is freed

    def before_fit(self):
        """Until one step has succeeded large blocks do go back, each by itself. Otherwise the free ones of an attempt that
        fails would keep their addresses, which a limit on these (`ulimit -v`) counts: in the end no batch would fit."""
        if mallopt := _of_glibc("mallopt"):
            mallopt(self.M_MMAP_THRESHOLD, self.USUAL)

    def after_batch(self):
        if self.iter == 0:
            self.keep()

    def keep(self):
        """From now on until the process ends."""
        mallopt = _of_glibc("mallopt")
        if mallopt and any(mallopt(self.M_MMAP_THRESHOLD, n_bytes) for n_bytes in self.LARGE):
            mallopt(self.M_TRIM_THRESHOLD, 2**31 - 1)

    def after_epoch(self):
        _return_memory()


def _return_memory() -> None:
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str):
    """A function of the C library, or None where there is none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


class EarlyStopping(EarlyStoppingCallback):
    """fastai's EarlyStoppingCallback by validation loss, once the learning rate has fallen to half of its peak.

    Before that a one-cycle schedule's loss says little: it is low while the learning rate warms up, wanders as long as that
    is high, and falls with it; to stop there would be to stop a good training. The end comes when the next epoch is about to
    begin: the last one is saved whole, and a training resumed after it ends there too.
    """

    kept = ("best", "wait")

    def __init__(self, patience: int, stream=None):
        super().__init__(**MONITOR, patience=patience)
        self.stream = stream

    def after_epoch(self):
        TrackerCallback.after_epoch(self)
        lrs = self.recorder.lrs
        self.wait = 0 if self.new_best or lrs[-1] > max(lrs) / 2 else self.wait + 1

    def before_epoch(self):
        if self.wait >= self.patience:
            print(f"stopped: no lower validation loss for {self.wait} epochs", file=self.stream or sys.stdout, flush=True)
            raise CancelFitException


class Progress(Callback):
    """A line an epoch; on a terminal also a bar with epoch, loss, accuracy and time left; once, an estimate of it all."""

    order = Checkpoints.order + 1  # an epoch that is told of is saved

    WARM_UP = 2  # batches not timed for the estimate: the first ones allocate
    TIMED = 20
    VALIDATION_COST = 1 / 3  # of a training image: no backward pass
    FROZEN_COST = 1 / 2  # likewise: no gradients of the body's weights

    def __init__(self, stream=None):
        self.stream, self.bar = stream, None

    def before_fit(self):
        self.out = self.stream or sys.stdout
        self.estimate = None  # seconds
        self.bar = self._start_bar() if self.out.isatty() else None

    def before_train(self):
        self.timed_from = None

    def after_batch(self):
        if not self.training:
            return
        if self.estimate is None:
            self._estimate()
        if self.bar:
            rows = self.history.rows
            accuracy = f"accuracy {rows[-1]['accuracy']:.1%}" if rows else ""
            text = f"epoch {self.epoch + 1}/{self.n_epoch}  loss {self.stop_on_divergence.last_loss:.3f}  {accuracy}"
            self.bar.update(self.task, advance=1, description=text)

    def after_epoch(self):
        row = self.history.rows[-1]
        self._say(
            f"epoch {row['epoch']:>{len(str(self.n_epoch))}}/{self.n_epoch}  train loss {row['train_loss']:.4f}  "
            f"valid loss {row['valid_loss']:.4f}  accuracy {row['accuracy']:.2%}  {row['seconds']:.1f} s"
            + ("  best so far" if self.save_best.new_best else "")
        )

    def close(self):
        if self.bar:
            self.bar.stop()

    def _start_bar(self):
        bar = progress_bar(self.out)
        total = self.n_epoch * len(self.dls.train)
        self.task = bar.add_task(f"epoch {self.first_epoch + 1}", total=total, completed=self.train_iter)
        bar.start()
        return bar

    def _estimate(self):
        last = min(self.WARM_UP + self.TIMED, len(self.dls.train)) - 1
        if self.iter == min(self.WARM_UP, last - 1):
            float(self.smooth_loss)  # waits for the device: what it has yet to do counts
            self.timed_from, self.first_timed = time.perf_counter(), self.iter
        if self.iter == last and self.timed_from is not None:  # it is None in an epoch too short, or begun in the middle
            float(self.smooth_loss)
            a_batch = (time.perf_counter() - self.timed_from) / (self.iter - self.first_timed)
            an_image = a_batch / (len(self.yb[0]) * self.processes.size)
            training, validation = self._costs()
            valid = len(self.dls.valid_ds) * an_image * self.VALIDATION_COST * validation
            epochs = self.n_epoch - self.epoch
            self.estimate = epochs * (len(self.dls.train) * a_batch * training + valid)
            self._say(f"about {in_words(self.estimate)} for {epochs} epochs, at {1 / an_image:,.0f} images a second")

    def _costs(self) -> tuple[float, float]:
        """What a training image costs on average from now on, and at most, in units of one now."""
        costs = [self._cost(epoch) for epoch in range(self.epoch, self.n_epoch)]
        return sum(costs) / len(costs) / costs[0], 1 / costs[0]

    def _cost(self, epoch: int) -> float:
        """What a training image costs in this epoch: less than 1 where images have yet to grow or a body is frozen."""
        resizing, freezing = (getattr(self.learn, name, None) for name in ("progressive_resizing", "freeze_body"))
        full = self.dls.data.size if resizing else 1
        area = (resizing.side(full, epoch / self.n_epoch) / full) ** 2 if resizing else 1
        return area * self.FROZEN_COST if freezing and epoch < freezing.epochs else area

    def _say(self, line):
        if self.bar:
            self.bar.console.print(line)
        else:
            print(line, file=self.out, flush=True)
