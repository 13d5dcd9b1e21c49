"""The served page, through Gradio's own client and through a real browser."""

import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers.commands import ROOT, call, environment, free_port
from helpers.web import assert_opens_by_itself
from PIL import Image

from cifar_fastai import Classifier


@pytest.fixture(scope="module")
def address(digits_run):
    """app.py serving the digits export, as a process of its own."""
    port = free_port()
    command = [sys.executable, ROOT / "app.py", "--export", digits_run.export, "--port", str(port)]
    process = subprocess.Popen(command, cwd=digits_run.cwd, stdout=subprocess.PIPE, text=True, env=environment())
    lines = [process.stdout.readline() for _ in range(2)]
    assert lines == [f"export   {digits_run.export}\n", f"serving  http://127.0.0.1:{port}/ (Ctrl-C stops it)\n"]
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(8).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "rgba.png")
    Image.fromarray(pixels[..., :3]).save(folder / "photo.jpg")
    Image.fromarray(pixels[..., :3]).convert("P").save(folder / "palette.gif")
    (folder / "page.png").write_text("<html><script>alert(1)</script></html>")
    return folder


@pytest.mark.parametrize("name", ["rgba.png", "photo.jpg", "palette.gif"])
def test_the_client_gets_what_the_classifier_says(address, images, digits_run, name):
    answer = Client(address, verbose=False).predict(handle_file(images / name), api_name="/predict")
    expected = list(Classifier(digits_run.export).predict(images / name).items())[:5]
    assert answer["label"] == expected[0][0]
    got = [(entry["label"], entry["confidence"]) for entry in answer["confidences"]]
    assert [label for label, _ in got] == [label for label, _ in expected]
    assert [share for _, share in got] == pytest.approx([share for _, share in expected], abs=1e-6)


def test_what_is_no_image_is_said_so_without_its_content(address, images):
    with pytest.raises(AppError, match="Not an image") as caught:
        Client(address, verbose=False).predict(handle_file(images / "page.png"), api_name="/predict")
    assert "script" not in str(caught.value) and "/tmp" not in str(caught.value)


def test_the_port_is_taken(address, digits_run, tmp_path):
    port = address.rsplit(":", 1)[1].strip("/")
    done = call("app.py", "--export", digits_run.export, "--port", port, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: 127.0.0.1:{port} cannot be listened on (Address already in use). Choose another --port or --host.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--port", "0"], "--port"), (["--auth", "me"], "USER:PASSWORD"), (["--max-queue", "0"], "--max-queue")],
)
def test_wrong_usage(digits_run, tmp_path, arguments, word):
    done = call("app.py", "--export", digits_run.export, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1


def test_sign_in_holds_for_the_page_and_the_client(digits_run, images):
    port = free_port()
    command = [sys.executable, ROOT / "app.py", "--export", digits_run.export, "--port", str(port), "--auth", "ann:secret"]
    process = subprocess.Popen(command, cwd=digits_run.cwd, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        for _ in range(2):
            process.stdout.readline()
        address = f"http://127.0.0.1:{port}/"
        with pytest.raises(Exception, match=r"401|login|auth|credentials"):
            Client(address, verbose=False).predict(handle_file(images / "photo.jpg"), api_name="/predict")
        signed_in = Client(address, auth=("ann", "secret"), verbose=False)
        assert signed_in.predict(handle_file(images / "photo.jpg"), api_name="/predict")["label"]
    finally:
        process.terminate()
        process.wait(timeout=30)


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser, address):
    """A fresh page of the app; afterwards: no error on its console, no request to another machine."""
    errors, requests = [], []
    page = browser.new_page()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    page.close()
    assert not errors
    assert all(url.startswith((address, "data:", "blob:")) for url in requests), requests


def shown_label(page) -> str:
    return page.get_by_test_id("label-output-value").inner_text(timeout=20_000).strip()


@pytest.mark.browser
def test_upload_in_the_browser(page, images, digits_run):
    page.set_input_files("input[type=file]", images / "photo.jpg")
    assert shown_label(page) == next(iter(Classifier(digits_run.export).predict(images / "photo.jpg")))


@pytest.mark.browser
def test_a_bad_file_in_the_browser_wipes_the_old_answer(page, images):
    page.set_input_files("input[type=file]", images / "photo.jpg")
    shown_label(page)
    page.get_by_label("Remove Image").click()
    page.wait_for_selector("input[type=file]", state="attached")
    page.set_input_files("input[type=file]", images / "page.png")
    page.get_by_text("Not an image in a format that is read here").wait_for(timeout=20_000)
    assert page.get_by_test_id("label-output-value").count() == 0


@pytest.mark.browser
def test_the_documentation_of_the_api_in_the_browser(page, address, images):
    page.goto(f"{address}docs")
    page.get_by_text("/v1/predict").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Add string item").click()
    page.set_input_files("input[type=file]", images / "photo.jpg")
    page.get_by_role("button", name="Execute").click()
    page.locator(".live-responses-table").get_by_text('"label"').wait_for(timeout=20_000)


@pytest.mark.browser
def test_the_report_in_the_browser(browser, digits_run):
    assert_opens_by_itself(browser, digits_run.folder / "report.html", n_pictures=11)


def test_the_page_is_ready_soon_after_its_line(address):
    start = time.perf_counter()
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.status == 200 and b"gradio" in answer.read()
    assert time.perf_counter() - start < 30
