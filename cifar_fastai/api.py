"""The HTTP interface, given a classifier: pictures in, JSON out. The page is mounted beside it by `web`."""

import asyncio
import base64
import os
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from cifar_fastai.artifacts import model_card
from cifar_fastai.batching import BatchingClassifier, NotReady
from cifar_fastai.images import MAX_BYTES, TOO_LARGE, BadImage, decode_image
from cifar_fastai.inference import Classifier, Verdict

TOP_K = 5
MAX_FILES = 1000
MAX_REQUEST_BYTES = 100_000_000  # of files
MAX_TEXT_BYTES = 15_000_000  # of anything else: the largest file as base64 fits in
MAX_UPLOAD_SECONDS = 120
CHUNK = 32  # files of one request that are decoded and computed together, so that other requests come in between
RETRY_AFTER = b"1"  # seconds
LINGER_SECONDS = 2


class Prediction(BaseModel):
    """What is in one picture; confidences lie between 0 and 1."""

    name: str
    label: str
    confidence: float
    topk: list[tuple[str, float]]
    warnings: list[str]


class Failure(BaseModel):
    """Why there is no answer for one file."""

    name: str
    error: str


class Predictions(BaseModel):
    predictions: list[Prediction | Failure]


class Health(BaseModel):
    """digest: sha256 of the export's manifest, and thereby of all its files."""

    ready: bool
    export: str
    digest: str


FILES = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "description": f"JPEG, PNG, WebP, GIF or BMP, up to {MAX_BYTES // 1_000_000} MB and 25 megapixels each",
}
FORM = {"schema": {"type": "object", "required": ["file"], "properties": {"file": FILES}}}
BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": FORM}}}
TOO_MUCH = f"Over {MAX_BYTES // 1_000_000} MB in a file, {MAX_REQUEST_BYTES // 1_000_000} MB in all, or {MAX_FILES} files"
RESPONSES: dict[int | str, dict[str, Any]] = {
    413: {"description": TOO_MUCH},
    422: {"description": "The only file is no image that can be read, or there is none", "model": Predictions},
    503: {"description": "Busy, or no model: try again after the seconds in Retry-After"},
}


def create_api(classifier: BatchingClassifier, auth: tuple[str, str] | None = None, max_queue: int = 100) -> FastAPI:
    """The application, with its page of documentation at /docs.

    auth: user and password for HTTP Basic. max_queue: requests that may wait while one is answered.
    """

    @asynccontextmanager
    async def lifespan(_):
        yield
        decoders.shutdown()
        classifier.close()

    decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decoder")
    places = asyncio.Semaphore(max_queue + 1)
    export = classifier.export
    health = Health(ready=True, export=export.folder.name, digest=export.sealed.digest)
    api = FastAPIOffline(
        title="Image classifier",
        version="1",
        redoc_url=None,
        swagger_ui_parameters={"validatorUrl": None},  # an outside service
        lifespan=lifespan,
        dependencies=[Depends(_Documented())] if auth else [],
    )
    api.add_middleware(SignIn, auth=auth)
    api.add_middleware(Limits)

    @api.post("/v1/predict", response_model=Predictions, responses=RESPONSES, openapi_extra=BODY)
    async def predict(request: Request):
        """What is in one or many pictures. A file that is no image has an `error` in its place."""
        if places.locked():
            raise HTTPException(503, f"Busy: {max_queue} requests are waiting already. Try again in a moment.")
        async with places:
            form = await _receive(request)
            try:
                entries = await _answer(classifier, decoders, _named_files(form))
            finally:
                await form.close()
        alone_and_bad = len(entries) == 1 and "error" in entries[0]
        return JSONResponse({"predictions": entries}, 422 if alone_and_bad else 200)

    @api.get("/v1/health", response_model=Health, responses={503: {"description": "Not ready", "model": Health}})
    async def get_health():
        """Whether predictions can be had, and from which export."""
        now = health.model_copy(update={"ready": classifier.ready})
        return JSONResponse(now.model_dump(), 200 if now.ready else 503)

    @api.get("/v1/model")
    async def get_model() -> dict[str, Any]:
        """The model card: figures and classes as data, and `card`, the page about them as Markdown."""
        config = classifier.export.config
        return {**config, "card": model_card(config)}

    @api.exception_handler(NotReady)
    async def not_ready(_, error):
        return JSONResponse({"detail": str(error)}, 503)

    return api


# --- receiving files ---------------------------------------------------------------------------------------------


class _Parser(MultiPartParser):
    """Starlette's parser, refusing while they arrive files that are too large or too many."""

    n_parts = received = 0

    def on_part_begin(self):
        self.received = 0
        self.n_parts += 1
        if self.n_parts > MAX_FILES:
            raise HTTPException(413, f"There are more than {MAX_FILES} files. Send several requests.")
        super().on_part_begin()

    def on_part_data(self, data, start, end):
        self.received += end - start
        if self.received > MAX_BYTES:
            raise HTTPException(413, TOO_LARGE)
        super().on_part_data(data, start, end)


async def _receive(request: Request):
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(422, "Send one or many pictures as multipart/form-data in the field 'file'.")
    try:
        return await asyncio.wait_for(_Parser(request.headers, request.stream()).parse(), MAX_UPLOAD_SECONDS)
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None
    except asyncio.TimeoutError:
        raise HTTPException(408, f"The upload took more than {MAX_UPLOAD_SECONDS} seconds.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The upload was broken off.") from None


def _named_files(form) -> list[tuple[str, Callable[[], bytes]]]:
    files = [(part.filename, part.file.read) for part in form.getlist("file") if isinstance(part, UploadFile)]
    if not files:
        raise HTTPException(422, "There is no file in the field 'file'.")
    return files


# --- answering ---------------------------------------------------------------------------------------------------


async def _answer(classifier: BatchingClassifier, decoders, files: list) -> list[dict]:
    """One entry for each file, in order. Decoding and computing leave the event loop to others."""
    entries = []
    for start in range(0, len(files), CHUNK):
        read = asyncio.get_running_loop().run_in_executor(decoders, read_files, classifier, files[start : start + CHUNK])
        chunk, images = await read
        if images:
            fill_in(chunk, await asyncio.wrap_future(classifier.submit(torch.stack(images))))
        entries += chunk
    return entries


def read_files(classifier: Classifier, files: Iterable[tuple[str, Callable[[], bytes]]], show=None):
    """An entry for each of (name, function that reads the file), and what the network sees of those that are images.

    show: is called with each picture.
    """
    entries, images = [], []
    for name, read in files:
        try:
            picture = decode_image(read())
        except BadImage as error:
            entries.append({"name": name, "error": str(error)})
            continue
        entries.append({"name": name, "warnings": picture.info["warnings"]})
        images.append(classifier.tensor(picture))
        if show:
            show(picture)
    return entries, images


def fill_in(entries: list[dict], verdicts: list[Verdict]) -> None:
    """Write the verdicts into the entries without an error, in order."""
    verdicts = iter(verdicts)
    for entry in entries:
        if "error" not in entry:
            verdict = next(verdicts)
            topk = list(verdict.confidences.items())[:TOP_K]
            label, confidence = topk[0]
            warnings = entry.pop("warnings") + verdict.warnings
            entry |= {"label": label, "confidence": confidence, "topk": topk, "warnings": warnings}


# --- at the door -------------------------------------------------------------------------------------------------


class Limits:
    """Refuses a request that is too large, of the API and the page alike: at once if it says so, else while it arrives.

    A refused sender is hung up on, and one who meets a full queue is told when to come back.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        of_files = headers.get("content-type", "").startswith("multipart/")
        limit = MAX_REQUEST_BYTES if of_files else MAX_TEXT_BYTES
        too_large = HTTPException(413, f"The request is larger than {limit // 1_000_000} MB.")
        n_bytes, status = 0, None

        async def counted():
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > limit:
                raise too_large
            return message

        async def marked(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = {413: [(b"connection", b"close")], 503: [(b"retry-after", RETRY_AFTER)]}.get(status, [])
                message = {**message, "headers": [*message["headers"], *extra]}
            elif status == 413 and not message.get("more_body"):
                await send({**message, "more_body": True})
                await _hear_out(receive)
                message = {"type": "http.response.body"}
            await send(message)

        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            return await JSONResponse({"detail": too_large.detail}, 413)(scope, receive, marked)
        await self.app(scope, counted, marked)


async def _hear_out(receive) -> None:
    """Let go by what a sender still sends, for a while: many listen only when they have said all, and would hear nothing
    but that the connection was reset."""

    async def rest():
        while (await receive()).get("more_body"):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), LINGER_SECONDS)


class SignIn:
    """HTTP Basic for the API and its documentation. (The page has Gradio's own sign-in.)"""

    def __init__(self, app, auth: tuple[str, str] | None):
        self.app = app
        self.expected = base64.b64encode(":".join(auth).encode()) if auth else None

    async def __call__(self, scope, receive, send):
        guarded = scope["type"] == "http" and scope["path"].startswith(("/v1", "/docs", "/openapi.json"))
        if self.expected and guarded and not self.admits(Headers(scope=scope).get("authorization", "")):
            headers = {"WWW-Authenticate": 'Basic realm="Image classifier", charset="UTF-8"'}
            return await JSONResponse({"detail": "Sign in with user and password."}, 401, headers)(scope, receive, send)
        await self.app(scope, receive, send)

    def admits(self, authorization: str) -> bool:
        scheme, _, credentials = authorization.partition(" ")
        return scheme.lower() == "basic" and secrets.compare_digest(credentials.strip().encode(), self.expected)


class _Documented(HTTPBasic):
    """Has the documentation say that SignIn asks for a password. (FastAPI's own check takes ASCII alone.)"""

    async def __call__(self, request: Request):
        pass
