"""Folders for a while: gone when they have been used, and swept by the next one if their process was killed."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "cifar_fastai-"  # of folders in the temporary directory
LOCK = "lock"  # in each of them, held by the process that uses it


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """An empty folder in the temporary directory, removed at the end. kind: a word for its name."""
    _sweep()
    made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))  # the name that is swept it gets when it is locked
    lock = FileLock(made / LOCK)
    with suppress(NotImplementedError):  # a file system without locks: nothing is swept there
        lock.acquire()
    folder = made.rename(made.with_name(f"{PREFIX}{kind}-{made.name.removeprefix(f'.{PREFIX}')}"))
    try:
        content = folder / kind
        content.mkdir()
        yield content
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _sweep() -> None:
    """Remove what processes of this user left that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout, NotImplementedError):
            if _is_ours(folder) and (folder / LOCK).is_file():
                with FileLock(folder / LOCK, timeout=0):
                    shutil.rmtree(folder)


def _is_ours(folder: Path) -> bool:
    """Whether this is a folder, no link to one, that nobody but this user can have put anything into."""
    about = folder.lstat()
    owned = not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not about.st_mode & 0o022)
    return stat.S_ISDIR(about.st_mode) and owned
