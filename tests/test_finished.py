"""Runs and exports judged once more, through the commands."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from helpers.commands import call, call_here
from helpers.files import write_pictures
from PIL import Image

from cifar_fastai.artifacts import load_export
from cifar_fastai.checkpoints import BEST, LAST, PREVIOUS, load, save
from cifar_fastai.finished import REPORTED_FIGURES
from cifar_fastai.schema import EXPORTED_FIGURES, Corruptions, checked


@pytest.fixture
def run(digits_run, tmp_path):
    """A copy of the digits run that may be damaged."""
    return shutil.copytree(digits_run.folder, tmp_path / "run")


def test_evaluating_a_run_again_gives_the_same_figures(run, tmp_path):
    before = json.loads((run / "metrics.json").read_text())
    predictions = (run / "predictions.csv").read_text()
    for name in ("predictions.csv", "report.html", "confusion_matrix.png"):
        (run / name).unlink()
    done = call("-m", "cifar_fastai", "evaluate", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = json.loads((run / "metrics.json").read_text())
    assert after.pop("evaluated_at_commit") and after == before
    assert (run / "predictions.csv").read_text() == predictions
    assert (run / "report.html").exists() and (run / "confusion_matrix.png").exists()


def test_exporting_a_run_again_gives_the_same_export(run, digits_run, tmp_path):
    done = call("-m", "cifar_fastai", "export", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again, first = load_export(tmp_path / "exports" / "digits"), load_export(digits_run.export)
    assert {**again.config, "created": ""} == {**first.config, "created": ""}
    assert call_here("export", run, "--name", "other", cwd=tmp_path).returncode == 0
    assert load_export(tmp_path / "exports" / "other").config["name"] == "other"
    weights = [folder / "model.safetensors" for folder in (again.folder, first.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_export_is_judged_on_other_images(digits_run, tmp_path):
    """Digits written to files, with classes in another order of numbers: the figures are those of the run."""
    from cifar_fastai.cache import load_data

    data = load_data("digits")
    for row in range(len(data.images)):
        split, name = "train" if row < data.n_train else "test", data.classes[data.labels[row]]
        folder = tmp_path / "files" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        if name != "0":  # a class fewer: the others' numbers are not the export's any more
            Image.fromarray(data.images[row]).save(folder / f"{row}.png")
    for split in ("train", "test"):
        (tmp_path / "files" / split / "0").rmdir()
    done = call("-m", "cifar_fastai", "evaluate", digits_run.export, "--data", tmp_path / "files", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    matrix = np.array(json.loads((digits_run.folder / "metrics.json").read_text())["confusion_matrix"])[1:]
    right, n = matrix[:, 1:].diagonal().sum(), matrix.sum()
    assert f"{n} test images of files" in done.stdout and f"accuracy  {right / n:.2%}" in done.stdout


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda run: (run / "metrics.json").unlink(), 2, "is no finished run: metrics.json is missing"),
        (lambda run: (run / "config.json").write_text("{}"), 2, "config.json: name is missing"),
        (lambda run: (run / "checkpoints/best.pth").unlink(), 2, "best.pth cannot be used"),
        (lambda run: (run / "checkpoints/best.pth").write_bytes(b"x"), 2, "best.pth cannot be used"),
    ],
)
def test_runs_that_will_not_do(run, tmp_path, damage, code, words):
    damage(run)
    done = call_here("evaluate", run, cwd=tmp_path)
    assert done.returncode == code and words in done.stderr and done.stderr.count("\n") == 1


def test_other_data_is_refused(run, digits_run, tmp_path):
    colours = write_pictures(tmp_path / "colours")
    done = call_here("evaluate", run, "--data", colours, cwd=tmp_path)
    assert done.returncode == 3 and "holds other pixels" in done.stderr
    done = call_here("evaluate", digits_run.export, "--data", colours, cwd=tmp_path)
    assert done.returncode == 2 and "does not know the classes blue, green, red" in done.stderr
    done = call_here("evaluate", tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == 5 and "There is no export at" in done.stderr


@pytest.fixture
def numbers(tmp_path):
    """Digits as files: sixty in train/, twenty in valid/ and twenty in test/, of eight of the ten classes."""
    from cifar_fastai.cache import load_data

    data = load_data("digits")
    rows = [row for row in range(len(data.images)) if data.labels[row] < 8][:100]
    for place, row in enumerate(rows):
        split = "train" if place < 60 else "valid" if place < 80 else "test"
        path = tmp_path / "numbers" / split / data.classes[data.labels[row]] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images[row]).save(path)
    return tmp_path / "numbers"


def accuracy_by_hand(export, folder) -> str:
    """Of the files below a folder, each by itself."""
    from cifar_fastai import Classifier

    classifier, paths = Classifier(export), sorted(folder.rglob("*.png"))
    right = sum(max(found := classifier.predict(path), key=found.get) == path.parent.name for path in paths)
    return f"accuracy  {right / len(paths):.2%}"


@pytest.mark.parametrize("kind", ["folder", "gztar", "zip"])
def test_an_export_is_judged_on_whatever_has_labels(digits_run, numbers, tmp_path, kind):
    def judged(folder, *options):
        source = folder if kind == "folder" else shutil.make_archive(tmp_path / folder.name, kind, folder)
        done = call_here("evaluate", digits_run.export, "--data", source, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole = judged(numbers)
    assert "data      20 test images of numbers" in whole and accuracy_by_hand(digits_run.export, numbers / "test") in whole
    assert "  9                recall       -" in whole and "0 images" in whole
    for split, n, word in (("valid", 20, "validation"), ("train", 60, "training"), ("all", 100, "labelled")):
        part = numbers if split == "all" else numbers / split
        out = judged(numbers, "--split", split)
        assert f"data      {n} {word} images of numbers" in out and accuracy_by_hand(digits_run.export, part) in out
    plain = judged(numbers / "train")
    assert (
        "data      60 labelled images of train" in plain and accuracy_by_hand(digits_run.export, numbers / "train") in plain
    )

    shutil.rmtree(numbers / "train")
    assert "data      20 test images of numbers" in judged(numbers)
    shutil.rmtree(numbers / "test")
    assert "data      20 labelled images of numbers" in judged(numbers)


def test_images_without_a_test_split_are_all_judged(digits_run, numbers, tmp_path):
    """None is held out, as it would be for a training."""
    for split in ("valid", "test"):
        shutil.rmtree(numbers / split)
    done = call_here("evaluate", digits_run.export, "--data", numbers, cwd=tmp_path)
    assert "data      60 labelled images of numbers" in done.stdout and "held out" not in done.stdout
    assert "trained on images among these, the figures are too high" in done.stdout
    done = call_here("evaluate", digits_run.export, "--data", numbers, "--corruptions", cwd=tmp_path)
    assert done.returncode == 0 and "60 of 60 test images" in done.stdout


def test_what_cannot_be_judged(digits_run, numbers, tmp_path):
    done = call_here("evaluate", digits_run.export, "--data", "digits", "--split", "valid", cwd=tmp_path)
    words = "--split valid: digits has none. There is: train (1,437 images), test (360 images), all (1,797 images)."
    assert done.returncode == 2 and words in done.stderr
    (numbers / "test" / "7").rename(numbers / "test" / "seven")
    done = call_here("evaluate", digits_run.export, "--data", numbers, cwd=tmp_path)
    assert done.returncode == 2 and "does not know the classes seven of numbers" in done.stderr
    assert call_here("evaluate", digits_run.export, "--data", numbers, "--split", "train", cwd=tmp_path).returncode == 0
    done = call_here("evaluate", digits_run.folder, "--split", "train", cwd=tmp_path)
    assert done.returncode == 2 and "--split is for exports" in done.stderr


# --- runs that somebody else made or edited ------------------------------------------------------------------------


@pytest.fixture
def cut(digits_run, tmp_path):
    """A copy of the run as if it had been stopped in its evaluation, beside a folder that is not to be touched."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "diary.txt").write_text("dear")
    folder = shutil.copytree(digits_run.folder, tmp_path / "cut")
    (folder / "metrics.json").unlink()
    return folder


def edit(path, **changes):
    content = json.loads(path.read_text())
    for place, value in changes.items():
        *way, last = place.split("__")
        holder = content
        for step in way:
            holder = holder[step]
        holder[last] = value
    path.write_text(json.dumps(content))


def contents(*folders) -> dict:
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(done, words: str, code: int = 2) -> None:
    assert done.returncode == code and words in done.stderr, (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "internal" not in done.stderr


def test_a_name_that_is_a_path_replaces_nothing(run, cut, tmp_path):
    for name in (str(tmp_path / "victim"), "../victim", "..", "a/b", "", 5, None, ["victim"]):
        for folder in (run, cut):
            edit(folder / "config.json", name=name)
        before = contents(tmp_path)
        refused(call_here("export", run, cwd=tmp_path), "config.json: name must be up to 100 letters")
        refused(call_here("train", "--resume", cut, cwd=tmp_path), "config.json: name must be up to 100 letters")
        assert contents(tmp_path) == before and not (tmp_path / "exports").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 43}, "seed 43 where it was 42"),
        ({"recipe__epochs": 9}, "epochs 9 where it was 8"),
        ({"recipe__lr": 0.2, "subset": 500}, "lr 0.2 where it was 0.1; subset 500 where it was None"),
        ({"deterministic": True}, "deterministic True where it was False"),
        ({"initial_weights": "from x.pth"}, "initial_weights 'from x.pth' where it was 'from scratch'"),
    ],
)
def test_an_edited_configuration_is_noticed_by_resume(cut, tmp_path, changes, words):
    edit(cut / "config.json", **changes)
    before = contents(tmp_path)
    refused(call_here("train", "--resume", cut, cwd=tmp_path), f"config.json was changed since the training began: {words}.")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} <= {"lock"}


def test_a_configuration_may_change_what_decides_nothing(cut, tmp_path, digits_run):
    """Its name and its words; and a state that an older version saved knows no configuration."""
    edit(cut / "config.json", name="renamed", command="by hand", recipe__about="words")
    done = call_here("train", "--resume", cut, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = [folder / "model.safetensors" for folder in (tmp_path / "exports" / "renamed", digits_run.export)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    (cut / "metrics.json").unlink()
    for name in (LAST, PREVIOUS):
        state = load(cut / "checkpoints" / name)
        assert state.pop("config")["seed"] == 42
        save(state, cut / "checkpoints" / name)
    edit(cut / "config.json", command="by hand again")
    assert call_here("train", "--resume", cut, cwd=tmp_path).returncode == 0


BROKEN = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "of another network": lambda path: save({"model": {"weight": torch.zeros(3)}, "opt": {}}, path),
    "without weights": lambda path: save({"model": [1, 2]}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "not finite": lambda path: save(
        {
            "model": {
                key: value * torch.nan if value.is_floating_point() else value for key, value in load(path)["model"].items()
            }
        },
        path,
    ),
    "unpacks to more": lambda path: pack(path),
}


def pack(path):
    """The same content compressed."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data + bytes(10_000_000) if name.endswith("data/0") else data)


@pytest.mark.parametrize("damage", BROKEN)
def test_best_weights_that_are_gone_are_known_at_the_beginning(run, cut, tmp_path, damage):
    for folder in (run, cut):
        BROKEN[damage](folder / "checkpoints" / BEST)
    before = contents(tmp_path)
    words = "are in no other file: put it back, or train anew."
    for command in (("train", "--resume", cut), ("evaluate", run), ("export", run), ("evaluate", run, "--corruptions")):
        done = call_here(*command, cwd=tmp_path)
        refused(done, words)
        assert f"{BEST} cannot be used: " in done.stderr and done.stdout == ""
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before


def test_a_checkpoint_decides_values_alone(cut, tmp_path):
    """Attributes that are no state, such as where the best weights are saved, stay as they are."""
    for name in (LAST, PREVIOUS):
        state = load(cut / "checkpoints" / name)
        state["callbacks"]["save_best"]["path"] = str(tmp_path / "victim" / "diary.txt")
        state["callbacks"]["learn"] = {"model_dir": str(tmp_path / "victim")}
        state["recorder"]["path"] = str(tmp_path / "victim")
        save(state, cut / "checkpoints" / name)
    before = contents(tmp_path / "victim")
    assert call_here("train", "--resume", cut, cwd=tmp_path).returncode == 0
    assert contents(tmp_path / "victim") == before

    (cut / "metrics.json").unlink()
    for name in (LAST, PREVIOUS):
        state = load(cut / "checkpoints" / name)
        del state["callbacks"]["history"]
        save(state, cut / "checkpoints" / name)
    done = call_here("train", "--resume", cut, cwd=tmp_path)
    assert done.returncode == 2 and "The checkpoint is not of this training (KeyError: 'history')" in done.stderr


LINKS = {
    "report.html": lambda place, victim: (place.unlink(), place.symlink_to(victim / "diary.txt")),
    "confusion_matrix.png": lambda place, victim: (place.unlink(), place.symlink_to(victim / "diary.txt")),
    "history.csv.part": lambda place, victim: place.symlink_to(victim / "diary.txt"),
    "checkpoints": lambda place, victim: (place.rename(victim / "moved"), place.symlink_to(victim / "moved")),
    "checkpoints/lock": lambda place, victim: (place.unlink(missing_ok=True), place.symlink_to(victim / "diary.txt")),
    "tensorboard": lambda place, victim: place.symlink_to(victim),
    "metrics.json.part": lambda place, _: os.mkfifo(place),
}


@pytest.mark.parametrize("name", LINKS)
def test_no_link_leads_out_of_a_run_folder(run, cut, tmp_path, name):
    for number, folder in enumerate((run, cut)):
        victim = tmp_path / f"victim{number}"
        shutil.copytree(tmp_path / "victim", victim)
        LINKS[name](folder / name, victim)
    before = {path: path.read_bytes() for path in tmp_path.glob("victim*/**/*") if path.is_file()}
    for command in (("train", "--resume", cut), ("evaluate", run)):
        refused(call_here(*command, cwd=tmp_path), "is a link or a device; a run folder holds plain files.")
    assert {path: path.read_bytes() for path in tmp_path.glob("victim*/**/*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_images": "many"}, "corruptions.json: n_images must be a whole number"),
        ({"accuracy": {}}, "corruptions.json: accuracy must hold the kinds of kind_accuracy"),
    ],
)
def test_a_report_shows_only_figures(run, tmp_path, changes, words):
    found = {
        "source": "digits", "encoding": "lossless", "n_images": 9, "n_test": 9, "seed": 0, "clean_accuracy": 1.0,
        "clean_accuracy_interval": [0.9, 1.0], "mean_corruption_accuracy": 0.5, "drop": 0.5, "worst_kind": "fog",
        "mean_corruption_accuracy_interval": [-0.01, 1.01], "kind_accuracy": {"fog": 0.5},
        "accuracy": {"weather": {"fog": [0.5] * 5}},
    }  # fmt: skip
    assert checked(Corruptions, "x", found) == found
    (run / "corruptions.json").write_text(json.dumps(found | changes))
    refused(call_here("evaluate", run, cwd=tmp_path), words)


def test_truncated_files_of_a_run_are_named(run, cut, digits_run, tmp_path):
    for name in ("config.json", "metrics.json"):
        whole = (run / name).read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 3):
            (run / name).write_bytes(whole[:length])
            for command in (("evaluate", run), ("export", run), ("compare", run, digits_run.folder)):
                refused(call_here(*command, cwd=tmp_path), f"{name} is damaged (")
        (run / name).write_bytes(whole)


@pytest.mark.parametrize("field", REPORTED_FIGURES + EXPORTED_FIGURES)
def test_a_run_that_lacks_a_figure_is_evaluated_first(run, tmp_path, field):
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics[field]
    (run / "metrics.json").write_text(json.dumps(metrics))
    needed = field in ("test_accuracy", "test_accuracy_tta", "test_loss", "ece", "confusion_matrix")  # by all versions
    for command in (("export", run), ("evaluate", run, "--corruptions")):
        words = f"metrics.json: {field} is missing" if needed else "was evaluated by an older version"
        refused(call_here(*command, cwd=tmp_path), words)
