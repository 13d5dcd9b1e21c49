"""On CIFAR-10 itself: set CIFAR10_DATA to an archive or folder of it."""

import json
import os
import tarfile

import numpy as np
import pytest
from helpers.commands import call
from PIL import Image

from cifar_fastai import dataloaders, get_recipe
from cifar_fastai.cache import load_data

SOURCE = os.environ.get("CIFAR10_DATA")
pytestmark = [pytest.mark.real_data, pytest.mark.skipif(not SOURCE, reason="CIFAR10_DATA is not set")]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def cifar():
    return load_data(SOURCE)


def test_counts_and_classes(cifar):
    assert cifar.images.shape == (60_000, 32, 32, 3) and cifar.images.dtype == np.uint8
    assert (cifar.n_train, cifar.n_test, cifar.classes) == (50_000, 10_000, CLASSES)
    assert np.bincount(cifar.labels[:50_000]).tolist() == [5000] * 10
    assert np.bincount(cifar.labels[50_000:]).tolist() == [1000] * 10
    assert CLASSES[cifar.labels[0]] == "frog" and CLASSES[cifar.labels[50_000]] == "cat"  # the original order
    assert not cifar.warnings


@pytest.mark.skipif(not str(SOURCE).endswith("gz"), reason="CIFAR10_DATA is no tar archive of pictures")
def test_pixels_against_reading_the_archive_by_hand(cifar):
    with tarfile.open(SOURCE) as archive:
        for name in ("train/frog/00000", "train/truck/00001", "test/horse/09999"):
            member = archive.extractfile(f"cifar10/{name}.jpg")
            row = int(name[-5:]) + (cifar.n_train if name.startswith("test") else 0)
            assert np.array_equal(cifar.images[row], np.asarray(Image.open(member)))
            assert CLASSES[cifar.labels[row]] == name.split("/")[1]


def test_the_statistics_are_the_ones_fastai_knows(cifar):
    from fastai.vision.core import cifar_stats

    for ours, known in zip(cifar.channel_stats, cifar_stats, strict=True):
        assert ours == pytest.approx(list(known), abs=0.01)  # a lossy copy differs a little


def test_the_split_of_the_full_set(cifar):
    dls = dataloaders(cifar, get_recipe("classic-adam"))
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.test.dataset)) == (40_000, 10_000, 10_000)
    assert np.bincount(cifar.labels[list(dls.valid.dataset.items)]).tolist() == [1000] * 10


@pytest.mark.slow
def test_a_short_training_learns_within_its_memory(tmp_path):
    arguments = (
        "--data",
        SOURCE,
        "--recipe",
        "classic-adam",
        "--subset",
        "4000",
        "--epochs",
        "3",
        "--bs",
        "64",
        "--lr",
        "2e-3",
    )
    done = call("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.3  # chance is 0.1
    assert metrics["peak_memory_mb"] < 2000
    assert metrics["data"]["n_test"] == 10_000
