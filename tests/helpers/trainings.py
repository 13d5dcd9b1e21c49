"""Trainings that are cut into legs, and whether two of them are the same."""

import io

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from cifar_fastai import create_learner, dataloaders
from cifar_fastai.distributed import ALONE
from cifar_fastai.resuming import collect
from cifar_fastai.sources import ImageData
from cifar_fastai.training import train


def random_data(n_train=240, n_test=20):
    """Pictures with labels that say nothing about them: validation soon gets worse."""
    random = np.random.default_rng(0)
    n = n_train + n_test
    images, labels = random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 2
    return ImageData("noise", images, labels, ("heads", "tails"), n_train, "lossless")


class Cut(Callback):
    """Ends the training, as abruptly as a process can end itself, after a batch of an epoch."""

    order = 99

    def __init__(self, epoch, batch):
        self.where = (epoch, batch)

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.where:
            raise KeyboardInterrupt


def train_in_legs(folder, recipe, cuts, data="digits", subset=150, processes=ALONE):
    """A training cut short after each (epoch, batch) of `cuts`, and each time resumed by a new learner."""
    folder.mkdir()  # in which all legs leave their files
    for number, cut in enumerate([*cuts, None]):
        torch.manual_seed(number)  # what is not put back shows
        learn = create_learner(dataloaders(data, recipe, subset=subset), recipe, seed=1)
        learn.processes = processes
        if cut is None:
            keeper = Keeper()
            learn.add_cb(keeper)
            return learn, train(learn, recipe, folder, io.StringIO(), resume=number > 0), keeper.state
        learn.add_cb(Cut(*cut))
        with pytest.raises(KeyboardInterrupt):
            train(learn, recipe, folder, io.StringIO(), resume=number > 0)


class Keeper(Callback):
    """Notes all of a training's state at its end."""

    order = 60

    def after_fit(self):
        self.state = collect(self.learn)


def assert_equal(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "train_seconds"}:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{where}[{number}]")
    else:
        assert a == b, where


def assert_same_training(whole, cut):
    (learn, training, state), (again, training_again, state_again) = whole, cut
    assert_equal(state, state_again)
    assert_equal(learn.model.state_dict(), again.model.state_dict())
    assert_equal(training.history, [{**row, "seconds": 0} for row in training_again.history])
    assert (training.best_epoch, training.lrs) == (training_again.best_epoch, training_again.lrs)
    assert again.recorder.hps == learn.recorder.hps
