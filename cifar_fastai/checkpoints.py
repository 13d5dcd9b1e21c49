"""Files that survive whatever stops the process: written aside, proven, renamed; and checkpoints as such files."""

import errno
import io
import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from cifar_fastai.errors import UserError, first_line
from cifar_fastai.terminal import warn

FORMAT = 2  # of the state in last.pth
BEST, LAST, PREVIOUS = "best.pth", "last.pth", "previous.pth"


def write_whole(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Give the file `path` the content `data` in one step: whatever happens meanwhile, it holds all of it or what it held.

    keep: the name that the file's former self gets. Raises OSError, with the path.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if part.read_bytes() != data:
            raise OSError(errno.EIO, "it was written and read back otherwise")
        if keep and path.exists():
            path.replace(keep)
        part.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)  # on a full disk it is in the way
        raise OSError(error.errno, error.strerror, str(path)) from None


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(state: dict, path: Path, keep: Path | None = None) -> None:
    """Write tensors and plain data as `write_whole` does."""
    file = io.BytesIO()
    torch.save(state, file)
    write_whole(path, file.getvalue(), keep)


def save_last(state: dict, folder: Path) -> None:
    """Save the state of a training; the one saved before is kept too."""
    save({"format": FORMAT, **state}, folder / LAST, keep=folder / PREVIOUS)


def load(path: Path) -> dict:
    """What was saved, on the CPU, after checking the CRC of all of it. Runs no code from the file. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as file:  # torch itself reads changed bytes without complaint
            if sum(member.file_size for member in file.infolist()) > path.stat().st_size:
                raise ValueError("it would unpack to more than itself")
            if damaged := file.testzip():
                raise ValueError(f"{damaged} is damaged")
            if folders := [member.filename for member in file.infolist() if member.external_attr]:
                raise ValueError(f"{folders[0]} is damaged")  # marked as a folder, torch leaves its tensor uninitialised
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it holds no state")
        return state
    except UnpicklingError:  # torch's own words advise to run what the file holds
        raise UserError(f"{path} cannot be used: it holds other things than tensors and plain values.") from None
    except Exception as error:  # zipfile and torch raise nearly anything on a damaged file, some of it without words
        reason = first_line(getattr(error, "strerror", None) or error)
        raise UserError(f"{path} cannot be used: {reason}") from None


def load_last(folder: Path, quiet: bool = False) -> dict | None:
    """The newest whole state in a folder of checkpoints; None if none was saved yet. Raises UserError.

    quiet: without a warning of one that is damaged, if another is whole.
    """
    saved, damaged = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()], []
    for path in saved:
        try:
            state = load(path)
        except UserError as error:
            damaged.append(error)
            continue
        if state.get("format") != FORMAT:
            raise UserError(f"{path} was saved by another version, which alone can go on from it.")
        if not quiet:
            _tell(damaged)
        return state
    if saved:
        _tell(damaged)
        raise UserError(f"No checkpoint in {folder} is whole; the training has to start anew.")
    return None


def _tell(damaged: list[UserError]) -> None:
    for error in damaged:
        warn(error)
