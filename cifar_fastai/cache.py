"""Prepared data: a source's pixels and labels in one file that is mapped into memory, proven whole at every start.

`<cache folder>/prepared/<source>-<size>px-<key>/` holds `data.bin` (the images, uint8, then the labels, int64) and
`manifest.json`, written last: where the data came from, what it is, and the sha256 of every block of the file.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cifar_fastai.download import CIFAR10, MB, NoMirror, alone, check_network, digests, is_fetched
from cifar_fastai.errors import DataError, DataWarning
from cifar_fastai.folders import list_folder
from cifar_fastai.sources import ImageData, cache_folder, check_rows, existing_path, read_data, read_rows
from cifar_fastai.terminal import printable

FORMAT = 3  # of these files, and of how `fit_image` makes a picture square
DATA, MANIFEST = "data.bin", "manifest.json"
BLOCK = 1 << 24  # bytes of the file hashed at once
TUPLES = ("classes", "file_warnings", "split_warnings")
KEPT_FIELDS = (*TUPLES, "source", "n_train", "n_valid", "held_out", "unfit", "encoding", "n_files", "sha256")
MEASURES = ("fingerprint", "channel_stats")  # of ImageData, too slow to compute anew at every start


class _Damaged(Exception):
    """A prepared copy that is not what its manifest says."""


def load_data(source: str | os.PathLike | ImageData, size: int = 32, labelled: bool = False) -> ImageData:
    """The images of `source` (see `read_data`) at `size` x `size` pixels, from the prepared copy if there is a whole one.

    The first call reads the source and keeps a copy in the user's cache folder; later ones map that file into memory,
    after checking the sha256 of all of it. A copy that is damaged, or older than its source, is made anew. One process
    makes it while others wait. digits and an ImageData are taken as they are. "auto" is CIFAR-10, or where no mirror of it
    can be reached digits, with a DataWarning. labelled: as for `read_data`. Raises DataError.
    """
    data = _load(source, size, labelled)
    if data.unfit and not labelled:
        raise DataError(f"--data {data.source}: {data.unfit}")
    return data


def _load(source: str | os.PathLike | ImageData, size: int, labelled: bool) -> ImageData:
    if isinstance(source, ImageData):
        check_rows(source)
        return source
    if source == "auto":
        source, instead = settle(source, size)
        if instead:
            warnings.warn(instead, DataWarning, stacklevel=2)
    if source == "digits":
        return read_data(source, size)
    origin = _origin(source)
    folder = _folder(source, size)
    if data := _open_or_tell(folder, origin):
        return data
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder.with_name(folder.name + ".lock"), f"preparing {folder.name}"):
            return _open_or_tell(folder, origin) or _prepare(source, size, labelled, folder, origin)
    except OSError as error:
        return _without_copy(read_rows(source, size, labelled), folder, error)


def settle(source: str | os.PathLike, size: int = 32) -> tuple[str | os.PathLike, str]:
    """What "auto" stands for, cifar10 or digits, known within seconds; and for digits the reason in words.

    digits only where CIFAR-10 is not in the cache and no mirror can be reached. Not where one is named in CIFAR10_MIRROR,
    nor in one of several processes, which might not see the same: there, as for "cifar10", NoMirror is raised.
    """
    if source not in ("auto", "cifar10"):
        return source, ""
    first = os.environ.get("CIFAR10_MIRROR")
    if not (_open_or_tell(_folder("cifar10", size), _origin("cifar10")) or is_fetched(CIFAR10, cache_folder())):
        try:
            check_network(CIFAR10, first=first)
        except NoMirror as error:
            if source == "cifar10" or first or "RANK" in os.environ:
                raise
            return "digits", f"CIFAR-10 is out of reach ({error.reason}): digits instead"
    return "cifar10", ""


# --- which copy belongs to a source ------------------------------------------------------------------------------


def _folder(source: str | os.PathLike, size: int) -> Path:
    """A folder for each source and size, named so that people can tell them apart."""
    place = source if source == "cifar10" else str(existing_path(source).resolve())
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(place).name)[:60]
    return cache_folder() / "prepared" / f"{name}-{size}px-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def _origin(source: str | os.PathLike) -> dict:
    """What tells whether a source is still the one that was read: it changes whenever a file does."""
    if source == "cifar10":
        return {"sha256": CIFAR10.sha256}
    path = existing_path(source).resolve()
    if path.is_file():
        about = path.stat()
        return {"path": str(path), "bytes": about.st_size, "changed": about.st_mtime_ns}
    digest = hashlib.sha256()
    for name, about in list_folder(path):
        what = "/" if stat.S_ISDIR(about.st_mode) else f"{about.st_size}\0{about.st_mtime_ns}"
        digest.update(f"{name}\0{what}\n".encode(errors="surrogateescape"))
    return {"path": str(path), "listing": digest.hexdigest()}


# --- reading a copy ----------------------------------------------------------------------------------------------


def _open_or_tell(folder: Path, origin: dict) -> ImageData | None:
    """The copy if it is there, belongs to `origin` and is whole; says so if it is damaged."""
    try:
        manifest = _read_manifest(folder)
        if manifest is None or manifest["origin"] != origin:
            return None
        return _open(folder, manifest)
    except _Damaged as reason:
        print(printable(f"the prepared copy {folder} is damaged ({reason}): making it anew"), file=sys.stderr, flush=True)
        return None


def _read_manifest(folder: Path) -> dict | None:
    """The manifest, proven by its own digest; None if there is none of this format."""
    try:
        sealed = json.loads((folder / MANIFEST).read_bytes())
        manifest, seal = sealed["manifest"], sealed["sha256"]
        if seal != _seal(manifest):
            raise _Damaged(f"{MANIFEST} does not match its digest")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{MANIFEST} cannot be read: {type(error).__name__}") from None
    return manifest if manifest["format"] == FORMAT else None


def _seal(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, manifest: dict) -> ImageData:
    """Map the file of a copy, after hashing all of it."""
    shape = tuple(manifest["shape"])
    n_pixels, n_labels = int(np.prod(shape)), shape[0] * 8
    try:
        if (folder / DATA).stat().st_size != n_pixels + n_labels:
            raise _Damaged(f"{DATA} has another length")
        # Copy on write: torch wants memory it may write to, and nothing written there may reach the file.
        file = np.memmap(folder / DATA, np.uint8, mode="c")
    except OSError as error:
        raise _Damaged(f"{DATA}: {error.strerror}") from None
    for number, (found, expected) in enumerate(zip(_block_digests(file), manifest["blocks"], strict=True)):
        if found != expected:
            raise _Damaged(f"{DATA} was changed near byte {number * BLOCK:,}")
    images, labels = file[:n_pixels].reshape(shape).view(np.ndarray), file[n_pixels:].view(np.int64).copy()
    fields = {name: manifest[name] for name in KEPT_FIELDS}
    for name in TUPLES:
        fields[name] = tuple(fields[name])
    data = ImageData(images=images, labels=labels, **fields)
    vars(data).update({name: manifest[name] for name in MEASURES})  # where cached_property looks first
    return data


def _block_digests(file: np.ndarray) -> list[str]:
    """sha256 of each block of the bytes of `file`; several at a time, since hashing leaves other threads the GIL."""
    blocks = [file[start : start + BLOCK] for start in range(0, len(file), BLOCK)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda block: hashlib.sha256(block).hexdigest(), blocks))


# --- making a copy -----------------------------------------------------------------------------------------------


def _prepare(source: str | os.PathLike, size: int, labelled: bool, folder: Path, origin: dict) -> ImageData:
    """Read the source and keep a copy of it; if that cannot be kept, say so and go on without."""
    data = read_rows(source, size, labelled)
    try:
        _write(data, folder, origin)
    except OSError as error:
        return _without_copy(data, folder, error)
    del data  # or the pixels would be in memory twice
    try:
        return _open(folder, _read_manifest(folder))
    except _Damaged as reason:
        raise DataError(f"{folder} was written and read back otherwise ({reason}): is the disk sound?") from None


def _without_copy(data: ImageData, folder: Path, error: OSError) -> ImageData:
    reason = error.strerror or error
    words = f"no prepared copy can be kept in {folder} ({reason}): the next start reads everything again"
    print(printable(words), file=sys.stderr)
    return dataclasses.replace(data, images=np.stack(data.images))


def _write(data: ImageData, folder: Path, origin: dict) -> None:
    """Write a copy: the old manifest goes first and the new one comes last, so that half a copy never counts as one."""
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    shape = [len(data.images), *data.images[0].shape]
    needed, free = int(np.prod(shape)) + 8 * len(data.labels), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / MB:.0f} MB are needed and {free / MB:.0f} MB free")
    part = folder / f"{DATA}.part"
    try:
        with part.open("wb") as file:
            for block in data.blocks():
                file.write(block.data)
            file.write(data.labels.astype(np.int64).data)
            _flush(file)
        with part.open("rb") as file:
            blocks = [hashlib.sha256(block).hexdigest() for block in iter(partial(file.read, BLOCK), b"")]
        part.replace(folder / DATA)
    finally:
        part.unlink(missing_ok=True)
    manifest = {"format": FORMAT, "origin": origin, "shape": shape, "blocks": blocks}
    manifest |= {name: getattr(data, name) for name in (*KEPT_FIELDS, *MEASURES)}
    aside = folder / f"{MANIFEST}.part"
    with aside.open("w", encoding="utf-8") as file:
        json.dump({"manifest": manifest, "sha256": _seal(manifest)}, file, indent=1)
        _flush(file)
    aside.replace(folder / MANIFEST)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


# --- what is there -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Something kept in the cache folder."""

    path: Path
    bytes: int
    about: str
    damage: str | None = None  # what is wrong with it, if that was looked for


def cache_entries(verify: bool = False) -> list[Entry]:
    """The downloaded archive and the prepared copies; `verify`: each read and hashed whole."""
    entries = []
    archive = cache_folder() / CIFAR10.name
    for path, about in ((archive, "CIFAR-10 as downloaded"), (archive.with_name(archive.name + ".part"), "half a download")):
        if path.exists():
            whole = not verify or path != archive or digests(path, "md5", "sha256") == [CIFAR10.md5, CIFAR10.sha256]
            entries.append(Entry(path, path.stat().st_size, about, None if whole else "its digests are not the archive's"))
    for folder in sorted(path for path in (cache_folder() / "prepared").glob("*") if path.is_dir()):
        entries.append(_entry(folder, verify))
    return entries


def _entry(folder: Path, verify: bool) -> Entry:
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    try:
        manifest = _read_manifest(folder)
        if manifest is None:
            return Entry(folder, n_bytes, "unfinished, or of another version; the next use makes it anew")
        if verify:
            _open(folder, manifest)
    except _Damaged as reason:
        return Entry(folder, n_bytes, "a prepared copy", str(reason))
    n, size = manifest["shape"][:2]
    origin = manifest["origin"].get("path", "the download")
    return Entry(folder, n_bytes, f"{n:,} images of {len(manifest['classes'])} classes, {size} x {size}, from {origin}")
