"""How fast, how steady and how right the server answers: `app.py` as a process of its own, asked over HTTP.

    python benchmarks/serving.py [--export PATH] [--clients 1 10 100] [--soak 10000] [--json FILE]

Each client sends 20 requests, one after another, each with a picture of its own; every answer is compared with that of
`Classifier` in this process, so that none can be lost or swapped unseen. Then Gradio's HTTP endpoint (upload, call, fetch
the answer), a batch of 1,000 files in one request, and with --soak the server's resident memory over that many requests.
Clients and server share the machine, so that latencies with many clients contain the clients' own work.
"""

import argparse
import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from cifar_fastai import Classifier
from cifar_fastai.artifacts import find_export
from cifar_fastai.run import hardware, versions

ROOT = Path(__file__).parent.parent
REQUESTS = 20  # of each client
TOLERANCE = 1e-5  # between confidences computed alone and among others


def pictures(n: int, width: int = 320, height: int = 240) -> list[bytes]:
    """Different JPEG files of smooth random colours."""
    colours = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    files = []
    for pixels in colours:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    return files


class Server:
    """app.py, started on a free port and stopped at the end; `start_seconds` until its page could be read."""

    def __init__(self, export: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        start = time.perf_counter()
        command = [sys.executable, ROOT / "app.py", "--export", export, "--port", str(port), "--max-queue", "1000"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not self._page():
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - start

    def _page(self) -> bool:
        if self.process.poll() is not None:
            raise SystemExit(f"app.py ended with {self.process.returncode}.")
        try:
            return httpx.get(self.url, timeout=60).status_code == 200
        except httpx.ConnectError:
            return False

    def resident_mb(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    return {f"p{share}_ms": round(float(np.percentile(seconds, share)) * 1e3, 2) for share in (50, 95, 99)}


def timed(function, n: int) -> dict[str, float]:
    """Percentiles of the last n of n + 10 calls."""
    seconds = []
    for number in range(n + 10):
        start = time.perf_counter()
        function(number)
        seconds.append(time.perf_counter() - start)
    return percentiles(seconds[10:])


def is_answer(prediction: dict, expected: dict[str, float]) -> bool:
    topk = dict(prediction["topk"])
    return prediction["label"] == next(iter(expected)) and all(
        abs(confidence - expected[label]) < TOLERANCE for label, confidence in topk.items()
    )


async def crowd(url: str, n_clients: int, files: list[bytes], expected: list[dict], requests: int = REQUESTS) -> dict:
    """Many clients at once, each with its own connection and pictures."""
    seconds, wrong, lost = [], 0, 0
    tls = httpx.create_ssl_context()  # of no use here, but each client would take its time to make one

    async def client(number: int):
        nonlocal wrong, lost
        async with httpx.AsyncClient(base_url=url, timeout=120, verify=tls) as http:
            for turn in range(requests):
                place = (number * requests + turn) % len(files)
                start = time.perf_counter()
                answer = await http.post("/v1/predict", files={"file": ("picture.jpg", files[place])})
                seconds.append(time.perf_counter() - start)
                if answer.status_code != 200:
                    lost += 1
                elif not is_answer(answer.json()["predictions"][0], expected[place]):
                    wrong += 1

    start = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(n_clients)))
    rate = n_clients * requests / (time.perf_counter() - start)
    return {"clients": n_clients, "requests": len(seconds), "lost": lost, "wrong": wrong,
            **percentiles(seconds), "requests_per_second": round(rate, 1)}  # fmt: skip


def gradio_call(http: httpx.Client, file: bytes) -> dict:
    """Gradio's label object by its HTTP endpoint: upload, call, fetch the answer."""
    (path,) = http.post("/gradio_api/upload", files={"files": ("picture.jpg", file)}).json()
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
    event = http.post("/gradio_api/call/predict", json={"data": data}).json()["event_id"]
    stream = http.get(f"/gradio_api/call/predict/{event}").text
    return json.loads(stream.partition("data: ")[2])[0]


def batch(http: httpx.Client, files: list[bytes], expected: list[dict]) -> dict:
    start = time.perf_counter()
    parts = [("file", (f"{number}.jpg", file)) for number, file in enumerate(files)]
    predictions = http.post("/v1/predict", files=parts).json()["predictions"]
    seconds = time.perf_counter() - start
    wrong = sum(not is_answer(*pair) for pair in zip(predictions, expected, strict=True))
    return {"files": len(files), "wrong": wrong, "images_per_second": round(len(files) / seconds, 1)}


def measure(export: str, clients: list[int], soak: int) -> dict:
    classifier = Classifier(export)
    files = pictures(1000)
    start = time.perf_counter()
    expected = classifier.predict_batch(files)
    offline_rate = len(files) / (time.perf_counter() - start)
    confidences = np.sort([[answer[label] for label in classifier.classes] for answer in expected], axis=0)
    assert (np.abs(np.diff(confidences, axis=0)).max(axis=1) > 0).all(), "two pictures have one answer"
    result = {
        "export": Path(export).name,
        "classifier_predict": timed(lambda number: classifier.predict(files[number]), 200),
        "classifier_predict_batch": {"files": len(files), "images_per_second": round(offline_rate, 1)},
    }
    with Server(export) as server, httpx.Client(base_url=server.url, timeout=300) as http:
        result["page_ready_seconds"] = round(server.start_seconds, 2)
        post = lambda number: http.post("/v1/predict", files={"file": ("picture.jpg", files[number])})  # noqa: E731
        result["v1_predict"] = timed(post, 200)
        result["gradio_call"] = timed(lambda number: gradio_call(http, files[number]), 100)
        result["v1_predict_batch"] = batch(http, files, expected)
        result["concurrent"] = [asyncio.run(crowd(server.url, n, files, expected)) for n in clients]
        if soak:
            before = server.resident_mb()
            crowded = asyncio.run(crowd(server.url, 10, files, expected, requests=soak // 10))
            result["soak"] = {
                **crowded,
                "resident_mb_before": round(before),
                "resident_mb_after": round(server.resident_mb()),
            }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", help="folder of the export (default: the newest in exports/)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10, 100], help="how many at once, one round each")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="requests between two looks at the server's memory")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    result = measure(str(find_export(options.export)), options.clients, options.soak)
    result |= {"load_before": round(load, 2), "hardware": hardware("cpu"), "versions": versions()}
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    bad = [row for row in (*result["concurrent"], result.get("soak", {})) if row.get("lost") or row.get("wrong")]
    return 1 if bad or result["v1_predict_batch"]["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
