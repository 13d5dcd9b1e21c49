"""The pictures that somebody uploads, those in zip archives among them: read in memory, within limits."""

import stat
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cifar_fastai.errors import UserError
from cifar_fastai.guards import MAX_FILES, MAX_REQUEST_BYTES
from cifar_fastai.images import MAX_BYTES, TOO_LARGE, BadImage

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others may ask for gigabytes of memory before the first byte
ARCHIVE_START = b"PK"
MAX_ARCHIVES = 50  # in one upload: each stays open meanwhile, and a process may often open no more than 1,024 files


class Upload(NamedTuple):
    """A file that may be a picture. Nothing of it is in memory yet."""

    name: str  # as it was sent; of a member its archive's name, a slash and its own
    read: Callable[[], bytes]  # raises BadImage


class TooMany(UserError):
    """More files than are taken at a time."""


def find_uploads(files: Iterable[tuple[str, Path]]) -> list[Upload]:
    """The files, given as (name, path), with each zip archive replaced by what is in it. Raises TooMany.

    Of all archives together no more than MAX_REQUEST_BYTES are unpacked, as many as could be sent without them, and of each
    member no more than the largest picture that is read, whatever is announced: how well something is compressed does not
    matter then. Archives within archives are not opened.
    """
    found, room, n_archives = [], _Room(MAX_REQUEST_BYTES), 0
    for name, path in files:
        if _is_archive(path):
            n_archives += 1
            if n_archives > MAX_ARCHIVES:
                raise TooMany(f"There are more than {MAX_ARCHIVES} archives. Send fewer at a time.")
            found += _members(name, path, room)
        else:
            found.append(Upload(name, path.read_bytes))
        if len(found) > MAX_FILES:
            raise TooMany(f"There are more than {MAX_FILES:,} files. Send fewer at a time.")
    return found


@dataclass
class _Room:
    """What may still be unpacked."""

    n_bytes: int


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ARCHIVE_START)) == ARCHIVE_START


def _members(name: str, path: Path, room: _Room) -> list[Upload]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return [Upload(name, partial(_refuse, f"The archive is damaged ({error})."))]
    members = [member for member in archive.infolist() if _is_meant(member)]
    if not members:
        return [Upload(name, partial(_refuse, "There is no file in this archive."))]
    return [Upload(f"{name}/{member.filename}", partial(_read_member, archive, member, room)) for member in members]


def _is_meant(member: zipfile.ZipInfo) -> bool:
    """Whether somebody put this there, rather than their computer: folders, links and hidden files are passed over."""
    parts = set(member.filename.split("/")) - {".", ".."}
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not (hidden or member.is_dir() or stat.S_ISLNK(member.external_attr >> 16))


def _refuse(reason: str) -> bytes:
    raise BadImage(reason)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, room: _Room) -> bytes:
    if member.filename.lower().endswith(".zip"):
        raise BadImage("An archive within an archive is not opened.")
    if member.flag_bits & 1:
        raise BadImage("The archive asks for a password.")
    if member.compress_type not in METHODS:
        raise BadImage("The archive is compressed in a way that is not read here.")
    if member.file_size > MAX_BYTES:
        raise BadImage(TOO_LARGE)
    if member.file_size > room.n_bytes:
        raise BadImage(f"Left out: more than {MAX_REQUEST_BYTES // 1_000_000} MB come out of the archives.")
    room.n_bytes -= member.file_size  # zipfile gives no more than that; what turns out to be damaged was unpacked too
    try:
        with archive.open(member) as file:
            return file.read()
    except Exception as error:  # a damaged archive makes zipfile raise nearly anything
        raise BadImage(f"It cannot be unpacked ({error or type(error).__name__}).") from None
