"""The package as others meet it: built, installed, called outside the repository, checked for types, and described."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import ROOT, environment
from PIL import Image
from sklearn.datasets import load_digits

import cifar_fastai

FILES = {  # of the package
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "cifar_fastai").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def done(*command, cwd, **env) -> subprocess.CompletedProcess:
    """A command that has to succeed, without the repository on Python's path."""
    env = {**environment(**env), "PYTHONPATH": env.get("PYTHONPATH", "")}
    finished = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """sdist and, made from it, wheel; of a copy, since building leaves files behind."""
    source, folder = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    outputs = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*outputs))
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return SimpleNamespace(wheel=wheel, sdist=sdist)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A virtual environment with the wheel, which sees the packages that the tests run with; its folder for programs."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=os.name == "posix")
    paths = {"base": str(folder), "platbase": str(folder)}
    programs, packages = (sysconfig.get_path(kind, scheme="venv", vars=paths) for kind in ("scripts", "purelib"))
    pip = (sys.executable, "-m", "pip", "--python", f"{programs}/python", "install", "--no-index", "--no-deps")
    done(*pip, built.wheel, cwd=folder)
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built.wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == FILES
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_building_needs(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert FILES | {"pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= names
    assert not any(name.startswith(("tests", "exports", "results")) for name in names)


@pytest.mark.slow
def test_the_installed_command_trains_and_predicts_outside_the_repository(installed, tmp_path):
    Image.fromarray((load_digits().images[0] * 15.9).astype(np.uint8)).save(tmp_path / "zero.png")
    place = "import cifar_fastai; print(cifar_fastai.__file__)"
    assert done(f"{installed}/python", "-c", place, cwd=tmp_path).stdout.startswith(str(installed).rpartition("/")[0])

    options = ("--data", "digits", "--recipe", "classic-adam", "--subset", "200", "--bs", "16", "--epochs", "2")
    printed = done(f"{installed}/cifar-fastai", "train", *options, "--name", "few", cwd=tmp_path).stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())["git_commit"] is None
    assert json.loads((run / "config.json").read_text())["command"] == f"cifar-fastai train {shlex.join(options)} --name few"

    (words,) = re.findall(r"try `(.*) IMAGE`", printed)
    command = [f"{installed}/{words.split()[0]}", *words.split()[1:], "zero.png", "--json"]
    answer = json.loads(done(*command, cwd=tmp_path).stdout)
    assert answer["path"] == "zero.png" and answer["label"] in map(str, range(10))


def test_without_an_export_the_installed_command_tells_how_to_get_one(installed, tmp_path):
    command = [f"{installed}/cifar-fastai", "predict", "zero.png"]
    refused = subprocess.run(command, cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True)
    assert refused.returncode == 5 and refused.stderr.count("\n") == 1
    assert "cifar-fastai train" in refused.stderr and "--export" in refused.stderr


# --- types and descriptions --------------------------------------------------------------------------------------

USER = """\
from cifar_fastai import BadImage, Classifier, Recipe, callbacks, create_learner, dataloaders
from cifar_fastai import decode_image, fit, get_recipe, load_learner, load_pickled_learner
answer: dict[str, float] = Classifier("exports/cifar10").predict("photo.png")
number: int = Classifier("exports/cifar10").predict("photo.png")
recipe: int = get_recipe("fast")
picture: int = decode_image("photo.png")
mistake: int = BadImage("")
length: str = Recipe(name="mine").epochs
data: int = dataloaders
making: int = create_learner
fitting: int = fit
watching: int = callbacks
loading: int = load_learner
unpickling: int = load_pickled_learner
"""
QUICK = """\
[mypy]
follow_imports = silent
[mypy-torch.*,numpy.*,matplotlib.*]
follow_imports = skip
[mypy-fastai.*,fastcore.*,fasttransform.*,sklearn.*,torchvision.*,safetensors.*]
ignore_missing_imports = True
"""


def test_types_reach_those_who_import(tmp_path):
    """Every public name has a type: an assignment to another is an error, where Any would pass."""
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(QUICK)
    assert all(name in USER for name in cifar_fastai.__all__)
    env = environment(MYPYPATH=str(ROOT))
    command = [sys.executable, "-m", "mypy", "user.py"]
    checked = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [int(line) for line in re.findall(r"^user.py:(\d+): error: Incompatible types", checked.stdout, flags=re.M)]
    assert lines == list(range(4, 15)), checked.stdout


def test_the_api_reference_describes_every_public_name(tmp_path):
    written = done(sys.executable, ROOT / "tools" / "api.py", tmp_path / "api", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert written.stderr == ""
    page = (tmp_path / "api" / "cifar_fastai.html").read_text()
    assert (tmp_path / "api" / "index.html").exists() and (tmp_path / "api" / "search.js").exists()
    for name in cifar_fastai.__all__:
        section = re.search(rf'<section id="{name}">(.*?)</section>', page, flags=re.S)
        word = max(re.findall(r"\w+", getattr(cifar_fastai, name).__doc__.splitlines()[0]), key=len)
        assert section and word in section[1].partition('class="docstring"')[2], name
