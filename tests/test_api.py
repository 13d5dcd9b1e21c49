"""The HTTP interface: app.py as a real process, asked over real HTTP."""

import asyncio
import hashlib
import http.client
import http.server
import io
import json
import re
import select
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from helpers.serving import MULTIPART, PART, assert_answers, picture, post, serving
from PIL import Image

from cifar_fastai import Classifier, decode_image
from cifar_fastai.batching import BatchingClassifier, NotReady

UPLOAD = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def url(digits_run):
    with serving(digits_run) as server:
        yield server.address


@pytest.fixture(scope="module")
def guarded(digits_run):
    """A server with a sign-in and next to no room for waiting."""
    with serving(digits_run, "--auth", "änn:s:cret", "--max-queue", "1") as server:
        yield server.address


@pytest.fixture(scope="module")
def classifier(digits_run):
    return Classifier(digits_run.export)


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_one_picture(url, classifier, format):
    file = picture(1, format)
    answer = post(url, ("photo.x", file))
    assert answer.status_code == 200
    (prediction,) = answer.json()["predictions"]
    assert set(prediction) == {"name", "label", "confidence", "topk", "warnings"}
    assert (prediction["name"], prediction["warnings"]) == ("photo.x", expected_warnings(classifier, file))
    assert_answers(prediction, classifier.predict(file))


def expected_warnings(classifier, file: bytes) -> list[str]:
    unfamiliar = classifier.export.unfamiliar(classifier.tensor(decode_image(file))[None]).item()
    warnings = ["unlike the training images: this may be none of the 10 classes"] if unfamiliar else []
    if max(classifier.predict(file).values()) < 0.5:
        warnings.append("low confidence: the answer is more likely wrong than right")
    return warnings


def test_pictures_of_every_kind_of_doubt(url, classifier):
    """Unsure and unfamiliar in all four combinations, by chance."""
    chance, kinds = np.random.default_rng(0), {}
    for _ in range(500):
        pixels = chance.integers(0, 256, (*chance.integers(1, 9, 2), 3)) // chance.integers(1, 9)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
        kinds.setdefault(tuple(expected_warnings(classifier, file.getvalue())), file.getvalue())
    assert len(kinds) == 4
    predictions = post(url, *((str(number), file) for number, file in enumerate(kinds.values()))).json()["predictions"]
    assert [tuple(prediction["warnings"]) for prediction in predictions] == list(kinds)


def test_many_pictures_with_a_bad_one_among_them(url, classifier):
    files = {f"{seed}.png": picture(seed) for seed in range(70)}  # more than are computed at once
    files["33.png"] = b"<html><script>alert(1)</script></html>"
    answer = post(url, *files.items())
    assert answer.status_code == 200
    predictions = answer.json()["predictions"]
    assert [prediction["name"] for prediction in predictions] == list(files)
    bad = predictions.pop(33)
    assert set(bad) == {"name", "error"} and bad["error"].startswith("Not an image") and "script" not in bad["error"]
    del files["33.png"]
    for prediction, file in zip(predictions, files.values(), strict=True):
        assert_answers(prediction, classifier.predict(file))


def test_a_single_bad_file(url):
    for content, reason in ((b"text", "Not an image"), (b"", "The file is empty."), (picture(1)[:60], "damaged")):
        answer = post(url, ("bad.png", content))
        assert answer.status_code == 422
        (entry,) = answer.json()["predictions"]
        assert set(entry) == {"name", "error"} and reason in entry["error"]


def test_an_animation_says_which_frame_was_taken(url, classifier):
    first, *others = (Image.open(io.BytesIO(picture(seed))) for seed in range(3))
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others)
    (prediction,) = post(url, ("moving.gif", file.getvalue())).json()["predictions"]
    still = io.BytesIO()
    first.save(still, "GIF")
    assert prediction["warnings"] == ["first frame of an animation", *expected_warnings(classifier, still.getvalue())]
    assert_answers(prediction, classifier.predict(still.getvalue()))


def test_requests_without_a_file(url):
    for options in ({}, {"json": {"file": "x"}}, {"files": {"image": picture(1)}}, {"data": {"file": "text"}}):
        answer = httpx.post(f"{url}/v1/predict", **options)
        assert answer.status_code == 422 and "'file'" in answer.json()["detail"]
    broken = httpx.post(f"{url}/v1/predict", content=b"--x", headers={"content-type": "multipart/form-data; boundary=y"})
    assert broken.status_code == 400 and broken.json()["detail"]


@pytest.mark.parametrize("n_clients", [1, 10, 30])
def test_many_clients_at_once_each_get_their_own_answer(url, classifier, n_clients):
    async def ask():
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:

            async def client(number):
                for file in files[number]:
                    answer = await http.post("/v1/predict", files={"file": file})
                    answers.append((file, answer.status_code, answer.json()))

            await asyncio.gather(*map(client, range(n_clients)))

    files = [[picture(1000 + 5 * number + turn) for turn in range(5)] for number in range(n_clients)]
    answers = []
    asyncio.run(ask())
    assert len(answers) == 5 * n_clients
    for file, status, body in answers:
        assert status == 200
        assert_answers(body["predictions"][0], classifier.predict(file))


def test_health_and_model(url, digits_run):
    health = httpx.get(f"{url}/v1/health")
    digest = hashlib.sha256((digits_run.export / "MANIFEST.json").read_bytes()).hexdigest()
    assert (health.status_code, health.json()) == (200, {"ready": True, "export": "digits", "digest": digest})
    model = httpx.get(f"{url}/v1/model").json()
    assert model.pop("card") == (digits_run.export / "README.md").read_text()
    assert model == json.loads((digits_run.export / "config.json").read_text())


def test_the_documentation_names_every_path_and_loads_nothing_from_elsewhere(url):
    description = httpx.get(f"{url}/openapi.json").json()
    assert set(description["paths"]) == {"/v1/predict", "/v1/health", "/v1/model"}
    page = httpx.get(f"{url}/docs").text
    addresses = re.findall(r"""(?:src|href)="([^"]+)""", page)
    assert len(addresses) == 3 and all(address.startswith("/") for address in addresses)
    for address in addresses:
        assert httpx.get(url + address).status_code == 200


# --- limits ------------------------------------------------------------------------------------------------------


def send_until_refused(url, headers: str, body=()) -> tuple[bytes, int]:
    """Write a request and then its body, until an answer comes: that, to its end, and how much was sent by then."""
    host, port = url.removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"POST {headers}\r\nHost: {host}\r\n\r\n".encode())
        for piece in body:
            if select.select([connection], [], [], 0)[0]:
                break
            connection.sendall(piece)
            sent += len(piece)
        answer = b""
        while len(answer.partition(b"\r\n\r\n")[2]) < 10 and (more := connection.recv(65536)):
            answer += more
    return answer, sent


def chunks(start: bytes, n: int):
    """A body in chunked encoding: `start`, then n megabytes in pieces of 100 kB."""
    for piece in (start, *[b"x" * 100_000] * (10 * n)):
        yield b"%x\r\n%b\r\n" % (len(piece), piece)


@pytest.mark.parametrize("path", ["/v1/predict", "/gradio_api/upload"])
def test_a_file_over_the_limit_is_refused_while_it_arrives(url, path):
    part = PART.replace(b'"file"', b'"files"') if "upload" in path else PART
    answer, sent = send_until_refused(url, f"{path} HTTP/1.1\r\n{MULTIPART}\r\nTransfer-Encoding: chunked", chunks(part, 60))
    assert answer.startswith(b"HTTP/1.1 413") and sent < 25_000_000
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(("kind", "size"), [(MULTIPART, 100_000_001), ("Content-Type: application/json", 1_000_001)])
@pytest.mark.parametrize("path", ["/v1/predict", "/gradio_api/upload", "/gradio_api/call/predict", "/gradio_api/queue/join"])
def test_a_request_that_says_it_is_too_large_is_refused_unread(url, path, kind, size):
    answer, _ = send_until_refused(url, f"{path} HTTP/1.1\r\n{kind}\r\nContent-Length: {size}")
    assert answer.startswith(b"HTTP/1.1 413") and b"larger than" in answer


@pytest.mark.parametrize("path", ["/gradio_api/call/predict", "/gradio_api/queue/join"])
def test_a_call_of_the_page_that_grows_too_large_is_refused_while_it_arrives(url, path):
    headers = f"{path} HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    answer, sent = send_until_refused(url, headers, chunks(b'{"data": ["', 60))
    assert answer.startswith(b"HTTP/1.1 413") and sent < 30_000_000


@pytest.mark.parametrize("size", [20_000_000, 120_000_000])
def test_a_refused_sender_who_listens_only_at_the_end_hears_why(url, size):
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request("POST", "/v1/predict", PART + bytes(size), dict([MULTIPART.split(": ")]))
    answer = connection.getresponse()
    assert answer.status == 413 and b"larger than" in answer.read()
    connection.close()


def test_too_many_files(url):
    answer = post(url, *[("a.png", b"x")] * 1001)
    assert answer.status_code == 413 and "more than 1000 files" in answer.json()["detail"]
    assert post(url, *[("a.png", b"x")] * 1000).status_code == 200


def test_ten_megabytes_are_not_too_large(url):
    entry = post(url, ("a.png", b"x" * 10_000_000)).json()["predictions"][0]
    assert entry["error"].startswith("Not an image")
    assert post(url, ("a.png", b"x" * 10_000_001)).status_code == 413
    assert post(url, *[("a.png", b"x" * 6_000_000)] * 2).status_code == 200


# --- busy --------------------------------------------------------------------------------------------------------


@contextmanager
def sent(url, authorization, body: bytes):
    """A connection on which a request with this body was sent, whole or not."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        headers = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\n{MULTIPART}\r\nAuthorization: {authorization}\r\n"
        connection.sendall(f"{headers}Content-Length: {max(len(body), 5000)}\r\n\r\n".encode() + body)
        yield connection


def test_a_full_queue_sends_the_next_away_and_loses_nobody(guarded, classifier):
    """Places are taken by those who are computed for, and not by those who have not sent all."""
    auth = httpx.BasicAuth("änn", "s:cret")
    header = next(auth.auth_flow(httpx.Request("GET", guarded))).headers["authorization"]
    file, large = picture(5), io.BytesIO()
    with sent(guarded, header, PART), sent(guarded, header, PART), sent(guarded, header, PART):
        assert_answers(post(guarded, ("a.png", file), auth=auth).json()["predictions"][0], classifier.predict(file))
    Image.new("RGB", (1400, 1400)).save(large, "PNG")
    many = (PART + large.getvalue() + b"\r\n") * 200 + PART + file + b"\r\n--b--\r\n"
    with sent(guarded, header, many) as first, sent(guarded, header, many) as second:
        deadline = time.monotonic() + 20
        while httpx.post(f"{guarded}/v1/predict", auth=auth).status_code == 422 and time.monotonic() < deadline:
            time.sleep(0.01)  # without a file, one takes no place
        busy = post(guarded, ("a.png", file), auth=auth)
        assert busy.status_code == 503 and busy.headers["retry-after"] == "1"
        assert "Busy" in busy.json()["detail"]
        for connection in (first, second):
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            predictions = json.loads(answer.read())["predictions"]
            assert len(predictions) == 201
            assert_answers(predictions[-1], classifier.predict(file))
    assert_answers(post(guarded, ("a.png", file), auth=auth).json()["predictions"][0], classifier.predict(file))


def test_the_page_is_busy_too(guarded):
    with httpx.Client(base_url=guarded, timeout=60) as http:
        assert http.post("/login", data={"username": "änn", "password": "s:cret"}).status_code == 200
        (path,) = http.post("/gradio_api/upload", files={"files": ("a.jpg", big_photo())}).json()
        call = {"data": [{"path": path, "meta": UPLOAD}]}
        answers = [http.post("/gradio_api/call/predict", json=call) for _ in range(30)]
        assert {answer.status_code for answer in answers} == {200, 503}
        assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 503)
        for answer in answers:
            if answer.status_code == 200:
                stream = http.get(f"/gradio_api/call/predict/{answer.json()['event_id']}").text
                assert stream.startswith("event: complete"), "who was let in is answered"


def big_photo() -> bytes:
    """20 megapixels, which take a while to decode."""
    file = io.BytesIO()
    Image.effect_noise((5000, 4000), 40).convert("RGB").resize((5000, 4000)).save(file, "JPEG", quality=30)
    assert file.tell() < 10_000_000
    return file.getvalue()


def test_the_queue_of_the_page_cannot_be_passed_by(url):
    for name in ("run", "api"):
        answer = httpx.post(f"{url}/gradio_api/{name}/predict", json={"data": [None]})
        assert answer.status_code == 404


def test_after_its_end_a_classifier_is_not_ready(digits_run):
    from starlette.testclient import TestClient

    from cifar_fastai.api import create_api

    batching = BatchingClassifier(digits_run.export)
    http = TestClient(create_api(batching))
    assert http.get("/v1/health").status_code == 200
    assert http.post("/v1/predict", files={"file": picture(1)}).status_code == 200
    waiting = batching.submit(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    batching.close()
    assert len(waiting.result()) == 3, "what waits is answered before"
    with pytest.raises(NotReady):
        batching.predict(picture(1))
    batching.close()
    health = http.get("/v1/health")
    assert health.status_code == 503 and health.json()["ready"] is False
    answer = http.post("/v1/predict", files={"file": picture(1)})
    assert answer.status_code == 503 and "no model" in answer.json()["detail"] and answer.headers["retry-after"]


def test_nothing_is_taken_that_will_not_be_answered(digits_run):
    batching, taken = BatchingClassifier(digits_run.export), []
    for _ in range(3):
        taken.append(batching.submit(torch.zeros(64, 3, 32, 32, dtype=torch.uint8)))
    closing = threading.Thread(target=batching.close)
    closing.start()
    while True:
        try:
            taken.append(batching.submit(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
        except NotReady:
            break
    closing.join()
    assert all(future.done() for future in taken)


def test_an_error_in_one_batch_does_not_end_the_classifier(digits_run, classifier):
    batching = BatchingClassifier(digits_run.export)
    bad = batching.submit(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert isinstance(bad.exception(), RuntimeError)
    cancelled = [batching.submit(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)) for _ in range(20)]
    for future in cancelled:
        future.cancel()
    image = batching.tensor(decode_image(picture(1)))
    (answer,) = batching.submit(image[None]).result(timeout=30)
    assert answer.confidences == pytest.approx(classifier.predict(picture(1)), abs=1e-6)
    batching.close()


# --- sign-in -----------------------------------------------------------------------------------------------------

API = ["/v1/predict", "/v1/health", "/v1/model", "/docs", "/openapi.json"]
PAGE = ["/config", "/gradio_api/info", "/gradio_api/upload", "/gradio_api/call/predict", "/gradio_api/queue/join",
        "/gradio_api/queue/data", "/gradio_api/file=/etc/passwd"]  # fmt: skip
POSTED = ("predict", "upload", "join")


def request(http, path, **options):
    return http.request("POST" if path.endswith(POSTED) else "GET", path, **options)


@pytest.mark.parametrize("path", API + PAGE)
def test_nothing_without_signing_in(guarded, path):
    with httpx.Client(base_url=guarded) as http:
        answer = request(http, path, json={} if path.endswith(POSTED) else None)
        assert answer.status_code == 401
        if path in API:
            assert answer.headers["www-authenticate"].startswith("Basic ")


@pytest.mark.parametrize(
    "header",
    ["Basic", "Basic !", "Basic w6Rubg==", "Bearer w6RubjpzOmNyZXQ=", "Basic w6RubjpzOmNyZXU=", "Basic w6RubjpzOmNyZXQ=="],
)
def test_wrong_credentials(guarded, header):
    assert httpx.get(f"{guarded}/v1/health", headers={"Authorization": header}).status_code == 401


def test_right_credentials(guarded):
    for scheme in ("Basic", "basic"):
        header = {"Authorization": f"{scheme} w6RubjpzOmNyZXQ="}  # änn:s:cret
        assert httpx.get(f"{guarded}/v1/health", headers=header).status_code == 200
    assert httpx.get(f"{guarded}/v1/model", auth=("änn", "s:cret")).status_code == 200
    page = httpx.get(f"{guarded}/docs", auth=("änn", "s:cret")).text
    for address in re.findall(r"""(?:src|href)="([^"]+)""", page):
        assert httpx.get(guarded + address, auth=("änn", "s:cret")).status_code == 200
    scheme = httpx.get(f"{guarded}/openapi.json", auth=("änn", "s:cret")).json()["components"]["securitySchemes"]
    assert [entry["scheme"] for entry in scheme.values()] == ["basic"]


def test_the_pages_sign_in(guarded):
    with httpx.Client(base_url=guarded) as http:
        assert http.post("/login", data={"username": "änn", "password": "secret"}).status_code == 400
        assert http.get("/config").status_code == 401
        assert http.post("/login", data={"username": "änn", "password": "s:cret"}).status_code == 200
        assert http.get("/config").status_code == 200


# --- what must not be opened -------------------------------------------------------------------------------------


@pytest.fixture
def canary():
    """A web server that notes who asks."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture(1))

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x.png", asked
    server.shutdown()
    server.server_close()


def calls_naming(path, url=None) -> list[tuple[str, dict]]:
    """The ways to have a function of the page open a file."""
    file = {"path": path, "url": url, "orig_name": "x.png", "meta": UPLOAD}
    return [
        ("/gradio_api/call/predict", {"data": [file]}),
        ("/gradio_api/call/predict_batch", {"data": [[file]]}),
        ("/gradio_api/call/v2/predict", {"image": file}),
        ("/gradio_api/run/predict", {"data": [file]}),
        ("/gradio_api/queue/join", {"data": [file], "fn_index": 1, "session_hash": "x"}),
    ]


def test_no_address_is_fetched(url, canary):
    address, asked = canary
    local = address.replace("127.0.0.1", "localhost")
    for path in (address, local, address.replace("http:", "https:")):
        for place, call in calls_naming(path, path):
            answer = httpx.post(url + place, json=call)
            assert answer.status_code == 403 and "Send the picture itself" in answer.json()["detail"]
        for place in (f"/gradio_api/file={path}", f"/gradio_api/proxy={path}", f"/gradio_api/file/{path}"):
            assert httpx.get(url + place).status_code == 403
    hidden = json.dumps(calls_naming(address)[0][1]).replace("path", "\\u0070ath")
    assert httpx.post(f"{url}/gradio_api/call/predict", content=hidden).status_code == 403
    assert post(url, (address, b"http")).status_code == 422, "a name is only a name"
    time.sleep(0.5)
    assert asked == []


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "{export}/config.json", "../../../../etc/passwd", "/tmp/x\0/../y", "{outside}"]
)
def test_no_file_of_the_server_is_opened(url, digits_run, tmp_path, name):
    (tmp_path / "secret.png").write_bytes(picture(1))
    path = name.format(export=digits_run.export, outside=tmp_path / "secret.png")
    for place, call in calls_naming(path):
        assert httpx.post(url + place, json=call).status_code == 403


def test_the_files_that_a_call_may_name_are_counted(url):
    (upload,) = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", picture(1))}).json()
    folder = upload.rpartition("/")[0]
    for n, refused in ((2000, False), (2001, True)):
        data = [{"path": f"{folder}/{number}", "meta": UPLOAD} for number in range(n)]
        answer = httpx.post(f"{url}/gradio_api/call/predict_batch", json={"data": [data]})
        assert (answer.status_code == 403) == refused
    data = [{"path": upload, "meta": UPLOAD, "orig_name": "x.png"}] * 1001
    with httpx.Client(base_url=url, timeout=60) as client:
        event = client.post("/gradio_api/call/predict_batch", json={"data": [data]}).json()["event_id"]
        assert "more than 1,000 files" in client.get(f"/gradio_api/call/predict_batch/{event}").text


def test_no_file_outside_the_uploads_is_served(url, digits_run, classifier):
    (upload,) = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", picture(1))}).json()
    assert httpx.get(f"{url}/gradio_api/file={upload}").content == picture(1)
    secrets = ["/etc/passwd", digits_run.export / "config.json", ROOT / "app.py", f"{upload}/../../../etc/passwd"]
    for path in secrets:
        for place in (f"/gradio_api/file={path}", f"/gradio_api/file/{path}", f"/file={path}", f"/static/{path}",
                      f"/assets/../../../{path}", f"/static-offline-docs/../../{path}"):  # fmt: skip
            target = place.replace("..", "%2e%2e")
            for sent in (place, target, target.replace("/..", "%2f..")):
                answer = httpx.get(url + sent)
                assert answer.status_code in (403, 404), (sent, answer.status_code)


def test_batch_endpoint_of_the_page(url, classifier):
    files = [("good.png", picture(7)), ("bad.png", b"text"), ("other.jpg", picture(8, "JPEG"))]
    with httpx.Client(base_url=url, timeout=60) as client:
        paths = client.post("/gradio_api/upload", files=[("files", file) for file in files]).json()
        data = [{"path": path, "orig_name": name, "meta": UPLOAD} for path, (name, _) in zip(paths, files, strict=True)]
        event = client.post("/gradio_api/call/predict_batch", json={"data": [data]}).json()["event_id"]
        stream = client.get(f"/gradio_api/call/predict_batch/{event}").text
    (entries,) = json.loads(stream.partition("data: ")[2])
    assert [entry["name"] for entry in entries] == ["good.png", "bad.png", "other.jpg"]
    assert "Not an image" in entries[1]["error"]
    for entry, (_, file) in ((entries[0], files[0]), (entries[2], files[2])):
        assert_answers(entry, classifier.predict(file))


# --- around it ---------------------------------------------------------------------------------------------------


def test_a_server_set_up_by_its_environment_without_a_way_to_gradios_servers(digits_run, tmp_path):
    """Address from the variables that Hugging Face sets; a share link that cannot be had; uploads that do not outlast it."""
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}  # no request leaves the machine
    with serving(digits_run, "--share", GRADIO_SERVER_NAME="0.0.0.0", TMPDIR=str(tmp_path), **nowhere) as server:
        start = time.monotonic()
        line = server.stdout.readline()
        assert re.fullmatch(r"public   no link could be made \(.+\); the local address works\n", line)
        assert time.monotonic() - start < 30
        assert httpx.get(server.address).status_code == 200
        assert post(server.address, ("a.png", picture(1))).status_code == 200
        httpx.post(f"{server.address}/gradio_api/upload", files={"files": ("a.png", picture(1))})
        assert [path.name for path in tmp_path.rglob("a.png")] == ["a.png"]
    assert not list(tmp_path.rglob("a.png"))


def test_the_readme_makes_a_space():
    """The settings that Hugging Face reads from the top of the README."""
    top = (ROOT / "README.md").read_text().split("---\n")[1]
    settings = dict(line.split(": ") for line in top.splitlines())
    assert settings["sdk"] == "gradio" and (ROOT / settings["app_file"]).is_file()
    assert "gradio>=6.31,<7" in (ROOT / "requirements.txt").read_text() and settings["sdk_version"] == "6.31.0"
    assert settings["python_version"].strip('"') in ("3.10", "3.11", "3.12", "3.13")
