"""Classifying many files: finding them, reading them in a few threads, printing the answers in their order."""

import csv
import glob
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from cifar_fastai.errors import UserError
from cifar_fastai.images import EXTENSIONS, MAX_BYTES, BadImage, decode_image, fit_image
from cifar_fastai.inference import MAX_BATCH, Classifier
from cifar_fastai.terminal import UNPRINTABLE, printable, progress_bar, trouble

STANDARD_INPUT = "-"
THREADS = min(4, os.cpu_count() or 1)  # that read files; each may hold a picture of 25 megapixels
MANY = 100  # files that are worth a progress bar


@dataclass(frozen=True)
class Answer:
    """What the network says of one file, or why it could not be asked."""

    path: str  # as it was given or found
    confidences: dict[str, float] | None = None  # class → confidence, most confident first
    error: str | None = None
    seen: Image.Image | None = None  # the network's input
    square: Image.Image | None = None  # the same in more pixels, where an overlay is drawn


# --- finding -----------------------------------------------------------------------------------------------------


def find_images(arguments: Iterable[str]) -> list[Answer]:
    """Each file named, each image in each folder, each match of each pattern, in that order; not answered yet.

    Folders are searched to their depths; hidden files, and folders that are links, are left out. A pattern such as `*.jpg`
    or `**/cat-?.png` means what it means to a shell, unless it is the very name of a file. What finds nothing, and a folder
    that cannot be read, is in the list with its error.
    """
    return [answer for argument in arguments for answer in _find(argument)]


def _find(argument: str) -> list[Answer]:
    if not argument:
        return [Answer(argument, error="'': an empty name is no file.")]
    if os.path.isdir(argument):  # noqa: PTH112  Path.is_dir raises over a name that is too long
        no_images = f"{argument}: no images in this folder ({', '.join(sorted(EXTENSIONS))})."
        return _images_in(Path(argument)) or [Answer(argument, error=no_images)]
    if not glob.has_magic(argument) or os.path.lexists(argument):
        return [Answer(argument)]
    matches = sorted(set(_matches(argument)))
    return find_images(matches) or [Answer(argument, error=f"{argument}: there is no such file.")]


def _images_in(folder: Path) -> list[Answer]:
    found = []
    for place, files, error in _walk(str(folder)):
        found += [Answer(str(path)) for path in map(Path, files) if path.suffix.lower() in EXTENSIONS]
        if error:
            path = str(Path(place))
            found.append(Answer(path, error=f"{path}: this folder cannot be read ({error.strerror or error})."))
    return sorted(found, key=lambda answer: Path(answer.path))


def _walk(top: str) -> Iterator[tuple[str, list[str], OSError | None]]:
    """Each folder with its files, or the reason why they are not known. Links to folders may lead back: they are not
    followed. (os.walk and Path.rglob end at a depth of 1,000 on some versions of Python.)"""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            yield folder, [], error
            continue
        waiting += [entry.path for entry in visible if entry.is_dir(follow_symlinks=False)]
        yield folder, [entry.path for entry in visible if not os.path.isdir(entry.path)], None  # noqa: PTH112


def _matches(pattern: str) -> Iterator[str]:
    """As glob.glob, which would follow links to folders at each `**`."""
    recursive = re.match(r"(|.*?/)\*\*(?:/|\Z)(.*)", pattern, re.DOTALL)
    if not recursive:
        yield from glob.glob(pattern)  # noqa: PTH207  Path.glob takes no absolute pattern
        return
    head, tail = recursive.groups()
    for top in glob.glob(head) if head else ["."]:  # noqa: PTH207
        for folder, *_ in _walk(top):
            within = f"{folder.rstrip('/')}/" if head else f"{folder}/"[2:]
            found = _matches(glob.escape(within) + (tail or "*"))
            yield from found if tail else itertools.filterfalse(os.path.isdir, found)


# --- classifying -------------------------------------------------------------------------------------------------


def classify(
    classifier: Classifier, found: Iterable[Answer], tta: bool = False, side: int | None = None
) -> Iterator[Answer]:
    """The answers in the order of `found`, each as soon as its batch is classified.

    The next batch is read meanwhile, and no more than that, so memory does not grow with the number of files. side: of
    `square` in pixels; it is left out by default.
    """
    found, executor = iter(found), ThreadPoolExecutor(THREADS)

    def start_reading():
        size = classifier.export.size
        return [executor.submit(_read, answer, _source(answer), size, side) for answer in itertools.islice(found, MAX_BATCH)]

    try:
        reading = start_reading()
        while reading:
            batch, reading = reading, start_reading()
            yield from _classify_batch(classifier, [future.result() for future in batch], tta)
    finally:
        executor.shutdown(cancel_futures=True)


def _source(answer: Answer) -> str | bytes:
    """What `decode_image` takes. Standard input is read here: in a thread, Ctrl-C could not end the wait for it."""
    if answer.path != STANDARD_INPUT:
        return answer.path
    try:
        return sys.stdin.buffer.read(MAX_BYTES + 1) or b""  # None: it does not block, and has nothing yet
    except OSError as error:
        raise UserError(f"standard input cannot be read: {error.strerror}.") from None


def _read(answer: Answer, source: str | bytes, size: int, side: int | None) -> Answer:
    """The answer with the network's input, or with the reason why there is none."""
    if answer.error:
        return answer
    try:
        picture = decode_image(source)
    except BadImage as error:
        return replace(answer, error=f"standard input: {error}" if isinstance(source, bytes) else str(error))
    return replace(answer, seen=fit_image(picture, size), square=fit_image(picture, side) if side else None)


def _classify_batch(classifier: Classifier, batch: list[Answer], tta: bool) -> Iterator[Answer]:
    confidences = iter(classifier.predict_batch([answer.seen for answer in batch if answer.seen], tta))
    for answer in batch:
        yield replace(answer, confidences=next(confidences)) if answer.seen else answer


# --- explaining --------------------------------------------------------------------------------------------------


def classify_and_draw(classifier: Classifier, found: Iterable[Answer], folder: Path, tta: bool = False) -> Iterator[Answer]:
    """As `classify`, and <name>-gradcam.png in `folder` for each picture: where in it the evidence for its class lies.

    Names that would be equal are numbered. An overlay that cannot be written is an error of its answer, which stays. Raises
    UserError if there is no such folder and it cannot be made.
    """
    from cifar_fastai.explainer import SIDE, Explainer

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--gradcam {folder}: this folder cannot be made ({error.strerror or error}).") from None
    explainer, taken = Explainer(classifier), {}
    for answer in classify(classifier, found, tta, SIDE):
        if answer.confidences:
            path = folder / f"{_free_name(answer.path, taken)}-gradcam.png"
            overlay = explainer.overlay(classifier.tensor(answer.seen), answer.square, next(iter(answer.confidences)))
            try:
                overlay.save(path)
            except OSError as error:
                answer = replace(answer, error=f"{path}: the overlay cannot be written ({error.strerror or error}).")
        yield answer


def _free_name(path: str, taken: dict[str, int]) -> str:
    """The file's name without its ending, numbered if it is taken; names that differ in case alone count as equal.

    taken: the names, each with the last number that was put behind it.
    """
    free = name = "standard-input" if path == STANDARD_INPUT else Path(path).stem
    while free.lower() in taken:
        taken[name.lower()] += 1
        free = f"{name}-{taken[name.lower()]}"
    taken[free.lower()] = 1
    return free


# --- printing ----------------------------------------------------------------------------------------------------


def print_answers(answers: Iterable[Answer], n: int, style: str, topk: int) -> int:
    """Print n answers as they come, with the topk likeliest classes of each, and errors on standard error, until nobody
    reads them any more; returns how many errors there were.

    style: "text" (a line of path, class and confidence, tabs between them), "json" (a line with one object) or "csv".
    """
    # UTF-8 wherever it goes, and a file name that is none is no reason to stop.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    write, n_errors = WRITERS[style], 0
    if style == "csv":
        write("path", [("label", "confidence"), *((f"label_{k}", f"confidence_{k}") for k in range(2, topk + 1))])
        sys.stdout.flush()  # the first answer may be long in coming
    with _progress(n) as advance:
        for answer in answers:
            if answer.error:
                n_errors += 1
                print(f"error: {printable(answer.error)}", file=sys.stderr)
            if answer.confidences:
                write(answer.path, list(answer.confidences.items())[:topk])
                sys.stdout.flush()  # whoever reads this need not wait for more
            if trouble(sys.stdout):
                break
            advance()
    return n_errors


def _write_text(path: str, likeliest: list[tuple[str, float]]) -> None:
    print(printable(path), *(f"{printable(label)}\t{confidence:.1%}" for label, confidence in likeliest), sep="\t")


def _write_json(path: str, likeliest: list[tuple[str, float]]) -> None:
    label, confidence = likeliest[0]
    text = json.dumps({"path": path, "label": label, "confidence": confidence, "topk": likeliest}, ensure_ascii=False)
    print(UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _write_csv(path: str, likeliest: list[tuple[str, float | str]]) -> None:
    row = [path, *(value for pair in likeliest for value in pair)]
    if sys.stdout.isatty():  # elsewhere names are as they are: data
        row = map(printable, row)
    csv.writer(sys.stdout, lineterminator="\n").writerow(row)


WRITERS = {"text": _write_text, "json": _write_json, "csv": _write_csv}


@contextmanager
def _progress(n: int):
    """Gives a function to call after each file: it moves a bar, where there are many and the answers go elsewhere."""
    if n < MANY or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda: None
        return
    from rich.progress import MofNCompleteColumn

    with progress_bar(sys.stderr, MofNCompleteColumn()) as bar:
        task = bar.add_task("classifying", total=n)
        yield lambda: bar.advance(task)
