import hashlib
import io
import os
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from helpers.files import COLOURS, Canary, archive_of
from PIL import Image
from torchvision.datasets import CIFAR10

from cifar_fastai import sources
from cifar_fastai.errors import DataError
from cifar_fastai.sources import read_data

# --- folders and archives of pictures ----------------------------------------------------------------------------


def read_by_hand(folder, split):
    """Pixels and class names of a folder, by another road: PIL alone, in order of path."""
    paths = sorted((folder / split).glob("*/*"))
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]), [path.parent.name for path in paths]


def test_folder_against_reading_by_hand(pictures):
    data = read_data(pictures)
    assert (data.source, data.encoding, data.warnings) == ("pictures", "lossless", ())
    assert (data.classes, data.n_train, data.n_test, data.size) == (tuple(sorted(COLOURS)), 60, 12, 32)
    for split, rows in (("train", slice(0, 60)), ("test", slice(60, None))):
        pixels, names = read_by_hand(pictures, split)
        assert np.array_equal(data.images[rows], pixels)
        assert [data.classes[label] for label in data.labels[rows]] == names


@pytest.mark.parametrize("kind", ["tgz", "zip"])
@pytest.mark.parametrize("prefix", ["", "some/where/"])
def test_archives_hold_what_the_folder_holds(pictures, tmp_path, kind, prefix):
    path = tmp_path / f"pictures.{kind}"
    if kind == "tgz":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(pictures, prefix or ".")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for file in pictures.rglob("*.png"):
                archive.write(file, prefix + str(file.relative_to(pictures)))
    data, folder = read_data(path), read_data(pictures)
    assert data.fingerprint == folder.fingerprint
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and folder.sha256 is None


def test_the_fingerprint_notices_a_pixel_a_label_and_a_name(pictures):
    before = read_data(pictures).fingerprint
    assert read_data(pictures).fingerprint == before
    seen = {before}
    file = next((pictures / "train/red").iterdir())
    pixels = np.array(Image.open(file))
    pixels[3, 3, 1] ^= 1
    Image.fromarray(pixels).save(file)
    seen.add(read_data(pictures).fingerprint)
    file.rename(pictures / "train/blue" / file.name)
    seen.add(read_data(pictures).fingerprint)
    for split in ("train", "test"):
        (pictures / split / "green").rename(pictures / split / "gruen")
    seen.add(read_data(pictures).fingerprint)
    assert len(seen) == 4


def test_hidden_files_are_no_images(pictures):
    before = read_data(pictures).fingerprint
    (pictures / "train/red/._red-000.png").write_bytes(b"what a Mac leaves in an archive")
    data = read_data(pictures)
    assert data.fingerprint == before and data.warnings == () and data.n_files == 72


def test_numbered_pictures_come_in_the_order_of_their_numbers(tmp_path):
    for split in ("train", "test"):
        for number, name in enumerate(["b", "a", "b", "a"]):
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / split / name / f"{number * 9}.png")  # 9 after 0, 27
    data = read_data(tmp_path)
    assert data.images[:4, 0, 0, 0].tolist() == [0, 1, 2, 3] and data.labels.tolist() == [1, 0, 1, 0] * 2


def test_jpegs_are_said_to_be_lossy(pictures):
    Image.new("RGB", (32, 32)).save(pictures / "train/red/photo.JPG")
    assert read_data(pictures).encoding == "JPEG"


def test_other_sizes_and_modes_are_fitted(pictures):
    Image.new("L", (100, 60), 77).save(pictures / "train/red/gray.png")
    data = read_data(pictures, size=16)
    assert data.images.shape == (73, 16, 16, 3)
    assert (data.images == 77).all(axis=(1, 2, 3)).sum() == 1


def test_unreadable_and_foreign_files_are_named(pictures):
    (pictures / "train/red/notes.txt").write_text("x")
    (pictures / "train/red/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    data = read_data(pictures)
    assert data.n_train == 60
    assert "1 not an image file, passed over: train/red/notes.txt" in data.warnings
    assert any(line.startswith("1 unreadable, left out: train/red/broken.png (") for line in data.warnings)


def test_files_too_large_are_named_and_not_read(pictures):
    (pictures / "train/red/huge.png").write_bytes(bytes(10_000_001))
    data = read_data(pictures)
    assert data.warnings == ("1 unreadable, left out: train/red/huge.png (The file is larger than 10 MB.)",)


def test_images_in_other_places_are_named(pictures, tmp_path):
    (pictures / "train/red/more").mkdir()
    shutil.copy(pictures / "train/red/red-000.png", pictures / "train/red/more/x.png")
    shutil.copy(pictures / "train/red/red-000.png", pictures / "train/y.png")
    assert read_data(pictures).warnings == (
        "2 not in train/<class>/ or test/<class>/, left out: train/red/more/x.png, train/y.png",
    )
    with tarfile.open(tmp_path / "linked.tgz", "w:gz") as archive:
        archive.add(pictures, ".")
        link = tarfile.TarInfo("train/red/link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "train/red/red-000.png"
        archive.addfile(link)
    assert "1 unreadable, left out: train/red/link.png (A link.)" in read_data(tmp_path / "linked.tgz").warnings


def test_a_class_of_hidden_files_and_a_link_to_nothing(pictures):
    (pictures / "train/red/lost.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"lost.png cannot be read: the link leads nowhere"):
        read_data(pictures)
    (pictures / "train/red/lost.png").unlink()
    (pictures / "train/black").mkdir()
    (pictures / "train/black/.gitkeep").touch()
    with pytest.raises(DataError, match="train/black is a class without images"):
        read_data(pictures)


def test_a_class_whose_name_is_not_utf8(pictures):
    (pictures / "train/red").rename(os.fsdecode(os.fsencode(pictures / "train/caf") + b"\xe9"))
    shutil.rmtree(pictures / "test/red")
    with pytest.raises(DataError, match=r"rename the class 'caf.udce9': it holds control characters or is no UTF-8"):
        read_data(pictures)
    other = pictures.with_name("other\udce9")
    pictures.rename(other)
    (other / "train/caf\udce9").rename(other / "train/red")
    (other / "train/red/\udce9.txt").touch()
    data = read_data(other)
    assert data.source == "other\\udce9" and data.warnings[0].endswith("train/red/\\udce9.txt")


def test_more_classes_than_an_export_can_hold(tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(sources, "MAX_CLASSES", 2)
    with pytest.raises(DataError, match="3 classes, where an export holds 2 at most"):
        read_data(pictures)


@pytest.mark.parametrize(
    ("name", "mode"), [("x.tgz", "w:gz"), ("x.tar.xz", "w:xz"), ("x.tar.bz2", "w:bz2"), ("x.zip", zipfile.ZIP_LZMA)]
)
def test_a_bit_flipped_in_an_archive(pictures, tmp_path, name, mode):
    """It gives the same images or is refused; pictures without a checksum of their own would be read as they are."""
    for number, path in enumerate(sorted(pictures.rglob("*.png"))):
        random = np.random.default_rng(number)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path.with_suffix(".bmp"))
        path.unlink()
    if isinstance(mode, str):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(pictures, ".")
    else:
        with zipfile.ZipFile(tmp_path / name, "w", mode) as archive:
            for file in pictures.rglob("*.bmp"):
                archive.write(file, file.relative_to(pictures))
    whole, expected = (tmp_path / name).read_bytes(), read_data(tmp_path / name)
    chance, refused = np.random.default_rng(0), 0
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[chance.integers(len(whole))] ^= 1 << chance.integers(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            data = read_data(tmp_path / name)
            assert data.fingerprint == expected.fingerprint and data.warnings == ()
        except DataError:
            refused += 1
    assert refused > 25


def test_links_are_followed_and_circles_are_not(pictures, tmp_path):
    (pictures / "train/red").rename(tmp_path / "elsewhere")
    (pictures / "train/red").symlink_to(tmp_path / "elsewhere")
    before = read_data(pictures)
    assert before.n_train == 60
    (tmp_path / "elsewhere/round").symlink_to(pictures)
    assert read_data(pictures).fingerprint == before.fingerprint


def test_a_file_that_vanishes_or_cannot_be_opened(pictures, monkeypatch):
    listing = sources.list_folder(pictures)
    monkeypatch.setattr(sources, "list_folder", lambda _: listing)
    (pictures / "train/red/red-000.png").unlink()
    with pytest.raises(DataError, match=r"red-000.png cannot be read: No such file"):
        read_data(pictures)


@pytest.mark.parametrize("kind", ["folder", "tgz", "zip"])
def test_decoding_on_all_cores_gives_the_same(pictures, tmp_path, monkeypatch, kind):
    (pictures / "train/red/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (pictures / "train/blue/empty.png").write_bytes(b"")
    source = pictures if kind == "folder" else archive_as(kind, pictures, tmp_path)
    alone = read_data(source)
    monkeypatch.setattr(sources, "PARALLEL_AFTER", -1.0)
    monkeypatch.setattr(sources, "CHUNK_FILES", 7)
    together = read_data(source)
    assert together.fingerprint == alone.fingerprint and together.warnings == alone.warnings
    assert all(words in together.warnings[0] for words in ("2 unreadable, left out: ", "red/broken.png", "blue/empty.png"))


def archive_as(kind, folder, tmp_path):
    return tmp_path / shutil.make_archive(tmp_path / "archive", {"tgz": "gztar", "zip": "zip"}[kind], folder)


def test_what_takes_long_is_announced(capfd, monkeypatch):
    now = iter([0.0, 0.5, 2.0, 3.0])
    monkeypatch.setattr(sources.time, "monotonic", lambda: next(now))
    with sources._progress("reading birds") as show:
        for share in (0.05, 0.2, 0.3):
            show(share)
    assert capfd.readouterr().err == "reading birds: about 10 seconds\n"


def test_without_a_test_folder_a_fixed_fifth_of_each_class_is_held_out(pictures):
    whole = read_data(pictures)
    shutil.rmtree(pictures / "test")
    data = read_data(pictures)
    assert (data.n_train, data.n_test) == (48, 12)
    assert np.bincount(data.labels[48:]).tolist() == [4, 4, 4]
    held_out, rest = ({image.tobytes() for image in part} for part in (data.images[48:], data.images[:48]))
    assert held_out | rest == {image.tobytes() for image in whole.images[:60]} and not held_out & rest
    assert data.warnings == ("no images in test/: 12 of train/ are held out as the test split, always the same ones",)
    assert read_data(pictures).fingerprint == data.fingerprint


def damage(pictures, how):
    if how == "empty class":
        for file in (pictures / "train/red").iterdir():
            file.unlink()
    elif how == "unreadable class":
        for file in (pictures / "train/red").iterdir():
            file.write_bytes(b"")
    elif how == "one picture a class and no test":
        shutil.rmtree(pictures / "train")
        (pictures / "test").rename(pictures / "train")
        for file in (pictures / "train").glob("*/*[1-9].png"):
            file.unlink()
    elif how == "nothing readable":
        for file in (pictures / "train").glob("*/*"):
            file.write_bytes(b"")
    elif how == "one class":
        for name in ("green", "red"):
            shutil.rmtree(pictures / "train" / name)
            shutil.rmtree(pictures / "test" / name)
    elif how == "strange class":
        (pictures / "test/red").rename(pictures / "test/purple")
    elif how == "empty":
        shutil.rmtree(pictures)
        pictures.mkdir()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("one picture a class and no test", "no test/, and too few images"),
        ("empty class", "train/red is a class without images"),
        ("unreadable class", "classes in test/ without images in train/: red"),
        ("one class", "only the class 'blue'"),
        ("strange class", "without images in train/: purple"),
        ("nothing readable", r"no images in train/ that can be read: train/blue/blue-000.png \(The file is empty"),
        ("empty", "no images in train/"),
    ],
)
def test_folders_that_will_not_do(pictures, how, words):
    damage(pictures, how)
    with pytest.raises(DataError, match=words):
        read_data(pictures)


def test_files_that_are_no_data(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_data(tmp_path / "nothing")
    with pytest.raises(DataError, match="Did you mean 'digits'"):
        read_data("digit")
    page = tmp_path / "cifar-10-python.tar.gz"
    page.write_text("<html>404</html>")
    with pytest.raises(DataError, match="neither a tar nor a zip"):
        read_data(page)


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_a_truncated_archive(pictures, tmp_path, kind):
    whole = shutil.make_archive(tmp_path / "whole", "gztar" if kind == "tgz" else "zip", pictures)
    half = tmp_path / f"half.{kind}"
    data = (tmp_path / whole).read_bytes()
    half.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged"):
        read_data(half)


def test_a_member_that_unpacks_to_more_than_an_image_is_not_unpacked(pictures, tmp_path):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(pictures.rglob("*.png")):
            archive.write(path, path.relative_to(pictures))
        with archive.open("train/red/bomb.png", "w") as member:
            for _ in range(300):
                member.write(bytes(1_000_000))
    data = read_data(bomb)
    assert data.n_train == 60 and "train/red/bomb.png (The file is larger than 10 MB.)" in data.warnings[0]
    lying = tmp_path / "lying.zip"
    lying.write_bytes(bomb.read_bytes().replace((300_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(DataError, match="damaged"):
        read_data(lying)


def test_a_batch_that_is_too_large_to_be_one(batches, tmp_path):
    copy = shutil.copytree(batches, tmp_path / "copy")
    with (copy / "data_batch_1").open("wb") as file:
        file.truncate(64_000_001)
    with pytest.raises(DataError, match="data_batch_1 is no batch of CIFAR-10's"):
        read_data(copy)


def test_an_archive_writes_nothing_outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../escaped.png", "/tmp/cifar-fastai-escaped.png", "train/a/ok.png"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"data"))
        link = tarfile.TarInfo("train/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError):
        read_data(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hostile.tgz"]


# --- CIFAR's own batches -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def batches(tmp_path_factory):
    """A cifar-10-batches-py folder in miniature: ten images a batch, as the university's pickles are written."""
    folder = tmp_path_factory.mktemp("batches") / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(1)
    names = [f"name{index}" for index in range(10)]
    for name in [name for files in sources.BATCH_FILES.values() for name in files]:
        batch = {
            "data": random.integers(0, 256, (10, 3072), dtype=np.uint8),
            "labels": random.permutation(10).tolist(),
            "filenames": [f"{name}-{index}.png" for index in range(10)],
            "batch_label": name,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names, "num_vis": 3072}, protocol=2))
    return folder


def as_tar(batches, path):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(batches, batches.name)
    return path


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def small_cifar10(batches, tmp_path, monkeypatch):
    """torchvision's CIFAR10 told to expect the miniature; returns the archive."""
    archive = as_tar(batches, tmp_path / "cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    for attribute, split in (("train_list", "train"), ("test_list", "test")):
        monkeypatch.setattr(CIFAR10, attribute, [[name, md5(batches / name)] for name in sources.BATCH_FILES[split]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(batches / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return archive


def test_batches_against_torchvisions_reading(batches, small_cifar10):
    data = read_data(batches)
    for split, rows in (("train", slice(0, 50)), ("test", slice(50, 60))):
        oracle = CIFAR10(batches.parent, train=split == "train")
        assert np.array_equal(data.images[rows], oracle.data)
        assert data.labels[rows].tolist() == oracle.targets
        assert list(data.classes) == oracle.classes
    assert (data.n_train, data.n_test, data.encoding) == (50, 10, "lossless")
    archive = read_data(small_cifar10)
    assert archive.fingerprint == data.fingerprint and archive.sha256


def test_cifar10_is_fetched_from_the_mirror_named_once(batches, small_cifar10, web_server, tmp_path, monkeypatch):
    web_server.files["/small.tar.gz"] = small_cifar10.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CIFAR10_MIRROR", web_server.address + "/small.tar.gz")
    monkeypatch.setattr(sources, "CIFAR10", archive_of(small_cifar10, mirrors=()))
    data = read_data("cifar10")
    assert data.source == "cifar10" and data.fingerprint == read_data(batches).fingerprint
    assert sources.cache_folder().is_relative_to(tmp_path)
    read_data("cifar10")
    assert len(web_server.requests) == 1


def test_missing_and_damaged_batches(batches, tmp_path):
    copy = shutil.copytree(batches, tmp_path / "copy")
    (copy / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3 missing"):
        read_data(copy)
    (copy / "data_batch_3").write_bytes((batches / "data_batch_3").read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged"):
        read_data(copy)


def test_a_hostile_batch_runs_nothing(batches, tmp_path):
    copy, canary = shutil.copytree(batches, tmp_path / "copy"), tmp_path / "canary"
    (copy / "data_batch_2").write_bytes(pickle.dumps({"data": Canary(canary), "labels": []}))
    with pytest.raises(DataError, match="no part of a CIFAR batch"):
        read_data(copy)
    assert not canary.exists()


def changed(content: dict, **fields) -> bytes:
    return pickle.dumps({name: value for name, value in {**content, **fields}.items() if value is not None}, protocol=4)


ROWS = np.zeros((10, 3072), np.uint8)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("data_batch_2", {"labels": [11] * 10}, "data_batch_2: the label 11 is none of 0 to 9"),
        ("data_batch_2", {"labels": [-1] * 10}, "the label -1 is none"),
        ("data_batch_2", {"labels": [True] * 10}, "the label True is none"),
        ("data_batch_2", {"labels": [1.0] * 10}, r"the label 1\.0 is none"),
        ("data_batch_2", {"labels": [1 << 70] * 10}, "the label 1180591620717411303424 is none"),
        ("data_batch_2", {"labels": list(range(9))}, "not one label for each of its 10 images"),
        ("data_batch_2", {"labels": 3}, "not one label for each"),
        ("data_batch_2", {"labels": None}, "it has no 'labels'"),
        ("data_batch_2", {"data": None}, "it has no 'data'"),
        ("test_batch", {"data": ROWS / 255}, "test_batch: its data are no rows of 3072 bytes"),
        ("test_batch", {"data": ROWS[:, :3071]}, "no rows of 3072 bytes"),
        ("test_batch", {"data": ROWS.reshape(10, 3, 32, 32)}, "no rows of 3072 bytes"),
        ("test_batch", {"data": ROWS.tolist()}, "no rows of 3072 bytes"),
        ("test_batch", {"data": ROWS.astype(object)}, "no rows of 3072 bytes"),
        ("test_batch", {"data": ROWS[:0], "labels": []}, "not one label for each of its 0 images"),
        ("batches.meta", {"label_names": "cat dog"}, r"batches\.meta: label_names is no list"),
        ("batches.meta", {"label_names": [f"name{n}" for n in range(9)] + [10]}, "label_names is no list"),
        ("batches.meta", {"label_names": ["name"] * 10}, "label_names holds a name twice"),
        ("batches.meta", {"label_names": None}, "it has no 'label_names'"),
        ("batches.meta", {"label_names": [f"name{n}" for n in range(9)] + ["x" * 300]}, "it has 300 letters"),
        ("batches.meta", {"label_names": [f"name{n}" for n in range(9)] + ["\x1b[2J"]}, "holds control characters"),
        ("batches.meta", {"label_names": [f"name{n}" for n in range(11)]}, "is of the class 'name10'"),
    ],
)
def test_batches_that_would_fail_later(batches, tmp_path, name, fields, words):
    copy = shutil.copytree(batches, tmp_path / "copy")
    (copy / name).write_bytes(changed(pickle.loads((batches / name).read_bytes()), **fields))
    for source in (copy, as_tar(copy, tmp_path / "copy.tgz")):
        with pytest.raises(DataError, match=words) as error:
            read_data(source)
        assert "\n" not in str(error.value)


def test_a_class_that_the_test_batch_lacks(batches, tmp_path):
    copy = shutil.copytree(batches, tmp_path / "copy")
    (copy / "test_batch").write_bytes(pickle.dumps({"data": ROWS[:3], "labels": [0, 1, 1]}))
    data = read_data(copy)
    assert (data.n_train, data.n_test, data.labels[50:].tolist()) == (50, 3, [0, 1, 1])
    assert data.warnings == ()
    (copy / "test_batch").write_bytes((batches / "data_batch_1").read_bytes())
    words = "10 of 10 test images are also training images, which makes the test accuracy too high: number 0, number 1"
    assert read_data(copy).warnings[0].startswith(words)


def test_batches_that_lie_twice_or_beside_other_things(batches, tmp_path, pictures):
    shutil.copytree(batches, tmp_path / "both" / "one")
    shutil.copytree(batches, tmp_path / "both" / "deeper" / "two")
    shutil.copytree(pictures, tmp_path / "both" / "one" / "pictures")
    assert read_data(tmp_path / "both").fingerprint == read_data(batches).fingerprint
    shutil.copytree(batches, tmp_path / "both" / "three")
    with pytest.raises(DataError, match="one/ and three/ could both be the data set"):
        read_data(tmp_path / "both")
    (pictures / "train/red/test_batch").touch()
    assert read_data(pictures).warnings == ("1 not an image file, passed over: train/red/test_batch",)


# --- digits ------------------------------------------------------------------------------------------------------


def test_digits_against_scikit_learn():
    from sklearn.datasets import load_digits

    data, digits = read_data("digits"), load_digits()
    assert (len(data.images), data.n_train, data.n_test) == (1797, 1437, 360)
    assert data.images.shape[1:] == (32, 32, 3) and data.classes == tuple("0123456789")
    assert (data.images[..., 0] == data.images[..., 1]).all() and (data.images[..., 0] == data.images[..., 2]).all()
    # Every digit once: shrunk back to 8 x 8, each image lies nearest to one original of its own label.
    blocks = data.images[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64)
    originals = digits.images.reshape(-1, 64) * (255 / 16)
    nearest = ((originals**2).sum(axis=1) - 2 * blocks @ originals.T).argmin(axis=1)
    assert len(set(nearest)) >= 1790  # a few digits resemble each other within the rounding
    assert (digits.target[nearest] == data.labels).all()
    test_share = np.bincount(data.labels[1437:]) / np.bincount(data.labels)
    assert abs(test_share - 0.2).max() < 0.01


def test_digits_are_always_divided_alike():
    assert read_data("digits").fingerprint == read_data("digits").fingerprint
