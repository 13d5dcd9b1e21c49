"""Folders and archives as people have them: splits, hidden files, copies, odd names; and as nobody should."""

import gzip
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import bound_by_permissions, call_here
from helpers.files import COLOURS
from PIL import Image

from cifar_fastai import dataloaders, get_recipe
from cifar_fastai.cache import load_data
from cifar_fastai.errors import DataError
from cifar_fastai.folders import list_folder
from cifar_fastai.sources import read_data
from cifar_fastai.tuning import without_test_split

RECIPE = get_recipe("classic-adam", bs=8)
CAFES = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]


def picture(number: int) -> bytes:
    """A PNG file of noise; of each number another one."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def some(**extra: bytes | None) -> dict[str, bytes | None]:
    """Files by path: six training and two test images of cats and of dogs, and what else is asked for. None: a folder."""
    names = [
        f"{split}/{name}/{n}.png" for split, k in (("train", 6), ("test", 2)) for name in ("cat", "dog") for n in range(k)
    ]
    return {name: picture(number) for number, name in enumerate(names)} | extra


@pytest.fixture(params=["folder", "tgz", "zip"])
def source(request, tmp_path):
    """Writes files by path as a folder or as an archive, and returns its path."""

    def written(files: dict[str, bytes | None]):
        path = tmp_path / f"data.{request.param}"
        if request.param == "folder":
            for name, content in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                if content is None:
                    (path / name).mkdir(exist_ok=True)
                else:
                    (path / name).write_bytes(content)
        elif request.param == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name if content is not None else f"{name}/", content or b"")
        else:
            write_tar(path, files)
        return path

    return written


def write_tar(path, files, mode="w:gz", members=(), **options):
    with tarfile.open(path, mode, **options) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(max(0, member.size))))
    return path


def counts(data) -> dict[str, int]:
    return {split: len(rows) for split, rows in data.splits.items()}


def pixels(data, split) -> set[bytes]:
    return {data.images[row].tobytes() for row in data.splits[split]}


def decoded(*numbers) -> set[bytes]:
    return {np.asarray(Image.open(io.BytesIO(picture(number)))).tobytes() for number in numbers}


# --- what is a class, and which split -----------------------------------------------------------------------------


def test_hidden_folders_and_files_are_no_classes(source):
    left_behind = {
        "train/.ipynb_checkpoints": None,
        "train/.ipynb_checkpoints/1-checkpoint.png": picture(90),
        "train/.empty": None,
        "train/@eaDir": None,
        "test/lost+found": None,
        "train/cat/.ipynb_checkpoints/1-checkpoint.png": picture(91),
        "train/cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.png": picture(92),
        "train/cat/._0.png": b"what a Mac leaves",
        "train/cat/Thumbs.db": b"what Windows leaves",
        "train/$RECYCLE.BIN/1.png": picture(93),
        "__MACOSX/train/cat/._0.png": b"what a Mac leaves in archives",
        ".git/train/cat/0.png": picture(94),
    }
    data = read_data(source(some(**left_behind)))
    assert (data.classes, data.warnings) == (("cat", "dog"), ())
    assert counts(data) == {"train": 12, "test": 4, "all": 16}


def test_one_data_set_and_its_own_validation_split(source):
    """fastai's dogscats: a sample of it lies inside, and test1/ has no classes."""
    mine = {"valid/cat/8.png": picture(80), "valid/dog/9.png": picture(81)}
    sample = {f"sample/{split}/cat/{n}.png": picture(n) for split in ("train", "valid") for n in range(2)}
    data = read_data(source(some(**mine, **sample, **{"test1/1.png": picture(70), "logo.png": picture(71)})))
    assert counts(data) == {"train": 12, "valid": 2, "test": 4, "all": 18}
    assert (data.n_train, data.n_valid, data.n_test) == (14, 2, 4)
    assert pixels(data, "valid") == decoded(80, 81) and pixels(data, "train") == decoded(*range(12))
    places = "train/<class>/, valid/<class>/ or test/<class>/"
    assert data.warnings == (f"6 elsewhere than in {places}, left out: logo.png, sample/, test1/",)

    dls = dataloaders(data, RECIPE, seed=3)
    assert (list(dls.train_ds.items), list(dls.valid_ds.items)) == (list(range(12)), [12, 13])
    assert list(dls.test.dataset.items) == [14, 15, 16, 17]


@pytest.mark.parametrize("name", ["val", "Validation", "dev", "VALID"])
def test_names_of_the_splits_in_any_case(source, name):
    files = {path.replace("train/", "Training/").replace("test/", "TEST/"): content for path, content in some().items()}
    data = read_data(source(files | {f"{name}/cat/1.png": picture(80)}))
    assert counts(data) == {"train": 12, "valid": 1, "test": 4, "all": 17}
    assert data.warnings == ("1 classes of train/ not in valid/: dog",)


def test_a_training_says_which_images_validate(tmp_path, pictures):
    """Even beside --valid-pct, and in a test split without one of the classes."""
    (pictures / "valid").mkdir()
    for name in COLOURS:
        (pictures / "valid" / name).mkdir()
        (pictures / "train" / name / f"{name}-000.png").rename(pictures / "valid" / name / "0.png")
    shutil.rmtree(pictures / "test/green")
    arguments = ("--recipe", "classic-sgd", "--epochs", "1", "--valid-pct", "0.2", "--name", "own")
    done = call_here("train", "--data", pictures, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = "57 training, 3 validation (the source's own; --valid-pct is not used), 8 test images of 3 classes"
    assert words in done.stdout and "1 classes of train/ not in test/: green" in done.stdout
    (metrics,) = (tmp_path / "runs").glob("*/metrics.json")
    data = json.loads(metrics.read_bytes())["data"]
    assert (data["n_train"], data["n_valid"], data["n_test"]) == (57, 3, 8)


def test_folders_around_the_data_set(source):
    data = read_data(source({f"my/data/{path}": content for path, content in some().items()}))
    assert counts(data) == {"train": 12, "test": 4, "all": 16} and data.warnings == ()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"val/cat/1.png": picture(1), "Valid/cat/1.png": picture(2)}, "Valid/ and val/ are both the validation split"),
        ({"TEST/cat/1.png": picture(1)}, "TEST/ and test/ are both the test split"),
        ({"train/bird": None}, r"train/bird is a class without images \(JPEG"),
        ({"train/notes/readme.txt": b"x"}, "train/notes is a class without images"),
        ({"train/birds/red/1.png": picture(1)}, "train/birds is a class without images"),
        (
            {"train/bird/1.png": b"x", "train/bird/2.png": b""},
            "none of the 2 images of the class 'bird' in train/ can be read",
        ),
        ({"valid/cat/1.png": b""}, "none of the 1 images of the class 'cat' in valid/ can be read: valid/cat/1.png"),
        ({"valid/bird/1.png": picture(1)}, "classes in valid/ without images in train/: bird"),
        ({"train/a\nb/1.png": picture(1)}, r"rename the class 'a\\nb': it holds control characters"),
        ({"train/a\u202eb/1.png": picture(1)}, "it holds control characters"),
        ({"train/a\u2028b/1.png": picture(1)}, "it holds control characters"),
        ({"train/ /1.png": picture(1)}, "rename the class '': it is empty"),
        ({"data_batch_1": b"x"}, "CIFAR-10's batches and folders of images"),
    ],
)
def test_what_training_would_refuse_is_refused_when_read(source, extra, words):
    with pytest.raises(DataError, match=words) as error:
        load_data(source(some(**extra)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_a_name_that_no_export_can_hold(tmp_path, kind):
    files = some(**{f"train/{'x' * 300}/1.png": picture(1)})
    path = tmp_path / f"long.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        write_tar(path, files)
    with pytest.raises(DataError, match="it has 300 letters, where 255 fit") as error:
        read_data(path)
    assert len(str(error.value)) < 400


def test_two_data_sets_side_by_side(source):
    files = {f"{top}/{path}": content for top in ("mine", "yours") for path, content in some().items()}
    with pytest.raises(DataError, match="mine/ and yours/ could both be the data set"):
        read_data(source(files))


def test_cifar100_is_named(source):
    with pytest.raises(DataError, match="looks like CIFAR-100"):
        read_data(source({f"cifar-100-python/{name}": b"x" for name in ("train", "test", "meta")}))


def test_class_names_are_compared_as_text(source):
    files = {f"train/{CAFES[0]}/1.png": picture(80), f"train/{CAFES[1]}/2.png": picture(81), "train/tea /1.png": picture(82)}
    data = read_data(source(some(**files, **{f"test/{CAFES[1]}/3.png": picture(83), "test/tea/1.png": picture(84)})))
    assert data.classes == (CAFES[0], "cat", "dog", "tea") and np.bincount(data.labels).tolist() == [3, 8, 8, 2]
    (warning,) = data.warnings
    assert warning.startswith("2 folders whose names are the same text, taken as one class: 'train/cafe\\u0301'")


def test_classes_that_differ_in_case_stay_apart_and_are_named(source, tmp_path):
    if (tmp_path / "A").mkdir() or (tmp_path / "a").exists():
        pytest.skip("names differ by more than case here")
    data = read_data(source(some(**{"train/Cat/1.png": picture(80), "train/Cat/2.png": picture(81)})))
    assert data.classes == ("Cat", "cat", "dog")
    assert "classes that differ in case alone: Cat, cat" in data.warnings


def test_names_rule_no_terminal(source):
    data = read_data(
        source(some(**{"train/cat/\x1b[2J\n\u202e.txt": b"x", "train/cat/\x9b.txt": b"x", "\x1b]0;/1.png": picture(1)}))
    )
    assert not [letter for letter in "".join(data.warnings) if not letter.isprintable()]


def test_copies_between_the_splits_are_counted_and_named(source):
    one, other = picture(80), picture(81)
    copies = {"train/dog/70.png": one, "valid/dog/7.png": one, "test/cat/8.png": one, "train/cat/71.png": other}
    copies |= {"test/dog/9.png": other, "valid/cat/1.png": picture(82)}
    assert read_data(source(some(**copies))).warnings == (
        "2 of 6 test images are also training images, which makes the test accuracy too high: test/cat/8.png, "
        "test/dog/9.png",
        "1 of 6 test images are also validation images, which makes the test accuracy too high: test/cat/8.png",
        "1 of 2 validation images are also training images, which makes the validation accuracy too high: valid/dog/7.png",
    )


def test_copies_are_found_in_what_is_held_out_too(source):
    same = {f"train/{name}/{n}.png": picture(5) for name in ("cat", "dog") for n in range(10)}
    data = read_data(source(same))
    assert (data.n_train, data.n_test) == (16, 4)
    assert any(line.startswith("4 of 4 test images are also training images") for line in data.warnings)


def test_the_prepared_copy_keeps_splits_and_warnings(source):
    path = source(some(**{"valid/cat/8.png": picture(0), "valid/dog/9.png": picture(81)}))
    first, again, read = load_data(path), load_data(path), read_data(path)
    for data in (first, again):
        assert counts(data) == counts(read) and data.warnings == read.warnings and len(read.warnings) == 1
        assert data.fingerprint == read.fingerprint


def test_own_validation_images_are_part_of_the_fingerprint(pictures):
    """And no others: what was trained on before can be gone on with."""
    plain = read_data(pictures)
    (pictures / "valid/red").mkdir(parents=True)
    moved = pictures / "valid/red/1.png"
    (pictures / "train/red/red-019.png").rename(moved)  # the last image: all pixels keep their order
    own = read_data(pictures)
    assert np.array_equal(own.images, plain.images) and np.array_equal(own.labels, plain.labels)
    assert own.fingerprint != plain.fingerprint
    assert own.channel_stats != plain.channel_stats  # of the images that are trained on


def test_subset_is_drawn_from_the_training_images(source):
    extra = {f"train/{name}/{n}.png": picture(100 + n) for name in ("cat", "dog") for n in range(10, 20)}
    data = read_data(source(some(**extra, **{"valid/cat/8.png": picture(80), "valid/dog/9.png": picture(81)})))
    dls = dataloaders(data, RECIPE, subset=20)
    assert len(dls.train_ds) == 20 and max(dls.train_ds.items) < 32 and list(dls.valid_ds.items) == [32, 33]


def test_tuning_keeps_the_own_validation_split(source):
    data = without_test_split(read_data(source(some(**{"valid/cat/8.png": picture(80), "valid/dog/9.png": picture(81)}))))
    dls = dataloaders(data, RECIPE)
    assert (len(dls.train_ds), list(dls.valid_ds.items), dls.test) == (12, [12, 13], None)


# --- what can be judged but not trained on ------------------------------------------------------------------------


def only(*splits):
    files = some(**{"valid/cat/8.png": picture(80)})
    return {path: content for path, content in files.items() if path.split("/")[0] in splits}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (only("test"), {"test": 4, "all": 4}),
        (only("train"), {"train": 12, "all": 12}),
        (only("valid"), {"valid": 1, "all": 1}),
        (only("train", "valid"), {"train": 12, "valid": 1, "all": 13}),
        (only("train", "valid", "test"), {"train": 12, "valid": 1, "test": 4, "all": 17}),
        ({path.replace("train/", ""): content for path, content in only("train").items()}, {"train": 12, "all": 12}),
        ({path.replace("train/", "pets/"): content for path, content in only("train").items()}, {"train": 12, "all": 12}),
        (some(**{"train/bird": None}), {"train": 12, "test": 4, "all": 16}),
        (some(**{"test/bird/1.png": picture(80)}), {"train": 12, "test": 5, "all": 17}),
    ],
)
def test_whatever_is_labelled_can_be_judged(source, files, expected):
    path = source(files)
    data = load_data(path, labelled=True)
    assert counts(data) == counts(load_data(path, labelled=True)) == expected
    if data.unfit:
        with pytest.raises(DataError, match=r"no images in train/|train/bird is a class|without images in train/: bird"):
            load_data(path)
    else:
        assert load_data(path).fingerprint == data.fingerprint


def test_a_folder_around_the_classes_may_hold_an_image(source):
    files = {path.replace("train/", "pets/"): content for path, content in only("train").items()}
    data = read_data(source(files | {"pets/logo.png": picture(80)}), labelled=True)
    assert counts(data) == {"train": 12, "all": 12}
    assert data.warnings == ("1 elsewhere than in pets/<class>/, left out: pets/logo.png",)


# --- small sets ---------------------------------------------------------------------------------------------------


def small(n: int, *splits: str) -> dict:
    """n images of each of five classes in each split, in train/ if none is named."""
    names = [f"{split}/class{label}/{k}.png" for split in splits or ("train",) for label in range(5) for k in range(n)]
    return {name: picture(number) for number, name in enumerate(names)}


@pytest.mark.parametrize(("n", "splits"), [(10, ()), (3, ()), (8, ("train", "test")), (2, ("train", "test")), (4, ())])
def test_every_class_has_its_place_in_every_split(source, n, splits):
    data = read_data(source(small(n, *splits)))
    dls = dataloaders(data, RECIPE)
    for dl in (dls.train, dls.valid, dls.test):
        assert set(data.labels[list(dl.dataset.items)]) == set(range(5))
    rows = [*dls.train.dataset.items, *dls.valid.dataset.items, *dls.test.dataset.items]
    assert sorted(rows) == list(range(len(data.images)))


def test_a_small_division_depends_on_the_seed_alone(pictures):
    for path in pictures.glob("train/*/*[1-9].png"):
        path.unlink()
    data = read_data(pictures)
    first, again, other = (list(dataloaders(data, RECIPE, seed=seed).valid_ds.items) for seed in (1, 1, 5))
    assert first == again != other and len(first) == 3


@pytest.mark.parametrize(
    ("n", "splits", "words"),
    [
        (2, (), "no test/, and too few images to hold some out: of 'class0' there are 2, and it takes 3"),
        (1, (), "no test/, and too few images to hold some out: of 'class0' there are 1, and it takes 3"),
        (1, ("train", "valid"), "of 'class0' there are 1, and it takes 2"),
        (
            1,
            ("train", "test"),
            "too few training images of the class 'class0', 1: add some, or remove the class. It takes 2",
        ),
    ],
)
def test_too_few_images_are_named_in_words_of_our_own(source, n, splits, words):
    with pytest.raises(DataError, match=words):
        dataloaders(source(small(n, *splits)), RECIPE)


def test_one_image_a_class_is_enough_beside_both_other_splits(source):
    dls = dataloaders(source(small(1, "train", "valid", "test")), RECIPE)
    assert [len(dl.dataset) for dl in (dls.train, dls.valid, dls.test)] == [5, 5, 5]


# --- archives and folders as nobody should have them ---------------------------------------------------------------


@pytest.fixture
def archive(tmp_path):
    return tmp_path / "odd.archive"


def zipped(path, files, change=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo("name")
            member.filename = name
            archive.writestr(member, content)
    if change:
        path.write_bytes(change(path.read_bytes()))
    return path


def test_a_zip_as_windows_writes_it(archive):
    data = read_data(zipped(archive, {path.replace("/", "\\"): content for path, content in some().items()}))
    assert counts(data) == {"train": 12, "test": 4, "all": 16} and data.warnings == ()


def test_members_that_lead_out_or_are_no_files(archive):
    files = some(**{"../train/dog/9.png": picture(80), "train/../../dog/9.png": picture(80), "/abs/1.png": picture(81)})
    with zipfile.ZipFile(zipped(archive, files), "a") as zip_file:
        link = zipfile.ZipInfo("train/cat/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zip_file.writestr(link, "/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate name"):
            zip_file.writestr("train/cat/0.png", picture(82))
    expected = [
        "2 with a path that leads out of the archive, left out: ../train/dog/9.png, train/../../dog/9.png",
        "1 replaced by a later file of the same name: train/cat/0.png",
        "1 unreadable, left out: train/cat/link.png (A link.)",
        "1 elsewhere than in train/<class>/ or test/<class>/, left out: abs/",
    ]
    data = read_data(archive)
    assert list(data.warnings) == expected and pixels(data, "train") == decoded(82, *range(1, 12))

    members = [tarfile.TarInfo(f"train/cat/{name}.png") for name in ("fifo", "device", "link")]
    for member, kind in zip(members, (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.SYMTYPE), strict=True):
        member.type = kind
    data = read_data(write_tar(archive, files, members=members))
    assert data.warnings[0] == expected[0]
    assert data.warnings[1].startswith("3 unreadable, left out: train/cat/fifo.png (No regular file.), train/cat/device.png")


def header(name: str, kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(**fields) -> dict:
    member = tarfile.TarInfo("train/cat/odd.png")
    member.size, member.pax_headers = 2000, {name.replace("_", "."): value for name, value in fields.items()}
    return {"members": [member], "format": tarfile.PAX_FORMAT}


def as_tar(path, **options):
    return write_tar(path, some(), "w", **options)


def end_of_members(path) -> bytes:
    """A tar without its end mark."""
    with tarfile.open(as_tar(path)) as archive:
        *_, last = archive
        end = last.offset_data + (last.size + 511) // 512 * 512
    return path.read_bytes()[:end]


N_BYTES = 5_000_000 // 512 * 512
ATTRIBUTES = header("x", b"x", N_BYTES) + f"{N_BYTES} comment=".encode().ljust(N_BYTES - 1, b"x") + b"\n"
ATTRIBUTES += header("train/cat/9.png", b"0", 0)

ODD_ARCHIVES = {
    "a name that is no UTF-8": lambda path: zipped(
        path, some(**{"train/cat/éé.png": picture(1)}), lambda data: data.replace("éé".encode(), b"\xff\xfe\xff\xfe")
    ),
    "encrypted": lambda path: zipped(
        path, some(), lambda data: data.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0")
    ),
    "an unknown method": lambda path: zipped(
        path,
        some(),
        lambda data: data.replace(b"\x14\x03\x14\0\0\0\0\0", b"\x14\x03\x14\0\0\0\x63\0").replace(
            b"\x03\x04\x14\0\0\0\0\0", b"\x03\x04\x14\0\0\0\x63\0"
        ),
    ),
    "a wrong checksum": lambda path: zipped(path, some(), lambda data: data.replace(b"IHDR", b"IHDX", 1)),
    "a sparse map of letters": lambda path: as_tar(path, **pax(GNU_sparse_map="a,b")),
    "a sparse file without its map": lambda path: as_tar(path, **pax(GNU_sparse_major="1", GNU_sparse_minor="0")),
    "a sparse file of negative size": lambda path: as_tar(path, **pax(GNU_sparse_realsize="-1")),
    "a negative size": lambda path: as_tar(path, **pax(size="-1000")),
    "a size beyond all": lambda path: as_tar(path, **pax(size="9" * 30)),
    "attributes of 5 MB": lambda path: path.write_bytes(end_of_members(path) + ATTRIBUTES + bytes(1024)),
    "names of names of names": lambda path: path.write_bytes((header("x", b"L", 5) + b"abcd".ljust(512, b"\0")) * 1500),
    "twice": lambda path: path.write_bytes(2 * gzip.compress(as_tar(path).read_bytes())),
    "and more": lambda path: path.write_bytes(gzip.compress(as_tar(path).read_bytes()) + b"more"),
    "half": lambda path: path.write_bytes(gzip.compress(as_tar(path).read_bytes())[:-3000]),
}


@pytest.mark.parametrize("how", ODD_ARCHIVES)
def test_odd_archives_are_refused_in_a_line(archive, how):
    ODD_ARCHIVES[how](archive)
    with pytest.raises(DataError, match=r"is damaged|is encrypted|cannot be unpacked here") as error:
        read_data(archive)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_tar_compressed_in_pieces_is_whole(archive):
    whole = as_tar(archive).read_bytes()
    archive.write_bytes(gzip.compress(whole[:5000]) + gzip.compress(whole[5000:]))
    assert counts(read_data(archive)) == {"train": 12, "test": 4, "all": 16}


def test_bytes_changed_anywhere_in_the_headers(archive):
    """Of a tar and of a zip: refused in a line, or read; nothing else comes out."""
    chance = np.random.default_rng(0)
    for write, first in ((as_tar, 0), (lambda path: zipped(path, some()), 0.8)):
        whole = write(archive).read_bytes()
        for _ in range(150):
            changed = bytearray(whole)
            place = int(chance.integers(int(first * len(whole)), len(whole)))
            place = place if first else place // 512 * 512 + int(chance.integers(345))
            changed[place] = int(chance.choice([0, 0x80, 0xFF, chance.integers(256)]))
            archive.write_bytes(changed)
            try:
                read_data(archive)
            except DataError as error:
                assert "\n" not in str(error)


def test_what_is_no_regular_file_is_named_and_never_opened(pictures):
    os.mkfifo(pictures / "train/red/fifo.png")
    os.mkfifo(pictures / "train/red/fifo")
    (pictures / "train/red/zero.png").symlink_to("/dev/zero")
    (pictures / "train/red/.#an-editors-lock.png").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        place = os.open(pictures / "train/red", os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{place}/socket.png")
        os.close(place)
    data = read_data(pictures)
    assert data.n_train == 60 and data.warnings == (
        "1 not an image file, passed over: train/red/fifo",
        "3 unreadable, left out: train/red/fifo.png (No regular file.), train/red/socket.png (No regular file.), "
        "train/red/zero.png (No regular file.)",
    )


@pytest.fixture
def deep(pictures, monkeypatch):
    """A folder in train/red, and a function that makes so many folders in each other there."""
    place = pictures / "train/red/deep"
    place.mkdir()

    def dig(n: int, name: str):
        monkeypatch.chdir(place)
        for _ in range(n):
            Path(name).mkdir()
            os.chdir(name)
        monkeypatch.chdir(pictures)

    yield dig
    subprocess.run(["rm", "-rf", place], check=True)  # Python's own way goes no deeper than 1,000


def test_folders_in_folders_in_folders(pictures, deep):
    """1,100 of them are read; where a path is too long for the system, that is said."""
    before = read_data(pictures).fingerprint
    deep(1100, "a")
    assert read_data(pictures).fingerprint == before
    deep(100, "a longer name that leads to a path " * 2)
    with pytest.raises(DataError, match=r"….* cannot be read: File name too long") as error:
        read_data(pictures)
    assert len(str(error.value)) < 300


def test_a_folder_that_may_not_be_read(pictures):
    (pictures / "lost+found").mkdir(mode=0)  # as on any disk
    (pictures / "train/red").chmod(0)
    with bound_by_permissions():
        with pytest.raises(DataError, match=r"train/red cannot be read: Permission denied\.$"):
            read_data(pictures)
        (pictures / "train/red").chmod(0o755)
        assert read_data(pictures).classes == tuple(sorted(COLOURS))


def test_a_folder_is_listed_in_order(tmp_path):
    for name in ("b/1", "a b/1", "a/2", "a/10", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [name for name, _ in list_folder(tmp_path)] == ["a", "a/10", "a/2", "a b", "a b/1", "a.txt", "b", "b/1"]
