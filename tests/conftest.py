import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import cifar_fastai.compat  # noqa: F401  the tests compare with torchvision, which is imported after this

ROOT = Path(__file__).parent.parent


def call(*arguments, cwd, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of the project, or python itself, as a user would, in `cwd`."""
    arguments = [str(ROOT / word) if word in ("train.py", "predict.py", "app.py") else str(word) for word in arguments]
    kwargs = {"capture_output": True, "text": True, "timeout": 600, "env": environment(), **kwargs}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, **kwargs)


def environment(**extra) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name != "CIFAR10_DATA"}
    return {**plain, "PYTHONPATH": str(ROOT), **extra}


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """One real training on digits through the command line: its folders and what it printed."""
    cwd = tmp_path_factory.mktemp("digits")
    arguments = ("--data", "digits", "--recipe", "classic-sgd", "--epochs", "8", "--bs", "64", "--name", "digits")
    done = call("train.py", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    (folder,) = (cwd / "runs").iterdir()
    return SimpleNamespace(cwd=cwd, folder=folder, export=cwd / "exports" / "digits", output=done.stdout, errors=done.stderr)


@pytest.fixture(scope="session")
def trained(digits_run):
    """The learner of that training, loaded safely in this process."""
    from cifar_fastai import load_learner

    return load_learner(digits_run.export)


COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 40), "red": (210, 30, 20)}


def write_pictures(folder: Path, n_train=20, n_test=4, size=32) -> Path:
    """train/<colour>/<number>.png and test/…, each its colour with noise: learnable, and lossless."""
    noise = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(n):
                pixels = np.clip(noise.normal(colour, 25, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{name}-{number:03}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")
