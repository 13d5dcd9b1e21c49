"""Clients that stall, flood, lie or hang up: what the others notice of them, over real sockets.

`app.py` runs as a process of its own where the page takes part, and in a thread of the tests where times are shortened.
"""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import pytest
from helpers.commands import environment, free_port
from helpers.serving import MULTIPART, PART, assert_answers, picture, post, serving
from PIL import Image

from cifar_fastai import Classifier, guards, server
from cifar_fastai.api import create_api
from cifar_fastai.batching import BatchingClassifier

SOON = 5  # seconds: 2 are promised, on a machine that does nothing else
CANARY = "canary-7f3a"


@pytest.fixture(scope="module")
def classifier(digits_run):
    return Classifier(digits_run.export)


@pytest.fixture(scope="module")
def app(digits_run):
    with serving(digits_run) as process:
        assert post(process.address, ("a.png", picture(1))).status_code == 200
        yield process


@pytest.fixture(scope="module")
def url(app):
    return app.address


@pytest.fixture(scope="module")
def guarded(digits_run):
    with serving(digits_run, "--auth", "ann:secret") as process:
        yield process.address


def connect(url) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def head(path, kind="application/json", *more, method="POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", *more, "\r\n"]).encode()


def read_all(connection) -> bytes:
    """Everything until the server hangs up."""
    answer = b""
    try:
        while more := connection.recv(65536):
            answer += more
    except ConnectionResetError:
        pass
    return answer


def assert_others_are_answered(url, classifier, times=3):
    for number in range(times):
        start = time.monotonic()
        answer = post(url, ("a.png", picture(number)))
        assert answer.status_code == 200 and time.monotonic() - start < SOON
        assert_answers(answer.json()["predictions"][0], classifier.predict(picture(number)))


def memory_mb(process) -> float:
    (line,) = (line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


# --- JSON --------------------------------------------------------------------------------------------------------

CALLS = [
    "queue/join",
    "call/predict",
    "call/predict_batch",
    "call/v2/predict",
    "run/predict",
    "api/predict",
    "cancel",
    "reset",
]
ROUTES = [*CALLS, "component_server", "stream/x", "stream/x/close", "process_recording", "vibe-edit", "no/such/route"]
BODIES = {
    "objects in a list": b"[" + b"{}," * 300_000 + b"{}]",
    "objects": b'{"data": [' + b"{}," * 300_000 + b"{}]}",
    "numbers": b'{"data": [' + b"1," * 400_000 + b"1]}",
    "fewer objects": b'{"data": [[' + b"{}," * 5000 + b'{}]], "fn_index": 1, "session_hash": "x"}',
    "lists in lists": b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "fewer lists in lists": b'{"data": ' + b"[" * 300 + b"]" * 300 + b', "session_hash": "x"}',
    "digits": b'{"data": [' + b"9" * 900_000 + b"]}",
    "words": json.dumps({"data": [[CANARY] * 2000], "fn_index": 1, "session_hash": "x"}).encode(),
    "types": json.dumps({"data": CANARY, "fn_index": CANARY, "session_hash": [CANARY], "event_id": {CANARY: 1}}).encode(),
    "a long name": json.dumps({"data": [], "fn_index": 1, "session_hash": CANARY * 50_000}).encode(),
    "no JSON": CANARY.encode() * 1000,
    "a form": f"data={CANARY}&".encode() * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_call_is_refused_at_once_and_without_a_word_of_it(url, body):
    for route in ROUTES:
        for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
            start = time.monotonic()
            answer = httpx.post(
                f"{url}/gradio_api/{route}", content=BODIES[body], headers={"content-type": kind}, timeout=60
            )
            assert answer.status_code in (404, 413, 422), (route, kind)
            assert len(answer.content) < 150 and CANARY not in answer.text, (route, kind)
            assert time.monotonic() - start < SOON, (route, kind)


STRANGE = [
    ("GET", f"file=/{CANARY}", None),
    ("GET", f"file/{CANARY}", None),
    ("GET", f"custom_component/{CANARY}/client/a/b", None),
    ("GET", f"stream/a/b/{CANARY}/playlist.m3u8", None),
    ("POST", f"call/{CANARY}", {"data": [None]}),
    ("POST", f"call/v2/{CANARY}", {}),
    ("POST", "call/v2/predict", {CANARY: 1}),
    ("POST", "call/predict", {"data": {CANARY: 1}}),
    ("POST", "queue/join", {"data": [CANARY], "fn_index": 999, "session_hash": "x"}),
    ("POST", "queue/join", {"data": [], "fn_index": 10**400, "session_hash": "x"}),
    ("POST", "cancel", {"event_id": [CANARY]}),
    ("POST", "reset", {CANARY: CANARY}),
]


@pytest.mark.parametrize(("method", "route", "body"), STRANGE)
def test_errors_repeat_nothing_of_the_request(url, method, route, body):
    answer = httpx.request(method, f"{url}/gradio_api/{route}", json=body, timeout=SOON)
    assert 400 <= answer.status_code < 500 and CANARY not in answer.text and len(answer.content) < 150


def test_an_error_in_a_stream_repeats_nothing_of_the_call(url):
    for data in ([CANARY], [None, CANARY], [{"path": CANARY}]):
        answer = httpx.post(f"{url}/gradio_api/call/predict", json={"data": data})
        if answer.status_code == 200:
            answer = httpx.get(f"{url}/gradio_api/call/predict/{answer.json()['event_id']}", timeout=SOON)
        assert CANARY not in answer.text


def test_a_call_of_the_allowed_size_keeps_nobody_waiting(url, classifier):
    """A thousand files in one call, again and again."""
    (path,) = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", b"x")}).json()
    about = {"url": f"{url}/gradio_api/file={path}", "size": 1, "mime_type": "image/png", "is_stream": False}
    upload = {"path": path, "orig_name": "a.png", **about, "meta": {"_type": "gradio.FileData"}}
    calls = [("predict_batch", [[upload] * 1000]), ("predict", [[upload] * 1000])] * 2
    events = []
    for name, data in calls:
        events.append(
            (name, httpx.post(f"{url}/gradio_api/call/{name}", json={"data": data}, timeout=60).json()["event_id"])
        )
    assert_others_are_answered(url, classifier)
    answers = [httpx.get(f"{url}/gradio_api/call/{name}/{event}", timeout=120).text for name, event in events]
    assert all(
        answer.startswith("event: complete") == (name == "predict_batch")
        for (name, _), answer in zip(calls, answers, strict=True)
    )
    assert all("validation" not in answer and path not in answer for answer in answers)


# --- forms -------------------------------------------------------------------------------------------------------


def test_unfinished_forms_of_a_thousand_parts(url, classifier):
    """Each part opens a file."""
    part = PART.replace(b'"file"', b'"files"') + b"x\r\n"
    start = head("/gradio_api/upload", MULTIPART.partition(" ")[2], "Content-Length: 9000000")
    with ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(closing(connect(url))).sendall(start + part * 999)
        assert_others_are_answered(url, classifier)
    name = httpx.post(f"{url}/gradio_api/upload", files=[("files", (f"{n}.png", b"%d" % n)) for n in range(100)]).json()
    assert len(name) == 100, "and many parts arrive whole"


def test_forms_that_are_none(url, classifier):
    for boundary in ("", "b" * 201, "-" * 5000):
        for path in ("/v1/predict", "/gradio_api/upload"):
            kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
            answer = httpx.post(url + path, content=b"--" + boundary.encode() + b"\r\n", headers=kind)
            assert answer.status_code == 400
    for junk in (
        b"\r\n--" * 200_000,
        b"\r" * 900_000,
        PART[:-2] + b"X: " + b"y" * 900_000,
        PART[:-2] + b"X: y\r\n" * 50_000,
    ):
        answer = httpx.post(f"{url}/v1/predict", content=junk, headers=dict([MULTIPART.split(": ")]))
        assert answer.status_code in (400, 413, 422) and len(answer.content) < 200
    assert_others_are_answered(url, classifier, times=1)


def test_unfinished_bodies_hold_no_memory(app, url, classifier):
    """A hundred, of fifteen megabytes."""
    before = memory_mb(app)
    starts = [
        head("/gradio_api/queue/join", "application/json", "Transfer-Encoding: chunked"),
        head("/v1/predict", MULTIPART.partition(" ")[2], "Transfer-Encoding: chunked"),
    ]
    files = PART + b"x" * 60_000 + b"\r\n"  # such small ones stay in memory
    pieces = [b'{"data": [' + b"1," * 30_000, files]
    with ExitStack() as stack:

        def send(number):
            piece = pieces[number % 2]
            with suppress(OSError):  # the server has hung up
                connections[number].sendall(starts[number % 2])
                for _ in range(250):
                    connections[number].sendall(b"%x\r\n%b\r\n" % (len(piece), piece))

        connections = [stack.enter_context(closing(connect(url))) for _ in range(100)]
        threads = [threading.Thread(target=send, args=[number], daemon=True) for number in range(100)]
        for thread in threads:
            thread.start()
        assert_others_are_answered(url, classifier)
        for thread in threads:
            thread.join(30)
        assert memory_mb(app) - before < 500
    assert_others_are_answered(url, classifier, times=1)


# --- connections -------------------------------------------------------------------------------------------------


def open_many(stack, url, n, start: bytes) -> list[socket.socket]:
    connections = []
    for _ in range(n):
        connections.append(stack.enter_context(closing(connect(url))))
        with suppress(OSError):
            connections[-1].sendall(start)
    return connections


STALLED = head("/v1/predict", MULTIPART.partition(" ")[2], "Content-Length: 5000") + PART + b"x" * 100
FLOODS = {
    "nothing": (1200, b""),
    "half a head": (1200, b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"),
    "half an upload": (1200, STALLED),
    "half an upload to the page": (300, STALLED.replace(b"/v1/predict", b"/gradio_api/upload")),
    "half a call": (300, head("/gradio_api/queue/join", "application/json", "Content-Length: 900000") + b'{"data": ['),
    "a stream": (200, head("/gradio_api/heartbeat/x", method="GET")),
    "answers that nobody reads": (100, head("/config", method="GET") * 10),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_connections_that_are_left_open_shut_out_nobody(url, classifier, flood):
    with ExitStack() as stack:
        open_many(stack, url, *FLOODS[flood])
        assert_others_are_answered(url, classifier)


def test_a_head_without_end(url):
    with closing(connect(url)) as connection, pytest.raises(OSError):
        for _ in range(1000):
            connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 60_000)


def test_a_body_in_crumbs(url, classifier):
    with closing(connect(url)) as connection, suppress(OSError):
        connection.sendall(head("/v1/predict", MULTIPART.partition(" ")[2], "Transfer-Encoding: chunked"))
        for _ in range(100):
            connection.sendall(b"1\r\nx\r\n" * 10_000)
        pytest.fail("a megabyte of single bytes was read")
    assert_others_are_answered(url, classifier, times=1)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /v1/health HTTP/1.0\r\n\r\n", 200),
        (
            head("/v1/health", "x", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", method="GET"),
            200,
        ),
        (head("/v1/predict", "x", "Transfer-Encoding: chunked") + b"zz\r\n", 400),
        (head("/v1/predict", "x", "Transfer-Encoding: chunked") + b"-1\r\n", 400),
        (head("/v1/predict", "x", "Content-Length: -1"), 400),
        (head("/v1/predict", "x", "Content-Length: 1", "Content-Length: 2"), 400),
        (head("/v1/predict%00", "x", "Content-Length: 0"), 400),
        (head("/gradio_api/dev/reload", "x", method="GET"), 404),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
    ],
)
def test_odd_requests(url, request_, status):
    with closing(connect(url)) as connection:
        connection.sendall(request_)
        assert connection.recv(100).startswith(b"HTTP/1.1 %d" % status)


def test_requests_one_behind_the_other_are_answered_in_order(url):
    with closing(connect(url)) as connection:
        connection.sendall(
            head("/v1/health", method="GET")
            + head("/no", method="GET")
            + head("/v1/health", "x", "Connection: close", method="GET")
        )
        assert re.findall(rb"HTTP/1.1 (\d+)", read_all(connection)) == [b"200", b"404", b"200"]


def test_methods_that_are_not_meant(url):
    for path in ("/v1/health", "/v1/predict", "/", "/gradio_api/upload"):
        for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"):
            assert httpx.request(method, url + path, timeout=SOON).status_code in (200, 404, 405), (method, path)
    answer = httpx.head(f"{url}/v1/health")
    assert answer.status_code == 200 and answer.headers["content-length"] != "0" and not answer.content


# --- sign-in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1/predict", "/docs", "/config", *(f"/gradio_api/{route}" for route in (*ROUTES, "upload"))]
)
def test_signing_in_comes_before_the_body(guarded, path):
    for kind in ("application/json", MULTIPART.partition(" ")[2]):
        with closing(connect(guarded)) as connection:
            connection.settimeout(SOON)
            connection.sendall(head(path, kind, "Content-Length: 90000"))  # of which nothing comes
            assert connection.recv(100).startswith(b"HTTP/1.1 401")


SHUT = ["file=/etc/passwd", "queue/data?session_hash=x", "heartbeat/x", "info", "startup-events", "queue/status",
        "upload_progress?upload_id=x", "no/such"]  # fmt: skip


def test_what_nobody_sees_without_signing_in(guarded):
    for path in SHUT:
        assert httpx.get(f"{guarded}/gradio_api/{path}", timeout=SOON).status_code == 401
    cookies = {f"access-token-{n}": "x" for n in ("", "unsecure-", "1")}
    assert httpx.get(f"{guarded}/config", cookies=cookies).status_code == 401


def test_nobody_signs_in_with_a_large_form(guarded):
    for options in ({"data": {"username": "ann", "password": "x" * 5000}}, {"files": {"username": (None, b"x" * 5000)}}):
        assert httpx.post(f"{guarded}/login", **options).status_code == 413


# --- a server whose times are shorter ----------------------------------------------------------------------------


@pytest.fixture
def quick(digits_run, monkeypatch):
    """The API in a thread of the tests: its address, with the server as `server`."""
    for module, name, value in (
        (guards, "GRACE_SECONDS", 1),
        (guards, "MAX_UPLOAD_SECONDS", 4),
        (guards, "LINGER_SECONDS", 0.2),
        (guards, "MAX_HELD_BYTES", 3_000_000),
        (server, "HEAD_SECONDS", 1),
        (server, "UNREAD_SECONDS", 1),
        (server.Connection, "most", 20),
    ):
        monkeypatch.setattr(module, name, value)
    listener = server.listen("127.0.0.1", 0)
    batching = BatchingClassifier(digits_run.export)
    listening = threading.Event()
    running = server.Server(create_api(batching, max_queue=1), started=listening.set, stopping=int, remove=int)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    listening.wait()
    address = Address(f"http://127.0.0.1:{listener.getsockname()[1]}")
    address.server = running
    yield address
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


class Address(str):
    server: server.Server


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\n", head("/v1/health", method="GET")])
def test_who_asks_for_nothing_is_hung_up_on(quick, start):
    with closing(connect(quick)) as connection:
        connection.sendall(start)
        began = time.monotonic()
        read_all(connection)
        assert 0.5 < time.monotonic() - began < SOON


def test_who_asks_letter_by_letter_is_hung_up_on(quick):
    with closing(connect(quick)) as connection, pytest.raises(OSError):
        for letter in b"GET / HTTP/1.1\r\nX: " + b"y" * 100:
            connection.sendall(bytes([letter]))
            time.sleep(0.1)


@pytest.mark.parametrize("path", ["/v1/predict", "/openapi.json", "/no/such"])
@pytest.mark.parametrize("kind", [MULTIPART.partition(" ")[2], "application/json"])
def test_who_sends_too_slowly_is_told_so_or_hung_up_on(quick, path, kind):
    with closing(connect(quick)) as connection:
        connection.sendall(head(path, kind, "Content-Length: 5000") + PART)
        began = time.monotonic()
        answer = read_all(connection)
        assert time.monotonic() - began < SOON
        assert answer.startswith(b"HTTP/1.1 408") or (
            answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405")) and kind in MULTIPART
        )


def test_who_sends_fast_enough_is_answered(quick, classifier, monkeypatch):
    """For longer than the grace, but not than any upload may take."""
    monkeypatch.setattr(guards, "MIN_RATE", 1000)
    file, end = picture(1), b"\r\n--b--\r\n"
    body = PART + file + end
    for pause, status in ((0.3, b"200"), (1.0, b"408")):
        with closing(connect(quick)) as connection:
            connection.sendall(head("/v1/predict", MULTIPART.partition(" ")[2], f"Content-Length: {len(body)}"))
            with suppress(OSError):
                for at in range(0, len(body), len(body) // 6):
                    connection.sendall(body[at : at + len(body) // 6])
                    time.sleep(pause)
            assert connection.recv(100).startswith(b"HTTP/1.1 " + status)


def test_who_does_not_read_is_hung_up_on(quick):
    with closing(connect(quick)) as connection:
        connection.settimeout(1)
        with suppress(TimeoutError, OSError):  # at some time the server reads no further requests either
            for _ in range(300):
                connection.sendall(head("/openapi.json", method="GET") * 100)
        deadline = time.monotonic() + SOON
        while quick.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not quick.server.server_state.connections


def test_the_newest_connection_always_finds_a_place(quick, classifier):
    with ExitStack() as stack:
        open_many(stack, quick, 40, STALLED)
        assert len(quick.server.server_state.connections) <= 21
        assert_others_are_answered(quick, classifier, times=1)


def test_who_holds_most_for_longest_makes_room(quick, classifier):
    """Room is for three megabytes here."""
    start = head("/v1/predict", MULTIPART.partition(" ")[2], "Content-Length: 9000000") + PART
    with closing(connect(quick)) as greedy:
        greedy.sendall(start + b"x" * 2_500_000)
        time.sleep(0.3)
        entry = post(quick, ("a.png", b"x" * 1_000_000)).json()["predictions"][0]
        assert entry["error"].startswith("Not an image")
        answer = read_all(greedy)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer and b"Busy" in answer
    assert_others_are_answered(quick, classifier, times=1)


def test_who_hangs_up_is_not_computed_for(quick, classifier, monkeypatch):
    """Two places, for requests that would take a minute: hung up, both are free again."""
    monkeypatch.setattr(guards, "MAX_HELD_BYTES", 10**9)
    file = io.BytesIO()
    Image.new("RGB", (1400, 1400)).save(file, "PNG")  # 10 ms or more each
    part = PART + file.getvalue() + b"\r\n"
    body = part * 200 + b"--b--\r\n"
    with ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(closing(connect(quick)))
            connection.sendall(head("/v1/predict", MULTIPART.partition(" ")[2], f"Content-Length: {len(body)}") + body)
        deadline = time.monotonic() + 20
        while httpx.post(f"{quick}/v1/predict").status_code == 422 and time.monotonic() < deadline:
            time.sleep(0.02)  # without a file, one takes no place
        assert post(quick, ("a.png", picture(1))).status_code == 503
    start = time.monotonic()
    while post(quick, ("a.png", picture(1))).status_code == 503 and time.monotonic() - start < SOON:
        time.sleep(0.02)
    assert_others_are_answered(quick, classifier, times=1)


# --- uploads that wait -------------------------------------------------------------------------------------------


def test_uploads_make_room_for_newer_ones_but_not_for_the_pages_own(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MAX_STORED_FILES", 3)
    monkeypatch.setattr(guards, "MAX_STORED_BYTES", 1000)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "icon.jpg").write_bytes(b"x" * 900)
    store = guards._Store(tmp_path)
    for number in range(6):
        path = tmp_path / str(number) / "a.png"
        path.parent.mkdir()
        path.write_bytes(b"x" * (600 if number == 4 else 10))
        os.utime(path, (number, number))
    store._remove_oldest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "5", "own"]
    (tmp_path / "5" / "a.png").write_bytes(b"x" * 500)
    os.utime(tmp_path / "5" / "a.png", (9, 9))
    store._remove_oldest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "own"]


# --- the end -----------------------------------------------------------------------------------------------------

ENDLESS = """
import sys, time
from cifar_fastai import api, web
from cifar_fastai.batching import BatchingClassifier
def endless(data):
    print("decoding", flush=True)
    time.sleep(600)
classifier = BatchingClassifier(sys.argv[1])
api.decode_image = endless
web.serve(classifier, host="127.0.0.1", port=int(sys.argv[2]), share=False, auth=None, max_queue=9)
"""


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGTERM] * 2, 143), ([signal.SIGINT], 130)])
def test_a_signal_ends_the_server_whatever_it_does_and_who_is_connected(digits_run, tmp_path, signals, code):
    """A picture that is decoded for ever, streams, uploads that stall, connections that do nothing."""
    port = free_port()
    variables = environment(TMPDIR=str(tmp_path))
    command = [sys.executable, "-c", ENDLESS, str(digits_run.export), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(3):
            process.stdout.readline()
        httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", b"x")})
        assert [path.name for path in tmp_path.rglob("a.png")] == ["a.png"]
        with ExitStack() as stack:
            for start in (b"", b"GET / HTTP/1.1\r\n", STALLED, head("/gradio_api/heartbeat/x", method="GET")):
                open_many(stack, url, 20, start)
            body = PART + picture(1) + b"\r\n--b--\r\n"
            open_many(stack, url, 3, head("/v1/predict", MULTIPART.partition(" ")[2], f"Content-Length: {len(body)}") + body)
            assert process.stdout.readline() == "decoding\n"
            start = time.monotonic()
            for number in signals:
                process.send_signal(number)
                time.sleep(0.5)
            assert process.wait(timeout=30) == code
            assert time.monotonic() - start < 10
        assert not list(tmp_path.iterdir())
    finally:
        process.kill()
        process.communicate()
