"""What "auto" stands for: CIFAR-10 where it is or can be reached, else digits; and the recipe for either."""

import dataclasses
import json
import re

import numpy as np
import pytest
from helpers.commands import ROOT, call, call_here, environment
from helpers.files import archive_of

from cifar_fastai import cache, cli, sources
from cifar_fastai.cache import load_data, settle
from cifar_fastai.data import dataloaders
from cifar_fastai.download import NoMirror
from cifar_fastai.errors import DataWarning
from cifar_fastai.recipes import get_recipe

NOWHERE = ("http://a.invalid/x", "http://127.0.0.1:9/x")


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Sets what is known of CIFAR-10's archive: the mirrors, and the bytes it ought to have. The cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CIFAR10_DATA", raising=False)
    monkeypatch.delenv("CIFAR10_MIRROR", raising=False)
    monkeypatch.delenv("RANK", raising=False)

    def official(*mirrors, content=b"the archive"):
        path = tmp_path / "cifar-10-python.tar.gz"
        path.write_bytes(content)
        for module in (cache, sources):
            monkeypatch.setattr(module, "CIFAR10", archive_of(path, mirrors))
        return path

    return official


def test_digits_where_no_mirror_can_be_reached(official):
    official(*NOWHERE)
    assert settle("auto") == ("digits", "CIFAR-10 is out of reach (host not found): digits instead")
    with pytest.raises(NoMirror):
        settle("cifar10")
    with pytest.warns(DataWarning, match="digits instead"):
        data = load_data("auto")
    assert data.fingerprint == load_data("digits").fingerprint
    with pytest.warns(DataWarning):
        assert dataloaders("auto", get_recipe("digits")).data.source == "digits"
    assert settle("digits") == ("digits", "") and settle("a folder") == ("a folder", "")


def test_cifar10_where_it_is_in_the_cache(official):
    archive = official(*NOWHERE)
    place = sources.cache_folder() / archive.name
    place.parent.mkdir(parents=True)
    place.write_bytes(archive.read_bytes())
    assert settle("auto") == settle("cifar10") == ("cifar10", "")
    place.write_bytes(b"half of")
    assert settle("auto")[0] == "digits"


def test_cifar10_where_a_prepared_copy_of_the_size_is_there(official):
    official(*NOWHERE)
    copy = dataclasses.replace(load_data("digits"), source="cifar10")
    folder = cache._folder("cifar10", 32)
    folder.parent.mkdir(parents=True)
    cache._write(copy, folder, cache._origin("cifar10"))
    assert settle("auto") == ("cifar10", "") and load_data("auto").fingerprint == copy.fingerprint
    assert settle("auto", 48)[0] == "digits"


@pytest.mark.parametrize(("name", "value"), [("CIFAR10_MIRROR", "http://127.0.0.1:9/mine"), ("RANK", "1")])
def test_a_named_mirror_and_several_processes_insist(official, monkeypatch, name, value):
    official(*NOWHERE)
    monkeypatch.setenv(name, value)
    with pytest.raises(NoMirror):
        settle("auto")


@pytest.mark.parametrize("manner", ["404", "html", "flip", "lie"])
def test_who_answers_wrongly_ends_the_command(official, web_server, tmp_path, manner):
    """There is a network, so the user is told instead of getting other data."""
    web_server.files["/x"] = official().read_bytes() * 100
    official(f"{web_server.address}/{manner}/x", content=web_server.files["/x"])
    done = call_here("train", "--epochs", "1", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 3 and "from any mirror:" in done.stderr, done.stderr
    assert "digits instead" not in done.stdout and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [("train", "--data", "cifar10"), ("evaluate", ROOT / "exports" / "cifar10")])
def test_without_a_network_those_who_insist_end_in_two_lines(official, tmp_path, arguments):
    """An export of CIFAR-10 is never judged on digits, whatever the default."""
    official("http://a.invalid/x", "http://b.invalid/x")
    done = call_here(*arguments, cwd=tmp_path)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 2
    assert done.stderr.startswith("error: no mirror of cifar-10-python.tar.gz answers (host not found).\n")
    assert "digits" not in done.stdout


def test_an_augmentation_is_shown_on_digits(official, tmp_path):
    official(*NOWHERE)
    done = call_here("data", "--show", "digits", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "augmentation-digits.png\n"
    assert done.stderr == "warning: CIFAR-10 is out of reach (host not found): digits instead\n"


@pytest.fixture(scope="module")
def fallen_back(tmp_path_factory):
    """The first command of the README, shortened, as a process of its own behind a proxy that is not there."""
    cwd = tmp_path_factory.mktemp("first")
    environ = environment(XDG_CACHE_HOME=str(cwd / "cache"))
    done = call("train.py", "--epochs", "2", "--subset", "300", cwd=cwd, env=environ)
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_the_first_command_without_a_network(fallen_back):
    cwd, done = fallen_back
    lines = done.stdout.splitlines()
    assert lines[0] == "data     looking for CIFAR-10 ..."
    assert lines[1] == "data     CIFAR-10 is out of reach (connection refused): digits instead"
    assert lines[2].startswith("auto     recipe digits on ")
    assert lines[-1] == "data     these are scikit-learn's digits, not CIFAR-10, which was out of reach"
    assert done.stderr == "" and all(len(line) <= 80 for line in (*lines[:2], lines[-1]))
    (folder,) = (cwd / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-digits", folder.name)
    assert [path.name for path in (cwd / "exports").iterdir()] == ["digits"]
    config = json.loads((folder / "config.json").read_bytes())
    assert (config["data"], config["name"], config["recipe"]["name"]) == ("digits", "digits", "digits")


def test_a_run_goes_on_with_the_digits_it_began_with(fallen_back, official):
    """Whatever could be reached by now."""
    cwd, _ = fallen_back
    official("http://127.0.0.1:9/x")
    (folder,) = (cwd / "runs").iterdir()
    before = json.loads((folder / "metrics.json").read_bytes())
    (folder / "metrics.json").unlink()
    done = call_here("train", "--resume", folder, "--data", "auto", cwd=cwd)
    assert done.returncode == 0 and "looking for" not in done.stdout, done.stderr
    after = json.loads((folder / "metrics.json").read_bytes())
    assert after["data"] == before["data"] and after["test_accuracy"] == before["test_accuracy"]


def test_an_export_of_digits_is_judged_on_digits(fallen_back):
    cwd, _ = fallen_back
    done = call_here("evaluate", "exports/digits", cwd=cwd)
    assert done.returncode == 0 and done.stdout.startswith("data      360 test images of digits")


def test_a_name_tells_of_digits_too(official, tmp_path, monkeypatch):
    """Or an export of CIFAR-10 of that name would be replaced."""
    official(*NOWHERE)
    monkeypatch.setattr("cifar_fastai.run.run", lambda recipe, options: chosen.append((recipe, options)))
    chosen = []
    for given in (["--name", "mine"], [], ["--recipe", "classic-sgd"], ["--model", "small"]):
        assert cli.main("train", ["--epochs", "3", "--device", "cpu", *given]) == 0
    assert [(recipe.name, recipe.epochs) for recipe, _ in chosen] == [
        ("digits", 3), ("digits", 3), ("classic-sgd", 3), ("classic-sgd", 3),
    ]  # fmt: skip
    assert [(options.source, options.name) for _, options in chosen] == [("digits", "mine-digits"), *[("digits", None)] * 3]


def test_the_recipe_for_digits_mirrors_and_covers_nothing():
    recipe = get_recipe("digits")
    assert (recipe.flip, recipe.cutout, recipe.size, recipe.epochs) == ("off", 0, 32, 30)
    dls = dataloaders("digits", recipe)
    still = dataclasses.replace(recipe, crop_pad=0, rotate=0.0, translate=0.0, scale=0.0)
    plain = dataloaders("digits", still)
    (x, _), (y, _) = (each.train.one_batch() for each in (dls, plain))
    assert x.shape == y.shape and np.isfinite(x.numpy()).all()
    mirrored = y.flip(-1)
    nearest = [float((x[i] - y[i]).square().mean()) < float((x[i] - mirrored[i]).square().mean()) for i in range(len(x))]
    assert np.mean(nearest) > 0.8  # those that are their own mirror images aside
