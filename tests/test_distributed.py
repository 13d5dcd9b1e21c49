"""Two real processes that train one network, on CPUs. Run as a program, this file is what each of them does."""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback
from helpers.commands import ROOT, call, environment
from helpers.trainings import assert_equal, assert_same_training, train_in_legs
from torch import nn

from cifar_fastai import cli, create_learner, dataloaders, get_recipe, resuming
from cifar_fastai.distributed import ALONE, Processes, joined
from cifar_fastai.errors import Interrupted, UserError
from cifar_fastai.interrupts import Interrupts
from cifar_fastai.resuming import load_own
from cifar_fastai.run import resume
from cifar_fastai.training import train

AUGMENTATION = {
    "flip": "random", "rotate": 10.0, "perspective": 0.2, "brightness": 0.2, "trivial_augment": True, "cutout": 8,
}  # fmt: skip
SGD = get_recipe("classic-sgd", precision="float32")  # whose sums are almost the same in any order
ALIKE = replace(SGD, bs=24, epochs=2, lr=0.02, lookahead_steps=2, label_smoothing=0.1, **AUGMENTATION)
AMOUNTS = ("rotate", "translate", "scale", "perspective", "brightness", "contrast", "saturation")
SUBSET = 163  # of which 17 to validate with: no multiple of two
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DROPOUT = get_recipe("classic-adam", bs=24, epochs=3, mixup=0.2)


def train_alike(folder, processes):
    """Train a network in which no image has to do with another, so that how a batch is divided should not matter."""
    learn = create_learner(dataloaders("digits", ALIKE, subset=SUBSET), ALIKE, seed=1)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.GroupNorm(4, 32)]
    learn.model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    learn.processes = processes
    folder.mkdir()
    training = train(learn, ALIKE, folder, io.StringIO())
    figures = [[row[key] for key in ("train_loss", "valid_loss", "accuracy", "lr")] for row in training.history]
    return {
        "losses": [float(loss) for loss in learn.recorder.losses],
        "history": figures,
        "train_accuracies": training.train_accuracies,
        "model": {name: value.clone() for name, value in learn.model.state_dict().items()},
    }


def one_step_learner():
    """A learner with BatchNorm whose whole training is one batch of 90 images as they are."""
    recipe = replace(SGD, bs=90, epochs=1, flip="off", **dict.fromkeys(AMOUNTS, 0.0))
    learn = create_learner(dataloaders("digits", recipe, subset=100), recipe, seed=1)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)]
    learn.model = nn.Sequential(*layers)
    return learn


def gradients_and_statistics(model):
    statistics = {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}
    return statistics | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class NoteStep(Callback):
    """Notes what the optimizer is about to use."""

    order = 30

    def before_step(self):
        self.noted = gradients_and_statistics(self.model)


def take_one_step(folder, processes):
    learn, note = one_step_learner(), NoteStep()
    learn.processes = processes
    folder.mkdir()
    train(learn, get_recipe("classic-sgd", epochs=1), folder, io.StringIO(), cbs=[note])
    return note.noted


class SignalToSecond(Callback):
    """Asks one process alone to stop."""

    def after_batch(self):
        if self.training and self.iter == 2 and self.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_by_signal(folder, processes):
    """How the training ended, and after which batch."""
    learn = create_learner(dataloaders("digits", DROPOUT, subset=SUBSET), DROPOUT, seed=1)
    learn.processes = processes
    folder.mkdir()
    with pytest.raises(Interrupted) as caught, Interrupts("words") as interrupts:
        train(learn, DROPOUT, folder, io.StringIO(), cbs=[SignalToSecond()], interrupts=interrupts)
    state = load_own(folder / "checkpoints", processes)
    return caught.value.exit_code, str(caught.value), state["epoch"], state["batch"]


def main(out: Path):
    with joined("cpu") as processes:
        own = out / str(processes.rank)
        own.mkdir()
        found = {"alike": train_alike(own / "alike", processes), "step": take_one_step(own / "step", processes)}
        whole = train_in_legs(own / "whole", DROPOUT, [], subset=SUBSET, processes=processes)
        resuming.SAVE_SECONDS = 0  # after every batch
        cuts = [(0, 1), (1, 0), (2, 4)]
        assert_same_training(whole, train_in_legs(own / "cut", DROPOUT, cuts, subset=SUBSET, processes=processes))
        found |= {"state": whole[2], "stopped": stop_by_signal(own / "stopped", processes)}
        try:
            processes.check_same(f"what process {processes.rank} has")
        except UserError as error:
            found["error"] = str(error)
        found |= {"environment": os.environ.get("WORLD_SIZE"), "accelerate": "accelerate" in sys.modules}
        print("written by", processes.rank)
        torch.save(found, out / f"{processes.rank}.pth")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes did together, and what one does alone."""
    out = tmp_path_factory.mktemp("together")
    done = call(*TORCHRUN, __file__, out, cwd=out)
    assert done.returncode == 0, done.stderr
    both = [torch.load(out / f"{rank}.pth", weights_only=True) for rank in (0, 1)]
    return SimpleNamespace(out=out, both=both, alone=train_alike(out / "alone", ALONE), printed=done.stdout)


def test_two_processes_follow_one(together):
    """To the rounding of sums: with every augmentation, drawn for each image as it is drawn by one process."""
    alone, (first, _) = together.alone, together.both
    assert first["alike"]["losses"] == pytest.approx(alone["losses"], rel=1e-4) and len(alone["losses"]) == 12
    assert first["alike"]["train_accuracies"] == alone["train_accuracies"]
    for row, expected in zip(first["alike"]["history"], alone["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    for name, value in alone["model"].items():
        assert torch.allclose(first["alike"]["model"][name], value, atol=1e-4), name


def test_both_hold_the_same_network_and_losses_and_draw_their_own_masks_and_mixtures(together):
    first, second = (found["state"] for found in together.both)
    assert_equal(together.both[0]["alike"], together.both[1]["alike"])
    for part in ("model", "opt", "recorder", "losses", "smooth_loss", "hypers", "augmentation"):
        assert_equal(first[part], second[part])
    assert not torch.equal(first["generators"]["torch"], second["generators"]["torch"])
    assert first["callbacks"]["mix_images"] != second["callbacks"]["mix_images"]


def test_one_writes_and_talks(together):
    assert sorted(path.name for path in (together.out / "0" / "whole").rglob("*.pth")) == [
        "best.pth",
        "last.pth",
        "previous.pth",
    ]
    assert not [path for path in (together.out / "1").rglob("*") if path.is_file()]
    assert together.printed == "written by 0\n"


def test_a_signal_to_one_stops_all_after_the_same_batch(together):
    assert [found["stopped"] for found in together.both] == [(143, "words", 0, 3)] * 2


def test_other_data_or_options_are_noticed_by_all(together):
    words = "Process 1 has other data or options than process 0: start all of them with the same command, on the same data."
    assert [found["error"] for found in together.both] == [words, words]


def test_fastai_does_not_notice_and_accelerate_is_not_loaded(together):
    """fastai would gather every loss, by its own count of processes."""
    assert [found["environment"] for found in together.both] == [None, None]
    assert [found["accelerate"] for found in together.both] == [False, False]


def test_with_batch_norm_a_step_is_the_mean_of_those_of_the_parts(together):
    """Each part normalised by itself, worked out here part by part."""
    learn, parts = one_step_learner(), []
    x, y = learn.dls.train.one_batch()
    start = {name: value.clone() for name, value in learn.model.state_dict().items()}
    for rank in (0, 1):
        learn.model.load_state_dict(start)
        learn.model.train().zero_grad()
        learn.loss_func(learn.model(x.as_subclass(torch.Tensor)[rank::2]), y[rank::2]).backward()
        parts.append(gradients_and_statistics(learn.model))
    for name, mean in together.both[0]["step"].items():
        assert torch.allclose(mean, (parts[0][name] + parts[1][name]) / 2, atol=1e-6), name
    assert not torch.allclose(parts[0]["1.running_mean"], parts[1]["1.running_mean"], atol=1e-3)
    assert_equal(*(found["step"] for found in together.both))


class Pair:
    """Two processes started by hand, so that one of them can be hurt; what they say is kept."""

    def __init__(self, *arguments, cwd):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in ("0", "1"):
            place = environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(command, cwd=cwd, env=place, **pipes))

    def hurt_second(self, after: str, number) -> list:
        """Send it a signal once the first has printed a line that begins with `after`; how both ended, and how fast."""
        for line in self.processes[0].stdout:
            if line.startswith(after):
                break
        self.processes[1].send_signal(number)
        since, ends = time.monotonic(), []
        for process in self.processes:
            output, errors = process.communicate(timeout=60)
            ends.append(SimpleNamespace(returncode=process.returncode, stdout=output, stderr=errors))
        self.seconds = time.monotonic() - since
        return ends


@pytest.fixture(scope="module")
def ordeal(tmp_path_factory):
    """A run of two processes, of which the second is killed; one tries to go on, and two do."""
    cwd = tmp_path_factory.mktemp("ordeal")
    arguments = ("--data", "digits", "--recipe", "classic-adam", "--epochs", "4", "--subset", "300", "--name", "two")
    pair = Pair(*arguments, cwd=cwd)
    killed = pair.hurt_second("epoch 2/4", signal.SIGKILL)
    (folder,) = (cwd / "runs").iterdir()
    command = ("--resume", folder.relative_to(cwd))
    with pytest.raises(UserError) as alone:
        resume(folder)
    finished = call(*TORCHRUN, "train.py", *command, cwd=cwd)
    ends = {"killed": killed, "alone": alone.value, "finished": finished}
    return SimpleNamespace(cwd=cwd, folder=folder, command=command, seconds=pair.seconds, **ends)


def way_on(ordeal):
    return f"go on with: torchrun --standalone --nproc-per-node 2 -m cifar_fastai train --resume {ordeal.command[1]}"


@pytest.mark.slow
def test_a_killed_process_ends_the_other_soon_with_a_clear_error(ordeal):
    first, second = ordeal.killed
    assert second.returncode == -signal.SIGKILL and ordeal.seconds < 30
    words = ("Another process of this training has ended", f"What was saved last is whole: {way_on(ordeal)}")
    assert first.returncode == 2 and "Traceback" not in first.stderr
    assert all(word in first.stderr for word in words), first.stderr


def test_one_alone_cannot_go_on_for_two(ordeal):
    command = f"`torchrun --standalone --nproc-per-node 2 -m cifar_fastai train --resume {ordeal.folder}`"
    assert str(ordeal.alone) == f"{ordeal.folder} was begun by 2 processes, and as many have to go on: {command}."


def test_together_they_end_the_run(ordeal):
    assert ordeal.finished.returncode == 0, ordeal.finished.stderr
    assert ordeal.finished.stdout.count("epoch 4/4") == 1 and ordeal.finished.stdout.count("\nexport ") == 1
    with (ordeal.folder / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == list("1234")
    metrics = json.loads((ordeal.folder / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["epochs_run"] == 4
    assert (ordeal.cwd / "exports" / "two" / "model.safetensors").is_file()
    assert len(list((ordeal.cwd / "runs").iterdir())) == 1


def test_what_cannot_be_divided_is_refused(tmp_path):
    recipe = get_recipe("classic-adam", bs=64, epochs=1)
    learn = create_learner(dataloaders("digits", recipe), recipe)
    learn.processes = Processes(0, 3)
    with pytest.raises(UserError, match="64 images cannot be divided among 3 processes: choose another --bs"):
        train(learn, recipe, tmp_path, io.StringIO())


def test_wrong_starts_are_refused(monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "none"}.items():
        monkeypatch.setenv(name, value)
    for command, option, what in (
        ("train", "--seeds=2", "--seeds"),
        ("find-lr", "--bs=64", "find-lr"),
        ("tune", "--trials=1", "tune"),
    ):
        assert cli.main(command, ["--data", "digits", option]) == 2
        assert capsys.readouterr().err.startswith(f"error: {what} is for one process")
    with pytest.raises(UserError, match="Process 1 of 2 cannot reach the others"), joined("cpu"):
        pass
    for device, words in (("mps", "give --device cpu"), ("cuda", "no GPU for process 100 of this machine")):
        monkeypatch.setenv("LOCAL_RANK", "99")
        with pytest.raises(UserError, match=words), joined(device):
            pass


def test_a_process_started_plainly_is_alone():
    with joined("cpu") as processes:
        assert processes is ALONE and not torch.distributed.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
