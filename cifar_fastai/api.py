"""The HTTP interface, given a classifier: pictures in, JSON out. The page is mounted beside it by `web`."""

import asyncio
import io
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic
from fastapi_offline import FastAPIOffline
from PIL import Image
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from cifar_fastai.artifacts import model_card
from cifar_fastai.batching import BatchingClassifier, NotReady
from cifar_fastai.guards import MAX_FILES, MAX_REQUEST_BYTES, Limits, SignIn
from cifar_fastai.images import FORMATS, MAX_BYTES, TOO_LARGE, BadImage, decode_image
from cifar_fastai.inference import Classifier, Verdict

TOP_K = 5
CHUNK = 32  # files of one request that are decoded and computed together, so that other requests come in between
SLICE_SECONDS = 0.05  # of decoding, after which other requests have their turn
LARGE_PIXELS = 2_000_000  # a larger picture may take half a gigabyte to decode: one at a time
DECODERS = min(os.cpu_count() or 1, 4)  # threads for the others
SPOOL_BYTES = 64_000  # of a file that are kept in memory; more go to a temporary file
ONE_LARGE = threading.Lock()


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
        decoders.close()
        classifier.close()

    decoders = _Decoders(classifier)
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
    api.add_middleware(Limits)
    api.add_middleware(SignIn, auth=auth)  # before it

    def refuse_if_full():
        if places.locked():
            raise HTTPException(503, f"Busy: {max_queue} requests are waiting already. Try again in a moment.")

    @api.post("/v1/predict", response_model=Predictions, responses=RESPONSES, openapi_extra=BODY)
    async def predict(request: Request):
        """What is in one or many pictures. A file that is no image has an `error` in its place."""
        refuse_if_full()
        form = await _receive(request)
        try:
            files = _named_files(form)
            refuse_if_full()
            async with places:  # taken for computing, not for receiving
                entries = await _unless_gone(request, _answer(classifier, decoders, files))
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


async def _receive(request: Request):
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(422, "Send one or many pictures as multipart/form-data in the field 'file'.")
    parser = MultiPartParser(request.headers, request.stream())
    parser.spool_max_size = SPOOL_BYTES
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None


def _named_files(form) -> list[tuple[str, Callable[[], bytes]]]:
    parts = [part for part in form.getlist("file") if isinstance(part, UploadFile)]
    if not parts:
        raise HTTPException(422, "There is no file in the field 'file'.")
    if any(part.size > MAX_BYTES for part in parts):
        raise HTTPException(413, TOO_LARGE)
    return [(part.filename, _reader(part)) for part in parts]


def _reader(part: UploadFile) -> Callable[[], bytes]:
    """Reads the file of a form, as often as it is called."""

    def read() -> bytes:
        part.file.seek(0)
        return part.file.read()

    return read


async def _unless_gone(request: Request, work: Awaitable):
    """What `work` gives, which is cancelled when its client hangs up. Raises ClientDisconnect."""
    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())  # all else has been received
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        return await done
    finally:
        done.cancel()
        gone.cancel()


# --- answering ---------------------------------------------------------------------------------------------------


class _Decoders:
    """Threads that read and decode files. Large pictures have one of their own, so that small ones do not wait for them."""

    def __init__(self, classifier: Classifier):
        self._classifier = classifier
        self._small = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-decoder")

    async def read(self, files: list) -> tuple[list[dict], list]:
        """As `read_files`, for the first of the files: one or some."""
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._small, read_files, self._classifier, files, None, SLICE_SECONDS)
        return result if result[0] else await loop.run_in_executor(self._large, read_files, self._classifier, files[:1])

    def close(self) -> None:
        for executor in (self._small, self._large):
            executor.shutdown(wait=False, cancel_futures=True)


async def _answer(classifier: BatchingClassifier, decoders: _Decoders, files: list) -> list[dict]:
    """One entry for each file, in order. Decoding and computing leave the event loop to others."""
    entries: list[dict] = []
    while len(entries) < len(files):
        chunk, images = await decoders.read(files[len(entries) : len(entries) + CHUNK])
        if images:
            fill_in(chunk, await asyncio.wrap_future(classifier.submit(torch.stack(images))))
        entries += chunk
    return entries


def read_files(
    classifier: Classifier, files: Iterable[tuple[str, Callable[[], bytes]]], show=None, seconds: float = math.inf
):
    """An entry for each of (name, function that reads the file), and what the network sees of those that are images.

    show: is called with each picture. seconds: where given, what is not begun by then is left out, and all from the first
    large picture on.
    """
    entries, images = [], []
    hurried, end = seconds < math.inf, time.monotonic() + seconds
    for name, read in files:
        if hurried and entries and time.monotonic() > end:
            break
        try:
            data = read()
            turn = turn_for(data)
            if hurried and turn is ONE_LARGE:
                break
            with turn:
                picture = decode_image(data)
                entry = {"name": name, "warnings": picture.info["warnings"]}
                image = classifier.tensor(picture)
                if show:
                    show(picture)
                del picture
        except BadImage as error:
            entries.append({"name": name, "error": str(error)})
            continue
        entries.append(entry)
        images.append(image)
    return entries, images


def turn_for(data: bytes) -> AbstractContextManager:
    """What to hold while these bytes are decoded and the picture is used: nothing for a small one."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return ONE_LARGE if math.prod(image.size) > LARGE_PIXELS else nullcontext()
    except Exception:  # `decode_image` will say what is wrong
        return nullcontext()


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


class _Documented(HTTPBasic):
    """Has the documentation say that SignIn asks for a password. (FastAPI's own check takes ASCII alone.)"""

    async def __call__(self, request: Request):
        pass
