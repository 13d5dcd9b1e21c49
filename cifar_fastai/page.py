"""The Gradio page, given a classifier."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from cifar_fastai import fragments
from cifar_fastai.api import CHUNK, TOP_K, fill_in, read_files, turn_for
from cifar_fastai.errors import UserError
from cifar_fastai.explainer import SIDE, Explainer
from cifar_fastai.images import BadImage, decode_image, fit_image
from cifar_fastai.inference import Classifier
from cifar_fastai.manifest import MANIFEST
from cifar_fastai.uploads import TooMany, Upload, find_uploads

EXAMPLES = Path(__file__).parent / "examples"
STYLE = Path(__file__).with_name("page.css")
EXAMPLE_NAMES = ("cat", "ship", "airplane", "frog", "automobile", "coffee", "moon", "rocket")
HINT = "<p class=quiet>Choose a picture, or try one of the examples.</p>"
WIPE = "() => [{}, '', '']"  # in the browser, and so at once
PASTE = """
() => document.addEventListener("paste", async (event) => {
  const file = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
  if (!file || !document.querySelector("#picture")?.checkVisibility()) return;
  document.querySelector("#picture button[aria-label='Remove Image']")?.click();
  for (let tries = 0; tries < 50; tries++) {
    const input = document.querySelector("#picture input[type=file]");
    if (input) {
      const transfer = new DataTransfer();
      transfer.items.add(file);
      input.files = transfer.files;
      return input.dispatchEvent(new Event("change", { bubbles: true }));
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
})
"""  # Ctrl-V anywhere; by itself Gradio takes a press of its button, and works only where there is https
# Threads that may hold a decoded picture at a time, whoever asks for what; batches are apart, so that they block nobody.
ONE = {"concurrency_id": "one", "concurrency_limit": 4}
MANY = {"concurrency_id": "many", "concurrency_limit": 2}
MOST_LOADED = 3  # exports kept in memory besides the one served


class Shelf:
    """The exports that lie beside the one served, each read and checked when somebody chooses it."""

    def __init__(self, served: Classifier):
        self.folder = served.export.folder.absolute()
        # Who names the one export to be trusted has no other taken.
        beside = () if served.expect_digest else self.folder.parent.glob(f"[!.]*/{MANIFEST}")
        self.names = sorted({self.folder.name, *(path.parent.name for path in beside)})
        self._served = served, Explainer(served)
        self._others: dict[str, tuple[Classifier, Explainer]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> tuple[Classifier, Explainer]:
        """The export of that name, one of `names`, and what draws its Grad-CAM. Raises ExportError."""
        if name == self.folder.name:
            return self._served
        with self._lock:
            if name not in self._others:
                classifier = Classifier(self.folder.with_name(name))
                while len(self._others) >= MOST_LOADED:
                    del self._others[next(iter(self._others))]
                self._others[name] = classifier, Explainer(classifier)
            return self._others[name]

    def without_path(self, name: str, error: UserError) -> str:
        """What an error says of an export; where that lies is nobody's business."""
        return str(error).replace(str(self.folder.with_name(name)), name)


class Turns:
    """Which call of each visitor is the last one: what an earlier one finds comes too late to be shown."""

    def __init__(self):
        self._last: WeakValueDictionary = WeakValueDictionary()

    def take(self, request) -> Callable[[], bool]:
        """Makes this call the last one of its visitor; the function tells whether it still is."""

        def is_last() -> bool:
            return self._last.get(request.session_hash) is is_last

        self._last[request.session_hash] = is_last
        return is_last


def build_app(classifier: Classifier):
    """A `gradio.Blocks` in three tabs, and two endpoints for programs: `/predict` and `/predict_batch`."""
    import gradio as gr

    shelf, one_turns, many_turns = Shelf(classifier), Turns(), Turns()
    config = classifier.export.config
    with gr.Blocks(title="Image classifier", analytics_enabled=False) as app:
        with gr.Row():
            header = _html(gr, fragments.header(config), elem_id="header")
            chosen = gr.Dropdown(
                shelf.names, value=shelf.folder.name, label="Export", visible=len(shelf.names) > 1, scale=0, min_width=200,
                filterable=False,
            )  # fmt: skip
        with gr.Tab("One picture"):
            one = _one_picture(gr, shelf, one_turns, chosen)
        with gr.Tab("Many pictures"):
            many = _many_pictures(gr, shelf, many_turns, chosen)
        with gr.Tab("How good is it"):
            quality = _html(gr, fragments.quality(config))

        def choose(name, request: gr.Request):
            one_turns.take(request), many_turns.take(request)
            return _choose(shelf, name)

        chosen.select(
            choose, chosen, [chosen, header, quality, *one, *many],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        _endpoints(gr, classifier)
    return app


def appearance() -> dict:
    """What `gr.mount_gradio_app` has to be told besides, for the page to look and work as meant."""
    import gradio as gr

    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # others would be fetched
    theme = gr.themes.Soft(primary_hue="sky", secondary_hue="sky", neutral_hue="gray", **fonts)
    return {"theme": theme, "css_paths": STYLE, "js": PASTE, "allowed_paths": [str(EXAMPLES)]}


def _choose(shelf: Shelf, name: str) -> list:
    """What the page shows after another export was chosen: nothing that came from the one before. One that cannot be used
    leads back to the one served, and the page says why."""
    problem = ""
    try:
        config = shelf[name][0].export.config
    except UserError as error:
        problem = fragments.failure(shelf.without_path(name, error))
        name = shelf.folder.name
        config = shelf[name][0].export.config
    return [name, fragments.header(config) + problem, fragments.quality(config), None, None, HINT, "", None, ""]


def _html(gr, value="", **options):
    """A piece of HTML, with the page's own style."""
    return gr.HTML(value, apply_default_css=False, **options)


# --- one picture -------------------------------------------------------------------------------------------------


def _one_picture(gr, shelf: Shelf, turns: Turns, chosen) -> list:
    def look(file, name, request: gr.Request) -> Iterator[tuple]:
        """The answer, its sentence and the two views; at first without the slower one."""
        is_last = turns.take(request)
        for outputs in answers(file, name):
            yield outputs if is_last() else (gr.skip(),) * len(outputs)

    def answers(file, name) -> Iterator[tuple]:
        if file is None:
            yield None, "", ""
            return
        try:
            classifier, explainer = shelf[name]
            image, picture, remarks = _taken_in(classifier, file)
        except UserError as error:  # BadImage is one
            yield None, fragments.failure(shelf.without_path(name, error)), ""
            return
        (verdict,) = classifier.verdicts(image[None])
        words = fragments.sentence(verdict, remarks, classifier.export.config["test"]["false_alarm_rate"])
        likeliest = next(iter(verdict.confidences))
        yield verdict.confidences, words, fragments.views(_seen(image), likeliest, None)
        yield gr.skip(), gr.skip(), fragments.views(_seen(image), likeliest, explainer.overlay(image, picture, likeliest))

    def look_for(file, name, event: gr.SelectData, request: gr.Request):
        """The views for the class that was clicked."""
        is_last = turns.take(request)
        classifier, explainer = shelf[name]
        if file is None or event.value not in classifier.classes:
            return gr.skip()
        image, picture, _ = _taken_in(classifier, file)
        views = fragments.views(_seen(image), event.value, explainer.overlay(image, picture, event.value))
        return views if is_last() else gr.skip()

    with gr.Row(equal_height=False):
        with gr.Column():
            image = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard", "webcam"], height=340, buttons=[],
                placeholder="Drop a picture here, paste one, or use the camera", alt_text="The picture to be classified",
                elem_id="picture",
            )  # fmt: skip
            with gr.Row(elem_id="examples"):
                examples = [gr.Button(name, icon=EXAMPLES / f"{name}.jpg", size="sm") for name in EXAMPLE_NAMES]
        with gr.Column():
            sentence = _html(gr, HINT, elem_id="sentence", html_template='<div role="status">${value}</div>')
            answer = gr.Label(label="Answer", num_top_classes=TOP_K, elem_id="answer")
            seen = _html(gr)
    _take_uploads(image, _file_content)  # the bytes as they came: decode_image is the one place that reads images
    results = [answer, sentence, seen]
    # An answer to the last picture must not stand under the next one, however long that takes: it is wiped away at once,
    # all calls are made, and what any but the last one finds is not shown.
    private = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "multiple", **ONE}
    wipe = {"fn": None, "outputs": results, "js": WIPE, **private}
    for event in (image.input, image.clear, *(button.click for button in examples)):
        event(**wipe)
    for event in (image.input, image.clear):
        event(look, [image, chosen], results, **private)
    for name, button in zip(EXAMPLE_NAMES, examples, strict=True):
        path = str(EXAMPLES / f"{name}.jpg")
        button.click(lambda path=path: path, None, image, **private).then(look, [image, chosen], results, **private)
    answer.select(look_for, [image, chosen], seen, **private)
    return [image, *results]


def _taken_in(classifier: Classifier, file: bytes):
    """What the network sees of a picture, the square that Grad-CAM is drawn over, and remarks. Raises BadImage."""
    with turn_for(file):
        picture = decode_image(file)
        return classifier.tensor(picture), fit_image(picture, SIDE), picture.info["warnings"]


def _seen(image: torch.Tensor):
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).numpy())


# --- many pictures -----------------------------------------------------------------------------------------------


def _many_pictures(gr, shelf: Shelf, turns: Turns, chosen) -> list:
    def look_at_all(files, name, request: gr.Request, progress=gr.Progress()):  # noqa: B008  Gradio finds it as a default
        is_last = turns.take(request)
        table = answers(files, name, progress)
        return table if is_last() else gr.skip()

    def answers(files, name, progress) -> str:
        if not files:
            return ""
        thumbnails: list[str] = []
        try:
            entries = _read_all(shelf[name][0], find_uploads(files), thumbnails, progress)
            return fragments.table(entries, thumbnails)
        except UserError as error:
            return fragments.failure(shelf.without_path(name, error))

    gr.Markdown("Several files, or a zip archive of them: JPEG, PNG, WebP, GIF or BMP, up to 10 MB a file.")
    files = gr.File(label="Pictures", file_count="multiple", height=200)
    table = _html(gr, min_height=80)
    _take_uploads(files, _named_paths)
    private = {"api_visibility": "private", "trigger_mode": "multiple", **MANY}
    files.clear(None, None, table, js="() => ''", **private)
    for event in (files.upload, files.delete, files.clear):
        event(look_at_all, [files, chosen], table, **private)
    return [files, table]


def _read_all(
    classifier: Classifier, uploads: list[Upload], thumbnails: list[str] | None = None, progress=None
) -> list[dict]:
    """The API's entries.

    thumbnails: gets one for each entry without an error. progress: a `gradio.Progress`.
    """
    entries: list[dict] = []

    def show(picture):
        if thumbnails is not None:
            thumbnails.append(fragments.thumbnail(picture))

    for start in range(0, len(uploads), CHUNK):
        if progress:
            progress((start, len(uploads)), unit="files")
        chunk, images = read_files(classifier, uploads[start : start + CHUNK], show)
        if images:
            fill_in(chunk, classifier.verdicts(torch.stack(images)))
        entries += chunk
    return entries


# --- for programs ------------------------------------------------------------------------------------------------


def _endpoints(gr, classifier: Classifier) -> None:
    """`/predict` (a picture in, Gradio's label object out) and `/predict_batch` (pictures in, entries as of the API)."""

    def predict(image):
        if image is None:
            return None
        try:
            with turn_for(image):
                return classifier.predict(image)
        except BadImage as error:
            raise gr.Error(str(error), print_exception=False) from None

    def predict_batch(files):
        try:
            return _read_all(classifier, find_uploads(files))
        except TooMany as error:
            raise gr.Error(str(error), print_exception=False) from None

    image, label = gr.Image(type="filepath", visible=False), gr.Label(num_top_classes=TOP_K, visible=False)
    files, table = gr.File(label="Pictures", file_count="multiple", visible=False), gr.JSON(visible=False)
    _take_uploads(image, _file_content)
    _take_uploads(files, _named_paths)
    image.upload(predict, image, label, api_name="predict", **ONE)
    files.upload(predict_batch, files, table, api_name="predict_batch", **MANY)


def _take_uploads(component, preprocess: Callable) -> None:
    """Has a component hand over uploads by `preprocess`, and others have their turn while Gradio looks at a thousand."""

    keep = component.async_move_resource_to_block_cache

    async def in_turn(path):
        await asyncio.sleep(0)
        return await keep(path)

    component.preprocess, component.async_move_resource_to_block_cache = preprocess, in_turn


def _file_content(payload) -> bytes | None:
    """The bytes of an upload, in place of Gradio's own decoding."""
    if payload is None:
        return None
    return Path(payload.path).read_bytes()


def _named_paths(payload) -> list[tuple[str, Path]]:
    """The files of an upload, as `find_uploads` takes them."""
    return [(file.orig_name or Path(file.path).name, Path(file.path)) for file in (payload.root if payload else [])]
