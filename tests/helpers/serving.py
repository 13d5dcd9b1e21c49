"""app.py as a real process, and what is sent to it and comes back."""

import io
import subprocess
import sys
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from PIL import Image

from helpers.commands import ROOT, environment, free_port

MULTIPART = "Content-Type: multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'


@contextmanager
def serving(digits_run, *arguments, **variables):
    """app.py in a process of its own, its port given by the environment; `address` is added to the process."""
    variables["GRADIO_SERVER_PORT"] = str(free_port())
    command = [sys.executable, ROOT / "app.py", "--export", digits_run.export, *arguments]
    variables = environment(**variables)
    process = subprocess.Popen(command, cwd=digits_run.cwd, stdout=subprocess.PIPE, text=True, env=variables)
    process.address = f"http://127.0.0.1:{variables['GRADIO_SERVER_PORT']}"
    try:
        name = process.address.replace("127.0.0.1", "localhost" if "GRADIO_SERVER_NAME" in variables else "127.0.0.1")
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[1:] == [f"serving  {name}/ (Ctrl-C stops it)\n", f"api      {name}/docs\n"]
        yield process
    finally:
        process.terminate()
        process.stdout.read()
        assert process.wait(timeout=30) == 143


def picture(seed: int, format="PNG", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 50), Image.Resampling.BICUBIC).save(file, format, **options)
    return file.getvalue()


def post(url, *files, **options):
    return httpx.post(f"{url}/v1/predict", files=[("file", file) for file in files], timeout=60, **options)


def assert_answers(prediction, expected: dict[str, float]):
    """The five likeliest classes, as the classifier says offline."""
    assert [label for label, _ in prediction["topk"]] == list(expected)[:5]
    assert [share for _, share in prediction["topk"]] == pytest.approx(list(expected.values())[:5], abs=1e-5)
    assert [prediction["label"], prediction["confidence"]] == prediction["topk"][0]
