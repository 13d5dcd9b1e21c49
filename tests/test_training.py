import csv
import io
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from helpers.commands import ROOT, call
from helpers.trainings import random_data
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_fastai import create_learner, dataloaders, get_recipe
from cifar_fastai.checkpoints import load
from cifar_fastai.errors import TrainingDiverged
from cifar_fastai.learner import FreezeBody, ProgressiveResizing
from cifar_fastai.training import HISTORY_COLUMNS, Progress, ReuseMemory, StopOnDivergence, seconds_to_train, train


def start(tmp_path, data=None, **fields):
    recipe = get_recipe("classic-adam", **{"bs": 64, "epochs": 3, **fields})
    learn = create_learner(dataloaders(data or "digits", recipe, subset=None if data else 300), recipe, seed=1)
    return learn, recipe, tmp_path


def test_history_and_checkpoints(tmp_path):
    stream = io.StringIO()
    learn, recipe, folder = start(tmp_path)
    training = train(learn, recipe, folder, stream)
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == HISTORY_COLUMNS and [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["valid_loss"]) for row in rows] == [row["valid_loss"] for row in training.history]
    losses = [row["valid_loss"] for row in training.history]
    assert training.best_epoch == 1 + int(np.argmin(losses))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best.pth", "last.pth", "previous.pth"]
    assert len(training.lrs) == 3 * len(learn.dls.train)
    assert training.seconds > 0 and training.images_per_second > 0
    assert load(folder / "checkpoints" / "best.pth").keys() == {"model", "opt"}
    assert load(folder / "checkpoints" / "last.pth")["epoch"] == 3
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("about ") and "images a second" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == ["1/3", "2/3", "3/3"]
    assert all("train loss" in line and "valid loss" in line and "accuracy" in line for line in lines[1:])
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_training_accuracy_by_counting(tmp_path):
    class Count(Callback):
        order, right = 80, []

        def after_batch(self):
            if self.training:
                self.right += [(self.epoch, bool(flag)) for flag in self.pred.argmax(dim=1) == self.yb[0]]

    learn, recipe, folder = start(tmp_path)
    learn.add_cb(Count())
    training = train(learn, recipe, folder, io.StringIO())
    expected = [np.mean([flag for epoch, flag in Count.right if epoch == number]) for number in range(3)]
    assert training.train_accuracies == expected and training.train_accuracies[2] > 0.3


def test_the_best_epoch_is_reloaded_not_the_last(tmp_path):
    class Spoil(Callback):
        """Ruins the weights once the second epoch is over and saved."""

        order = 90

        def after_epoch(self):
            if self.epoch == 1:
                for parameter in self.model.parameters():
                    parameter.data.mul_(5).add_(0.5)

    learn, recipe, folder = start(tmp_path, epochs=3, bs=16, precision="float32")  # validated later as in the training
    learn.add_cb(Spoil())
    training = train(learn, recipe, folder, io.StringIO())
    assert training.best_epoch < 3
    with learn.no_bar():
        assert learn.validate()[0] == pytest.approx(training.history[training.best_epoch - 1]["valid_loss"], rel=1e-4)


@pytest.mark.parametrize(("bs", "n_steps"), [(16, 7), (90, 2), (200, 1)])
def test_the_time_is_reckoned_by_a_few_steps(tmp_path, bs, n_steps):
    class Count(Callback):
        steps = 0

        def after_batch(self):
            self.steps += 1

    learn, recipe, _ = start(tmp_path, bs=bs)
    learn.add_cb(count := Count())
    assert (seconds_to_train(learn, recipe) > 0) == (n_steps > 1) and count.steps == n_steps


def test_early_stopping_waits_for_a_falling_learning_rate_and_says_so(tmp_path):
    """On labels by chance the first epochs are the best, and many more go by before the learning rate has fallen by half."""
    stream = io.StringIO()
    learn, recipe, folder = start(tmp_path, random_data(), epochs=20, patience=3, lr=0.01, flip="off", rotate=0.0)
    training = train(learn, recipe, folder, stream)
    rates = [row["lr"] for row in training.history]
    n_high = sum(rate > max(training.lrs) / 2 or n < rates.index(max(rates)) for n, rate in enumerate(rates))
    assert training.best_epoch + 3 < n_high
    assert len(training.history) == n_high + 3 < 20
    assert "stopped: no lower validation loss for 3 epochs" in stream.getvalue()


def test_divergence_stops_and_keeps_the_last_finite_checkpoint(tmp_path):
    class Poison(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1:
                self.learn.xb = (self.xb[0] * float("nan"),)

    learn, recipe, folder = start(tmp_path)
    learn.add_cb(Poison())
    with pytest.raises(TrainingDiverged, match=r"^The training loss .* epoch 2, at step 1: try a lower --lr. The check"):
        train(learn, recipe, folder, io.StringIO())
    for name in ("best", "last"):
        weights = load(folder / "checkpoints" / f"{name}.pth")["model"]
        assert all(value.isfinite().all() for value in weights.values())
    assert len((folder / "history.csv").read_text().splitlines()) == 2


def test_callbacks_of_a_run_leave_the_learner_with_it(tmp_path):
    learn, recipe, folder = start(tmp_path, epochs=1)
    before = [type(cb) for cb in learn.cbs]
    train(learn, recipe, folder, io.StringIO())
    assert sorted(map(str, before)) == sorted(str(type(cb)) for cb in learn.cbs)


def test_the_estimate_knows_that_images_grow():
    progress = Progress(io.StringIO())
    progress.learn = SimpleNamespace(
        progressive_resizing=ProgressiveResizing(16, 0.5), dls=SimpleNamespace(data=random_data()), epoch=0, n_epoch=4
    )
    sides = (16, 24, 32, 32)
    assert progress._costs() == (np.mean(np.square(sides)) / 16**2, 4.0)
    progress.learn = SimpleNamespace(epoch=0, n_epoch=4)
    assert progress._costs() == (1.0, 1.0)


def test_the_estimate_knows_that_a_body_thaws():
    progress = Progress(io.StringIO())
    progress.learn = SimpleNamespace(freeze_body=FreezeBody(1), epoch=0, n_epoch=4)
    assert progress._costs() == ((0.5 + 3) / 4 / 0.5, 2.0)


with_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone"
)


@with_glibc
def test_freed_memory_goes_back_to_the_system():
    """Blocks freed between blocks in use stay with the process until it is told to return them."""

    def resident():
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith("RssAnon"))

    blocks = [bytearray(100_000) for _ in range(2000)]
    del blocks[1::2], blocks[1::2], blocks[1::2]
    before = resident()
    ReuseMemory().after_epoch()
    assert resident() < before - 100


@with_glibc
def test_a_step_reuses_the_memory_of_the_last_one(tmp_path):
    """Memory that comes from the system anew comes page by page, each with a fault."""
    code = (
        "import io, resource, sys; from pathlib import Path; from fastai.callback.core import Callback\n"
        "from cifar_fastai import create_learner, dataloaders, get_recipe; from cifar_fastai.training import train\n"
        "class Faults(Callback):\n"
        "    seen = []\n"
        "    def before_batch(self): self.seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "recipe = get_recipe('fast', bs=128, epochs=1)\n"
        "learn = create_learner(dataloaders('digits', recipe), recipe, seed=1)\n"
        "train(learn, recipe, Path(sys.argv[1]), io.StringIO(), cbs=[Faults()])\n"
        "print(sorted(after - before for before, after in zip(Faults.seen[2:7], Faults.seen[3:8]))[2])"
    )
    n_bytes = 128 * 64 * 31 * 31 * 4  # what the first convolution of a group gives
    assert int(call("-c", code, tmp_path, cwd=ROOT).stdout) < n_bytes / os.sysconf("SC_PAGE_SIZE") / 10


READING = {"item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__int__", "__bool__", "__index__", "__array__"}


class PretendedDevice(TorchFunctionMode):
    """Takes some tensors, and all that is computed from them, for ones on a GPU; notes what would have a CPU wait for it."""

    def __init__(self, tensors):
        super().__init__()
        self.waits = []
        self.put(tensors)

    def put(self, values):
        for each in tree_leaves(values):
            if isinstance(each, torch.Tensor):
                each.on_device = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(getattr(each, "on_device", False) for each in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        with ValuesNeeded() as inside:
            result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in READING or inside.operators:
            self.waits.append(name)
        if name == "cpu":
            return result.clone()
        self.put(result)
        return result


class ValuesNeeded(TorchDispatchMode):
    """Notes operators that need the values of tensors, not only their shapes, to go on."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("classic-sgd", {}),
        ("cpu", {"optimizer": "muon", "lookahead_steps": 5}),
        ("classic-adam", {"mixup": 0.2, "cutmix": 1.0, "precision": "bfloat16"}),
    ],
)
def test_a_training_step_waits_for_nothing(tmp_path, monkeypatch, name, fields):
    """However many steps an epoch has, the CPU needs values from the device equally often."""
    monkeypatch.setattr(StopOnDivergence, "LOOK_STEPS", 100)
    monkeypatch.setattr("cifar_fastai.data.EVAL_BATCH", 20)  # each batch of a validation takes its values: as many of either
    waits = []
    for bs in (40, 20):
        (folder := tmp_path / str(bs)).mkdir()
        recipe = get_recipe(name, bs=bs, epochs=1, **fields)
        learn = create_learner(dataloaders("digits", recipe, subset=300), recipe, seed=1)
        images_and_labels = learn.dls.train.dataset.tls[0].tfms.fs[0].tensors(learn.dls.device)
        with PretendedDevice([images_and_labels, list(learn.model.state_dict(keep_vars=True).values())]) as device:
            train(learn, recipe, folder, io.StringIO())
        assert learn.smooth_loss.on_device
        waits.append(Counter(device.waits))
    assert waits[0] == waits[1] and waits[0]["cpu"]
    with device:
        float(learn.smooth_loss)
    assert device.waits[-1] == "__float__"
