import contextlib
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run two at a time; read when torch is imported

import cifar_fastai.compat  # noqa: F401  the tests compare with torchvision, which is imported after this
from cifar_fastai.cli import main
from cifar_fastai.download import Archive

ROOT = Path(__file__).parent.parent


def call(*arguments, cwd, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of the project, or python itself, as a user would, in `cwd`."""
    arguments = [str(ROOT / word) if word in ("train.py", "predict.py", "app.py") else str(word) for word in arguments]
    kwargs = {"capture_output": True, "text": True, "timeout": 600, "env": environment(), **kwargs}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, **kwargs)


def call_here(command, *arguments, cwd) -> SimpleNamespace:
    """A command of the program in this process, which spares its start."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code = main(None, [command, *map(str, arguments)])
            except SystemExit as end:  # argparse's
                code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())


def environment(**extra) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name != "CIFAR10_DATA"}
    return {**plain, "PYTHONPATH": str(ROOT), **extra}


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory):
    """The user's own cache is neither used nor filled by the tests, in this process or in those it starts; nor does any of
    them reach a mirror."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("https_proxy", "http://127.0.0.1:9")
        yield


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """One real training on digits through the command line, for all processes of the tests, which leave it as it is: its
    folders and what it printed."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    cwd, said = shared / "digits", shared / "digits.json"
    with FileLock(shared / "digits.lock"):
        if not said.exists():
            cwd.mkdir()
            arguments = ("--data", "digits", "--recipe", "classic-sgd", "--epochs", "8", "--bs", "64", "--name", "digits")
            done = call("train.py", *arguments, cwd=cwd)
            assert done.returncode == 0, done.stderr
            said.write_text(json.dumps({"output": done.stdout, "errors": done.stderr}))
    (folder,) = (cwd / "runs").iterdir()
    return SimpleNamespace(cwd=cwd, folder=folder, export=cwd / "exports" / "digits", **json.loads(said.read_text()))


@pytest.fixture(scope="session")
def trained(digits_run):
    """The learner of that training, loaded safely in this process."""
    from cifar_fastai import load_learner

    return load_learner(digits_run.export)


@pytest.fixture(scope="module")  # not longer: while it is open, no test can run an event loop of its own
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    arguments = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    arguments += [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ]  # a camera, and the leave to use it
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


def assert_opens_by_itself(browser, path: Path, n_pictures: int) -> None:
    """A page shows all its pictures, wide and narrow, with nothing over the edge, on the console or asked of a server."""
    requests, errors = [], []
    for width in (1000, 360):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        loaded = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 100)")
        assert len(loaded) == n_pictures and all(loaded)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing runs over the edge"
        page.close()
    assert not errors and all(url.startswith(("file:", "data:")) for url in requests)


class Canary:
    """Something whose pickle writes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def archive_of(path: Path, mirrors: tuple[str, ...]) -> Archive:
    """What the downloader has to know of a file."""
    data = path.read_bytes()
    digests = (hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest())
    return Archive(path.name, len(data), *digests, mirrors)


class MisbehavingServer:
    """A real HTTP server on this machine. `files` maps paths to bytes; the first folder of a path says how it is served:

    /stall/… sends half and then nothing, /pause/… takes a break there, /cut/… hangs up there, /crawl/… sends very slowly,
    /lie/… announces another length, /long/… sends more than it should, /flip/… changes a byte, /noranges/… ignores
    ranges, /html/… redirects to a page, /shift/… sends another range than was asked for, /404/… and any other number
    answers with it.
    """

    def __init__(self):
        self.files, self.requests = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers.get("Range")))
                outer.serve(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # clients hang up on purpose
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.stopped = threading.Event()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve(self, handler):
        manner, _, name = handler.path.strip("/").rpartition("/")
        if handler.path == "/page":
            return self.answer(handler, 200, b"<html>Sign in to the network</html>", {"Content-Type": "text/html"})
        if manner == "html":
            return self.answer(handler, 302, b"", {"Location": "/page"})
        if manner.isdigit():
            return self.answer(handler, int(manner), b"", {})
        body, status, headers = self.files["/" + name], 200, {"Content-Type": "application/gzip"}
        size, asked = len(body), handler.headers.get("Range")
        if manner == "flip":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        if asked and manner != "noranges":
            start = int(asked.removeprefix("bytes=").removesuffix("-")) + (manner == "shift")
            body, status = body[start:], 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        if manner == "long":
            body += b"more"  # without a word on its length
        else:
            headers["Content-Length"] = str(len(body) + (manner == "lie"))
        self.answer(handler, status, body, headers, manner)

    def answer(self, handler, status, body, headers, manner=""):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if manner == "crawl":
            for place in range(0, len(body), 2000):
                handler.wfile.write(body[place : place + 2000])
                if self.stopped.wait(0.1):
                    return
        elif manner in ("stall", "cut", "pause"):
            handler.wfile.write(body[: len(body) // 2])
            if manner == "stall":
                self.stopped.wait(30)
            if manner == "pause":
                self.stopped.wait(1.5)
                handler.wfile.write(body[len(body) // 2 :])
        else:
            handler.wfile.write(body)

    def close(self):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web_server():
    server = MisbehavingServer()
    yield server
    server.close()


COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 40), "red": (210, 30, 20)}


def write_pictures(folder: Path, n_train=20, n_test=4, size=32) -> Path:
    """train/<colour>/<number>.png and test/…, each its colour with noise: learnable, and lossless."""
    noise = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(n):
                pixels = np.clip(noise.normal(colour, 25, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{name}-{number:03}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")
