import json
import os
import shutil
from types import SimpleNamespace

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run two at a time; read when torch is imported

from helpers.commands import call
from helpers.files import write_pictures
from helpers.web import MisbehavingServer

import cifar_fastai.compat  # noqa: F401  the tests compare with torchvision, which is imported after this


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


@pytest.fixture
def web_server():
    server = MisbehavingServer()
    yield server
    server.close()


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")
