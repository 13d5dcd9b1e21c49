"""What stands at the door of the server: who comes in, how much they may send, and how slowly.

Whatever is refused here is refused for the API and the page alike, and without a word of what was sent.
"""

import asyncio
import base64
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import parse_options_header
from starlette.requests import ClientDisconnect, Request, cookie_parser
from starlette.responses import JSONResponse

from cifar_fastai.images import MAX_BYTES, TOO_LARGE

# What one request may hold.
MAX_FILES = 1000
MAX_REQUEST_BYTES = 100_000_000  # of files
MAX_JSON_BYTES = 1_000_000  # a call that names 1,000 uploads has 300 kB
MAX_LOGIN_BYTES = 4_000
MAX_PATHS = 2 * MAX_FILES  # that one call may name: each is looked up
MAX_PATH_LENGTH = 1000  # characters
MAX_ITEMS = 12_000  # brackets and commas in a call: nine for each upload, as Gradio describes one
MAX_DEPTH = 20  # lists in lists; the calls of the page have five
MAX_WORD = 100  # characters of what Gradio keeps of a session
MAX_BOUNDARY = 200  # bytes; RFC 2046 allows 70
MAX_PART_BYTES = MAX_BYTES + 50_000  # of a form, with the part's own headers
# How slowly it may come.
GRACE_SECONDS = 10  # before the rate counts
MIN_RATE = 10_000  # bytes a second on average, from the first on
MAX_UPLOAD_SECONDS = 120
LINGER_SECONDS = 2  # for which a refused sender is heard out
PAGE_AT_ONCE = 2  # requests to the page that are answered at a time; others have their turn in between
SLICE_PARTS = 8  # of a form with many, which are parsed at a time: each opens a file
# What all requests together may hold.
MAX_HELD_BYTES = 400_000_000  # of bodies from their first byte to the answer
PART_BYTES = 100_000  # that a part of a form counts for besides: it has a file of its own
MAX_STORED_BYTES, MAX_STORED_FILES = 1_000_000_000, 20_000  # uploads to the page, which wait to be named by a call

RETRY_AFTER = b"1"  # seconds
BUSY = "Busy: too much is being sent at the same time. Try again in a moment."
CALLS = re.compile(r"/gradio_api/(queue/join|(call|call/v2|run|api)/[^/]+/?|cancel|reset/?)")
API = "/v1/"
UPLOAD = "/gradio_api/upload"
WAITING = "/gradio_api/upload_progress"  # for an upload to begin
SHUT = "/gradio_api/dev/"  # a stream that asks for changes twenty times a second
MALFORMED = "The request does not have the form that is asked for here."
ELSEWHERE = "Send the picture itself: neither addresses nor files of the server are opened."
LOGIN = ("/login", "/login/")
# The page's addresses that a visitor needs before signing in.
OPEN = re.compile(r"/|/login/?|/logout/?|/(assets|static)/.*|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt")


# --- how much, and how slowly ------------------------------------------------------------------------------------


class Limits:
    """Refuses a request that is too large or too slow: at once if it says so, else while it arrives.

    What is no form is received as a whole before anybody sees it. A refused sender is hung up on, and one who meets a full
    queue is told when to come back. When all bodies together hold too much, the one that has held most for longest is given
    up, so that a newcomer finds room.
    """

    def __init__(self, app):
        self.app = app
        self.bodies: set[_Body] = set()
        self.held = 0  # bytes
        self.slicing = asyncio.Lock()
        self.turns = asyncio.Semaphore(PAGE_AT_ONCE)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "HEAD" and scope["path"].startswith(API):  # FastAPI knows none; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        body = _Body(self, scope, receive)
        answer = _Answer(body, send)
        self.bodies.add(body)
        try:
            if refusal := body.refusal():
                await _detail(*refusal)(scope, receive, answer.send)
            elif body.is_form:
                await self.app(scope, body.receive, answer.send)
            else:
                whole = _replayed(await Request(scope, body.receive).body(), receive)
                if scope["path"].startswith(API) or scope["path"] == WAITING:
                    await self.app(scope, whole, answer.send)
                else:
                    async with _Turn(self.turns) as turn:
                        await self.app(scope, whole, turn.ending(answer.send))
        except HTTPException as error:
            await _detail(error.status_code, error.detail)(scope, receive, answer.send)
        except ClientDisconnect:  # there is nobody to tell
            pass
        except asyncio.CancelledError:
            if not body.given_up or answer.status:
                raise
            await _detail(503, BUSY)(scope, receive, answer.send)
        finally:
            self.bodies.discard(body)
            self.held -= body.cost

    def make_room(self) -> None:
        while self.held > MAX_HELD_BYTES:
            now = asyncio.get_running_loop().time()
            max(self.bodies, key=lambda body: body.cost * (now - body.start)).give_up()


class _Body:
    """What arrives of a request, counted and timed."""

    def __init__(self, limits: Limits, scope, receive):
        self._limits, self._scope, self._receive = limits, scope, receive
        self._headers = Headers(scope=scope)
        self._task = asyncio.current_task()
        self.start, self.n_bytes, self.cost = asyncio.get_running_loop().time(), 0, 0
        self.whole = self.given_up = False
        self._slices: list[dict] = []  # of the last message, the first one last
        kind, options = parse_options_header(self._headers.get("content-type"))
        self.is_form = kind == b"multipart/form-data"
        self._parts = _Parts(options.get(b"boundary", b""))
        if scope["path"] in LOGIN:
            self.limit = MAX_LOGIN_BYTES
        else:
            self.limit = MAX_REQUEST_BYTES if self.is_form else MAX_JSON_BYTES
        size = f"{self.limit // 1_000_000} MB" if self.limit >= 1_000_000 else f"{self.limit // 1000} kB"
        self.too_large = 413, f"The request is larger than {size}."

    def refusal(self) -> tuple[int, str] | None:
        """Why this is refused unread."""
        length = self._headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.limit:
            return self.too_large
        if self.is_form and not 0 < len(self._parts.boundary) <= MAX_BOUNDARY:
            return 400, "The form has no boundary, or one that is too long."
        if "\0" in self._scope["path"]:
            return 400, "There is a null character in the address."
        return None

    async def receive(self):
        """The next message. Raises HTTPException."""
        if self._slices:
            async with self._limits.slicing:  # one at a time of all requests
                await asyncio.sleep(0)
            return self._slices.pop()
        if self.whole:
            return await self._receive()
        seconds = min(GRACE_SECONDS + self.n_bytes / MIN_RATE, MAX_UPLOAD_SECONDS)
        left = max(self.start + seconds - asyncio.get_running_loop().time(), 0)
        try:
            message = await asyncio.wait_for(self._receive(), left)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"The upload is too slow, or took more than {MAX_UPLOAD_SECONDS} seconds.") from None
        self.whole = not message.get("more_body")
        n_parts = self._count(message.get("body", b""))
        if n_parts <= SLICE_PARTS:
            return message
        self._slices = _sliced(message, len(message["body"]) * SLICE_PARTS // n_parts)
        return self._slices.pop()

    def _count(self, data: bytes) -> int:
        self.n_bytes += len(data)
        if self.n_bytes > self.limit:
            raise HTTPException(*self.too_large)
        n_parts = self._parts.count(data) if self.is_form else 0
        self.cost += (more := len(data) + n_parts * PART_BYTES)
        self._limits.held += more
        self._limits.make_room()
        if self.given_up:
            raise HTTPException(503, BUSY)
        return n_parts

    def give_up(self) -> None:
        self.given_up = True
        self._limits.held -= self.cost
        self.cost = 0
        if self._task is not asyncio.current_task():
            self._task.cancel()

    async def hear_out(self) -> None:
        """Let go by what a sender still sends, for a while: many listen only when they have said all, and would hear nothing
        but that the connection was reset."""

        async def rest():
            while (await self._receive()).get("more_body"):
                pass

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(rest(), LINGER_SECONDS)


def _sliced(message: dict, size: int) -> list[dict]:
    """A message as several with bodies of `size`, the last one first."""
    body, kind = message["body"], message["type"]
    slices = [{"type": kind, "body": body[at : at + size], "more_body": True} for at in range(0, len(body), size)]
    slices[-1]["more_body"] = message.get("more_body", False)
    return slices[::-1]


class _Parts:
    """Counts the parts of a form while they arrive, and refuses those that are too many or too large."""

    def __init__(self, boundary: bytes):
        self.boundary, self._delimiter = boundary, b"\r\n--" + boundary
        self._tail, self._n_delimiters, self._size = b"\r\n", 0, 0  # the first one stands at the start of a line too

    def count(self, data: bytes) -> int:
        """How many parts begin in these bytes. Raises HTTPException."""
        text = self._tail + data
        self._tail = text[1 - len(self._delimiter) :]
        n_delimiters = text.count(self._delimiter)
        self._n_delimiters += n_delimiters
        if self._n_delimiters > MAX_FILES + 1:  # the last one ends the form
            raise HTTPException(413, f"There are more than {MAX_FILES} files. Send several requests.")
        self._size += len(data)
        if self._size > MAX_PART_BYTES:
            raise HTTPException(413, TOO_LARGE)
        if n_delimiters:
            self._size = len(text) - text.rfind(self._delimiter) - len(self._delimiter)
        return n_delimiters


class _Answer:
    """Sends an answer, with what its sender has to know: whether to come back, and that nothing more is read."""

    def __init__(self, body: _Body, send):
        self._body, self._send = body, send
        self.status: int | None = None

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"]]
            if self.status == 503:
                headers.append((b"retry-after", RETRY_AFTER))
            if self._hangs_up():
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif self._hangs_up() and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._body.hear_out()
            message = {"type": "http.response.body"}
        await self._send(message)

    def _hangs_up(self) -> bool:
        return not self._body.whole and (self.status in (408, 413) or self._body.given_up)


def _replayed(body: bytes, receive):
    """In place of `receive`, where all of the body has been received."""
    messages = [{"type": "http.request", "body": body}]

    async def replayed():
        return messages.pop() if messages else await receive()

    return replayed


class _Turn:
    """One of a few until its answer begins. An answer of the page takes milliseconds, and a stream then next to nothing."""

    def __init__(self, turns: asyncio.Semaphore):
        self._turns, self._taken = turns, False

    async def __aenter__(self):
        await self._turns.acquire()
        self._taken = True
        return self

    async def __aexit__(self, *_):
        self._end()

    def ending(self, send):
        async def ended(message):
            self._end()
            await send(message)

        return ended

    def _end(self) -> None:
        if self._taken:
            self._taken = False
            self._turns.release()


# --- who ---------------------------------------------------------------------------------------------------------


class SignIn:
    """Lets in who has signed in, before anything of the request is read: to the API and its documentation by HTTP Basic,
    to the page by the cookie that its own sign-in gave."""

    def __init__(self, app, auth: tuple[str, str] | None):
        self.app = app
        self.expected = base64.b64encode(":".join(auth).encode()) if auth else None

    async def __call__(self, scope, receive, send):
        if self.expected and scope["type"] == "http" and (refusal := self._refusal(scope)):
            return await refusal(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if scope["path"].startswith((API, "/docs", "/openapi.json", "/static-offline-docs")):
            if self._admits(headers.get("authorization", "")):
                return None
            asked = {"WWW-Authenticate": 'Basic realm="Image classifier", charset="UTF-8"'}
            return _detail(401, "Sign in with user and password.", asked)
        if OPEN.fullmatch(scope["path"]) or _has_cookie(scope["app"], headers.get("cookie", "")):
            return None
        return _detail(401, "Sign in on the page.")  # without a word of Basic, for which a browser would ask

    def _admits(self, authorization: str) -> bool:
        scheme, _, credentials = authorization.partition(" ")
        return scheme.lower() == "basic" and secrets.compare_digest(credentials.strip().encode(), self.expected)


def _has_cookie(app, cookie: str) -> bool:
    """Whether one of Gradio's own tokens is there. app: has the page, if there is one, as `state.page`."""
    page = getattr(app.state, "page", None)
    cookies = cookie_parser(cookie)
    names = ("access-token-", "access-token-unsecure-")
    return page is not None and any(cookies.get(name + page.cookie_id) in page.tokens for name in names)


# --- calls of the page -------------------------------------------------------------------------------------------


class UploadsOnly:
    """Lets calls of the page's functions through that are small and name uploads alone.

    Gradio parses a call in the event loop, where nothing may take long; it would fetch an address that stands in place of a
    file, and its check of paths can be off. Addresses that take a body and that the page has no use for are shut.
    """

    def __init__(self, app, folder: Path):
        self.app = app
        self.store = _Store(folder)
        self._within = tuple({f"{path}{os.sep}" for path in (folder.absolute(), folder.resolve())})

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, is_post = scope["path"], scope["method"] == "POST"
        is_call = is_post and CALLS.fullmatch(path)
        if path.startswith("/gradio_api/") and "://" in path:
            return await _detail(403, ELSEWHERE)(scope, receive, send)
        if path.startswith(SHUT) or (is_post and not is_call and path not in (UPLOAD, *LOGIN)):
            return await _detail(404, "There is nothing here.")(scope, receive, send)
        if is_post and path == UPLOAD:
            receive = await self.store.receiving(receive)
        elif is_call:
            body = await Request(scope, receive).body()
            try:
                self.check(path, body)
            except HTTPException as error:
                return await _detail(error.status_code, error.detail)(scope, receive, send)
            receive = _replayed(body, receive)
        try:
            await self.app(scope, receive, send)
        except RuntimeError as error:
            if "already started" not in str(error):  # a stream of something that is not there
                raise

    def check(self, path: str, body: bytes) -> None:
        """Raises HTTPException unless this is a call of some size and depth that gives words and uploads alone."""
        if sum(map(body.count, b"[{,")) > MAX_ITEMS:  # before anything is made of them
            raise HTTPException(413, "There is too much in this call. Send several.")
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            raise HTTPException(422, "Send a call as JSON.") from None
        if not isinstance(call, dict):
            raise HTTPException(422, "Send a call as a JSON object.")
        files = [value for value in _objects(call) if "path" in value or "url" in value]
        paths = {file.get("path") for file in files if isinstance(file.get("path"), str)}
        if len(paths) > MAX_PATHS or not all(map(self._is_upload, paths)) or any("path" not in file for file in files):
            raise HTTPException(403, ELSEWHERE)
        try:
            _Call.model_validate({"data": list(call.values())} if "/call/v2/" in path else call)
        except ValidationError:
            raise HTTPException(422, MALFORMED) from None

    def _is_upload(self, path: str) -> bool:
        return len(path) <= MAX_PATH_LENGTH and "\0" not in path and os.path.normpath(path).startswith(self._within)


class _Upload(BaseModel):
    """An upload as Gradio describes it, and as far as Gradio does not check it in a way that takes long."""

    model_config = ConfigDict(strict=True)

    path: str
    url: str | None = Field(None, max_length=2 * MAX_PATH_LENGTH)
    orig_name: str | None = Field(None, max_length=MAX_PATH_LENGTH)
    mime_type: str | None = Field(None, max_length=MAX_WORD)
    size: int | None = None
    is_stream: Literal[False] = False


_Word = Annotated[str, Field(max_length=MAX_PATH_LENGTH)]


class _Call(BaseModel):
    """The words by which Gradio keeps a session, and what is given to a function."""

    model_config = ConfigDict(strict=True)

    session_hash: str | None = Field(None, max_length=MAX_WORD)
    event_id: str | None = Field(None, max_length=MAX_WORD)
    data: list[bool | int | float | _Word | _Upload | list[_Upload] | None] = []


def _objects(call: dict) -> Iterator[dict]:
    """All objects in a call. Raises HTTPException if they lie too deep."""
    level: list[dict | list] = [call]
    for _ in range(MAX_DEPTH):
        yield from (value for value in level if isinstance(value, dict))
        inner = (each for value in level for each in (value.values() if isinstance(value, dict) else value))
        level = [each for each in inner if isinstance(each, (dict, list))]
        if not level:
            return
    raise HTTPException(413, "There are lists in lists without end.")


class _Store:
    """The uploads that wait to be named by a call. When they become too many, the oldest go."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._own = set(folder.rglob("*"))  # files of the page, which are there before the first upload
        self._n_bytes = self._n_uploads = 0  # since the last look

    async def receiving(self, receive):
        """Makes room for an upload; it is received by what is returned."""
        self._n_uploads += 1
        if self._n_bytes > MAX_REQUEST_BYTES or self._n_uploads > MAX_STORED_FILES // MAX_FILES:
            self._n_bytes = self._n_uploads = 0
            await run_in_threadpool(self._remove_oldest)

        async def counted():
            message = await receive()
            self._n_bytes += len(message.get("body", b""))
            return message

        return counted

    def _remove_oldest(self) -> None:
        files = []
        for path in set(self.folder.rglob("*")) - self._own:
            with suppress(FileNotFoundError):  # it has been used and moved meanwhile
                about = path.lstat()
                if stat.S_ISREG(about.st_mode):
                    files.append((about.st_mtime, about.st_size, path))
        n_files, n_bytes = len(files), sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if n_files <= MAX_STORED_FILES and n_bytes <= MAX_STORED_BYTES:
                return
            path.unlink(missing_ok=True)
            with suppress(OSError):  # there is another file in it
                path.parent.rmdir()
            n_files, n_bytes = n_files - 1, n_bytes - size


# --- for all -----------------------------------------------------------------------------------------------------


def _detail(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": text}, status, headers)


async def unfit(_request, _error) -> JSONResponse:
    return _detail(422, MALFORMED)


async def _without_path(_request, error) -> JSONResponse:
    return _detail(error.status_code, HTTPStatus(error.status_code).phrase)


# In place of answers of FastAPI and Gradio that repeat the request, and of tracebacks over one that is like no other.
REFUSALS: dict[int | type[Exception], Callable] = {
    **dict.fromkeys((RequestValidationError, LookupError, ValueError, TypeError, OverflowError), unfit),
    **dict.fromkeys((403, 404), _without_path),
}
