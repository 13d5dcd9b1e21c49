"""Where images come from: CIFAR-10, a folder or archive of pictures, CIFAR's own batches, scikit-learn's digits.

Every source ends as one `ImageData`: uint8 pixels, labels, class names and a fingerprint, the training split first
and the test split after it.
"""

import dataclasses
import errno
import hashlib
import io
import mmap
import os
import pickle
import sys
import tarfile
import time
import unicodedata
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from lzma import LZMAError
from pathlib import Path, PurePosixPath

import numpy as np

from cifar_fastai.download import CIFAR10, digests, fetch
from cifar_fastai.errors import DataError
from cifar_fastai.images import EXTENSIONS, MAX_BYTES, TOO_LARGE, BadImage, decode_image, fit_image
from cifar_fastai.recipes import nearest
from cifar_fastai.terminal import progress_bar

SPLITS = ("train", "test")
BATCH_FILES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
BATCH_NAMES = {"batches.meta", *BATCH_FILES["train"], *BATCH_FILES["test"]}
BATCH_BYTES = 64_000_000  # more than any of CIFAR's batches
TEST_SHARE, TEST_SEED = 0.2, 0
MAX_CLASSES = 1_500  # as many as an export can hold the confusion matrix of
CHUNK_FILES, CHUNK_BYTES = 512, 4_000_000  # images decoded at once: at most so many, or so much before and after
PARALLEL_AFTER = 0.5  # seconds; before that, starting processes costs more than it saves
BLOCK_BYTES = 4_000_000  # of pixels worked on at once
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
        return self.images[0].shape[0]

    def blocks(self, rows: slice = slice(None)) -> Iterator[np.ndarray]:
        """The images of `rows` in contiguous arrays of some megabytes each."""
        images = self.images[rows]
        n = max(1, BLOCK_BYTES // self.images[0].nbytes)
        for start in range(0, len(images), n):
            yield np.ascontiguousarray(images[start : start + n])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over pixels, labels, class names and the place of the split: equal data, equal fingerprint."""
        shape = (len(self.images), *self.images[0].shape)
        digest = hashlib.sha256(repr((self.classes, self.n_train, shape)).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        for block in self.blocks():
            digest.update(block.data)
        return digest.hexdigest()

    @cached_property
    def channel_stats(self) -> list[list[float]]:
        """Mean and standard deviation of red, green and blue over the training split, in units of the full range."""
        counts = np.zeros((3, 256))
        for block in self.blocks(slice(self.n_train)):
            for channel in range(3):
                counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
        shares = counts / counts.sum(axis=1, keepdims=True)
        values = np.arange(256) / 255
        means = shares @ values
        variances = shares @ values**2 - means**2
        return [means.tolist(), np.sqrt(np.maximum(variances, 1 / 255**2)).tolist()]


def read_data(source: str | os.PathLike, size: int = 32) -> ImageData:
    """Read `source` from where it lies, its images fitted to `size` x `size` pixels.

    `source` is "cifar10" (downloaded once into the user's cache folder), "digits" (scikit-learn's, no network), a
    folder or a .tgz or .zip of a folder `train/<class>/*, test/<class>/*`, `cifar-10-python.tar.gz`, or an extracted
    `cifar-10-batches-py` folder. Raises DataError.
    """
    data = read_rows(source, size)
    return dataclasses.replace(data, images=np.stack(data.images))


def read_rows(source: str | os.PathLike, size: int) -> ImageData:
    """As `read_data`, but `images` is a list of single images, which can be written out without a second copy."""
    if source == "cifar10":
        path = fetch(CIFAR10, cache_folder(), first=os.environ.get("CIFAR10_MIRROR"))
        return dataclasses.replace(_from_archive(path, size), source="cifar10")
    if source == "digits":
        return _digits(size)
    path = existing_path(source)
    return _from_folder(path, size) if path.is_dir() else _from_archive(path, size)


def existing_path(source: str | os.PathLike) -> Path:
    """The file or folder that `source` names. Raises DataError if there is none."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111  Path's raises over an unknown user
    is_there = os.path.isdir(path) or os.path.isfile(path)  # noqa: PTH112, PTH113  Path's raise over a name too long
    if not (is_there and str(source)):
        named, hint = source or "''", nearest(str(source), ("cifar10", "digits"))
        raise DataError(f"--data {named}: there is no such file or folder.{hint} `--data digits` needs no file at all.")
    return path


# --- the named sources -------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloads are kept: `cifar-fastai` in the user's cache folder (`$XDG_CACHE_HOME` where that is set)."""
    from platformdirs import user_cache_path

    return user_cache_path("cifar-fastai", appauthor=False)


def _digits(size: int) -> ImageData:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = _hold_out(np.arange(len(digits.target)), digits.target)
    rows = np.concatenate([train, test])
    small = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)  # 8 x 8, values 0 to 16
    resized = (Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in small)
    images = [np.repeat(np.asarray(image)[..., None], 3, axis=2) for image in resized]
    labels = digits.target[rows].astype(np.int64)
    return ImageData("digits", images, labels, tuple(map(str, digits.target_names)), len(train), "lossless")


def _hold_out(items, labels) -> tuple:
    """(training items, test items), for sources that come undivided: a fifth of each class, always the same."""
    from sklearn.model_selection import train_test_split

    return train_test_split(items, test_size=TEST_SHARE, stratify=labels, random_state=TEST_SEED)


# --- files, wherever they lie ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A file in a folder or an archive. Nothing of it is in memory yet."""

    path: PurePosixPath  # within the folder or archive
    size: int  # bytes, as announced
    open: Callable
    progress: float  # share of the source that lies before it

    def read(self, limit: int) -> bytes:
        """Its bytes. Raises BadImage if there are more than `limit`, however few were announced."""
        if self.size <= limit:
            with self.open() as file:
                data = file.read(limit + 1)
            if len(data) <= limit:
                return data
        raise BadImage(TOO_LARGE)


def _from_files(files: Iterable[_File], source: str, size: int, sha256: str | None = None) -> ImageData:
    """Sort what comes into CIFAR's batches and pictures."""
    batches, pictures = {}, _Pictures(size)

    def images(show):
        for number, file in enumerate(files):
            if number % 50 == 0:
                show(file.progress)
            folders, name = file.path.parts[:-1], file.path.name
            if name in BATCH_NAMES:
                batches[name] = _bytes_of_batch(file, source)
            elif name.startswith("."):
                continue
            elif len(folders) >= 2 and folders[-2] in SPLITS:
                yield file
            elif not set(SPLITS).isdisjoint(folders) and file.path.suffix.lower() in EXTENSIONS:
                pictures.misplaced.append(str(file.path))

    with _progress(f"reading {source}") as show:
        pictures.add_all(images(show))
    if batches:
        return _from_batches(batches, source, size, sha256)
    return _from_pictures(pictures, source, sha256)


@contextmanager
def _progress(what: str):
    """Gives a function that takes the share done: it moves a bar on a terminal, and elsewhere says once what takes long."""
    if sys.stderr.isatty():
        with progress_bar(sys.stderr) as bar:
            task = bar.add_task(what, total=100)
            yield lambda share: bar.update(task, completed=100 * share)
        return
    start, told = time.monotonic(), []

    def show(share):
        seconds = time.monotonic() - start
        if seconds > 1 and not told:
            told.append(True)
            print(f"{what}: about {seconds / max(share, 1e-3):.0f} seconds", file=sys.stderr, flush=True)

    yield show


def _from_folder(folder: Path, size: int) -> ImageData:
    listing = list_folder(folder)

    def files():
        for number, (path, stat) in enumerate(listing):
            yield _File(PurePosixPath(path), stat.st_size, partial(open, folder / path, "rb"), number / len(listing))

    try:
        return _from_files(files(), _printable(folder.resolve().name), size)
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from None


def list_folder(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Every file in a folder, by path from there, sorted; links are followed. Raises DataError."""
    found = []

    def walk(path: Path, prefix: str, above: tuple):
        about, entries = path.stat(), sorted(os.scandir(path), key=lambda entry: entry.name)
        here = (about.st_dev, about.st_ino)
        if here in above:
            return  # a link that leads back
        if path.parent.name in SPLITS and all(entry.name.startswith(".") for entry in entries):
            raise DataError(f"{path} is a class without images: put some in, or remove the folder.")
        for entry in entries:
            if entry.is_dir():
                walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, here))
            elif entry.is_file():
                found.append((prefix + entry.name, entry.stat()))
            elif entry.is_symlink():
                raise FileNotFoundError(errno.ENOENT, "the link leads nowhere", entry.path)

    try:
        walk(folder, "", ())
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None
    return found


def _files_in_tar(path: Path) -> Iterator[_File]:
    # Members are read in memory and nothing is written, so hostile names and links in an archive have no effect.
    length = path.stat().st_size
    with path.open("rb") as file, tarfile.open(fileobj=file) as archive:
        for member in archive:
            if member.isfile() or member.islnk() or member.issym():
                read = partial(archive.extractfile, member) if member.isfile() else _refuse_link
                yield _File(PurePosixPath(member.name), member.size, read, file.tell() / length)
        # tarfile stops at the end mark, or at a header it cannot read. What follows tells which, and ends with gzip's CRC.
        while rest := archive.fileobj.read(BLOCK_BYTES):
            if any(rest):
                raise tarfile.ReadError("a header in it cannot be read")


def _refuse_link():
    raise BadImage("A link.")


def _files_in_zip(path: Path) -> Iterator[_File]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for number, member in enumerate(members):
            if not member.is_dir():
                name = PurePosixPath(member.filename)
                yield _File(name, member.file_size, partial(archive.open, member), number / len(members))


def _from_archive(path: Path, size: int) -> ImageData:
    try:
        if zipfile.is_zipfile(path):
            files = _files_in_zip(path)
        elif tarfile.is_tarfile(path):
            files = _files_in_tar(path)
        else:
            raise DataError(f"--data {path}: neither a tar nor a zip archive, or a damaged one. {LAYOUT_HELP}")
        return _from_files(files, _printable(path.name), size, *digests(path, "sha256"))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, LZMAError, RuntimeError) as error:
        if getattr(error, "errno", None):
            raise DataError(f"--data {path}: it cannot be read: {error.strerror}.") from None
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


def _bytes_of_batch(file: _File, source: str) -> bytes:
    try:
        return file.read(BATCH_BYTES)
    except BadImage:
        raise DataError(f"--data {source}: {file.path} is no batch of CIFAR-10's; it is far too large.") from None


def _from_batches(content: dict[str, bytes], source: str, size: int, sha256: str | None) -> ImageData:
    n_files = len(content)
    if missing := sorted(BATCH_NAMES - content.keys()):
        raise DataError(f"--data {source}: {', '.join(missing)} missing from CIFAR-10's batches. Fetch them again.")
    images, labels, n_rows = [], [], {}
    try:
        classes = tuple(_read_batch(content["batches.meta"])["label_names"])
        for split in SPLITS:
            batches = [_read_batch(content.pop(name)) for name in BATCH_FILES[split]]
            for batch in batches:
                images += list(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += [np.asarray(batch["labels"], dtype=np.int64) for batch in batches]
            n_rows[split] = sum(len(batch["labels"]) for batch in batches)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"--data {source}: CIFAR-10's batches are damaged ({error}). Fetch them again.") from None
    if size != 32:
        images = [np.asarray(fit_image(decode_image(image), size)) for image in images]
    return ImageData(source, images, np.concatenate(labels), classes, n_rows["train"], "lossless", n_files, sha256)


# --- folders of pictures -----------------------------------------------------------------------------------------


@dataclass
class _Pictures:
    """Decoded pictures by split, as (path, pixels), and what was not one."""

    size: int
    splits: dict[str, list[tuple[PurePosixPath, np.ndarray]]] = field(default_factory=lambda: {"train": [], "test": []})
    passed_over: list[str] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def add_all(self, files: Iterable[_File]) -> None:
        for paths, (pixels, reasons) in _decoded(self._chunks(files), self.size):
            for path, image, reason in zip(paths, _on_own_pages(pixels), reasons, strict=True):
                if reason:
                    self.damaged.append(f"{path} ({reason})")
                else:
                    self.splits[path.parts[-3]].append((path, image))

    def _chunks(self, files: Iterable[_File]) -> Iterator[tuple[list[PurePosixPath], list[bytes]]]:
        paths, contents, n_bytes = [], [], 0
        for file in files:
            if file.path.suffix.lower() not in EXTENSIONS:
                self.passed_over.append(str(file.path))
                continue
            try:
                contents.append(file.read(MAX_BYTES))
            except BadImage as error:
                self.damaged.append(f"{file.path} ({error})")
                continue
            paths.append(file.path)
            n_bytes += len(contents[-1]) + 3 * self.size**2
            if len(paths) == CHUNK_FILES or n_bytes > CHUNK_BYTES:
                yield paths, contents
                paths, contents, n_bytes = [], [], 0
        if paths:
            yield paths, contents

    def hold_out_test(self, source: str) -> None:
        """Make the test split of a fifth of each class of the training split."""
        found = sorted(self.splits["train"], key=lambda picture: picture[0])
        names = [path.parts[-2] for path, _ in found]
        try:
            self.splits["train"], self.splits["test"] = _hold_out(found, names)
        except ValueError as error:  # scikit-learn's: a class of one image
            raise DataError(f"--data {source}: no test/, and too few images to hold some out: {error}") from None


def _decode_chunk(contents: list[bytes], size: int) -> tuple[np.ndarray, list[str | None]]:
    """Pixels (N, size, size, 3) of encoded images, and for each the reason why it is none."""
    pixels = np.zeros((len(contents), size, size, 3), np.uint8)
    reasons: list[str | None] = [None] * len(contents)
    for place, content in enumerate(contents):
        try:
            pixels[place] = np.asarray(fit_image(decode_image(content), size))
        except BadImage as error:
            reasons[place] = str(error)
    return pixels, reasons


def _decoded(chunks: Iterator, size: int) -> Iterator:
    """(paths, what `_decode_chunk` gives) of each chunk in order; on all cores if there is more than a moment's work."""
    started = time.monotonic()
    for paths, contents in chunks:
        yield paths, _decode_chunk(contents, size)
        if time.monotonic() - started > PARALLEL_AFTER:
            break
    else:
        return
    # Processes, since decoding small images is mostly Python's own work; loky's, since they do not import __main__.
    from loky import BrokenProcessPool, ProcessPoolExecutor, cpu_count

    waiting = deque()

    def first_result():
        paths, future = waiting.popleft()
        return paths, future.result()

    try:
        with ProcessPoolExecutor(cpu_count()) as executor:
            for paths, contents in chunks:
                waiting.append((paths, executor.submit(_decode_chunk, contents, size)))
                if len(waiting) > 2 * cpu_count():  # enough to keep them busy, and no more in memory than that
                    yield first_result()
            while waiting:
                yield first_result()
    except BrokenProcessPool:
        raise DataError("A process that decodes images was ended from outside; is there too little memory?") from None


def _on_own_pages(pixels: np.ndarray) -> np.ndarray:
    """A copy that goes back to the system when freed; what malloc gave, among smaller things, may stay with the process."""
    pages = np.frombuffer(mmap.mmap(-1, pixels.nbytes), np.uint8).reshape(pixels.shape)
    pages[:] = pixels
    return pages


def _from_pictures(pictures: _Pictures, source: str, sha256: str | None) -> ImageData:
    if not pictures.splits["train"]:
        reason = f" that can be read: {pictures.damaged[0]}" if pictures.damaged else ""
        raise DataError(f"--data {source}: no images in train/{reason}. {LAYOUT_HELP}")
    warnings = _count_and_name("not an image file, passed over", pictures.passed_over)
    warnings += _count_and_name("unreadable, left out", pictures.damaged)
    warnings += _count_and_name("not in train/<class>/ or test/<class>/, left out", pictures.misplaced)
    if not pictures.splits["test"]:
        pictures.hold_out_test(source)
        n_test = len(pictures.splits["test"])
        warnings += (f"no images in test/: {n_test} of train/ are held out as the test split, always the same ones",)
    names = {split: {path.parts[-2] for path, _ in found} for split, found in pictures.splits.items()}
    if strangers := sorted(names["test"] - names["train"]):
        raise DataError(f"--data {source}: classes in test/ without images in train/: {', '.join(strangers)}.")
    classes = tuple(sorted(names["train"]))
    if rulers := [name for name in classes if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)]:
        raise DataError(f"--data {source}: rename the class {rulers[0]!r}: it holds control characters or is no UTF-8.")
    if len(classes) > MAX_CLASSES:
        raise DataError(f"--data {source}: {len(classes)} classes, where an export holds {MAX_CLASSES} at most.")
    if len(classes) < 2:
        raise DataError(f"--data {source}: train/ holds only the class {classes[0]!r}; it takes two to classify.")

    train, test = (_in_original_order(pictures.splits[split]) for split in SPLITS)
    images = [pixels for _, pixels in train + test]
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
    return (_printable(f"{len(things)} {what}: {named}"),)


def _printable(name: str) -> str:
    """`name`, with what is no UTF-8 in it written as an escape."""
    return name.encode("utf-8", "backslashreplace").decode()
