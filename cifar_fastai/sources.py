"""Where images come from: CIFAR-10, a folder or archive of pictures, CIFAR's own batches, scikit-learn's digits.

Every source ends as one `ImageData`: uint8 pixels, labels, class names and a fingerprint; the training split first, then
the validation split, where the source has one, and the test split after them.
"""

import dataclasses
import hashlib
import io
import math
import mmap
import os
import pickle
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from cifar_fastai.download import CIFAR10, fetch
from cifar_fastai.errors import DataError, first_line
from cifar_fastai.folders import (
    BATCH_FILES,
    BATCH_NAMES,
    SPLIT_WORDS,
    SPLITS,
    Folder,
    Layout,
    Tar,
    Zip,
    count_and_name,
    list_folder,
    open_archive,
    shown,
    sort_out,
)
from cifar_fastai.images import MAX_BYTES, BadImage, decode_image, fit_image
from cifar_fastai.labels import MAX_CLASSES, MAX_NAME, is_label, label_of
from cifar_fastai.recipes import nearest
from cifar_fastai.terminal import progress_bar

BATCH_BYTES = 64_000_000  # more than any of CIFAR's batches
TEST_SHARE, TEST_SEED = 0.2, 0
CHUNK_FILES, CHUNK_BYTES = 512, 4_000_000  # images decoded at once: at most so many, or so much before and after
PARALLEL_AFTER = 0.5  # seconds; before that, starting processes costs more than it saves
BLOCK_BYTES = 4_000_000  # of pixels worked on at once


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images of one size with their labels.

    Rows `0 … n_train-1` are what a training may look at, the last `n_valid` of them the source's own validation split; the
    rest is the test split.
    """

    source: str  # "cifar10", "digits", or the name of the file or folder
    images: np.ndarray  # uint8, (rows, size, size, 3)
    labels: np.ndarray  # int64, (rows,), indices into classes
    classes: tuple[str, ...]
    n_train: int
    encoding: str  # how the pixels were stored: "lossless" or a lossy format's name
    n_files: int | None = None  # that were read, where there were several
    sha256: str | None = None  # of the file they came from, where it was one
    file_warnings: tuple[str, ...] = ()  # of what was left out or taken otherwise
    split_warnings: tuple[str, ...] = ()  # of how far the splits can be trusted
    n_valid: int = 0
    held_out: bool = False  # whether the source has no test split, and these rows were taken from its training split
    unfit: str | None = None  # why nothing can be trained on this source

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.file_warnings + self.split_warnings

    @property
    def n_test(self) -> int:
        return len(self.images) - self.n_train

    @property
    def splits(self) -> dict[str, np.ndarray]:
        """The rows of each split that the source has, and of "all"."""
        rows = np.arange(len(self.images))
        first_valid = self.n_train - self.n_valid
        train, valid, test = rows[:first_valid], rows[first_valid : self.n_train], rows[self.n_train :]
        if self.held_out:
            train, test = np.concatenate([train, test]), test[:0]
        found = {"train": train, "valid": valid, "test": test, "all": rows}
        return {name: part for name, part in found.items() if len(part)}

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
        """sha256 over pixels, labels, class names and the places of the splits: equal data, equal fingerprint."""
        shape = (len(self.images), *self.images[0].shape)
        own = (self.n_valid,) if self.n_valid else ()
        digest = hashlib.sha256(repr((self.classes, self.n_train, shape, *own)).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        for block in self.blocks():
            digest.update(block.data)
        return digest.hexdigest()

    @cached_property
    def channel_stats(self) -> list[list[float]]:
        """Mean and standard deviation of red, green and blue over the training split (over all, if there is
        none), in units of the full range."""
        counts = np.zeros((3, 256))
        for block in self.blocks(slice(self.n_train - self.n_valid or None)):
            for channel in range(3):
                counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
        shares = counts / counts.sum(axis=1, keepdims=True)
        values = np.arange(256) / 255
        means = shares @ values
        variances = shares @ values**2 - means**2
        return [means.tolist(), np.sqrt(np.maximum(variances, 1 / 255**2)).tolist()]


def read_data(source: str | os.PathLike, size: int = 32, labelled: bool = False) -> ImageData:
    """Read `source` from where it lies, its images fitted to `size` x `size` pixels.

    `source` is "cifar10" (downloaded once into the user's cache folder), "digits" (scikit-learn's, no network), a folder, a
    tar or a zip of `train/<class>/*, valid/<class>/*, test/<class>/*`, `cifar-10-python.tar.gz`, or an extracted
    `cifar-10-batches-py` folder. labelled: what cannot be trained on will do too, `unfit` of it then says why: a source
    without train/, or plain folders of classes. Raises DataError.
    """
    data = read_rows(source, size, labelled)
    return dataclasses.replace(data, images=np.stack(data.images))


def read_rows(source: str | os.PathLike, size: int, labelled: bool = False) -> ImageData:
    """As `read_data`, but `images` is a list of single images, which can be written out without a second copy."""
    if source == "cifar10":
        path = fetch(CIFAR10, cache_folder(), first=os.environ.get("CIFAR10_MIRROR"))
        return dataclasses.replace(_from_files(open_archive(path), size, labelled), source="cifar10")
    if source == "digits":
        return _digits(size)
    path = existing_path(source)
    return _from_files(Folder(path, list_folder(path)) if path.is_dir() else open_archive(path), size, labelled)


def existing_path(source: str | os.PathLike) -> Path:
    """The file or folder that `source` names. Raises DataError if there is none."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111  Path's raises over an unknown user
    is_there = os.path.isdir(path) or os.path.isfile(path)  # noqa: PTH112, PTH113  Path's raise over a name too long
    if not (is_there and str(source)):
        named, hint = source or "''", nearest(str(source), ("auto", "cifar10", "digits"))
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
    train, test = _hold_out(digits.target)
    rows = np.concatenate([train, test])
    small = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)  # 8 x 8, values 0 to 16
    resized = (Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in small)
    images = [np.repeat(np.asarray(image)[..., None], 3, axis=2) for image in resized]
    labels, classes = digits.target[rows].astype(np.int64), tuple(map(str, digits.target_names))
    return _with_copies_told(ImageData("digits", images, labels, classes, len(train), "lossless"))


def _hold_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of (training, test) images, for sources that come undivided: a fifth of each class, always the same; of very
    small ones an image of each class. Each class has at least two images."""
    from sklearn.model_selection import train_test_split

    if math.ceil(TEST_SHARE * len(labels)) < len(np.unique(labels)):
        test = one_of_each_class(labels, TEST_SEED)
        return np.setdiff1d(np.arange(len(labels)), test), test
    return train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=TEST_SEED)


def one_of_each_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """The place of one image of each class, drawn by chance."""
    random = np.random.default_rng(seed)
    return np.array([random.choice(np.flatnonzero(labels == label)) for label in np.unique(labels)])


def _with_copies_told(data: ImageData, name: Callable[[int], str] | None = None) -> ImageData:
    """The data with a warning for each two splits that have images in common, to the last pixel. name: of the file in a
    row."""
    digests = [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in data.images]
    first_valid = data.n_train - data.n_valid
    bounds = {"train": (0, first_valid), "valid": (first_valid, data.n_train), "test": (data.n_train, len(digests))}
    told: list[str] = []
    for split, other in (("test", "train"), ("test", "valid"), ("valid", "train")):
        start, stop = bounds[split]
        known = set(digests[slice(*bounds[other])])
        word, other_word = SPLIT_WORDS[split], SPLIT_WORDS[other]
        copies = [name(row) if name else f"number {row - start}" for row in range(start, stop) if digests[row] in known]
        what = f"of {stop - start} {word} images are also {other_word} images, which makes the {word} accuracy too high"
        told += count_and_name(what, copies)
    return dataclasses.replace(data, split_warnings=(*data.split_warnings, *told))


# --- files, wherever they lie ------------------------------------------------------------------------------------


def _from_files(files: Folder | Tar | Zip, size: int, labelled: bool) -> ImageData:
    with _progress(f"listing {files.name}") as show:
        layout = sort_out(files.entries(show), files.name, labelled)
    if layout.batches:
        found = _read_all(files, layout.batches, BATCH_BYTES)
        return _from_batches({layout.batches[number]: content for number, content in found}, files, size)
    _check_names(layout.classes(), files.name)
    if layout.unfit and not labelled:
        raise DataError(f"--data {files.name}: {layout.unfit}")
    pictures = _Pictures(layout, size)
    pictures.add_all(_read_all(files, layout.images, MAX_BYTES))
    return _from_pictures(pictures, files, labelled)


def _read_all(files: Folder | Tar | Zip, wanted: dict, limit: int) -> Iterator[tuple[int, bytes | BadImage]]:
    with _progress(f"reading {files.name}") as show:
        for place, found in enumerate(files.contents(wanted, limit)):
            if place % 50 == 0:
                show(place / len(wanted))
            yield found


def check_rows(data: ImageData) -> None:
    """Raises DataError for what would fail during a training, or after it."""
    if data.images.dtype != np.uint8 or data.images.ndim != 4 or data.images.shape[1:] != (data.size, data.size, 3):
        found = f"{data.images.dtype} of {data.images.shape}"
        raise DataError(f"{data.source}: images are uint8 of the shape (rows, size, size, 3), not {found}.")
    wrong = data.labels[(data.labels < 0) | (data.labels >= len(data.classes))]
    if len(data.labels) != len(data.images) or len(wrong):
        raise DataError(f"{data.source}: each image has a label of 0 to {len(data.classes) - 1}, its place in classes.")
    _check_names(data.classes, data.source)


def _check_names(classes: Iterable[str], source: str) -> None:
    """Raises DataError for what an export would refuse after the training."""
    for name in sorted(classes):
        if not is_label(name):
            reason = "it holds control characters or is no UTF-8"
            if not name or len(name) > MAX_NAME:
                reason = f"it has {len(name)} letters, where {MAX_NAME} fit into an export" if name else "it is empty"
            raise DataError(f"--data {source}: rename the class {shown(repr(name))}: {reason}.")
    if len(set(classes)) > MAX_CLASSES:
        raise DataError(f"--data {source}: {len(set(classes))} classes, where an export holds {MAX_CLASSES} at most.")


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


def _from_batches(content: dict[str, bytes | BadImage], files: Folder | Tar | Zip, size: int) -> ImageData:
    source, n_files = files.name, len(content)
    if missing := sorted(BATCH_NAMES - content.keys()):
        raise DataError(f"--data {source}: {', '.join(missing)} missing from CIFAR-10's batches. Fetch them again.")
    images, labels, n_rows = [], [], {}
    classes = _parsed("batches.meta", content, source, _class_names)
    _check_names(classes, source)
    for split, names in BATCH_FILES.items():
        for name in names:
            pixels, numbers = _parsed(name, content, source, lambda batch: _rows(batch, len(classes)))
            images += list(pixels)
            labels.append(numbers)
        n_rows[split] = sum(map(len, labels)) - sum(n_rows.values())
    numbers = np.concatenate(labels)
    if absent := sorted(set(range(len(classes))) - set(numbers[: n_rows["train"]].tolist())):
        raise DataError(f"--data {source}: no training image in CIFAR-10's batches is of the class {classes[absent[0]]!r}.")
    if size != 32:
        images = [np.asarray(fit_image(decode_image(image), size)) for image in images]
    data = ImageData(source, images, numbers, classes, n_rows["train"], "lossless", n_files, files.sha256)
    return _with_copies_told(data)


def _parsed(name: str, content: dict[str, bytes | BadImage], source: str, parse: Callable):
    """What `parse` makes of the dictionary in a file, whose bytes are then let go. Raises DataError."""
    data = content.pop(name)
    if isinstance(data, BadImage):
        raise DataError(f"--data {source}: {name} is no batch of CIFAR-10's; it is far too large.")
    try:
        return parse(_read_batch(data))
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise DataError(
            f"--data {source}: CIFAR-10's batches are damaged ({name}: {shown(reason)}). Fetch them again."
        ) from None


def _class_names(meta: dict) -> tuple[str, ...]:
    names = meta["label_names"]
    if type(names) not in (list, tuple) or len(names) < 2 or not all(type(name) is str for name in names):
        raise ValueError("label_names is no list of at least two names")
    classes = tuple(map(label_of, names))
    if len(set(classes)) < len(classes):
        raise ValueError("label_names holds a name twice")
    return classes


def _rows(batch: dict, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 32, 32, 3) and labels (N,) of a batch, if it is one to the letter."""
    data, labels = batch["data"], batch["labels"]
    if type(data) is not np.ndarray or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise ValueError(f"its data are no rows of {3 * 32 * 32} bytes")
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if type(labels) not in (list, tuple) or not len(labels) == len(data) > 0:
        raise ValueError(f"it has not one label for each of its {len(data)} images")
    if wrong := [label for label in labels if type(label) is not int or not 0 <= label < n_classes]:
        raise ValueError(f"the label {wrong[0]!r} is none of 0 to {n_classes - 1}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


# --- folders of pictures -----------------------------------------------------------------------------------------


@dataclass
class _Pictures:
    """Decoded pictures by split, as (path, class, pixels)."""

    layout: Layout
    size: int
    splits: dict[str, list[tuple[PurePosixPath, str, np.ndarray]]] = field(default_factory=lambda: defaultdict(list))

    def add_all(self, contents: Iterable[tuple[int, bytes | BadImage]]) -> None:
        for numbers, (pixels, reasons) in _decoded(self._chunks(contents), self.size):
            for number, image, reason in zip(numbers, _on_own_pages(pixels), reasons, strict=True):
                if reason:
                    self._leave_out(number, reason)
                else:
                    split, label = self.layout.images[number]
                    self.splits[split].append((self.layout.entries[number].path, label, image))

    def _chunks(self, contents: Iterable[tuple[int, bytes | BadImage]]) -> Iterator[tuple[list[int], list[bytes]]]:
        numbers, chunk, n_bytes = [], [], 0
        for number, content in contents:
            if isinstance(content, BadImage):
                self._leave_out(number, str(content))
                continue
            numbers.append(number)
            chunk.append(content)
            n_bytes += len(content) + 3 * self.size**2
            if len(numbers) == CHUNK_FILES or n_bytes > CHUNK_BYTES:
                yield numbers, chunk
                numbers, chunk, n_bytes = [], [], 0
        if numbers:
            yield numbers, chunk

    def _leave_out(self, number: int, reason: str) -> None:
        self.layout.unreadable[self.layout.images[number]].append(f"{self.layout.entries[number].path} ({reason})")

    def hold_out_test(self) -> None:
        """Make the test split of a fifth of each class of the training split. Raises ValueError if there are too few."""
        found = sorted(self.splits["train"], key=lambda picture: picture[0])
        labels = np.array([label for _, label, _ in found])
        needed = 2 if self.splits["valid"] else 3  # one to train on, one to test on, and one to validate on
        parts = _hold_out(labels) if min(Counter(labels.tolist()).values()) > 1 else ([], [])
        left = Counter(labels[parts[0]].tolist())
        scarce, n = min(Counter(labels.tolist()).items(), key=lambda pair: (left[pair[0]], pair[1]))
        if left[scarce] < needed - 1:
            raise ValueError(
                f"no test/, and too few images to hold some out: of {scarce!r} there are {n}, and it takes {needed}"
            )
        self.splits["train"], self.splits["test"] = ([found[place] for place in places] for places in parts)


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


def _from_pictures(pictures: _Pictures, files: Folder | Tar | Zip, labelled: bool) -> ImageData:
    source, layout, splits = files.name, pictures.layout, pictures.splits
    if not (splits["train"] or labelled) or not any(splits.values()):
        reasons = [f"no images in train/ that can be read: {shown(each[0])}." for each in layout.unreadable.values()]
        raise DataError(f"--data {source}: {(reasons or [layout.unfit])[0]}")
    told: list[str] = []
    held_out = False
    if splits["train"] and not splits["test"] and not layout.unfit:
        try:
            pictures.hold_out_test()
            held_out = True
            n_test = len(splits["test"])
            told.append(f"no images in test/: {n_test} of train/ are held out as the test split, always the same ones")
        except ValueError as error:
            layout.refuse_to_train(f"{error}.")
    _check_classes(pictures)
    if layout.unfit and not labelled:
        raise DataError(f"--data {source}: {layout.unfit}")

    names = {split: {label for _, label, _ in splits[split]} for split in SPLITS}
    for split in ("valid", "test"):
        if names[split]:
            told += count_and_name(f"classes of train/ not in {split}/", sorted(names["train"] - names[split]))
    rows = [picture for split in SPLITS for picture in _in_original_order(splits[split])]
    classes = tuple(sorted({label for _, label, _ in rows}))
    numbers = {name: number for number, name in enumerate(classes)}
    data = ImageData(
        source,
        images=[pixels for _, _, pixels in rows],  # type: ignore[arg-type]  # stacked when they are written or mapped
        labels=np.array([numbers[label] for _, label, _ in rows], dtype=np.int64),
        classes=classes,
        n_train=len(splits["train"]) + len(splits["valid"]),
        n_valid=len(splits["valid"]),
        encoding=_encoding({path.suffix.lower() for path, _, _ in rows}),
        n_files=len(rows),
        sha256=files.sha256,
        file_warnings=(*layout.warnings(), *_look_alikes(classes)),
        split_warnings=tuple(told),
        held_out=held_out,
        unfit=layout.unfit,
    )
    return _with_copies_told(data, lambda row: str(rows[row][0]))


def _check_classes(pictures: _Pictures) -> None:
    """Note why the classes cannot be trained on, now that it is known what can be read."""
    layout, names = pictures.layout, {split: {label for _, label, _ in pictures.splits[split]} for split in SPLITS}
    strangers = sorted((names["valid"] | names["test"]) - names["train"])
    if strangers:
        where = " and ".join(f"{split}/" for split in ("valid", "test") if names[split] - names["train"])
        reasons = [layout.unreadable["train", name][0] for name in strangers if ("train", name) in layout.unreadable]
        reason = f" (of which {shown(reasons[0])} cannot be read)" if reasons else ""
        layout.refuse_to_train(f"classes in {where} without images in train/: {shown(', '.join(strangers))}{reason}.")
    for split, label in layout.unreadable:
        if label not in names[split]:
            reasons = layout.unreadable[split, label]
            words = f"none of the {len(reasons)} images of the class {label!r} in {split}/ can be read: {shown(reasons[0])}"
            layout.refuse_to_train(f"{words}. Put it right, or remove the folder.")
    if len(names["train"]) == 1:
        layout.refuse_to_train(f"only the class {min(names['train'])!r} in train/; it takes two to classify.")


def _look_alikes(classes: Iterable[str]) -> list[str]:
    same = defaultdict(list)
    for name in classes:
        same[name.casefold()].append(name)
    return [f"classes that differ in case alone: {shown(', '.join(names))}" for names in same.values() if len(names) > 1]


def _in_original_order(pictures: list) -> list:
    """By number where every name is a different number, as in fast.ai's copy of CIFAR-10; else by path."""
    stems = [path.stem for path, _, _ in pictures]
    numbered = all(stem.isdecimal() and len(stem) < 100 for stem in stems) and len(set(map(int, stems))) == len(stems)
    return sorted(pictures, key=lambda picture: int(picture[0].stem) if numbered else picture[0])


def _encoding(suffixes: set[str]) -> str:
    lossy = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}
    return " and ".join(sorted({lossy[suffix] for suffix in suffixes if suffix in lossy})) or "lossless"
