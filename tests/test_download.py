"""The downloader against real HTTP servers that misbehave, real kills and a real full disk."""

import contextlib
import dataclasses
import hashlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers.commands import environment
from helpers.files import archive_of

from cifar_fastai.download import CIFAR10, NoMirror, Patience, fetch
from cifar_fastai.errors import DataError

SHORT = Patience(connect=1.0, stall=0.5, last_stall=0.5, slowest=200_000, window=0.5)


@pytest.fixture
def archive(web_server, tmp_path):
    """A 2 MB archive on the server under /data.tgz, with no mirrors yet."""
    path = tmp_path / "data.tgz"
    path.write_bytes(np.random.default_rng(0).bytes(2_000_000))
    web_server.files["/data.tgz"] = path.read_bytes()
    return archive_of(path, mirrors=())


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def get(archive, web_server, cache):
    """Fetch from mirrors that behave as named; returns the bytes that came to lie in the cache."""

    def get(*manners, **kwargs):
        mirrors = tuple(f"{web_server.address}/{manner}/data.tgz".replace("//data", "/data") for manner in manners)
        path = fetch(dataclasses.replace(archive, mirrors=mirrors), cache, **{"patience": SHORT, **kwargs})
        assert path == cache / "data.tgz" and not (cache / "data.tgz.part").exists()
        return path.read_bytes()

    return get


def test_a_good_mirror(get, web_server):
    assert get("") == web_server.files["/data.tgz"]
    assert web_server.requests == [("/data.tgz", None)]
    get("")
    assert len(web_server.requests) == 1, "what is there and whole is not fetched again"


BAD = {
    "stall": "stalled; 1.0 MB had arrived",
    "crawl": r"crawled at \d+ kB/s",
    "cut": "peer closed connection.*1.0 MB had arrived",
    "lie": "announced 2000001 bytes, where 2000000 are due",
    "long": "sent more than the 2,000,000 bytes",
    "flip": "sent a file of other content",
    "html": "sent a web page",
    "404": "answered 404 Not Found",
    "429": "answered 429 Too Many Requests",
    "503": "answered 503 Service Unavailable",
}


@pytest.mark.parametrize("manner", BAD)
def test_a_bad_mirror_is_left_for_the_next(get, web_server, manner):
    start = time.perf_counter()
    assert get(manner, "") == web_server.files["/data.tgz"]
    assert time.perf_counter() - start < 15, "within seconds"


@pytest.mark.parametrize("manner", [manner for manner in BAD if manner != "crawl"])
def test_alone_it_is_named_with_its_reason(get, web_server, manner):
    host = web_server.address.removeprefix("http://")
    with pytest.raises(DataError, match=rf"(?s)from any mirror:\n  {host}  .*{BAD[manner]}.*CIFAR10_MIRROR.*--data digits"):
        get(manner)


def shortened(archive, web_server, size):
    """The archive cut to its first bytes, for servers that crawl."""
    data = web_server.files["/data.tgz"] = web_server.files["/data.tgz"][:size]
    digests = {"md5": hashlib.md5(data).hexdigest(), "sha256": hashlib.sha256(data).hexdigest()}
    return dataclasses.replace(archive, size=size, **digests)


def test_the_last_mirror_may_crawl(archive, web_server, cache):
    small = shortened(archive, web_server, 60_000)  # three seconds at its 20 kB/s, six windows too slow
    path = fetch(dataclasses.replace(small, mirrors=(f"{web_server.address}/crawl/data.tgz",)), cache, patience=SHORT)
    assert path.read_bytes() == web_server.files["/data.tgz"]


def test_the_last_mirror_is_given_more_time(get, web_server):
    """A silence of a second is enough to leave a mirror, if there is another."""
    patient = dataclasses.replace(SHORT, last_stall=5.0)
    assert get("pause", patience=patient) == web_server.files["/data.tgz"]
    assert len(web_server.requests) == 1


def test_a_silence_is_enough_to_leave_a_mirror_that_is_not_the_last(get, web_server):
    assert get("pause", "", patience=dataclasses.replace(SHORT, last_stall=5.0)) == web_server.files["/data.tgz"]
    assert len(web_server.requests) == 2


@pytest.mark.parametrize("manner", ["stall", "cut", "crawl"])
def test_the_next_mirror_goes_on_where_the_last_one_stopped(get, web_server, manner):
    assert get(manner, "") == web_server.files["/data.tgz"]
    path, asked = web_server.requests[-1]
    assert path == "/data.tgz" and 0 < int(asked.removeprefix("bytes=").removesuffix("-")) <= 1_000_000


def test_a_server_without_ranges_starts_anew(get, web_server):
    assert get("cut", "noranges") == web_server.files["/data.tgz"]


def test_a_server_that_sends_another_range_is_left(get, web_server):
    assert get("cut", "shift", "") == web_server.files["/data.tgz"]


def test_one_mirrors_wrong_bytes_do_not_spoil_the_next(get, cache, web_server):
    """The first half was damaged on the way: the next mirror completes it, notices, and fetches it all again."""
    cache.mkdir()
    (cache / "data.tgz.part").write_bytes(bytes(1_000_000))
    assert get("") == web_server.files["/data.tgz"]
    assert [asked for _, asked in web_server.requests] == ["bytes=1000000-", None]


def test_an_unreachable_host_is_left_quickly(get, web_server, archive, cache):
    mirrors = ("http://127.0.0.1:9/data.tgz", f"{web_server.address}/data.tgz")
    fetch(dataclasses.replace(archive, mirrors=mirrors), cache, patience=SHORT)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9  .*refused"):
        fetch(dataclasses.replace(archive, mirrors=mirrors[:1]), cache / "other", patience=SHORT)


def test_the_first_mirror_can_be_named(get, web_server):
    assert get("404", first=web_server.address + "/data.tgz") == web_server.files["/data.tgz"]
    assert len(web_server.requests) == 1


def test_an_address_that_is_none(get):
    with pytest.raises(DataError, match="no mirror at all"):
        get(first="no mirror at all")


@pytest.mark.parametrize("damage", [b"", b"<html>", None])
def test_a_damaged_file_in_the_cache_is_fetched_again(get, cache, web_server, damage):
    whole = get("")
    flipped = whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:]
    (cache / "data.tgz").write_bytes(flipped if damage is None else damage)
    assert get("") == whole and len(web_server.requests) == 2


CHILD = """
import sys
from pathlib import Path
from cifar_fastai.download import Archive, Patience, fetch
name, size, md5, sha256, url, folder = sys.argv[1:]
fetch(Archive(name, int(size), md5, sha256, (url,)), Path(folder), patience=Patience(slowest=0))
"""


def child(archive, url, cache, **kwargs):
    arguments = [archive.name, str(archive.size), archive.md5, archive.sha256, url, str(cache)]
    command = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(), **kwargs)


def test_a_killed_download_goes_on_where_it_was(archive, web_server, cache, get):
    process = child(archive, f"{web_server.address}/crawl/data.tgz", cache)
    part = cache / "data.tgz.part"
    while not part.exists() or part.stat().st_size < 10_000:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "data.tgz").exists() and 10_000 <= part.stat().st_size < archive.size
    assert get("") == web_server.files["/data.tgz"]
    assert web_server.requests[-1][1] is not None


def test_two_processes_download_once(archive, web_server, cache):
    small = shortened(archive, web_server, 100_000)
    processes = [child(small, f"{web_server.address}/crawl/data.tgz", cache) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(web_server.requests) == 1
    assert sum("waiting" in error for error in errors) == 1


def test_a_full_disk_is_said_plainly(archive, web_server, cache):
    """A file-size limit of half the archive stands for the disk that fills up on the way."""
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    process = child(archive, f"{web_server.address}/data.tgz", cache, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "DataError: data.tgz cannot be kept in" in errors and "File too large" in errors
    assert not (cache / "data.tgz").exists()


def test_too_little_room_is_noticed_before(archive, web_server, cache):
    huge = dataclasses.replace(archive, size=10**18, mirrors=(web_server.address,))
    with pytest.raises(DataError, match="needs 1000000000000 MB"):
        fetch(huge, cache)
    assert not web_server.requests


def test_a_cache_folder_that_cannot_be(archive, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept in"):
        fetch(archive, tmp_path / "file" / "cache")


def test_the_official_archive_and_its_mirrors():
    """torchvision knows size by md5 and the origin's address; ours agree and leave the slow origin for last."""
    from torchvision.datasets import CIFAR10 as Known

    assert (CIFAR10.md5, CIFAR10.name) == (Known.tgz_md5, Known.filename)
    assert CIFAR10.mirrors[-1] == Known.url and len(set(CIFAR10.mirrors)) == 4
    assert all(mirror.startswith("https://") for mirror in CIFAR10.mirrors)


def test_proxies_are_honoured(archive, web_server, cache, monkeypatch):
    """Through a proxy the request line names the whole address; our server answers as that proxy."""
    web_server.files["/http:/nowhere.invalid/data.tgz"] = web_server.files["/data.tgz"]
    monkeypatch.setenv("HTTP_PROXY", web_server.address)
    monkeypatch.setenv("NO_PROXY", "")
    fetch(dataclasses.replace(archive, mirrors=("http://nowhere.invalid/data.tgz",)), cache, patience=SHORT)
    assert web_server.requests[0][0] == "http://nowhere.invalid/data.tgz"
    assert (cache / "data.tgz").stat().st_size == archive.size


# --- whether there is a network ----------------------------------------------------------------------------------


@pytest.fixture
def dropped():
    """An address that answers no packet: a server whose queue is full."""
    with socket.socket() as server, contextlib.ExitStack() as callers:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(8):
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}/data.tgz"


@contextlib.contextmanager
def hanging_up(farewell: bytes):
    """The address of a server that accepts, says this and hangs up."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.recv(1000)
                connection.sendall(farewell)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def no_mirror(archive, cache, *mirrors, patience=SHORT) -> NoMirror:
    with pytest.raises(NoMirror) as caught:
        fetch(dataclasses.replace(archive, mirrors=mirrors), cache, patience=patience)
    return caught.value


def test_packets_that_are_dropped_are_waited_for_side_by_side(archive, cache, dropped):
    import httpx  # noqa: F401  what its import takes is no part of it

    start = time.monotonic()
    error = no_mirror(archive, cache, *(f"{dropped}?{number}" for number in range(4)), patience=Patience())
    assert time.monotonic() - start < 3.5
    assert error.reason == "nothing within 2.5 s"


@pytest.mark.parametrize(
    ("mirrors", "reason"),
    [
        (("http://a.invalid/data.tgz", "https://b.invalid/data.tgz"), "host not found"),
        (("http://127.0.0.1:9/data.tgz", "https://127.0.0.1:9/data.tgz"), "connection refused"),
    ],
)
def test_no_network_is_said_in_two_short_lines(archive, cache, monkeypatch, mirrors, reason):
    monkeypatch.delenv("https_proxy")
    official = dataclasses.replace(archive, name=CIFAR10.name)
    error = no_mirror(official, cache, *mirrors)
    first, second = f"error: {error}".splitlines()
    assert reason in first and "--data digits" in second and len(first) <= 80 and len(second) <= 80
    assert str(error.__cause__).count(reason) == 2, "with --debug each has its line"


def test_reasons_that_differ_are_all_named(archive, cache):
    error = no_mirror(archive, cache, "http://127.0.0.1:9/data.tgz", "nonsense", "http://a.invalid/data.tgz")
    for host, reason in (("127.0.0.1:9", "connection refused"), ("nonsense", "missing an"), ("a.invalid", "host not found")):
        assert re.search(rf"\n  {host} +.*{reason}", str(error))


def test_an_address_that_no_name_server_takes(archive, cache):
    no_mirror(archive, cache, "http://" + "a" * 100 + ".invalid/data.tgz", "http://..../data.tgz", "http://[::1/data.tgz")


def test_who_hangs_up_before_a_secure_connection_was_not_there(archive, cache, monkeypatch):
    monkeypatch.delenv("https_proxy")
    with hanging_up(b"") as host:
        assert no_mirror(archive, cache, f"https://{host}/data.tgz").reason in ("hung up", "connection reset by peer")


@pytest.mark.parametrize(
    ("scheme", "farewell"), [("http", b""), ("http", b"SSH-2.0-x\r\n"), ("https", b"HTTP/1.0 200 OK\r\n\r\n")]
)
def test_who_answers_at_odds_with_http_is_there(archive, cache, monkeypatch, scheme, farewell):
    """As the page of a hotel's network does, on a port for secure connections."""
    monkeypatch.delenv("https_proxy")
    with hanging_up(farewell) as host, pytest.raises(DataError, match=f"from any mirror:\n  {host}  ") as caught:
        fetch(dataclasses.replace(archive, mirrors=(f"{scheme}://{host}/data.tgz",)), cache, patience=SHORT)
    assert not isinstance(caught.value, NoMirror)


def test_who_says_nothing_is_there(archive, cache):
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(DataError, match=r"stalled; 0\.0 MB") as caught:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/data.tgz"
        fetch(dataclasses.replace(archive, mirrors=(address,)), cache, patience=SHORT)
    assert not isinstance(caught.value, NoMirror)


def test_what_cannot_be_reached_costs_no_time_of_its_own(archive, web_server, cache, dropped):
    """One look at all of them; whichever is last of the others may crawl."""
    small = shortened(archive, web_server, 60_000)
    mirrors = ("http://127.0.0.1:9/data.tgz", dropped, f"{web_server.address}/crawl/data.tgz", f"{dropped}?again")
    path = fetch(dataclasses.replace(small, mirrors=mirrors), cache, patience=SHORT)
    assert path.read_bytes() == web_server.files["/data.tgz"]
    assert web_server.requests == [("/crawl/data.tgz", None)]


def test_a_proxy_that_lets_nobody_through(archive, web_server, cache, monkeypatch):
    monkeypatch.setenv("https_proxy", web_server.address)  # which knows no CONNECT: 501
    error = no_mirror(archive, cache, "https://a.invalid/data.tgz", "https://b.invalid/data.tgz")
    assert error.reason == "the proxy answers 501"


def test_a_proxy_that_cannot_be_used(archive, cache, monkeypatch):
    monkeypatch.setenv("https_proxy", "gopher://127.0.0.1:9")
    with pytest.raises(DataError, match=r"The proxy that the environment names cannot be used: .*gopher"):
        no_mirror(archive, cache, "https://a.invalid/data.tgz")


SLOW_NAMES = """
import socket, time
socket.getaddrinfo = lambda *_, **__: time.sleep(60)
from cifar_fastai.download import CIFAR10, NoMirror, check_network
start = time.monotonic()
try:
    check_network(CIFAR10)
except NoMirror as error:
    print(time.monotonic() - start, error.reason, sep="|", flush=True)
"""


def test_names_that_are_looked_up_for_ever_hold_nothing_up(tmp_path):
    environ = environment(no_proxy="*")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SLOW_NAMES], env=environ, capture_output=True, text=True, timeout=50)
    assert time.monotonic() - start < 30, "nor the end of the process"
    seconds, reason = done.stdout.strip().split("|")
    assert float(seconds) < 5 and reason == "nothing within 2.5 s" and done.stderr == ""
