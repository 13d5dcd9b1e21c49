"""Runs and exports judged once more, through the commands."""

import json
import shutil

import numpy as np
import pytest
from conftest import call, call_here, write_pictures
from PIL import Image

from cifar_fastai.artifacts import load_export


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
        (lambda run: (run / "config.json").write_text("{}"), 2, "is a damaged run"),
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
