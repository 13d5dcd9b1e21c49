"""Nothing let in: files with code in them, wherever a command reads one; and exports tampered with at random."""

import ast
import io
import json
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, call
from helpers.files import Canary, write_pictures
from PIL import Image

from cifar_fastai import cli
from cifar_fastai.cache import load_data
from cifar_fastai.errors import DataError
from cifar_fastai.manifest import write_manifest
from cifar_fastai.sources import BATCH_FILES, cache_folder, read_data


def test_an_export_tampered_with_is_refused_or_unchanged(digits_run, tmp_path):
    """benchmarks/tamper.py, which does it 2,000 times and more."""
    numbers = ("--flips", "120", "--cuts", "40", "--resealed", "80", "--seed", "1")
    command = (ROOT / "benchmarks" / "tamper.py", "--export", digits_run.export, *numbers, "--json", "result.json")
    done = call(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["faults"] == []
    assert {kind: sum(sum(counts.values()) for counts in result[kind].values()) for kind in list(result)[:3]} == {
        "flips": 120, "cuts": 40, "resealed flips": 80,
    }  # fmt: skip
    unlisted = {name for kind in ("flips", "cuts") for name, counts in result[kind].items() if "without effect" in counts}
    assert unlisted <= {"MANIFEST.json"}, "only white space there has no effect"


# --- code in files ------------------------------------------------------------------------------------------------


@pytest.fixture
def place(digits_run, tmp_path, monkeypatch):
    """A folder, worked in, with a run, another one, one that was cut short, an export and a picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("run", "other", "cut"):
        shutil.copytree(digits_run.folder, tmp_path / name)
    (tmp_path / "cut" / "metrics.json").unlink()  # as if it had been stopped in its evaluation
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    shutil.copytree(digits_run.export, tmp_path / "exports" / "digits")
    return tmp_path


def hostile(canary) -> dict[str, bytes]:
    """Pickles that write the canary, as such and in all the wrappings that something here opens."""
    torch_file, array, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"format": 1, "model": Canary(canary)}, torch_file)
    np.savez(array, **dict.fromkeys(("images", "probabilities", "scores"), np.array([Canary(canary)])))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train/a/b.png", pickle.dumps(Canary(canary)))
    wrapped = {"torch": torch_file.getvalue(), "npz": array.getvalue(), "zip": archive.getvalue()}
    return {"pickle": pickle.dumps(Canary(canary)), "protocol 0": pickle.dumps(Canary(canary), 0), **wrapped}


def test_the_canary_is_alive(tmp_path):
    """Whatever opens these files without care writes it."""
    files = hostile(tmp_path / "canary")
    careless = {
        "pickle": lambda data: pickle.loads(data),
        "protocol 0": lambda data: pickle.loads(data),
        "torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "npz": lambda data: np.load(io.BytesIO(data), allow_pickle=True)["images"],
    }
    for name, load in careless.items():
        load(files[name])
        (tmp_path / "canary").unlink()


EXPORT_COMMANDS = (
    ("predict", "--export", "exports/digits", "photo.png"),
    ("serve", "--export", "exports/digits"),
    ("evaluate", "exports/digits", "--data", "digits"),
    ("export", "exports/digits", "--onnx"),
)
RESUME, EVALUATE, EXPORT, COMPARE = (
    ("train", "--resume", "cut"), ("evaluate", "run"), ("export", "run"), ("compare", "run", "other"),
)  # fmt: skip
READ_BY = {  # file of a run → the commands that read it
    "checkpoints/best.pth": (RESUME, EVALUATE, EXPORT),
    "checkpoints/last.pth": (RESUME,),
    "config.json": (RESUME, EVALUATE, EXPORT, COMPARE),
    "metrics.json": (RESUME, EVALUATE, EXPORT, COMPARE),
    "history.csv": (COMPARE,),
    "predictions.csv": (COMPARE,),
}


def run_all(commands, capsys) -> set[int]:
    """The exit codes of some commands, none of which may end in a fault of the program."""
    codes = set()
    for name, *arguments in commands:
        codes.add(cli.main(name, arguments))
        errors = capsys.readouterr().err
        assert "internal error" not in errors and "Traceback" not in errors, errors
    return codes


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "probe.npz", "export.pkl", "README.md", "model.onnx", "MANIFEST.json"]
)
def test_hostile_files_in_an_export(place, capsys, monkeypatch, name, listed):
    served = []
    monkeypatch.setattr("cifar_fastai.web.serve", lambda classifier, **_: served.append(classifier.close()))
    export, whole = place / "exports" / "digits", place / "whole"
    shutil.copytree(export, whole)
    for data in hostile(place / "canary").values():
        shutil.rmtree(export)
        shutil.copytree(whole, export)
        (export / name).write_bytes(data)
        if listed and name != "MANIFEST.json":
            write_manifest(export)
        if listed and name in ("export.pkl", "README.md", "model.onnx"):  # which nothing opens
            assert run_all(EXPORT_COMMANDS[:2], capsys) == {0} and served
        else:
            assert run_all(EXPORT_COMMANDS, capsys) == {5} and not served
        served.clear()
    assert not (place / "canary").exists()


@pytest.mark.parametrize("name", READ_BY)
def test_hostile_files_in_a_run(place, capsys, name):
    for data in hostile(place / "canary").values():
        for run in ("run", "cut"):
            (place / run / name).write_bytes(data)
        if name.endswith("last.pth"):
            (place / "cut" / "checkpoints" / "previous.pth").write_bytes(data)
        assert run_all(READ_BY[name], capsys) == {2}
    assert not (place / "canary").exists()


def test_a_run_that_names_code(place, capsys):
    for field in ("model", "optimizer"):
        for run in ("run", "cut"):
            config = json.loads((place / "other" / "config.json").read_text())
            config["recipe"][field] = "os.system"
            (place / run / "config.json").write_text(json.dumps(config))
        assert run_all((RESUME, EVALUATE), capsys) == {2}
    (place / "evil.py").write_text("open('canary', 'w')")
    assert run_all((("train", "--recipe", "evil.py"), ("train", "--recipe", "evil")), capsys) == {2}
    assert not (place / "canary").exists()


def test_hostile_files_as_data(place, capsys):
    for number, data in enumerate(hostile(place / "canary").values()):
        folder = write_pictures(place / f"pictures{number}", n_train=2, n_test=2)
        for path in folder.glob("*/*/*000.png"):
            path.write_bytes(data)
        batches = place / f"batches{number}"
        batches.mkdir()
        for name in ("batches.meta", *(name for names in BATCH_FILES.values() for name in names)):
            (batches / name).write_bytes(data)
        with tarfile.open(place / f"batches{number}.tgz", "w:gz") as archive:
            archive.add(batches, "cifar-10-batches-py")
        (place / f"file{number}.pkl").write_bytes(data)
        sources = [batches, f"batches{number}.tgz", f"file{number}.pkl"]
        assert run_all([("train", "--data", str(source)) for source in sources], capsys) == {3}
        assert read_data(folder).warnings[0].startswith("6 unreadable")
    assert not (place / "canary").exists()


@pytest.mark.parametrize("name", ["data.bin", "manifest.json"])
def test_hostile_files_in_the_cache(place, capsys, name):
    pictures = write_pictures(place / "pictures", n_train=2, n_test=1)
    fingerprint = load_data(pictures).fingerprint
    (folder,) = (path for path in (cache_folder() / "prepared").iterdir() if path.is_dir())
    for data in hostile(place / "canary").values():
        (folder / name).write_bytes(data)
        assert run_all([("data", "--verify")], capsys) == {3}
        assert load_data(pictures).fingerprint == fingerprint  # made anew
        assert "is damaged" in capsys.readouterr().err
    assert not (place / "canary").exists()


def test_a_class_that_rules_a_terminal(tmp_path):
    folder = write_pictures(tmp_path / "pictures", n_train=2, n_test=2)
    for split in ("train", "test"):
        (folder / split / "red").rename(folder / split / "red\x1b[2J")
    with pytest.raises(DataError, match=r"rename the class 'red\\x1b\[2J'"):
        read_data(folder)


def test_pickles_are_opened_in_two_places():
    """CIFAR's own batches, with a list of what they may name; and export.pkl, by the call that takes its sha256."""
    found = set()
    for path in sorted((ROOT / "cifar_fastai").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", "")
                names = {alias.name for alias in node.names}
                openers = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
                opens = names & openers if module not in openers else names - {"UnpicklingError"}
                opens |= {"load_learner"} & names if module == "fastai.learner" else set()
                found |= {(path.stem, name) for name in opens}
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                source = ast.unparse(node)
                assert not source.startswith("torch.") or "weights_only=True" in source
                assert not source.startswith("np.") or "allow_pickle=False" in source
    assert found == {("sources", "pickle"), ("artifacts", "load_learner")}
    callers = [path.stem for path in (ROOT / "cifar_fastai").glob("*.py") if "load_pickled_learner" in path.read_text()]
    assert sorted(callers) == ["__init__", "artifacts"]
