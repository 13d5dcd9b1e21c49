"""Kills trainings with SIGKILL at random moments, resumes each until it is done, and compares it with one left alone.

    python benchmarks/resume.py [--kills 30] [--recipes NAME …] [--seed S] [--json FILE]

Each kill hits somewhere between the making of the run folder and the end of the export. A checkpoint is saved after every
batch, and every second kill waits for a save: those after which a half-written file lies there are counted. Compared are
all weights and the optimizer's state, history, metrics and test predictions (times aside), by torch.equal and ==.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cifar_fastai.checkpoints import load
from cifar_fastai.run import git_commit, hardware, versions

SMALL = {"bs": 24, "epochs": 4}
SCHEDULED = {**SMALL, "lr": 0.05, "lookahead_steps": 2, "whiten_bias_epochs": 2}
TRAININGS = {  # recipe, and fields of it
    "classic-adam": ("classic-adam", SMALL),
    "classic-sgd": ("classic-sgd", SMALL),
    "early stopping": ("classic-adam", {**SMALL, "epochs": 8, "patience": 1, "lr": 1.0}),
    "fast": ("fast", SCHEDULED),
    "cpu": ("cpu", SCHEDULED),
    "mixup and CutMix": ("cpu", {**SCHEDULED, "mixup": 0.2, "cutmix": 1.0, "trivial_augment": True}),
}
TIMES = ("train_seconds", "images_per_second", "peak_memory_mb")
PROGRAM = """
import json, sys
from pathlib import Path
from cifar_fastai import get_recipe, resuming
from cifar_fastai.run import RunOptions, resume, run
resuming.SAVE_SECONDS = 0
name, fields, folder = json.loads(sys.argv[1])
if folder: resume(Path(folder))
else: run(get_recipe(name, **fields), RunOptions(source="digits", subset=150, name="proof"))
"""


def start(cwd: Path, training: tuple, folder=None) -> subprocess.Popen:
    """A process that trains, or goes on with what is in `folder`; it has just said where its run folder is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", PROGRAM, json.dumps([*training, folder and str(folder)])]
    process = subprocess.Popen(arguments, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("run "):
            break
    return process


def finish(process: subprocess.Popen) -> float:
    """Wait for the end; the seconds that the training took."""
    began = ended = time.perf_counter()
    for line in process.stdout:
        if line.startswith("epoch"):
            ended = time.perf_counter()
    assert process.wait() == 0
    return ended - began


def wait(process: subprocess.Popen, folder: Path, seconds: float, for_save: bool) -> None:
    """For some time, and on for a file that is being written, if wanted; or for the end of the process."""
    time.sleep(seconds)
    since = time.time_ns()
    while for_save and process.poll() is None and not half_written(folder, since):
        time.sleep(0.0005)


def half_written(folder: Path, since: int) -> bool:
    """Whether a file lies there that was begun after `since`, in nanoseconds, and not finished."""
    try:
        return any(path.stat().st_mtime_ns >= since for path in folder.rglob("*.part"))
    except FileNotFoundError:  # finished just now
        return False


def outcome(cwd: Path) -> dict:
    """All that a run left, times aside."""
    (folder,) = (cwd / "runs").iterdir()
    with (folder / "history.csv").open() as file:
        history = [{**row, "seconds": None} for row in csv.DictReader(file)]
    metrics = json.loads((folder / "metrics.json").read_bytes())
    return {
        "history": history,
        "metrics": {key: value for key, value in metrics.items() if key not in TIMES},
        "predictions": (folder / "predictions.csv").read_text(),
        "best": load(folder / "checkpoints" / "best.pth"),
        "last": {key: load(folder / "checkpoints" / "last.pth")[key] for key in ("model", "opt", "generators", "order")},
        "export": (cwd / "exports" / "proof" / "model.safetensors").read_bytes(),
    }


def differences(a, b, where="") -> list[str]:
    """Where two outcomes are not the same."""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        keys = a.keys() | b.keys()
        return [each for key in keys for each in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [where]
        return [
            each for i, (one, other) in enumerate(zip(a, b, strict=True)) for each in differences(one, other, f"{where}/{i}")
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def prove(name: str, kills: int, chance: random.Random, scratch: Path) -> dict:
    """Kill trainings of one kind, up to five times each, until that many kills are spent."""
    training = TRAININGS[name]
    reference = scratch / "reference"
    reference.mkdir()
    seconds = finish(start(reference, training))
    expected = outcome(reference)
    figures = {"kills": 0, "in a save": 0, "after the training": 0, "runs": 0, "different": []}
    while figures["kills"] < kills:
        cwd = scratch / str(figures["runs"])
        cwd.mkdir()
        process = start(cwd, training)
        (folder,) = (cwd / "runs").iterdir()
        for _ in range(min(5, kills - figures["kills"])):
            began = time.time_ns()
            wait(process, folder, chance.uniform(0, seconds / 2), for_save=chance.random() < 0.5)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            figures["kills"] += 1
            figures["in a save"] += half_written(folder, began)
            figures["after the training"] += (folder / "loss_curve.png").exists()
            process = start(cwd, training, folder.relative_to(cwd))
        finish(process)
        figures["runs"] += 1
        figures["different"] += differences(expected, outcome(cwd))
    return {**figures, "epochs": len(expected["history"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="in all, shared out over the trainings")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    chance, result = random.Random(options.seed), {"trainings": {}}
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            figures = prove(name, -(-options.kills // len(options.recipes)), chance, Path(scratch))
        result["trainings"][name] = figures
        print(name, figures, flush=True)
    result |= {"versions": versions(), "hardware": hardware("cpu"), "git_commit": git_commit()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(figures["different"] for figures in result["trainings"].values()))


if __name__ == "__main__":
    main()
