"""Where images come from: CIFAR-10, a folder or archive of pictures, CIFAR's own batches, scikit-learn's digits.

Every source ends as one `ImageData`: uint8 pixels, labels, class names and a fingerprint, the training split first
and the test split after it.
"""

import dataclasses
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from cifar_fastai.download import CIFAR10, digests, fetch
from cifar_fastai.errors import DataError
from cifar_fastai.images import EXTENSIONS, BadImage, decode_image, fit_image
from cifar_fastai.recipes import nearest

SPLITS = ("train", "test")
BATCH_FILES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
BATCH_NAMES = {"batches.meta", *BATCH_FILES["train"], *BATCH_FILES["test"]}
TEST_SHARE, TEST_SEED = 0.2, 0
LAYOUT_HELP = "A folder or archive of images holds train/<class>/<image>, and test/<class>/<image> if you have them."


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images of one size with their labels. Rows `0 … n_train-1` are the training split, the rest the test split."""

    source: str  # "cifar10", "digits", or the name of the file or folder
    images: np.ndarray  # uint8, (rows, size, size, 3)
    labels: np.ndarray  # int64, (rows,), indices into classes
    classes: tuple[str, ...]
    n_train: int
    encoding: str  # how the pixels were stored: "lossless" or a lossy format's name
    n_files: int | None = None  # that were read, where there were several
    sha256: str | None = None  # of the file they came from, where it was one
    warnings: tuple[str, ...] = field(default=())

    @property
    def n_test(self) -> int:
        return len(self.images) - self.n_train

    @property
    def size(self) -> int:
        return self.images.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over pixels, labels, class names and the place of the split: equal data, equal fingerprint."""
        digest = hashlib.sha256(repr((self.classes, self.n_train, self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()


def load_data(source: str | os.PathLike | ImageData, size: int = 32) -> ImageData:
    """Load `source`, its images fitted to `size` x `size` pixels.

    `source` is "cifar10" (downloaded once into the user's cache folder), "digits" (scikit-learn's, no network), a
    folder or a .tgz or .zip of a folder `train/<class>/*, test/<class>/*`, `cifar-10-python.tar.gz`, or an extracted
    `cifar-10-batches-py` folder. Raises DataError.
    """
    if isinstance(source, ImageData):
        return source
    if source == "cifar10":
        return _cifar10(size)
    if source == "digits":
        return _digits(size)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_files(_files_in_folder(path), path.resolve().name, size)
    if path.is_file():
        return _from_archive(path, size)
    hint = nearest(str(source), ("cifar10", "digits"))
    raise DataError(f"--data {source}: there is no such file or folder.{hint} `--data digits` needs no file at all.")


# --- the named sources -------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloads are kept: `cifar-fastai` in the user's cache folder (`$XDG_CACHE_HOME` where that is set)."""
    from platformdirs import user_cache_path

    return user_cache_path("cifar-fastai", appauthor=False)


def _cifar10(size: int) -> ImageData:
    path = fetch(CIFAR10, cache_folder(), first=os.environ.get("CIFAR10_MIRROR"))
    return dataclasses.replace(_from_archive(path, size), source="cifar10")


def _digits(size: int) -> ImageData:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = _hold_out(np.arange(len(digits.target)), digits.target)
    rows = np.concatenate([train, test])
    small = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)  # 8 x 8, values 0 to 16
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in small]
    images = np.repeat(np.stack([np.asarray(image) for image in resized])[..., None], 3, axis=3)
    labels = digits.target[rows].astype(np.int64)
    return ImageData("digits", images, labels, tuple(map(str, digits.target_names)), len(train), "lossless")


def _hold_out(items, labels) -> tuple:
    """(training items, test items), for sources that come undivided: a fifth of each class, always the same."""
    from sklearn.model_selection import train_test_split

    return train_test_split(items, test_size=TEST_SHARE, stratify=labels, random_state=TEST_SEED)


# --- files, wherever they lie ------------------------------------------------------------------------------------

File = tuple[PurePosixPath, bytes]


def _from_files(files: Iterable[File], source: str, size: int, sha256: str | None = None) -> ImageData:
    """Sort what comes into CIFAR's batches and pictures, one file at a time: a folder may be larger than memory."""
    batches, pictures = {}, _Pictures(size)
    for path, data in files:
        if path.name in BATCH_NAMES:
            batches[path.name] = data
        elif len(path.parts) >= 3 and path.parts[-3] in SPLITS and not path.name.startswith("."):
            pictures.add(path, data)
    if batches:
        return _from_batches(batches, source, size, sha256)
    return _from_pictures(pictures, source, sha256)


def _files_in_folder(folder: Path) -> Iterator[File]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                yield PurePosixPath(path.relative_to(folder).as_posix()), path.read_bytes()
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
        elif path.is_dir() and path.parent.name in SPLITS and not any(path.iterdir()):
            raise DataError(f"{path} is a class without images: put some in, or remove the folder.")


def _files_in_tar(path: Path) -> Iterator[File]:
    # Members are read in memory and nothing is written, so hostile names and links in an archive have no effect.
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                yield PurePosixPath(member.name), archive.extractfile(member).read()


def _files_in_zip(path: Path) -> Iterator[File]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield PurePosixPath(member.filename), archive.read(member)


def _from_archive(path: Path, size: int) -> ImageData:
    if zipfile.is_zipfile(path):
        files = _files_in_zip(path)
    elif tarfile.is_tarfile(path):
        files = _files_in_tar(path)
    else:
        raise DataError(f"--data {path}: neither a tar nor a zip archive, or a damaged one. {LAYOUT_HELP}")
    try:
        return _from_files(files, path.name, size, *digests(path, "sha256"))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, RuntimeError) as error:
        raise DataError(f"--data {path}: the archive is damaged ({error}). Fetch it again.") from None


# --- CIFAR's own batches -----------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's batches are pickles. This reads what such a batch holds and refuses to look up anything else."""

    ALLOWED = frozenset({("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})

    def find_class(self, module, name):
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return super().find_class("numpy._core.multiarray", name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a CIFAR batch")


def _read_batch(data: bytes) -> dict:
    batch = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    if not isinstance(batch, dict):
        raise ValueError("it holds no dictionary")
    return batch


def _from_batches(content: dict[str, bytes], source: str, size: int, sha256: str | None) -> ImageData:
    if missing := sorted(BATCH_NAMES - content.keys()):
        raise DataError(f"--data {source}: {', '.join(missing)} missing from CIFAR-10's batches. Fetch them again.")
    images, labels, n_rows = [], [], {}
    try:
        classes = tuple(_read_batch(content["batches.meta"])["label_names"])
        for split in SPLITS:
            batches = [_read_batch(content[name]) for name in BATCH_FILES[split]]
            images += [batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches]
            labels += [np.asarray(batch["labels"], dtype=np.int64) for batch in batches]
            n_rows[split] = sum(len(batch["labels"]) for batch in batches)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"--data {source}: CIFAR-10's batches are damaged ({error}). Fetch them again.") from None
    pixels = np.ascontiguousarray(np.concatenate(images))
    if size != 32:
        pixels = np.stack([np.asarray(fit_image(decode_image(image), size)) for image in pixels])
    return ImageData(source, pixels, np.concatenate(labels), classes, n_rows["train"], "lossless", len(content), sha256)


# --- folders of pictures -----------------------------------------------------------------------------------------


@dataclass
class _Pictures:
    """Decoded pictures by split, as (path, pixels), and what was not one."""

    size: int
    splits: dict[str, list[tuple[PurePosixPath, np.ndarray]]] = field(default_factory=lambda: {"train": [], "test": []})
    passed_over: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def add(self, path: PurePosixPath, data: bytes) -> None:
        if path.suffix.lower() not in EXTENSIONS:
            self.passed_over.append(str(path))
            return
        try:
            pixels = np.asarray(fit_image(decode_image(data), self.size))
        except BadImage as error:
            self.damaged.append(f"{path} ({error})")
        else:
            self.splits[path.parts[-3]].append((path, pixels))

    def hold_out_test(self, source: str) -> None:
        """Make the test split of a fifth of each class of the training split."""
        found = sorted(self.splits["train"], key=lambda picture: picture[0])
        names = [path.parts[-2] for path, _ in found]
        try:
            self.splits["train"], self.splits["test"] = _hold_out(found, names)
        except ValueError as error:  # scikit-learn's: a class of one image
            raise DataError(f"--data {source}: no test/, and too few images to hold some out: {error}") from None


def _from_pictures(pictures: _Pictures, source: str, sha256: str | None) -> ImageData:
    if not pictures.splits["train"]:
        reason = f" that can be read: {pictures.damaged[0]}" if pictures.damaged else ""
        raise DataError(f"--data {source}: no images in train/{reason}. {LAYOUT_HELP}")
    warnings = _count_and_name("not an image file, passed over", pictures.passed_over)
    warnings += _count_and_name("unreadable, left out", pictures.damaged)
    if not pictures.splits["test"]:
        pictures.hold_out_test(source)
        n_test = len(pictures.splits["test"])
        warnings += (f"no images in test/: {n_test} of train/ are held out as the test split, always the same ones",)
    names = {split: {path.parts[-2] for path, _ in found} for split, found in pictures.splits.items()}
    if strangers := sorted(names["test"] - names["train"]):
        raise DataError(f"--data {source}: classes in test/ without images in train/: {', '.join(strangers)}.")
    classes = tuple(sorted(names["train"]))
    if len(classes) < 2:
        raise DataError(f"--data {source}: train/ holds only the class {classes[0]!r}; it takes two to classify.")

    train, test = (_in_original_order(pictures.splits[split]) for split in SPLITS)
    images = np.stack([pixels for _, pixels in train + test])
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[path.parts[-2]] for path, _ in train + test], dtype=np.int64)
    encoding = _encoding({path.suffix.lower() for path, _ in train + test})
    return ImageData(source, images, labels, classes, len(train), encoding, len(images), sha256, warnings)


def _in_original_order(pictures: list) -> list:
    """By number where every name is a different number, as in fast.ai's copy of CIFAR-10; else by path."""
    stems = [path.stem for path, _ in pictures]
    numbered = all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems)
    return sorted(pictures, key=lambda picture: int(picture[0].stem) if numbered else picture[0])


def _encoding(suffixes: set[str]) -> str:
    lossy = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}
    return " and ".join(sorted({lossy[suffix] for suffix in suffixes if suffix in lossy})) or "lossless"


def _count_and_name(what: str, things: list) -> tuple[str, ...]:
    if not things:
        return ()
    named = ", ".join(map(str, things[:3])) + (" and more" if len(things) > 3 else "")
    return (f"{len(things)} {what}: {named}",)
