"""The pictures of a run. Each function takes plain arrays and returns a matplotlib Figure whose title is its finding.

They are called through `png` or `draw`, which have all text be text.
"""

import io
import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from cifar_fastai.errors import first_line
from cifar_fastai.terminal import shortened, warn

STYLE = {"text.parse_math": False, "text.usetex": False}  # a class may be called $1_front
BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#767676"  # Okabe and Ito's colours, told apart by colour-blind eyes
MOST_FILTERS = 64  # shown; more take long to draw
SEVERAL = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LONGEST_NAME = 24  # letters of a class that are shown
LARGEST = 24  # inches of a side that grows with the number of classes
MOST_BARS = 100  # classes with a bar each


def png(picture: Callable[..., Figure], *arguments, dpi: int = 120) -> bytes:
    """The file of a picture. picture: a function of this module, or one that returns what one of them does."""
    file = io.BytesIO()
    with rc_context(STYLE):
        picture(*arguments).savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def png_if_possible(name: str, picture: Callable[..., Figure], *arguments, dpi: int = 120) -> bytes | None:
    """The same; None, and a warning, where it cannot be drawn: what it illustrates is worth more than the picture."""
    try:
        return png(picture, *arguments, dpi=dpi)
    except Exception as error:  # matplotlib raises nearly anything
        warn(f"{name} could not be drawn ({type(error).__name__}: {first_line(error)}).")
        return None


def draw(path: Path, picture: Callable[..., Figure], *arguments) -> None:
    """Write it to a file. Where it cannot be drawn there is a warning and no file, not an older picture either."""
    data = png_if_possible(path.name, picture, *arguments)
    if data is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(data)


def loss_curve(history: list[dict], train_accuracies: list[float], best_epoch: int) -> Figure:
    """Training and validation loss and accuracy by epoch, the best epoch marked."""
    best = history[best_epoch - 1]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(
        f"Best epoch {best_epoch} of {len(history)}: validation loss {best['valid_loss']:.3f}, "
        f"accuracy {best['accuracy']:.1%}"
    )
    epochs = [row["epoch"] for row in history]
    losses, accuracies = figure.subplots(1, 2)
    losses.plot(epochs, [row["train_loss"] for row in history], color=GRAY, label="training (augmented)", marker=".")
    losses.plot(epochs, [row["valid_loss"] for row in history], color=BLUE, label="validation", marker=".")
    accuracies.plot(epochs, train_accuracies, color=GRAY, label="training (augmented)", marker=".")
    accuracies.plot(epochs, [row["accuracy"] for row in history], color=BLUE, label="validation", marker=".")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes, name in ((losses, "loss"), (accuracies, "accuracy")):
        axes.axvline(best_epoch, color=ORANGE, linestyle=":", label="best epoch")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        _plain(axes)
    return figure


def curves(runs: list[tuple[str, list[dict]]]) -> Figure:
    """Validation loss and accuracy by epoch of several runs, each a name and its history; one name, one kind of line."""
    names = list(dict.fromkeys(name for name, _ in runs))
    dashes = itertools.cycle(("-", "--", "-.", ":"))  # four against seven colours: no two of 28 kinds are alike
    kinds = dict(zip(names, zip(itertools.cycle(SEVERAL), dashes), strict=False))
    best, row = max(((name, row) for name, rows in runs for row in rows), key=lambda pair: pair[1]["accuracy"])
    figure = Figure(figsize=(6.4, 7 + 0.2 * len(names)), layout="constrained")
    title = f"Highest validation accuracy: {row['accuracy']:.1%}, by {shortened(best, 120)} in epoch {row['epoch']}"
    figure.suptitle(textwrap.fill(title, 60))
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    lines = {}
    for axes, column in ((losses, "valid_loss"), (accuracies, "accuracy")):
        for name, rows in runs:
            colour, dash = kinds[name]
            epochs, values = ([row[key] for row in rows] for key in ("epoch", column))
            (lines[name],) = axes.plot(epochs, values, color=colour, linestyle=dash, marker=".")
        _plain(axes)
    losses.set_ylabel("validation loss")
    accuracies.set(xlabel="epoch", ylabel="validation accuracy")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    accuracies.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = [" " + textwrap.fill(shortened(name, 180), 60) for name in lines]  # one that begins with _ would be left out
    figure.legend(lines.values(), names, loc="outside lower center", frameon=False, handlelength=4)
    return figure


def lr_schedule(lrs: list[float], steps_an_epoch: int) -> Figure:
    """The learning rate of every step."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(len(lrs)) / steps_an_epoch, lrs, color=BLUE)
    axes.set(
        xlabel="epoch", ylabel="learning rate", title=f"One cycle: the learning rate rises to {max(lrs):.3g}, then falls"
    )
    _plain(axes)
    return figure


def lr_search(lrs: list[float], losses: list[float], suggestions: dict[str, float]) -> Figure:
    """The loss by learning rate of a search, the suggestions (four at most) marked on the curve."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(lrs, losses, color=GRAY)
    for (name, lr), colour, marker in zip(suggestions.items(), SEVERAL, "osD^", strict=False):
        loss = np.interp(np.log(lr), np.log(lrs), losses)
        axes.plot(lr, loss, color=colour, marker=marker, markersize=8, linestyle="", label=f"{name} {lr:.2g}")
    title = f"The loss falls most steeply at a learning rate of {suggestions['steep']:.2g}"
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed", title=title)
    axes.xaxis.set_major_formatter("{x:g}")  # matplotlib's own is a formula
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def confusion_matrix(matrix: np.ndarray, classes: list[str]) -> Figure:
    """Counts, rows true and columns predicted, shaded by the share of the row."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    mistakes = matrix * (1 - np.eye(len(classes), dtype=int))
    true, predicted = np.unravel_index(mistakes.argmax(), mistakes.shape)
    names = [shortened(name, LONGEST_NAME) for name in classes]
    side = min(max(4.5, 0.7 * len(classes) + 1), LARGEST)
    title = f"Most confused: {names[true]} taken for {names[predicted]}, {mistakes.max()} of {matrix[true].sum()}"
    title = textwrap.fill(title, int(11 * side))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 30:
        for row, column in np.ndindex(*matrix.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{matrix[row, column]:,}\n{shares[row, column]:.0%}" if matrix[row, column] else "0"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    if (points := min(10, 72 * side / len(classes))) >= 4:  # smaller letters are not to be read
        axes.set_xticks(range(len(classes)), names, rotation=45, ha="right", fontsize=points)
        axes.set_yticks(range(len(classes)), names, fontsize=points)
    axes.set(xlabel="predicted", ylabel="true", title=title if mistakes.any() else "No mistakes")
    figure.colorbar(image, ax=axes, label="share of the true class", format=PercentFormatter(1), shrink=0.8)
    return figure


def per_class_accuracy(accuracies: dict[str, float], overall: float) -> Figure:
    """A bar a class, worst at the top, with the overall accuracy as a line."""
    ordered = sorted(accuracies.items(), key=lambda pair: -pair[1])
    names, shares = zip(*((shortened(name, LONGEST_NAME), share) for name, share in ordered), strict=True)
    title = f"Easiest: {names[0]}, hardest: {names[-1]}"
    if len(names) > MOST_BARS:
        title += f" (the {MOST_BARS} hardest of {len(names):,} classes)"
        names, shares = names[-MOST_BARS:], shares[-MOST_BARS:]
    figure = Figure(figsize=(7, 0.35 * len(names) + 1.5), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), shares, color=BLUE)
    axes.set_yticks(range(len(names)), names)
    for place, share in enumerate(shares):
        axes.text(1.02, place, f"{share:.1%}", va="center")
    axes.axvline(overall, color=ORANGE, linestyle=":")
    words = f"share recognised (dotted: all classes, {overall:.1%})"
    axes.set(xlim=(0, 1.12), xlabel=words, title=textwrap.fill(title, 70))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _plain(axes)
    return figure


def reliability(before: list[dict], after: list[dict], error_before: float, error_after: float) -> Figure:
    """Accuracy against confidence, bin by bin, before and after calibration, with the share of the images in each bin."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"Calibration on the validation split brings the error from {error_before:.3f} to {error_after:.3f}")
    panels = (("as trained", before, error_before), ("calibrated", after, error_after))
    for axes, (name, rows, error) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        confidences, accuracies = ([row[key] for row in rows] for key in ("confidence", "accuracy"))
        total = sum(row["count"] for row in rows)
        axes.plot([0, 1], [0, 1], color=GRAY, linestyle=":", label="perfectly calibrated")
        axes.vlines(confidences, confidences, accuracies, color=ORANGE, label="gap")
        axes.plot(confidences, accuracies, color=BLUE, marker="o", label="accuracy")
        axes.bar(confidences, [row["count"] / total for row in rows], width=0.03, color=BLUE, alpha=0.2, label="images")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=f"{name}: error {error:.3f}")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(frameon=False, loc="upper left")
        _plain(axes)
    return figure


def risk_coverage(confidences: np.ndarray, right: np.ndarray) -> Figure:
    """Accuracy over the most confident share of the images, by that share. Both arrays from the most confident down."""
    accuracies = np.cumsum(right) / np.arange(1, len(right) + 1)
    shares = np.arange(1, len(right) + 1) / len(right)
    half = accuracies[len(right) // 2]
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(shares, accuracies, color=BLUE)
    axes.axhline(accuracies[-1], color=ORANGE, linestyle=":", label=f"all images {accuracies[-1]:.1%}")
    title = f"Of the half it is surest of, the network gets {half:.1%} right"
    axes.set(xlabel="share of the images answered, the surest first", ylabel="accuracy", title=title, xlim=(0, 1))
    axes.set_ylim(min(0.95, accuracies[len(right) // 50 :].min() - 0.02), 1.002)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, loc="lower left")
    _plain(axes)
    return figure


def corruptions(groups: dict[str, dict[str, list[float]]], clean: float) -> Figure:
    """Accuracy by kind of corruption (rows, in groups) and severity, shaded by how far it lies below `clean`."""
    rows = {kind.replace("_", " "): accuracies for kinds in groups.values() for kind, accuracies in kinds.items()}
    table = np.array(list(rows.values()))
    means = table.mean(axis=1)
    worst = list(rows)[means.argmin()]
    figure = Figure(figsize=(8, 0.36 * len(rows) + 1.6), layout="constrained")
    figure.suptitle(
        f"{clean:.1%} of the clean images are recognised, {table.mean():.1%} of the corrupted ones;\n"
        f"hardest: {worst}, {means.min():.1%}"
    )
    axes = figure.subplots()
    table = np.column_stack([table, means])
    lost = 100 * (clean - table)
    image = axes.imshow(lost, cmap="Oranges", vmin=0, vmax=max(100 * clean, 1), aspect="auto")
    for row, column in np.ndindex(*table.shape):
        colour = "white" if lost[row, column] > 65 * clean else "black"
        axes.text(column, row, f"{table[row, column]:.1%}", ha="center", va="center", fontsize=9, color=colour)
    axes.axvline(table.shape[1] - 1.5, color="white", linewidth=4)
    for end in np.cumsum([len(kinds) for kinds in groups.values()])[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=4)
    axes.set_xticks(range(table.shape[1]), [*range(1, table.shape[1]), "mean"])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="severity")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="points below the accuracy on clean images", shrink=0.8)
    return figure


def image_grid(images: np.ndarray, captions: list[str], title: str, columns: int = 6) -> Figure:
    """uint8 images (N, H, W, 3) side by side with a caption above each.

    All on one pair of axes, in inches: a pair for each image takes several times as long to draw.
    """
    rows = max(1, -(-len(images) // columns))
    width = 1.6 * max(1, images.shape[2] / images.shape[1] * 0.75)
    height = width * images.shape[1] / images.shape[2]
    gap = 0.14
    above = gap * (1 + max((caption.count("\n") + 1 for caption in captions if caption), default=0))  # lines of a caption
    across, down = (width + gap) * columns, (height + above) * rows + gap
    figure = Figure(figsize=(across, down + 0.3))
    axes = figure.add_axes((0, 0, 1, down / (down + 0.3)), xlim=(0, across), ylim=(down, 0))
    axes.set_title(title)
    axes.axis("off")
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = gap / 2 + place % columns * (width + gap), above + place // columns * (height + above)
        axes.imshow(image, extent=(left, left + width, top + height, top), interpolation="nearest", aspect="auto")
        axes.text(left + width / 2, top - 0.05, caption, ha="center", va="bottom", fontsize=8)
    return figure


def filters(weights: np.ndarray) -> Figure:
    """The filters (N, 3, h, w) of a first convolution, each stretched over the whole range of colours."""
    n, weights = len(weights), weights[:MOST_FILTERS]
    span = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    images = ((weights / np.where(span > 0, span, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    shown = f"{n} filters" if n <= MOST_FILTERS else f"{MOST_FILTERS} of its {n} filters"
    title = f"What the first layer looks for: {shown} of {weights.shape[2]} x {weights.shape[3]} pixels"
    return image_grid(images, [""] * len(images), title, columns=8)


def contact_sheet(columns: list[np.ndarray], names: list[str], title: str) -> Figure:
    """uint8 images (N, H, W, 3) in columns, image by image in rows with a name before each."""
    gap = max(1, columns[0].shape[1] // 16)
    framed = [np.pad(images, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255) for images in columns]
    n_rows, side = framed[0].shape[:2]
    sheet = np.concatenate([images.reshape(n_rows * side, side, 3) for images in framed], axis=1)
    figure = Figure(figsize=(0.9 * len(columns) + 2, 0.9 * n_rows + 0.8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks([(row + 0.5) * side for row in range(n_rows)], [shortened(name, LONGEST_NAME) for name in names])
    axes.set_xticks([(column + 0.5) * side for column in range(len(columns))], ["as it is", *range(1, len(columns))])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def tuning_history(accuracies: dict[int, float | None], own: float | None) -> Figure:
    """Validation accuracy of each trial by its number, None for one that was ended early, and the best so far.

    own: the accuracy with the recipe's own values, if that was found out.
    """
    completed = [(number, value) for number, value in accuracies.items() if value is not None]
    numbers, values = zip(*completed, strict=True)
    best = np.maximum.accumulate(values)
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    if own is not None:
        axes.axhline(own, color=GRAY, linestyle=":", label="the recipe's own values")
    axes.plot(numbers, values, color=BLUE, marker="o", linestyle="", label="completed")
    axes.step([*numbers, max(accuracies)], [*best, best[-1]], where="post", color=ORANGE, label="best so far")
    early = [number for number, value in accuracies.items() if value is None]
    axes.plot(early, [min(values)] * len(early), color=GRAY, marker="x", linestyle="", label="ended early")
    start = "" if own is None else f"from {own:.1%} "
    title = f"Tuning took the validation accuracy {start}to {best[-1]:.1%}"
    axes.set(xlabel="trial", ylabel="validation accuracy", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    _plain(axes)
    return figure


def tuning_importances(importances: dict[str, float], n_trials: int) -> Figure:
    """A bar a field, the most important at the top: its share of the differences between the trials."""
    names, shares = zip(*sorted(importances.items(), key=lambda pair: pair[1]), strict=True)
    figure = Figure(figsize=(7, 0.35 * len(names) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.barh(names, shares, color=BLUE), [f"{share:.0%}" for share in shares], padding=3, fontsize=8)
    title = f"{names[-1]} mattered most: {shares[-1]:.0%} of the differences between {n_trials} trials"
    axes.set(xlim=(0, 1.1 * max(shares)), xlabel="share of the differences in accuracy (fANOVA)", title=title)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _plain(axes)
    return figure


def _plain(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
