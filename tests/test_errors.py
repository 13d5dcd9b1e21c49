"""A user's mistakes: wrong options and damaged files, each told in a line or two that name the thing and the way out."""

import argparse
import contextlib
import os
import shutil

import pytest
from helpers.commands import bound_by_permissions
from PIL import Image

from cifar_fastai import cli

DIGEST = "0" * 64
LONG = "x" * 300
TRAIN = ("--data", "digits", "--epochs", "1")
SGD = (*TRAIN, "--recipe", "classic-sgd", "--subset", "200", "--bs", "16")


@pytest.fixture(scope="module")
def shelf(digits_run, tmp_path_factory):
    """A folder with a run, another one, one that was cut short, an export and a few other files; to be left as it is."""
    shelf = tmp_path_factory.mktemp("shelf")
    for name in ("run", "other", "cut"):
        shutil.copytree(digits_run.folder, shelf / name)
    (shelf / "cut" / "metrics.json").unlink()
    shutil.copytree(digits_run.export, shelf / "export")
    Image.new("RGB", (40, 40)).save(shelf / "photo.png")
    for name in ("empty", "train/a", "train/b"):
        (shelf / name).mkdir(parents=True)
    for name, content in (("nothing", b""), ("notes.txt", b"no image"), ("cut.tgz", b"\x1f\x8b\x08\0"), ("cut.zip", b"PK")):
        (shelf / name).write_bytes(content)
    return shelf


@pytest.fixture
def place(shelf, monkeypatch):
    """That folder, worked in."""
    monkeypatch.chdir(shelf)
    monkeypatch.delenv("CIFAR10_DATA", raising=False)
    return shelf


@pytest.fixture
def fails(place, capsys):
    """Runs a command that must end with an exit code and a clear error, with these words in it."""

    def fails(command: str, arguments, code: int, *words: str):
        try:
            found = cli.main(command, list(map(str, arguments)))
        except SystemExit as error:  # argparse's
            found = error.code
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
        assert found == code, errors
        assert 1 <= len(lines) <= 2 and lines[0].startswith("error: ") and "Traceback" not in errors, errors
        assert "Errno" not in errors and "internal error" not in errors, errors
        for word in words:
            assert word in errors

    return fails


# --- options ------------------------------------------------------------------------------------------------------

TRAINING = [  # options of every command that trains
    (["--epochs", "0"], 2, "epochs must be at least 1"),
    (["--epochs", "999999999999"], 2, "epochs must be 100,000 at most"),
    (["--recipe", "cpu", "--model", "small"], 2, "begins with smaller ones", "--recipe classic-sgd"),
    (["--recipe", "cpu", "--model", "resnet18"], 2, "begins with smaller ones", "--recipe transfer"),
    (["--recipe", "fast", "--input-size", "64"], 2, "--input-size is for models such as resnet18"),
    (["--data", ""], 3, "--data '': there is no such file"),
    (["--data", "nowhere"], 3, "--data nowhere: there is no such file"),
    (["--data", LONG], 3, "there is no such file"),
    (["--data", "/dev/null"], 3, "there is no such file"),
    (["--data", "nothing"], 3, "--data nothing: neither a tar nor a zip archive"),
    (["--data", "notes.txt"], 3, "neither a tar nor a zip archive"),
    (["--data", "cut.tgz"], 3, "--data cut.tgz: the archive is damaged"),
    (["--data", "cut.zip"], 3, "neither a tar nor a zip archive"),
    (["--data", "empty"], 3, "no images in train/"),
    (["--data", "."], 3, "train/a is a class without images"),
    (["--recipe", ""], 2, "There is no recipe ''"),
    (["--recipe", "notes.txt"], 2, "There are: classic-adam"),
    ([*TRAIN, "--model", "huge"], 2, "There is no model 'huge'"),
    (["--pretrained", "--model", "small"], 2, "--pretrained is for models such as resnet18; 'small'"),
    (["--pretrained", "--from-scratch"], 2, "not allowed with argument --pretrained"),
    (["--weights", "notes.txt"], 2, "--weights is for pretrained models such as resnet18"),
    (["--model", "resnet18", "--weights", "nowhere"], 3, "The weights nowhere cannot be read"),
    (["--model", "resnet18", "--weights", "notes.txt"], 3, "notes.txt is no file of weights"),
    (["--from-scratch", "--weights", "notes.txt"], 2, "from scratch takes no weights"),
    (["--input-size", "7"], 2, "between 32 and 512"),
    (["--valid-pct", "nan"], 2, "between 0.10 and 0.20"),
    (["--bs", "-3"], 2, "bs must be at least 1"),
    ([*SGD, "--bs", "1"], 2, "One image at a time", "try --bs 2 or more"),
    (["--lr", "nan"], 2, "lr must be a positive number"),
    (["--lr", "inf"], 2, "lr must be a positive number"),
    (["--lr", "1e400"], 2, "lr must be a positive number"),
    (["--wd", "-1"], 2, "wd must be zero or a positive number"),
    (["--patience", "0"], 2, "patience must be at least 1"),
    (["--size", "4096"], 2, "between 32 and 128"),
    (["--seed", "-1"], 2, "--seed must lie between 0 and 4294967295"),
    (["--seed", "4294967296"], 2, "--seed must lie between 0 and 4294967295"),
    ([*TRAIN, "--subset", "-5"], 2, "between 100 and 1427, or be all 1437"),
    ([*TRAIN, "--out", "notes.txt"], 2, "notes.txt", "Choose another --out"),
    ([*TRAIN, "--out", LONG], 2, "File name too long. Choose another --out"),
    ([*TRAIN, "--out", "/proc/runs"], 2, "/proc/runs", "Choose another --out"),
    (["--name", ""], 2, "--name ''"),
    (["--name", ".."], 2, "--name '..'"),
    (["--device", "tpu"], 2, "invalid choice: 'tpu'"),
    (["extra"], 2, "unrecognized arguments: extra"),
]
OPTIONS = [
    *((command, *row) for command in ("train", "find-lr", "tune") for row in TRAINING),
    ("train", ["--seeds", "0"], 2, "--seeds must be at least 1"),
    ("train", ["--seeds", str(10**30)], 2, "--seeds must be at least 1 and at most 1000"),
    ("train", [*SGD, "--lr", "1e39"], 4, "try a lower --lr or --wd"),  # more than a float32 holds
    *((command, [*SGD, "--wd", "1e300"], 4, "try a lower --lr or --wd") for command in ("train", "find-lr")),
    ("train", ["--resume", "nowhere"], 2, "nowhere is no run"),
    ("train", ["--resume", "notes.txt"], 2, "notes.txt is no run"),
    ("train", ["--resume", "export"], 2, "export/config.json: recipe is missing"),
    ("train", ["--resume", LONG], 2, "cannot be read (File name too long)"),
    ("train", ["--resume", "cut", "--lr", "3"], 2, "--lr 3.0 where the run has 0.1"),
    ("tune", ["--trials", "0"], 2, "--trials must be at least 1"),
    ("tune", [*TRAIN, "--study", "nowhere/study"], 2, "The study nowhere/study cannot be opened", "--study takes a file"),
    ("predict", ["--export", "", "photo.png"], 5, "There is no export at"),
    ("predict", ["--export", "notes.txt", "photo.png"], 5, "There is no export at notes.txt", "train.py"),
    ("predict", ["--export", "run", "photo.png"], 5, "There is no export at run"),
    ("predict", ["--export", LONG, "photo.png"], 5, "There is no export at x"),
    ("predict", ["--export", "export", "--expect-digest", "", "photo.png"], 2, "64 hexadecimal digits"),
    ("predict", ["--export", "export", "--expect-digest", DIGEST, "photo.png"], 5, "not the expected one"),
    ("predict", ["--export", "export", "--topk", "0", "photo.png"], 2, "--topk must be at least 1"),
    ("predict", ["--export", "export", "--gradcam", "notes.txt", "photo.png"], 2, "--gradcam notes.txt: this folder"),
    ("predict", ["--export", "export", ""], 2, "'': an empty name"),
    ("predict", ["--export", "export", "notes.txt"], 2, "notes.txt: Not an image", "JPEG"),
    ("predict", ["--export", "export", "nothing"], 2, "nothing: The file is empty"),
    ("predict", ["--export", "export", "empty"], 2, "empty: no images in this folder"),
    ("predict", ["--export", "export", LONG], 2, "The file cannot be read: File name too long"),
    ("serve", ["--export", "empty"], 5, "There is no export at empty"),
    ("serve", ["--export", "export", "--expect-digest", DIGEST], 5, "not the expected one"),
    ("serve", ["--export", "export", "--host", "999.1.1.1"], 2, "999.1.1.1:7860 cannot be listened on", "--host"),
    ("serve", ["--export", "export", "--host", "my..host"], 2, "my..host:7860 cannot be listened on", "--host"),
    ("serve", ["--port", "0"], 2, "--port must lie between 1 and 65535"),
    ("serve", ["--port", "70000"], 2, "--port must lie between 1 and 65535"),
    ("serve", ["--auth", "me"], 2, "--auth takes USER:PASSWORD"),
    ("serve", ["--auth", ":secret"], 2, "--auth takes USER:PASSWORD"),
    ("serve", ["--auth", ""], 2, "--auth takes USER:PASSWORD"),
    ("serve", ["--max-queue", "0"], 2, "--max-queue must be at least 1"),
    ("evaluate", ["nowhere"], 5, "There is no export at nowhere"),
    ("evaluate", ["notes.txt"], 5, "There is no export at notes.txt"),
    ("evaluate", ["run", "--data", "nowhere"], 3, "--data nowhere"),
    ("evaluate", ["run", "--expect-digest", DIGEST], 2, "run is a run folder"),
    ("evaluate", ["export", "--data", "empty"], 3, "no images in train/"),
    ("evaluate", ["export", "--data", "."], 3, "train/a is a class without images"),
    ("evaluate", ["export", "--data", "digits", "--split", "valid"], 2, "--split valid: digits has none. There is: train"),
    ("evaluate", ["run", "--split", "all"], 2, "--split is for exports, and run is a run folder"),
    ("evaluate", ["export", "--data", "digits", "--expect-digest", DIGEST], 5, "not the expected one"),
    ("export", ["nowhere"], 2, "nowhere is no run"),
    ("export", ["notes.txt"], 2, "notes.txt is no run"),
    ("export", ["export"], 2, "export is an export already", "--onnx"),
    ("export", ["cut"], 2, "cut is no finished run"),
    ("export", ["run", "--name", "../x"], 2, "--name '../x'"),
    ("export", ["run", "--data", "nowhere"], 3, "--data nowhere"),
    ("export", ["run", "--expect-digest", DIGEST], 2, "run is a run folder"),
    ("export", ["export", "--onnx", "--expect-digest", DIGEST], 5, "not the expected one"),
    ("export", ["empty", "--onnx"], 5, "There is no export at empty"),
    ("compare", ["run"], 2, "at least two"),
    ("compare", ["run", "run"], 2, "run is given twice"),
    ("compare", ["run", "nowhere"], 2, "There is no run folder nowhere"),
    ("compare", ["run", "empty"], 2, "empty is no run"),
    ("compare", ["run", "cut"], 2, "cut is no finished run"),
    ("compare", ["run", "other", "--out", "empty"], 2, "empty cannot be written", "--out"),
    ("data", ["--show", "nosuch"], 2, "There is no recipe 'nosuch'"),
    ("data", ["--show", ""], 2, "There is no recipe ''"),
    ("data", ["--show", "fast", "--data", "nowhere"], 3, "--data nowhere"),
    ("data", ["--show-corruptions", "--data", "empty"], 3, "no images in train/"),
    ("data", ["--size", "7"], 2, "between 32 and 128"),
]


@pytest.mark.parametrize(("command", "arguments", "code", "words"), [(*row[:3], row[3:]) for row in OPTIONS], ids=repr)
def test_wrong_values(fails, command, arguments, code, words):
    fails(command, arguments, code, *words)


def options_of(command: str) -> list[argparse.Action]:
    return [action for action in cli._parser(command)._actions if action.option_strings and action.dest != "help"]


def test_every_option_with_a_range_is_in_the_table():
    for command in cli.COMMANDS:
        tried = {word for name, arguments, *_ in OPTIONS if name == command for word in arguments}
        takes_values = {action.option_strings[0] for action in options_of(command) if action.nargs is None}
        assert takes_values <= tried, f"{command}: {takes_values - tried}"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_values_of_another_type(fails, command):
    """Words for numbers, no value where one belongs, and one where none does."""
    for action in options_of(command):
        option = action.option_strings[0]
        if action.nargs == 0:
            fails(command, [f"{option}=3"], 2, option, "--help")
            continue
        fails(command, [option], 2, option, "expected one argument")
        if action.type in (int, float):
            fails(command, [option, "three"], 2, option, f"invalid {action.type.__name__} value: 'three'", "--help")


# --- files --------------------------------------------------------------------------------------------------------


def be_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "another thing": lambda path: path.write_bytes(b"<html>"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "a folder": be_folder,
    "not to be read": lambda path: path.chmod(0),
}
RESUME, EVALUATE, EXPORT, COMPARE = (
    ("train", "--resume", "cut"), ("evaluate", "run"), ("export", "run"), ("compare", "run", "other"),
)  # fmt: skip
RUN_FILES = {  # and the commands that need them
    "config.json": (RESUME, EVALUATE, EXPORT, COMPARE),
    "metrics.json": (EVALUATE, EXPORT, COMPARE),
    "checkpoints/best.pth": (EVALUATE, EXPORT),
    "history.csv": (COMPARE,),
    "predictions.csv": (COMPARE,),
}


@contextlib.contextmanager
def damaged(how: str, *paths):
    """Files damaged within it, and put right at its end."""
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        DAMAGE[how](path)
    try:
        yield
    finally:
        for path, data in before.items():
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(data)


HARMLESS = {  # what the commands do without: predictions, the history's last columns; a model card, a pickle
    ("predictions.csv", "missing"), ("history.csv", "cut"), ("README.md", "missing"), ("export.pkl", "missing"),
}  # fmt: skip


def damages(names) -> list[tuple[str, str]]:
    return [(name, how) for name in names for how in DAMAGE if (name, how) not in HARMLESS]


@pytest.mark.parametrize(("name", "how"), damages(RUN_FILES))
def test_damaged_files_of_a_run(fails, place, name, how):
    paths = [path for run in ("run", "cut") if (path := place / run / name).exists()]
    with damaged(how, *paths), bound_by_permissions():
        for command, *arguments in RUN_FILES[name]:
            fails(command, arguments, 2, "run" if command != "train" else "cut")


@pytest.mark.parametrize(
    ("name", "how"),
    damages(["MANIFEST.json", "config.json", "model.safetensors", "probe.npz", "README.md", "export.pkl"]),
)
def test_damaged_files_of_an_export(fails, place, name, how):
    with damaged(how, place / "export" / name), bound_by_permissions():
        fails("predict", ["--export", "export", "photo.png"], 5, "export")


@pytest.fixture
def locked(place):
    """The folder, and some of it that may not be read, or not be written to."""
    modes = {"photo.png": 0, "cut.tgz": 0, "train/a": 0, "export": 0, "empty": 0o500}
    for name, mode in modes.items():
        (place / name).chmod(mode)
    yield place
    for name in modes:
        (place / name).chmod(0o755)


def test_without_permission(fails, locked):
    with bound_by_permissions():
        fails("predict", ["--export", "export", "photo.png"], 5, "export")
        (locked / "export").chmod(0o755)
        fails("predict", ["--export", "export", "photo.png"], 2, "photo.png: The file cannot be read: Permission denied")
        fails("train", ["--data", "cut.tgz"], 3, "--data cut.tgz: it cannot be read: Permission denied")
        fails("train", ["--data", "."], 3, "train/a cannot be read: Permission denied")
        fails("train", [*TRAIN, "--out", "empty"], 2, "empty", "Permission denied. Choose another --out")
        fails("compare", ["run", "other", "--out", "empty/page.html"], 2, "empty/page.html cannot be written")
        os.chdir("empty")
        fails("data", ["--show", "fast", "--data", "digits"], 2, "augmentation-fast.png", "Permission denied")


# --- faults -------------------------------------------------------------------------------------------------------


def test_debug_shows_where_a_mistake_was_noticed(place, capsys):
    for command, arguments, code in (
        ("predict", ["--export", "nowhere", "photo.png"], 5), ("compare", ["run"], 2), ("data", ["--size", "7"], 2),
    ):  # fmt: skip
        assert cli.main(command, arguments) == code
        plain = capsys.readouterr().err
        assert cli.main(command, [*arguments, "--debug"]) == code
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback") and shown.endswith(plain) and "cifar_fastai" in shown


def test_a_fault_of_the_program_says_so(place, capsys, monkeypatch):
    def broken(*_):
        raise KeyError("nonsense")

    monkeypatch.setattr("cifar_fastai.finished.evaluate", broken)
    words = "error: internal error, please report it (KeyError: 'nonsense'). --debug shows the traceback."
    assert cli.main("evaluate", ["run"]) == 1
    assert capsys.readouterr().err.splitlines() == [words]
    assert cli.main("evaluate", ["run", "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "in broken" in shown and shown.splitlines()[-1] == words


def test_a_fault_in_a_run_tells_the_way_on(place, capsys, monkeypatch):
    def broken(*_, **__):
        raise ValueError

    monkeypatch.setattr("cifar_fastai.run.train", broken)
    assert cli.main("train", ["--resume", "cut"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "the state is saved; go on with: python -m cifar_fastai train --resume cut"
    assert second.startswith("error: internal error, please report it (ValueError: ")
