"""The Gradio interface, given a classifier."""

import base64
import os
import socket
from pathlib import Path

from cifar_fastai.errors import UserError
from cifar_fastai.images import MAX_BYTES, BadImage
from cifar_fastai.inference import Classifier

TOP_K = 5


def build_app(classifier: Classifier):
    """A `gradio.Blocks` with an image in and the likeliest classes out; its endpoint is `/predict`."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    import gradio as gr

    def predict(image):
        if image is None:
            return None
        try:
            return classifier.predict(image)
        except BadImage as error:
            raise gr.Error(str(error), print_exception=False) from None

    test = classifier.export.config["test"]
    with gr.Blocks(title="Image classifier") as app:
        gr.Markdown(
            f"# What is in the picture?\n"
            f"One of: {', '.join(classifier.classes)}. "
            f"The network was right on {test['test_accuracy']:.1%} of {classifier.export.config['name']}'s test images."
        )
        with gr.Row():
            image = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard", "webcam"], height=360,
                placeholder="Drop a picture here, paste one, or use the camera",
            )  # fmt: skip
            answer = gr.Label(label="Answer", num_top_classes=TOP_K)
        image.preprocess = _file_content  # the bytes as they came: decode_image is the one place that reads images
        # An error leaves outputs as they were, so the answer to the last picture is wiped first.
        wiped = image.input(lambda: None, None, answer, queue=False, show_progress="hidden", api_visibility="private")
        wiped.then(predict, image, answer, api_name="predict", show_progress="hidden")
    return app


def _file_content(payload) -> bytes | None:
    """The bytes of an upload or of a data: URL, in place of Gradio's own decoding."""
    if payload is None:
        return None
    if payload.url and payload.url.startswith("data:"):
        return base64.b64decode(payload.url.partition(",")[2])
    return Path(payload.path).read_bytes()


def serve(classifier: Classifier, *, host: str, port: int, share: bool, auth, max_queue: int) -> None:
    """Serve until interrupted. Raises UserError if the address cannot be listened on."""
    _check_free(host, port)
    app = build_app(classifier)
    app.queue(max_size=max_queue)
    print(f"export   {classifier.export.folder}", flush=True)
    _, local_url, share_url = app.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=auth,
        max_file_size=MAX_BYTES,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api"],
        prevent_thread_lock=True,
        quiet=True,
    )
    print(f"serving  {local_url} (Ctrl-C stops it)", flush=True)
    if share:
        print(f"public   {share_url or 'no link could be made; the local address works'}", flush=True)
    app.block_thread()


def _check_free(host: str, port: int) -> None:
    """Ask for the port as the server will, before anything heavy is started."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error.strerror or error}). Choose another --port.") from None
