"""report.html: a run on one page that needs nothing but itself."""

import base64
import html
import json
from pathlib import Path

from cifar_fastai.schema import CORRUPTIONS, Corruptions, read
from cifar_fastai.terminal import printable

SECTIONS = {  # the pictures, by what they answer
    "How good it is": {
        "per_class_accuracy": "Accuracy of each class",
        "confusion_matrix": "Confusion matrix of the test split",
    },
    "How far its confidence can be trusted": {
        "reliability": "Accuracy against confidence, before and after calibration",
        "risk_coverage": "Accuracy when only the surest answers count",
    },
    "Where it fails": {
        "top_losses": "Test images with the highest loss, and where the network saw its answer (Grad-CAM)",
        "confident_mistakes": "Its most confident mistakes",
    },
    "What it sees": {
        "predictions": "Test images drawn by chance, and its answers",
        "samples": "Training images after augmentation",
        "filters": "Filters of the first layer",
    },
    "How it was trained": {
        "loss_curve": "Loss and accuracy by epoch",
        "lr_schedule": "Learning rate by epoch",
    },
}

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { margin: 0 auto; max-width: 60rem; padding: 1rem }
h1, h2, p { overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin-bottom: .5rem }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 2px solid #0072b2; padding-bottom: .25rem }
h3 { font-size: 1rem }
.lead { font-size: 1.1rem } .note { color: #555; font-size: .9rem }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 45%), 1fr)); gap: .75rem }
.summary div { border: 1px solid #ccc; border-radius: 6px; padding: .5rem .75rem }
.summary dt { color: #555; font-size: .85rem } .summary dd { margin: 0; font-size: 1.2rem }
figure { margin: 1rem 0 } figcaption { color: #555; font-size: .9rem }
img { max-width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
.figures td { white-space: nowrap } .figures tr :first-child { position: sticky; left: 0; background: #fff }
.figures td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: min(10rem, 35vw) }
pre { overflow-x: auto; background: #f5f5f5; padding: .75rem; border-radius: 6px }
@media print {
  body { font-size: 11pt } pre { white-space: pre-wrap } img { max-height: 11cm }
  h2, h3 { break-after: avoid } figure, tr { break-inside: avoid }
}
"""


def write_report(folder: Path, metrics: dict, config: dict) -> Path:
    """Write report.html from a run folder's figures, configuration and pictures; returns its path."""
    tables = {
        "How good it is": _heading("Classes", table(("class", "precision", "recall", "F1", "images"), _class_rows(metrics))),
        "How far its confidence can be trusted": _heading(
            "When only confident answers count",
            table(("confidence from", "answers", "of those right"), _coverage_rows(metrics)),
        ),
        "Where it fails": _heading("Most confused", table(("class", "taken for", "images", "share"), _pair_rows(metrics))),
        "How it was trained": _heading("Recipe", table(("field", "value"), config["recipe"].items()))
        + _heading("Environment", table(("what", "which"), _environment_rows(metrics))),
    }
    sections = ""
    for title, pictures in SECTIONS.items():
        shown = [_picture(folder / f"{name}.png", caption) for name, caption in pictures.items()]
        sections += f"<h2>{title}</h2>{''.join(shown)}{tables.get(title, '')}"
    cards = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in _summary(metrics).items())
    body = f"""<h1>{escape(config["name"])}</h1>
<p class="lead">{_lead(metrics)}</p>
<dl class="summary">{cards}</dl>
<p class="note">The epoch and the calibration were chosen on the validation split; the test split was used once, at the end.
TTA: test-time augmentation, the average over those views of an image that the recipe allows. Repeat it with:</p>
<pre>{escape(config["command"])}</pre>
{sections}
{_corruptions(folder)}"""
    path = folder / "report.html"
    path.write_text(page(f"{config['name']}: {metrics['test_accuracy']:.1%}", body), encoding="utf-8")
    return path


def page(title: str, body: str) -> str:
    """A whole HTML page that asks for nothing else, in the reports' style. body: HTML."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style>
{body}
</html>
"""


def escape(text) -> str:
    """Text of users, or of this program, as HTML that shows just that."""
    return html.escape(printable(text))


def picture(caption: str, png: bytes) -> str:
    """HTML of a picture and its caption, with the picture's bytes in it."""
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _picture(path: Path, caption: str) -> str:
    """The same for a file; nothing for one that could not be drawn."""
    return picture(caption, path.read_bytes()) if path.exists() else ""


def table(heads, rows) -> str:
    """HTML of a table that scrolls by itself where the screen is narrow. Cells: text, or what json can write."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _lead(metrics: dict) -> str:
    """What came out, in a few sentences."""
    data = metrics["data"]
    low, high = metrics["test_accuracy_interval"]
    words = (
        f"Right on <strong>{metrics['test_accuracy']:.2%}</strong> of {data['n_test']:,} test images it had never seen "
        f"(95 % interval {low:.1%} to {high:.1%}). It learned from {data['n_train']:,} images of {escape(data['source'])} "
        f"({escape(data['encoding'])}) in {_duration(metrics['train_seconds'])} on {escape(metrics['hardware'])}; "
        f"{data['n_valid']:,} more chose its best epoch."
    )
    if metrics["confused_pairs"]:
        pair = metrics["confused_pairs"][0]
        words += (
            f" Its commonest mistake: {escape(pair['class'])} taken for {escape(pair['taken_for'])}, {pair['share']:.1%}."
        )
    return words


def _summary(metrics: dict) -> dict[str, str]:
    return {
        "test accuracy": f"{metrics['test_accuracy']:.2%}",
        "with TTA": f"{metrics['test_accuracy_tta']:.2%}",
        "validation accuracy": f"{metrics['valid_accuracy']:.2%}",
        "top-2 accuracy": f"{metrics['test_top2_accuracy']:.2%}",
        "test loss": f"{metrics['test_loss']:.3f}",
        "calibration error": f"{metrics['ece']:.3f} (was {metrics['ece_uncalibrated']:.3f})",
        "best epoch": f"{metrics['best_epoch']} of {metrics['epochs_run']}",
        "parameters": f"{metrics['n_params']:,}",
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _heading(title: str, below: str) -> str:
    return f"<h3>{title}</h3>{below}"


def _corruptions(folder: Path) -> str:
    """What `evaluate --corruptions` left in the folder, if it did."""
    if not (folder / CORRUPTIONS).is_file():
        return ""
    found = read(Corruptions, folder / CORRUPTIONS)
    interval = "{:.2%} to {:.2%}".format(*found["mean_corruption_accuracy_interval"])
    heads = ("kind", *(f"severity {number}" for number in range(1, 6)), "mean")
    return f"""<h2>How it bears corrupted images</h2>
<p>{found["n_images"]:,} of the {found["n_test"]:,} test images, corrupted in {len(found["kind_accuracy"])} ways at five
severities: mean corruption accuracy {found["mean_corruption_accuracy"]:.2%} (95 % interval {interval}),
{found["drop"] * 100:.2f} points below the {found["clean_accuracy"]:.2%} of the same images clean.</p>
{_picture(folder / "corruptions.png", "Accuracy by kind and severity of corruption")}
{table(heads, _corruption_rows(found))}"""


def _corruption_rows(found: dict):
    for kinds in found["accuracy"].values():
        for kind, accuracies in kinds.items():
            yield (kind.replace("_", " "), *(f"{share:.1%}" for share in (*accuracies, found["kind_accuracy"][kind])))


def _class_rows(metrics: dict):
    for name, figures in metrics["per_class"].items():
        shares = (f"{figures[key]:.2%}" for key in ("precision", "recall", "f1"))
        yield (name, *shares, f"{figures['support']:,}")


def _pair_rows(metrics: dict):
    for pair in metrics["confused_pairs"]:
        yield (pair["class"], pair["taken_for"], str(pair["count"]), f"{pair['share']:.1%}")


def _coverage_rows(metrics: dict):
    for row in metrics["risk_coverage"]:
        if row["accuracy"] is not None:
            yield (f"{row['threshold']:.0%}", f"{row['coverage']:.1%}", f"{row['accuracy']:.2%}")


def _environment_rows(metrics: dict):
    rows = [("device", metrics["device"]), ("hardware", metrics["hardware"]), ("seed", metrics["seed"])]
    rows += [("peak memory, 10^6 bytes", metrics["peak_memory_mb"]), ("git commit", metrics["git_commit"])]
    rows += [("data file's sha256", metrics["data"]["sha256"]), ("pixels' sha256", metrics["data"]["fingerprint"])]
    return rows + list(metrics["versions"].items())


def _cell(value) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value))
