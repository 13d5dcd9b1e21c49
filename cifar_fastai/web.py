"""The server of page and API."""

import gc
import os
import secrets
import shutil
import signal
import threading
from pathlib import Path

from starlette.middleware import Middleware

from cifar_fastai.api import create_api
from cifar_fastai.batching import BatchingClassifier
from cifar_fastai.guards import REFUSALS, UploadsOnly, unfit
from cifar_fastai.images import MAX_BYTES
from cifar_fastai.inference import Classifier
from cifar_fastai.interrupts import SIGNALS
from cifar_fastai.page import appearance, build_app
from cifar_fastai.scratch import scratch_folder
from cifar_fastai.server import Server, allow_files, listen
from cifar_fastai.terminal import say


def serve(classifier: BatchingClassifier, *, host: str, port: int, share: bool, auth, max_queue: int) -> None:
    """Serve page and API until interrupted. Raises UserError if the address cannot be listened on."""
    listener = listen(host, port)
    allow_files()
    for number in SIGNALS:
        signal.signal(number, _leave)  # after the server's own end, so that the uploads go too
    with scratch_folder("serve") as uploads:
        app = create_app(classifier, uploads, auth=auth, max_queue=max_queue)

        def started():
            gc.freeze()  # a search for garbage among all that was imported would keep everybody waiting for a second
            threading.Thread(target=_warm_up, daemon=True).start()
            _announce(classifier, host, port, share)

        Server(
            app,
            started=started,
            stopping=app.state.page.stop_event.set,  # ends the streams that open pages keep
            remove=lambda: shutil.rmtree(uploads.parent, ignore_errors=True),
        ).run(sockets=[listener])


def _warm_up() -> None:
    """Import what Gradio would import at its first call, in the event loop."""
    import matplotlib.pyplot  # noqa: F401

    gc.freeze()


def _leave(number, _frame):
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # cleaning up is soon done
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def create_app(classifier: BatchingClassifier, uploads: Path, *, auth=None, max_queue: int = 100):
    """The API with the page mounted at /.

    uploads: a folder for what visitors send; auth: (user, password) for both; max_queue: requests that may wait in each.
    """
    os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}  # read when gradio is imported
    import gradio as gr
    from gradio.route_utils import FnIndexInferError
    from gradio.utils import LRUCache

    page = build_app(classifier)
    page.queue(max_size=max_queue, api_open=False)  # nobody passes the queue by
    page._queue.pending_messages_per_session = LRUCache(max_queue + 100)  # answers that wait to be fetched
    page.state_session_capacity = 100  # the last call of each is kept
    page.delete_cache = (600, 3600)  # seconds: how often uploads are looked through, and how old they may become
    app = create_api(classifier, auth, max_queue)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=auth,
        max_file_size=MAX_BYTES,
        show_error=False,  # none but those that are raised to be shown
        root_path=os.environ.get("GRADIO_ROOT_PATH"),
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=["api"],
        app_kwargs={
            "middleware": [Middleware(UploadsOnly, folder=uploads)],
            "exception_handlers": {**REFUSALS, FnIndexInferError: unfit},
        },
        **appearance(),
    )
    app.state.page = app.routes[-1].app
    page.has_launched = True  # mounted, Gradio would otherwise leave out its own check of the files that a call names
    return app


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
