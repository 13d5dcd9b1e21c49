"""The parts of the page that are HTML, from figures and pictures. Every word from outside is escaped."""

import base64
import csv
import io

from PIL import Image

from cifar_fastai.artifacts import model_card
from cifar_fastai.inference import Verdict
from cifar_fastai.models import n_views
from cifar_fastai.report import escape
from cifar_fastai.terminal import cell

SURE_FROM = 0.9  # confidence
THUMBNAIL = 56  # pixels of a side, twice as many as are shown where the screen is fine
MOST_CLASSES = 30  # of a confusion matrix that can still be read


def percent(share: float) -> str:
    """In whole percent; what is not all but nearly is not rounded to all."""
    return ">99 %" if 0.995 <= share < 1 else f"{share:.0%}".replace("%", " %")


# --- one picture -------------------------------------------------------------------------------------------------


def header(config: dict) -> str:
    classes = ", ".join(config["classes"])
    accuracy = f"{config['test']['test_accuracy']:.1%}".replace("%", " %")
    return (
        "<h1>What is in the picture?</h1>"
        f"<p>One of: {escape(classes)}. The network <b>{escape(config['name'])}</b> was right on {accuracy} of its test "
        "images.</p>"
    )


def sentence(verdict: Verdict, remarks: list[str], false_alarms: float) -> str:
    """The answer in plain words, and what there is to say against it.

    remarks: about the picture, from `decode_image`. false_alarms: share of test images that are called unfamiliar too.
    """
    (first, confidence), (second, _) = [(escape(name), share) for name, share in list(verdict.confidences.items())[:2]]
    if verdict.unfamiliar:
        words = f"Closest to <b>{first}</b>."
    elif verdict.unsure:
        words = f"Perhaps <b>{first}</b> or <b>{second}</b>."
    elif confidence < SURE_FROM:
        words = f"Probably <b>{first}</b>, perhaps {second}."
    else:
        words = f"Very likely <b>{first}</b>."
    doubts = "".join(f" {escape(remark[0].upper() + remark[1:])}." for remark in verdict.warnings + remarks)
    page = f"<p{' class=doubt' if verdict.warnings else ''}>{words}{doubts}</p>"
    if verdict.unfamiliar:
        page += f"<p class=quiet>The same is said, wrongly, of {false_alarms:.1%} of its test images.</p>"
    return page


def failure(reason: str) -> str:
    return f"<p class=doubt>{escape(reason)}</p>"


def views(seen: Image.Image, label: str, overlay: Image.Image | None) -> str:
    """What the network sees, and where it finds the evidence for a class; a blank until that is known."""
    label = escape(label)
    if overlay:
        heat = f'<img alt="The same in gray, with the regions in colour that speak for {label}" src="{_url(overlay)}">'
    else:
        heat = "<div class=blank></div>"
    return (
        '<div class="views"><figure>'
        f'<img class="pixels" alt="The picture as a square of {seen.width} &times; {seen.height} pixels" src="{_url(seen)}">'
        f"<figcaption>What the network sees: {seen.width} &times; {seen.height} pixels</figcaption></figure>"
        f"<figure>{heat}<figcaption>What speaks for <b>{label}</b> (Grad-CAM). Choose another class above to see its "
        "own.</figcaption></figure></div>"
    )


def _url(image: Image.Image) -> str:
    """A small picture as an address that holds all of it."""
    file = io.BytesIO()
    kind = "png" if image.width < THUMBNAIL else "jpeg"
    image.save(file, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# --- many pictures -----------------------------------------------------------------------------------------------


def thumbnail(picture: Image.Image) -> str:
    """The address of a small copy."""
    small = picture.copy()
    small.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    return _url(small)


def table(entries: list[dict], thumbnails: list[str]) -> str:
    """The entries of the API as a table, with a thumbnail for each that has no error, and a link that saves it as CSV."""
    pictures, n_bad = iter(thumbnails), sum("error" in entry for entry in entries)
    rows = "".join(_row(entry, None if "error" in entry else next(pictures)) for entry in entries)
    count = f"{len(entries):,} {'file' if len(entries) == 1 else 'files'}"
    count += f", {n_bad:,} of them without an answer" if n_bad else ""
    data = base64.b64encode(as_csv(entries).encode()).decode()
    return (
        f'<a class="save" download="answers.csv" href="data:text/csv;charset=utf-8;base64,{data}">Save as CSV</a>'
        f'<p>{count}</p><div class="scroll"><table class="plain answers"><thead><tr><th>Picture</th><th>File</th>'
        f'<th>Answer</th><th class="number">Confidence</th><th>Note</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(entry: dict, picture: str | None) -> str:
    name = escape(entry["name"])
    if "error" in entry:
        note = f'<td class="note bad">{escape(entry["error"])}</td>'
        return f'<tr><td></td><td class="name">{name}</td><td></td><td></td>{note}</tr>'
    note = escape("; ".join(entry["warnings"]))
    return (
        f'<tr><td><img alt="" src="{picture}"></td><td class="name">{name}</td><td><b>{escape(entry["label"])}</b></td>'
        f'<td class="number">{percent(entry["confidence"])}</td><td class="note">{note}</td></tr>'
    )


def as_csv(entries: list[dict]) -> str:
    """file, label, confidence (0 to 1), note: a line for each entry, to be opened in a spreadsheet."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("file", "label", "confidence", "note"))
    for entry in entries:
        note = entry["error"] if "error" in entry else "; ".join(entry["warnings"])
        writer.writerow((cell(entry["name"]), cell(entry.get("label", "")), entry.get("confidence", ""), cell(note)))
    return file.getvalue()


# --- how good it is ----------------------------------------------------------------------------------------------


def quality(config: dict) -> str:
    """The figures of an export on its test split, and its model card."""
    test, classes, n = config["test"], config["classes"], n_views(config["tta_views"])
    return (
        f'<div class="quality"><h2>On its test images</h2>{_figures(test, n)}'
        f"<h2>What is taken for what</h2>{_matrix(test['confusion_matrix'], classes)}"
        f'<div class="pair"><div><h2>Class by class</h2>{_per_class(test["per_class"])}</div>'
        f"<div><h2>When only sure answers count</h2>{_risk_coverage(test['risk_coverage'])}"
        f"{_reliability(test.get('reliability'))}</div></div>"
        f"<h2>Model card</h2>{card(config)}</div>"
    )


def _figures(test: dict, views: int) -> str:
    low, high = test["test_accuracy_interval"]
    figures = {"Accuracy": (f"{test['test_accuracy']:.2%}", f"95 % interval {low:.2%} to {high:.2%}")}
    if views > 1:
        figures[f"Averaged over {views} views"] = (f"{test['test_accuracy_tta']:.2%}", "test-time augmentation")
    figures |= {
        "Calibration error": (f"{test['ece']:.3f}", "how far confidence and accuracy lie apart"),
        "False alarms": (f"{test['false_alarm_rate']:.1%}", "test images called unlike the training images"),
    }
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{figure} <small>{words}</small></dd></div>" for name, (figure, words) in figures.items()
    )
    return f'<dl class="figures">{tiles}</dl>'


def _matrix(matrix: list[list[int]], classes: list[str]) -> str:
    if len(classes) > MOST_CLASSES:
        return f'<p class="quiet">With {len(classes)} classes this table cannot be read; see the run\'s report.</p>'
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in classes)
    rows = ""
    for place, (name, counts) in enumerate(zip(classes, matrix, strict=True)):
        total = max(sum(counts), 1)
        cells = "".join(_cell(count, count / total, right=place == k) for k, count in enumerate(counts))
        rows += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return (
        '<p class="quiet">Each row is what was shown, each column what was answered; the diagonal is right.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix"><table class="matrix">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(count: int, share: float, right: bool) -> str:
    if not count:
        return '<td class="quiet">·</td>'
    colour, strength = ("0, 114, 178", share) if right else ("213, 94, 0", min(1, 3 * share + 0.05))
    ink = "; color: #fff" if strength > 0.5 else ""
    return f'<td style="background: rgba({colour}, {strength:.2f}){ink}">{count:,}</td>'


def _bar(share: float) -> str:
    return f'<span class="bar" aria-hidden="true"><i style="width: {share:.1%}"></i></span>'


def _per_class(rows: dict[str, dict]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_bar(row["recall"])}</td><td class="number">{row["recall"]:.1%}</td>'
        f'<td class="number">{row["precision"]:.1%}</td><td class="number">{row["support"]:,}</td></tr>'
        for name, row in rows.items()
    )
    return (
        '<div class="scroll"><table class="plain"><thead><tr><th>Class</th><th></th><th class="number">Recognised</th>'
        '<th class="number">Right when named</th><th class="number">Images</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _risk_coverage(rows: list[dict]) -> str:
    body = "".join(
        f'<tr><td class="number">{percent(row["threshold"])}</td><td>{_bar(row["coverage"])}</td>'
        f'<td class="number">{row["coverage"]:.1%}</td><td class="number">{row["accuracy"]:.1%}</td></tr>'
        for row in rows
        if row["accuracy"] is not None
    )
    return (
        '<div class="scroll"><table class="plain"><thead><tr><th class="number">Confidence at least</th><th></th>'
        '<th class="number">Images left</th><th class="number">Right of those</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _reliability(bins: list[dict] | None) -> str:
    """The reliability diagram: how often answers are right, by how sure they are. Older exports have no bins for it."""
    if not bins:
        return ""
    most = max(row["count"] for row in bins)
    points = [(300 * row["confidence"], 200 - 200 * row["accuracy"], 2 + 7 * (row["count"] / most) ** 0.5) for row in bins]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>' for x, y, radius in points)
    words = "; ".join(
        f"{row['accuracy']:.0%} right of {row['count']:,} with a confidence of {row['confidence']:.0%} on average"
        for row in bins
    )
    ticks = "".join(
        f'<text x="{3 * share}" y="218" text-anchor="middle">{share} %</text>'
        f'<text x="-8" y="{204 - 2 * share}" text-anchor="end">{share} %</text>'
        for share in (0, 50, 100)
    )
    return (
        "<h2>Whether the confidence can be believed</h2>"
        '<p class="quiet">The share that was right of answers about as sure, which on the dotted line is just what the '
        "confidence says. The larger a point, the more answers.</p>"
        f'<svg class="chart" viewBox="-45 -12 365 250" role="img" aria-label="Reliability diagram: {words}">'
        f'<path d="M0 0V200H300M0 200L300 0"/>{ticks}<text x="150" y="234" text-anchor="middle">confidence</text>'
        f'<polyline points="{line}"/>{dots}</svg>'
    )


def card(config: dict) -> str:
    """The model card. Of Markdown only what it needs is followed: no HTML, no links, no pictures from elsewhere."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    _, _, text = model_card(config).partition("\n")  # without its title
    return f'<div class="card">{markdown.render(text)}</div>'
