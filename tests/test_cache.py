"""The prepared copy: quick, proven whole, made by one, and never half."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import ROOT, call, environment
from helpers.files import write_pictures

from cifar_fastai import cache
from cifar_fastai.cache import cache_entries, load_data
from cifar_fastai.errors import DataError
from cifar_fastai.sources import read_data


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """An empty cache for each test; returns where the copies come to lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cifar-fastai" / "prepared"


@pytest.fixture
def reads(monkeypatch):
    """How often the sources were read."""
    calls, read = [], cache.read_rows
    monkeypatch.setattr(cache, "read_rows", lambda *arguments: calls.append(arguments) or read(*arguments))
    return calls


def the_copy(kept):
    (folder,) = (path for path in kept.iterdir() if path.is_dir())
    return folder


def assert_equal(data, other):
    assert np.array_equal(data.images, other.images) and np.array_equal(data.labels, other.labels)
    fields = ("source", "classes", "n_train", "encoding", "n_files", "sha256", "warnings", "fingerprint", "channel_stats")
    for field in fields:
        assert getattr(data, field) == getattr(other, field), field


@pytest.fixture(params=["folder", "tgz", "zip"])
def source(request, pictures, tmp_path):
    (pictures / "train" / "notes.txt").write_text("passed over")
    if request.param == "folder":
        return pictures
    kind = {"tgz": "gztar"}.get(request.param, request.param)
    return shutil.make_archive(tmp_path / "pictures", kind, pictures)


def test_the_copy_is_what_was_read(source, reads):
    read = read_data(source)
    first, second = load_data(source), load_data(source)
    assert len(reads) == 1
    assert_equal(first, read)
    assert_equal(second, read)
    assert isinstance(second.images.base, np.memmap) and second.images.dtype == np.uint8


def test_writing_into_the_images_leaves_the_copy_alone(pictures, reads):
    load_data(pictures).images[:] = 0
    assert load_data(pictures).images.any() and len(reads) == 1


def test_each_size_has_its_own_copy(pictures, reads):
    assert [load_data(pictures, size).size for size in (32, 48, 32)] == [32, 48, 32]
    assert len(reads) == 2


def test_a_changed_source_is_read_again(source, pictures, reads):
    load_data(source)
    if source == pictures:
        (pictures / "train" / "red" / "red-000.png").unlink()
    else:
        os.utime(source, ns=(1, 1))
    load_data(source)
    assert len(reads) == 2


def test_digits_need_no_copy(kept):
    load_data("digits")
    assert not kept.exists()


# --- damage ------------------------------------------------------------------------------------------------------


def flip_a_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit of a pixel": lambda folder: flip_a_bit(folder / "data.bin", 1000),
    "a bit of a label": lambda folder: flip_a_bit(folder / "data.bin", -5),
    "cut off": lambda folder: os.truncate(folder / "data.bin", 5000),
    "zeros": lambda folder: (folder / "data.bin").write_bytes(bytes((folder / "data.bin").stat().st_size)),
    "no data": lambda folder: (folder / "data.bin").unlink(),
    "a bit of the manifest": lambda folder: flip_a_bit(folder / "manifest.json", 300),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 300),
    "an empty manifest": lambda folder: os.truncate(folder / "manifest.json", 0),
    "another manifest": lambda folder: (folder / "manifest.json").write_text('{"manifest": {}, "sha256": ""}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_mended(pictures, kept, capfd, reads, damage):
    before = read_data(pictures)
    load_data(pictures)
    assert [entry.damage for entry in cache_entries(verify=True)] == [None]
    DAMAGES[damage](the_copy(kept))
    (entry,) = cache_entries(verify=True)
    assert entry.damage
    after = load_data(pictures)
    assert "is damaged" in capfd.readouterr().err and len(reads) == 2
    assert_equal(after, before)
    load_data(pictures)
    assert len(reads) == 2 and [entry.damage for entry in cache_entries(verify=True)] == [None]


def test_any_bit_of_the_manifest_counts(pictures, kept):
    """Flipped one by one: either the copy is refused or, if the text is still the same JSON, equal to what it was."""
    before = read_data(pictures)
    load_data(pictures)
    manifest = the_copy(kept) / "manifest.json"
    whole, refused = manifest.read_bytes(), 0
    origin = json.loads(whole)["manifest"]["origin"]
    for place in np.random.default_rng(0).choice(len(whole), 200, replace=False):
        flip_a_bit(manifest, place)
        data = cache._open_or_tell(the_copy(kept), origin)
        refused += data is None
        if data is not None:
            assert_equal(data, before)
        manifest.write_bytes(whole)
    assert refused > 150


# --- faults ------------------------------------------------------------------------------------------------------

LOAD = "import sys; from cifar_fastai.cache import load_data; print(load_data(sys.argv[1]).fingerprint)"


@pytest.fixture
def many_pictures(tmp_path):
    """Enough of them that reading takes a while."""
    return write_pictures(tmp_path / "many", n_train=700, n_test=100)


def test_killed_at_any_moment_of_the_making(many_pictures, kept):
    expected = read_data(many_pictures).fingerprint
    for delay in (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7):
        process = subprocess.Popen([sys.executable, "-c", LOAD, many_pictures], env=environment(), stdout=subprocess.PIPE)
        started = time.monotonic()
        while not kept.exists() and time.monotonic() < started + 60:  # the imports over, the reading begun
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(entry.damage is None for entry in cache_entries(verify=True))
        manifests = list(kept.glob("*/manifest.json"))
        if manifests:  # it was done before the kill
            assert load_data(many_pictures).fingerprint == expected
            shutil.rmtree(kept)
    assert call("-c", LOAD, many_pictures, cwd=ROOT).stdout.strip() == expected
    assert not list(kept.glob("*/*.part"))


def test_killed_between_data_and_manifest(pictures, kept, monkeypatch, reads):
    """The data file is whole and the manifest was never written: half a copy is none."""

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_seal", kill)
        with pytest.raises(Killed):
            load_data(pictures)
    assert (the_copy(kept) / "data.bin").exists() and not (the_copy(kept) / "manifest.json").exists()
    (entry,) = cache_entries()
    assert "unfinished" in entry.about
    assert_equal(load_data(pictures), read_data(pictures))


def test_two_processes_make_one_copy(many_pictures, kept):
    code = (
        "import sys; from cifar_fastai import cache; read = cache.read_rows\n"
        "cache.read_rows = lambda *arguments: print('reading', flush=True) or read(*arguments)\n" + LOAD.split("; ", 1)[1]
    )
    command = [sys.executable, "-c", code, many_pictures]
    several = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].split() for process in several]
    assert sum("reading" in output for output in outputs) == 1
    assert len({output[-1] for output in outputs}) == 1


def test_a_full_disk_leaves_the_data_and_no_half_copy(pictures, kept):
    """The limit on the size of a file is met as a full disk is: a write fails in the middle."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    done = call("-c", limit + LOAD, pictures, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == read_data(pictures).fingerprint
    assert "no prepared copy can be kept" in done.stderr and "File too large" in done.stderr
    assert not [path for path in kept.rglob("*") if path.suffix in (".bin", ".part", ".json")]


def test_too_little_room_is_noticed_before_writing(pictures, kept, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert_equal(load_data(pictures), read_data(pictures))
    assert "MB are needed and 0 MB free" in capfd.readouterr().err and not list(kept.glob("*/data.bin"))


def test_a_cache_folder_that_cannot_be_made(pictures, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_equal(load_data(pictures), read_data(pictures))
    assert "no prepared copy can be kept" in capfd.readouterr().err


def test_a_source_that_is_not_there(kept):
    with pytest.raises(DataError, match="Did you mean 'digits'"):
        load_data("digit")
    assert not kept.exists()


def test_one_copy_serves_training_and_judging(pictures, reads):
    """Also where the test split is held out, and where the source is judged first."""
    shutil.rmtree(pictures / "test")
    judged, trained = load_data(pictures, labelled=True), load_data(pictures)
    assert len(reads) == 1 and trained.n_test == 12
    assert {name: len(rows) for name, rows in judged.splits.items()} == {"train": 60, "all": 60}
    (pictures / "train" / "black").mkdir()
    for _ in range(2):
        with pytest.raises(DataError, match="train/black is a class without images"):
            load_data(pictures)
    before = len(reads)
    assert load_data(pictures, labelled=True).n_train == 60
    with pytest.raises(DataError, match="train/black is a class without images"):
        load_data(pictures)
    assert len(reads) == before + 1


def test_what_is_hidden_does_not_make_a_copy_old(pictures, reads):
    load_data(pictures)
    (pictures / "train" / ".ipynb_checkpoints").mkdir()
    (pictures / "train" / "red" / ".DS_Store").touch()
    load_data(pictures)
    assert len(reads) == 1


# --- cost --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parallel_after", [-1.0, 1e9])
def test_reading_and_keeping_holds_the_images_once(tmp_path, parallel_after):
    """4,000 images of 128 x 128 pixels, 197 MB: made, kept and mapped within that and 150 MB for all else."""
    code = (
        "import sys; from PIL import Image; from pathlib import Path\n"
        "import cifar_fastai.cache as cache; from cifar_fastai.run import peak_memory_mb\n"
        f"import cifar_fastai.sources as sources; sources.PARALLEL_AFTER = {parallel_after}\n"
        "folder = Path(sys.argv[1])\n"
        "for name, colour in (('red', 200), ('blue', 20)):\n"
        "    (folder / 'train' / name).mkdir(parents=True)\n"
        "    image = Image.new('RGB', (128, 128), (colour, 0, 100))\n"
        "    for number in range(2000): image.save(folder / 'train' / name / f'{number}.bmp')\n"
        "before = peak_memory_mb('cpu'); data = cache.load_data(folder, 128); data.images.sum()\n"
        "print(data.images.nbytes / 1e6, peak_memory_mb('cpu') - before)"
    )
    images, grown = map(float, call("-c", code, tmp_path / "large", cwd=tmp_path).stdout.split())
    assert images == pytest.approx(196.608) and images < grown < images + 150


# --- the command -------------------------------------------------------------------------------------------------


def test_the_data_command(pictures, kept):
    empty = call("-m", "cifar_fastai", "data", cwd=ROOT)
    assert empty.returncode == 0 and f"kept in {kept.parent}: 0.0 MB" in empty.stdout
    load_data(pictures)
    shown = call("-m", "cifar_fastai", "data", cwd=ROOT)
    assert shown.returncode == 0 and f"72 images of 3 classes, 32 x 32, from {pictures}" in shown.stdout
    verified = call("-m", "cifar_fastai", "data", "--verify", cwd=ROOT)
    assert verified.returncode == 0 and "whole" in verified.stdout
    flip_a_bit(the_copy(kept) / "data.bin", 5)
    damaged = call("-m", "cifar_fastai", "data", "--verify", cwd=ROOT)
    assert damaged.returncode == 3 and "DAMAGED: data.bin was changed near byte 0" in damaged.stdout


def test_the_contact_sheet(pictures, tmp_path):
    from PIL import Image

    arguments = ("-m", "cifar_fastai", "data", "--data", pictures, "--show")
    done = call(*arguments, "classic-sgd", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "augmentation-classic-sgd.png\n"), done.stderr
    sheet = np.asarray(Image.open(tmp_path / "augmentation-classic-sgd.png").convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
    wrong = call(*arguments, "classic-sdg", cwd=tmp_path)
    assert wrong.returncode == 2 and "Did you mean 'classic-sgd'" in wrong.stderr
