"""What befalls a run from outside, really done to it: signals, a full disk, a second process, too little memory."""

import csv
import json
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import ROOT, assert_clear_error, call, call_here, environment
from helpers.files import write_pictures

from cifar_fastai.checkpoints import LAST, load

TIMES = ("train_seconds", "images_per_second", "peak_memory_mb", "git_commit", "export")


def begin(*arguments, cwd, **kwargs):
    """Start train.py; its lines are to be read from `stdout`."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, arguments)],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **kwargs,
    )  # fmt: skip


def stop(process, after: str, number):
    """Send a signal once a line that starts with `after` is out."""
    for line in process.stdout:
        if line.startswith(after):
            break
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    return SimpleNamespace(returncode=process.returncode, stdout=output, stderr=errors)


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


@pytest.fixture(scope="module")
def ordeal(digits_run, tmp_path_factory):
    """The run of `digits_run` once more, cut short six times on the way; what came out each time."""
    cwd = tmp_path_factory.mktemp("ordeal")
    arguments = ("--data", "digits", "--recipe", "classic-sgd", "--epochs", "8", "--bs", "64", "--name", "digits")
    legs = {"SIGINT": stop(begin(*arguments, cwd=cwd), "epoch 1/8", signal.SIGINT)}
    (folder,) = (cwd / "runs").iterdir()
    command = ("--resume", folder.relative_to(cwd))
    before = load(folder / "checkpoints" / LAST)
    legs["full disk"] = call("train.py", *command, cwd=cwd, preexec_fn=no_room)
    after = load(folder / "checkpoints" / LAST)

    process = begin(*command, cwd=cwd)
    for line in process.stdout:
        if line.startswith("epoch 3/8"):
            break
    legs["second process"] = call("train.py", *command, cwd=cwd)
    pid = process.pid
    legs["SIGTERM"] = stop(process, "epoch", signal.SIGTERM)
    legs["SIGKILL"] = stop(begin(*command, cwd=cwd), "epoch 7/8", signal.SIGKILL)
    legs["in the evaluation"] = stop(begin(*command, cwd=cwd), "epoch 8/8", signal.SIGTERM)
    legs["to the end"] = call("train.py", *command, cwd=cwd)
    legs["once more"] = call("train.py", *command, cwd=cwd)
    return SimpleNamespace(cwd=cwd, folder=folder, command=command, legs=legs, before=before, after=after, pid=pid)


@pytest.mark.slow
@pytest.mark.parametrize(("leg", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("in the evaluation", 143)])
def test_a_signal_saves_and_tells_the_way_on(ordeal, leg, code):
    words = f"interrupted: the state is saved; go on with: python -m cifar_fastai train --resume {ordeal.command[1]}\n"
    assert (ordeal.legs[leg].returncode, ordeal.legs[leg].stderr) == (code, words)


def test_on_a_full_disk_the_earlier_checkpoint_stays(ordeal):
    words = (
        ".pth cannot be written (File too large)",
        "make room",
        f"python -m cifar_fastai train --resume {ordeal.command[1]}",
    )
    assert_clear_error(ordeal.legs["full disk"], 2, *words)
    assert (ordeal.before["epoch"], ordeal.before["batch"]) == (ordeal.after["epoch"], ordeal.after["batch"])
    assert all(torch.equal(value, ordeal.after["model"][name]) for name, value in ordeal.before["model"].items())
    assert not list((ordeal.folder / "checkpoints").glob("*.part"))


def test_a_second_process_is_refused(ordeal):
    assert_clear_error(ordeal.legs["second process"], 2, f"is in use by the process {ordeal.pid}", str(ordeal.command[1]))


def test_the_run_ends_as_if_nothing_had_been(ordeal, digits_run):
    assert ordeal.legs["to the end"].returncode == 0, ordeal.legs["to the end"].stderr
    assert "epoch 8/8" not in ordeal.legs["to the end"].stdout  # only the evaluation was left
    for name in ("best.pth", "last.pth"):
        found, expected = (load(run.folder / "checkpoints" / name) for run in (ordeal, digits_run))
        for key, value in expected["model"].items():
            assert torch.equal(found["model"][key], value)
    weights = [(run.cwd / "exports/digits/model.safetensors").read_bytes() for run in (ordeal, digits_run)]
    assert weights[0] == weights[1]
    rows = []
    for run in (ordeal, digits_run):
        with (run.folder / "history.csv").open() as file:
            rows.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and len(rows[0]) == 8
    assert figures(ordeal.folder) == figures(digits_run.folder)
    assert (ordeal.folder / "predictions.csv").read_text() == (digits_run.folder / "predictions.csv").read_text()
    assert (ordeal.folder / "samples.png").read_bytes() == (digits_run.folder / "samples.png").read_bytes()


def figures(folder):
    return {key: value for key, value in json.loads((folder / "metrics.json").read_text()).items() if key not in TIMES}


def test_a_finished_run_says_so(ordeal):
    done = ordeal.legs["once more"]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"run      {ordeal.command[1]} is finished; its export is exports/digits\n"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--epochs", "9"], 2, ["--epochs 9 where the run has 8"]),
        (
            ["--lr", "0.5", "--bs", "32", "--epochs", "8"],
            2,
            ["--lr 0.5 where the run has 0.1; --bs 32 where the run has 64"],
        ),
        (["--recipe", "fast", "--seed", "1"], 2, ["--recipe fast where the run has classic-sgd; --seed 1 where"]),
        (["--seeds", "2", "--out", "elsewhere"], 2, ["--seeds 2", "--out elsewhere where the run has runs"]),
        (["--data", "colours"], 3, ["colours holds other pixels"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_configuration_or_other_data_is_refused(ordeal, tmp_path, options, code, words):
    write_pictures(tmp_path / "colours")
    folder = shutil.copytree(ordeal.folder, tmp_path / "runs" / "digits")
    (folder / "metrics.json").unlink()
    assert_clear_error(call_here("train", "--resume", "runs/digits", *options, cwd=tmp_path), code, *words)


def test_what_cannot_be_resumed(ordeal, tmp_path):
    assert_clear_error(call_here("train", "--resume", "nowhere", cwd=tmp_path), 2, "nowhere is no run folder")
    folder = shutil.copytree(ordeal.folder, tmp_path / "damaged")
    (folder / "metrics.json").unlink()
    for name in ("last.pth", "previous.pth"):
        (folder / "checkpoints" / name).write_bytes(b"")
    done = call_here("train", "--resume", folder, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: No checkpoint in") and done.stderr.count("warning: ") == 2


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    code = (
        "import time\nfrom cifar_fastai.interrupts import Interrupts\n"
        "with Interrupts('words') as interrupts, interrupts.deferred():\n"
        "    print('ready', flush=True)\n"
        "    while not interrupts.pending: time.sleep(0.01)\n"
        "    print('noted', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for word, number in (("ready", signal.SIGINT), ("noted", signal.SIGTERM)):
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(number)
    assert process.wait(timeout=10) == 143
    process.stdout.close()


SCARCE = """
import resource, sys
from pathlib import Path
from cifar_fastai import run
from cifar_fastai.cli import main
status = Path("/proc/self/status").read_text()
used = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (used + 440_000_000,) * 2)
sys.exit(main("train", sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_too_little_memory_names_a_batch_that_fits(tmp_path):
    arguments = ["--data", "digits", "--recipe", "classic-sgd", "--epochs", "1"]
    done = call("-c", SCARCE, *arguments, "--bs", "1200", cwd=tmp_path)
    assert_clear_error(done, 2, "not enough memory for a batch of 1200 images", "try --bs ")
    fitting = re.search(r"--bs (\d+)", done.stderr)[1]
    again = call("-c", SCARCE, *arguments, "--bs", fitting, cwd=tmp_path)
    assert again.returncode == 0 and "epoch 1/1" in again.stdout, again.stderr


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_before_the_first_step_freed_memory_goes_back_with_its_addresses(tmp_path):
    code = (
        "import numpy as np\nfrom pathlib import Path\nfrom cifar_fastai.training import ReuseMemory\n"
        "def pages(): return int(Path('/proc/self/statm').read_text().split()[0])\n"
        "ReuseMemory().before_fit()\n"
        "before, small = pages(), []\n"
        "for size in (30, 20, 10):\n"  # a glibc left alone takes the second from the heap, where the small one holds it
        "    large = np.ones(size << 20, np.uint8)\n"
        "    small.append(np.ones(1000))\n"
        "    del large\n"
        "print((pages() - before) * 4096 >> 20)\n"
    )
    done = call("-c", code, cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout) < 5, done.stdout + done.stderr


def test_the_same_command_twice_gives_the_same_bits(tmp_path):
    command = ("--data", "digits", "--recipe", "classic-adam", "--subset", "300", "--epochs", "2", "--deterministic")
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        done = call("train.py", *command, "--name", "same", cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / name / "runs").iterdir()
        with (folder / "history.csv").open() as file:
            history = [{**row, "seconds": ""} for row in csv.DictReader(file)]
        files = folder / "predictions.csv", tmp_path / name / "exports/same/model.safetensors"
        found.append((figures(folder), history, *(path.read_bytes() for path in files)))
    assert found[0] == found[1]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """benchmarks/resume.py, which does it 30 times, for every recipe and callback."""
    command = (ROOT / "benchmarks" / "resume.py", "--kills", "2", "--recipes", "early stopping", "--json", "result.json")
    done = call(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "result.json").read_text())["trainings"]["early stopping"]
    assert figures["kills"] == 2 and figures["different"] == [] and figures["epochs"] < 8


def test_a_signal_between_seeds_leaves_the_spread_of_those_before(tmp_path):
    command = ("--data", "digits", "--recipe", "classic-sgd", "--subset", "300", "--epochs", "3", "--bs", "16")
    process = begin(*command, "--seed", "5", "--seeds", "4", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("seed     6"):
            break
    stopped = stop(process, "epoch 1/3", signal.SIGTERM)
    first, second = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    (path,) = (tmp_path / "runs").glob("*.json")
    summary = json.loads(path.read_text())
    accuracy = json.loads((first / "metrics.json").read_text())["test_accuracy"]
    assert summary["n"] == 1 and summary["mean"]["test_accuracy"] == accuracy and summary["std"]["test_accuracy"] is None
    assert [row["seed"] for row in summary["runs"]] == [5]
    way_on, rest = stopped.stderr.splitlines()
    assert stopped.returncode == 143 and way_on.endswith(f"train --resume runs/{second.name}")
    assert rest.startswith(f"Finished: 1 of 4 seeds, their spread is in runs/{path.name}. Then train the rest with: ")
    assert f"{' '.join(command)} --seed 5 --seeds 4 --seed 7 --seeds 2; `compare` " in rest


def test_one_seed_that_remains_keeps_its_name():
    from pathlib import Path

    from cifar_fastai.run import RunOptions, _remaining

    options = RunOptions(source="digits", seed=5, out=Path("runs"), command="python train.py --seeds 3 --seed 5")
    assert " --seed 7 --seeds 1 --name some-seed7; " in _remaining(options, "some", 6, 7)
    assert _remaining(options, "some", 7, 7) == "" and "--seed 6 --seeds 2; " in _remaining(options, "some", 5, 7)


def test_no_room_for_the_checkpoints_is_known_before_the_first_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_fastai.training.shutil.disk_usage", lambda _: SimpleNamespace(free=15_000_000))
    arguments = ("--data", "digits", "--recipe", "classic-sgd", "--subset", "200", "--epochs", "1")
    done = call_here("train", *arguments, cwd=tmp_path)
    assert_clear_error(done, 2, "no room for the checkpoints in runs/", "26 MB: 15 MB are free", "another --out")
    assert "epoch" not in done.stdout
