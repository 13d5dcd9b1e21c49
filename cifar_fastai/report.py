"""report.html: a run on one page that needs nothing but itself; and the parts such pages are made of."""

import base64
import json
from html import escape
from pathlib import Path

PICTURES = {
    "loss_curve": "Loss and accuracy by epoch",
    "confusion_matrix": "Confusion matrix of the test split",
    "per_class_accuracy": "Accuracy of each class",
    "reliability": "How far confidence can be trusted",
    "risk_coverage": "Accuracy when only the surest answers count",
    "top_losses": "Test images with the highest loss",
    "samples": "Training images after augmentation",
    "lr_schedule": "Learning rate by epoch",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { margin: 0 auto; max-width: 60rem; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } h1, h2, p { overflow-wrap: anywhere }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 45%), 1fr)); gap: .75rem }
.summary div { border: 1px solid #ccc; border-radius: 6px; padding: .5rem .75rem }
.summary dt { color: #555; font-size: .85rem } .summary dd { margin: 0; font-size: 1.3rem }
img { max-width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd }
.figures td { white-space: nowrap } .figures tr :first-child { position: sticky; left: 0; background: #fff }
.figures td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: min(10rem, 35vw) }
pre { overflow-x: auto; background: #f5f5f5; padding: .75rem; border-radius: 6px }
@media print { h2 { break-after: avoid } img { break-inside: avoid } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML page in the project's style. title: plain text; body: HTML."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style>
{body}
</html>
"""


def picture(caption: str, png: bytes) -> str:
    """HTML of a picture under its caption, a heading, with the picture's bytes in it."""
    data = base64.b64encode(png).decode()
    return f'<h2>{escape(caption)}</h2><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'


def table(heads, rows) -> str:
    """HTML of a table that scrolls by itself where the screen is narrow. Cells: text, or what json can write."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def write_report(folder: Path, metrics: dict, config: dict) -> Path:
    """Write report.html from a run folder's figures, configuration and pictures; returns its path."""
    data = metrics["data"]
    summary = {
        "test accuracy": f"{metrics['test_accuracy']:.2%}",
        "95 % interval": "{:.2%} to {:.2%}".format(*metrics["test_accuracy_interval"]),
        "with TTA": f"{metrics['test_accuracy_tta']:.2%}",
        "top-2 accuracy": f"{metrics['test_top2_accuracy']:.2%}",
        "validation accuracy": f"{metrics['valid_accuracy']:.2%}",
        "test loss": f"{metrics['test_loss']:.3f}",
        "calibration error": f"{metrics['ece']:.3f} (was {metrics['ece_uncalibrated']:.3f})",
        "best epoch": f"{metrics['best_epoch']} of {metrics['epochs_run']}",
        "training time": f"{metrics['train_seconds'] / 60:.1f} min",
        "parameters": f"{metrics['n_params']:,}",
    }
    split = f"{data['n_train']:,} training, {data['n_valid']:,} validation and {data['n_test']:,} test images"
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in summary.items())
    pictures = "".join(picture(caption, (folder / f"{name}.png").read_bytes()) for name, caption in PICTURES.items())
    body = f"""<h1>{escape(config["name"])}</h1>
<p>{escape(data["source"])} ({escape(data["encoding"])} images): {split}. The epoch was chosen by validation loss; the
test split was used once, at the end. TTA: test-time augmentation, the average over six views of each image.</p>
<dl class="summary">{cards}</dl>
{pictures}
<h2>Classes</h2>{table(("class", "precision", "recall", "F1", "images"), _class_rows(metrics))}
<h2>Most confused</h2>{table(("class", "taken for", "images", "share"), _pair_rows(metrics))}
<h2>When only confident answers count</h2>
{table(("confidence from", "answers", "of those right"), _coverage_rows(metrics))}
<h2>Repeat it</h2><pre>{escape(config["command"])}</pre>
<h2>Recipe</h2>{table(("field", "value"), config["recipe"].items())}
<h2>Environment</h2>{table(("what", "which"), _environment_rows(metrics))}"""
    path = folder / "report.html"
    path.write_text(page(f"{config['name']}: {metrics['test_accuracy']:.1%}", body), encoding="utf-8")
    return path


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
