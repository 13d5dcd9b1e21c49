"""All that decides the rest of a training, collected into plain data and put back: a resumed training is the same one.

A callback with a state names the attributes that make it up in `kept`, and in `apart` those of them that differ where
several processes train together. Generators count as state, and so do the order of the images and the position in it.
"""

import random
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import to_device
from fastcore.foundation import L
from torch import Tensor

from cifar_fastai import checkpoints
from cifar_fastai.augment import Augment
from cifar_fastai.distributed import Processes
from cifar_fastai.errors import UserError, first_line
from cifar_fastai.interrupts import Interrupts

SAVE_SECONDS = 300  # between two saves within an epoch
RECORDED, SMOOTHED = ("lrs", "iters", "values"), ("val", "count")  # of fastai's Recorder, and of its smoothed loss


class Checkpoints(Callback):
    """Saves the state after each epoch and, within long ones, every SAVE_SECONDS; starts from one; stops when asked to.

    folder: of the checkpoints. state: to go on from, as `checkpoints.load_last` gives it; None begins a training.
    interrupts: a pending signal ends the training after the batch, or the validation, that is under way. config: of the run,
    saved with the state.
    """

    order = 64  # after everything that has a state
    run_valid = False  # validation is short, and leaves nothing to be saved in the middle of it
    kept = ("seconds",)

    def __init__(
        self, folder: Path, state: dict | None = None, interrupts: Interrupts | None = None, config: dict | None = None
    ):
        self.folder, self.start, self.interrupts = folder, state, interrupts or Interrupts()
        self.config = {"config": config} if config else {}

    @property
    def seconds(self) -> float:
        """Time spent on the training so far, by all processes that had a part in it."""
        return time.perf_counter() - self.started

    @seconds.setter
    def seconds(self, value: float):
        self.started = time.perf_counter() - value

    def before_fit(self):
        self.seconds, self.done, self.saved = 0.0, 0, time.monotonic()
        self.learn.first_epoch = 0
        if self.start:
            put_back(self.learn, self.start)
            self.learn.first_epoch, self.done = self.start["epoch"], self.start["batch"]

    def before_train(self):
        self.epoch_order = self.dls.train.rng.getstate()
        self.dls.train.skip = self.done
        if self.done:
            self.learn.pct_train = self.start["pct_train"]

    def before_batch(self):
        if self.dls.train.skip:
            self.dls.train.skip = 0
            _set_generators(self.start["generators"])  # beginning to iterate has drawn from torch's
        self.learn.iter += self.done

    def after_batch(self):
        due = self.interrupts.pending is not None or time.monotonic() - self.saved >= SAVE_SECONDS
        # The last batch waits for the epoch's end; with broken weights the next loss ends the training.
        if self.processes.highest(due) and self.iter + 1 < self.n_iter and self._is_finite():
            self._save(self.epoch, self.iter + 1, self.epoch_order)

    def after_train(self):
        self.start, self.done = None, 0

    def after_epoch(self):
        self._save(self.epoch + 1, 0, self.dls.train.rng.getstate())

    def _save(self, epoch: int, batch: int, order: tuple):
        state = {"epoch": epoch, "batch": batch, "order": order, **self.config, **collect(self.learn)}
        others = self.processes.gather(_apart(self.learn, state))[1:]
        if self.processes.first:
            checkpoints.save_last({**state, "others": others}, self.folder)
        self.saved = time.monotonic()
        if number := self.processes.highest(self.interrupts.pending or 0):  # a signal to one is a signal to all
            self.interrupts.pending = number
            self.interrupts.stop_if_pending()

    def _is_finite(self) -> bool:
        return all(value.isfinite().all() for value in self.model.state_dict().values())


def load_own(folder: Path, processes: Processes) -> dict | None:
    """The newest state in a folder of checkpoints, as `Checkpoints` saved it for this process; None if there is none.

    Raises UserError if all are damaged, or if they are of another number of processes.
    """
    state = processes.from_first(lambda: checkpoints.load_last(folder))
    if state is None:
        return None
    others = state.get("others", [])
    if len(others) + 1 != processes.size:
        then = Processes(size=len(others) + 1)
        count = "one process" if then.size == 1 else f"{then.size} processes"
        way_on = then.way_on(folder.parent)
        raise UserError(f"{folder.parent} was begun by {count}, and as many have to go on: `{way_on}`.")
    if not processes.first:
        own = others[processes.rank - 1]
        state["generators"] = own["generators"]
        for name, attributes in own["callbacks"].items():
            state["callbacks"][name].update(attributes)
    return state


def _apart(learn: Learner, state: dict) -> dict:
    """What of a state is this process's own, where several train together: a callback's attributes named in `apart`."""
    callbacks = state["callbacks"]
    own = {cb.name: {name: callbacks[cb.name][name] for name in getattr(type(cb), "apart", ())} for cb in learn.cbs}
    return {"generators": state["generators"], "callbacks": {name: values for name, values in own.items() if values}}


def weights(learn: Learner) -> dict:
    """The network's weights and buffers, and the optimizer's state."""
    return _plain({"model": learn.model.state_dict(), "opt": learn.opt.state_dict()})


def load_weights(learn: Learner, state: dict) -> None:
    """Raises UserError if the state is another network's."""
    with _of_this_training():
        learn.model.load_state_dict(state["model"])
        learn.opt.load_state_dict(state["opt"])


@contextmanager
def _of_this_training():
    """Makes a UserError of what is wrong with a state that another training has saved, or that somebody else has made."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"The checkpoint is not of this training ({type(error).__name__}: {reason}); train anew.") from None


def collect(learn: Learner) -> dict:
    """The state of a training under way, but for its position, as tensors and Python's own types."""
    recorder = learn.recorder
    state = {
        "train_iter": learn.train_iter,
        "pct_train": learn.pct_train,
        "callbacks": {cb.name: {name: getattr(cb, name) for name in _kept(cb)} for cb in learn.cbs if _kept(cb)},
        "recorder": {name: getattr(recorder, name) for name in RECORDED},
        "losses": [float(loss) for loss in recorder.losses],  # thousands of tensors would take seconds to save
        "smooth_loss": {name: getattr(recorder.smooth_loss, name) for name in SMOOTHED},
        "hypers": learn.param_scheduler.hps,
        "augmentation": [tfm.random_state for tfm in _augmentations(learn)],
        "generators": _generators(),
    }
    return weights(learn) | _plain(state)


def put_back(learn: Learner, state: dict) -> None:
    """Give a learner that has just begun to fit what `collect` found. Raises UserError if it is another training's."""
    load_weights(learn, state)
    with _of_this_training():
        learn.train_iter = state["train_iter"]
        for cb in learn.cbs:  # by the callbacks' names, not by the state's: it decides values, and of these attributes alone
            for attribute in _kept(cb):
                setattr(cb, attribute, to_device(state["callbacks"][cb.name][attribute], learn.dls.device))
        recorder = learn.recorder
        vars(recorder).update(
            {name: state["recorder"][name] for name in RECORDED}, losses=list(torch.tensor(state["losses"]))
        )
        vars(recorder.smooth_loss).update({name: state["smooth_loss"][name] for name in SMOOTHED})
        learn.param_scheduler.hps = state["hypers"]
        for tfm, random_state in zip(_augmentations(learn), state["augmentation"], strict=True):
            tfm.random_state = random_state
        learn.dls.train.rng.setstate(state["order"])
        _set_generators(state["generators"])


def _kept(cb: Callback) -> tuple[str, ...]:
    return getattr(type(cb), "kept", ())  # of the class: what a callback lacks, fastai looks for in the learner


def _augmentations(learn: Learner) -> list[Augment]:
    return [tfm for tfm in learn.dls.train.after_batch.fs if isinstance(tfm, Augment)]


def _generators() -> dict:
    """States of the global random generators."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_generators(states: dict) -> None:
    setters = {"python": random.setstate, "numpy": np.random.set_state, "torch": torch.set_rng_state,
               "cuda": torch.cuda.set_rng_state, "mps": torch.mps.set_rng_state}  # fmt: skip
    for name, state in states.items():
        setters[name](state)


def _plain(value):
    """`value` out of plain tensors and Python's own types, which is all that a safe load takes."""
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | L):
        return [_plain(each) for each in value]
    return value
