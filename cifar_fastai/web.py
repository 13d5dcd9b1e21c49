"""The server of page and API."""

import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from cifar_fastai.api import MAX_FILES, create_api
from cifar_fastai.batching import BatchingClassifier
from cifar_fastai.errors import UserError
from cifar_fastai.images import MAX_BYTES
from cifar_fastai.inference import Classifier
from cifar_fastai.page import appearance, build_app
from cifar_fastai.terminal import say

MAX_PATHS = 2 * MAX_FILES  # that one call may name: each is looked up


def serve(classifier: BatchingClassifier, *, host: str, port: int, share: bool, auth, max_queue: int) -> None:
    """Serve page and API until interrupted. Raises UserError if the address cannot be listened on."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            _announce(classifier, host, port, share)

        async def shutdown(self, sockets=None):
            mounted = self.config.app.routes[-1].app
            mounted.stop_event.set()  # ends the streams that open pages keep
            await super().shutdown(sockets)

    listener = _listen(host, port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # after the server's own end, so that the uploads go too
    with tempfile.TemporaryDirectory(prefix="cifar_fastai-") as uploads:
        app = create_app(classifier, Path(uploads), auth=auth, max_queue=max_queue)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        Server(config).run(sockets=[listener])


def create_app(classifier: BatchingClassifier, uploads: Path, *, auth=None, max_queue: int = 100):
    """The API with the page mounted at /.

    uploads: a folder for what visitors send; auth: (user, password) for both; max_queue: requests that may wait in each.
    """
    os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}  # read when gradio is imported
    import gradio as gr
    from starlette.middleware import Middleware

    page = build_app(classifier)
    page.queue(max_size=max_queue, api_open=False)  # nobody passes the queue by
    page.delete_cache = (600, 3600)  # seconds: how often uploads are looked through, and how old they may become
    app = create_api(classifier, auth, max_queue)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=auth,
        max_file_size=MAX_BYTES,
        root_path=os.environ.get("GRADIO_ROOT_PATH"),
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=["api"],
        app_kwargs={"middleware": [Middleware(UploadsOnly, folder=uploads)]},
        **appearance(),
    )
    page.has_launched = True  # mounted, Gradio would otherwise leave out its own check of the files that a call names
    return app


class UploadsOnly:
    """Refuses calls of the page's functions that name a file other than an upload.

    Gradio would fetch an address that stands in place of a file, and its check of paths can be off.
    """

    def __init__(self, app, folder: Path):
        self.app = app
        self.folder = folder.resolve()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not scope["path"].startswith("/gradio_api/"):
            return await self.app(scope, receive, send)
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse

        request = Request(scope, receive)
        is_call = scope["method"] == "POST" and not request.headers.get("content-type", "").startswith("multipart/")
        try:
            body = await request.body() if is_call else b""
        except ClientDisconnect:
            return None
        except HTTPException as error:  # too large
            return await JSONResponse({"detail": error.detail}, error.status_code)(scope, receive, send)
        if "://" in scope["path"] or not self.allows(body):
            refusal = {"detail": "Send the picture itself: neither addresses nor files of the server are opened."}
            return await JSONResponse(refusal, 403)(scope, receive, send)

        async def replayed():
            nonlocal is_call
            if not is_call:
                return await receive()
            is_call = False
            return {"type": "http.request", "body": body}

        await self.app(scope, replayed, send)

    def allows(self, body: bytes) -> bool:
        """Whether each "path", anywhere in this JSON, lies in the folder, and there are no more than MAX_PATHS."""
        paths = set()

        def note(value: dict) -> None:
            if isinstance(path := value.get("path"), str):
                paths.add(path)

        try:
            json.loads(body or b"null", object_hook=note)
            return len(paths) <= MAX_PATHS and all(Path(path).resolve().is_relative_to(self.folder) for path in paths)
        except json.JSONDecodeError:  # Gradio will say so
            return True
        except (ValueError, RecursionError):  # a null character in a name, or lists in lists without end
            return False


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket, taken before anything heavy is started. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # bound alone, two servers that start at once would both have it
        return listener
    except (OSError, UnicodeError) as error:  # the latter: a name that none can be
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port} cannot be listened on ({reason}). Choose another --port or --host.") from None


def _announce(classifier: Classifier, host: str, port: int, share: bool) -> None:
    name = "localhost" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    say("export", classifier.export.folder)
    say("serving", f"http://{name}:{port}/ (Ctrl-C stops it)")
    say("api", f"http://{name}:{port}/docs")
    if share:
        threading.Thread(target=_share, args=(name.strip("[]"), port), daemon=True).start()


def _share(host: str, port: int) -> None:
    """Open Gradio's tunnel and print its public address, or why there is none."""
    from gradio import networking

    try:
        url = networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
        say("public", url.replace("http://", "https://"))
    except Exception as error:  # a mistake on the way to somebody else's server must not end this one
        reason = error.__cause__ or error
        say("public", f"no link could be made ({reason}); the local address works")
