"""Names of files, classes, runs and exports are text to whatever shows them: terminals, pictures, Markdown, HTML, tables."""

import csv
import io
import json
import os
import pty
import re
import shlex
import shutil

import numpy as np
import pytest
from helpers.commands import call_here
from markdown_it import MarkdownIt
from PIL import Image

from cifar_fastai import cli, figures, report, terminal
from cifar_fastai.artifacts import model_card

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202egnp\u2066\u2028\r\n\t\udcff"
MARKUP = ["$1_front", "$5_front", "_low", "a|b", "*x*", "`y`", "<b>z</b>", "[t](http://u)", "\\frac", "图", "n" * 255]
TROUBLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_printable_by_kind_of_character():
    words = terminal.printable(EVIL)
    assert words.isprintable() and words.startswith(
        "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\x7f\\u202egnp\\u2066\\u2028\\r\\n\\t"
    )
    assert words.endswith("\\udcff")
    for fine in ("naïve café 図 🐈 ‍ שלום C:\\temp", "نص عربي"):
        assert terminal.printable(fine) == fine


# --- terminals -----------------------------------------------------------------------------------------------------


def test_lines_of_progress_warnings_and_errors(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    terminal.say("run", f"runs/{EVIL}")
    for command, arguments in (
        ("predict", ["--export", EVIL, "x.png"]), ("compare", [EVIL, "x"]), ("train", [EVIL]), ("train", ["--recipe", EVIL]),
        ("train", ["--data", "digits", "--name", EVIL]), ("train", ["--resume", EVIL]), ("evaluate", [EVIL, "--debug"]),
    ):  # fmt: skip
        assert cli.main(command, arguments) in (2, 5)
    shown = "".join(capsys.readouterr())
    assert "owned" in shown and not TROUBLE.search(shown)


@pytest.fixture
def pictured(tmp_path):
    """A picture with an unprintable name, and one that cannot be read."""
    names = [f"{EVIL.replace('/', '')}.png", "=1+1.png"]
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    for name in names:
        shutil.copy(tmp_path / "photo.png", tmp_path / name)
    (tmp_path / f"bad{EVIL}.png").write_text("no image")
    return tmp_path, [*names, f"bad{EVIL}.png"]


def test_predict_in_each_style(digits_run, pictured):
    cwd, (evil, formula, bad) = pictured
    command = ("predict", "--export", digits_run.export)
    text = call_here(*command, evil, formula, bad, cwd=cwd)
    assert text.returncode == 2 and not TROUBLE.search(text.stdout.replace("\t", "") + text.stderr)
    assert [line.count("\t") for line in text.stdout.splitlines()] == [2, 2] and text.stderr.count("\n") == 1
    plain = call_here(*command, "--json", evil, formula, cwd=cwd).stdout
    assert not TROUBLE.search(plain) and [json.loads(line)["path"] for line in plain.splitlines()] == [evil, formula]
    table = call_here(*command, "--csv", evil, formula, cwd=cwd).stdout
    assert [row[0] for row in csv.reader(io.StringIO(table, newline=""))][1:] == [evil, formula], "data, as it is"


def test_csv_on_a_terminal(digits_run, pictured, monkeypatch):
    cwd, (evil, *_) = pictured
    monkeypatch.chdir(cwd)
    outside, inside = pty.openpty()
    with os.fdopen(inside, "w", encoding="utf-8", errors="backslashreplace") as screen:
        monkeypatch.setattr("sys.stdout", screen)
        assert cli.main("predict", ["--export", str(digits_run.export), "--csv", evil]) == 0
        shown = os.read(outside, 10_000).decode()
    os.close(outside)
    assert "owned" in shown and not TROUBLE.search(shown.replace("\r\n", "\n"))


def test_comparisons_on_a_terminal():
    from cifar_fastai.compare import Section, _printable, as_text

    section = Section(EVIL, ("run", EVIL), [(EVIL, EVIL)], [EVIL])
    text = as_text(_printable(section))
    assert text.count("owned") == 5 and not TROUBLE.search(text)


# --- pictures ------------------------------------------------------------------------------------------------------


def drawn(picture, *arguments) -> tuple[Image.Image, list[str]]:
    """A picture, and the text that is in it; text that matplotlib would take for a formula fails."""
    kept = []

    def keep(*arguments):
        kept.append(picture(*arguments))
        return kept[0]

    image = Image.open(io.BytesIO(figures.png(keep, *arguments)))
    texts = [text for text in kept[0].findobj(lambda artist: hasattr(artist, "get_parse_math")) if text.get_text()]
    assert not any(text.get_parse_math() for text in texts)
    return image, [text.get_text() for text in texts]


def test_classes_in_pictures_are_text_of_a_length_that_fits():
    n = len(MARKUP)
    shown = [name if len(name) <= 24 else f"{name[:23]}…" for name in MARKUP]
    matrix = np.arange(n * n).reshape(n, n)
    image, texts = drawn(figures.confusion_matrix, matrix, MARKUP)
    assert max(image.size) < 1500 and set(shown) <= set(texts)
    image, texts = drawn(figures.per_class_accuracy, dict.fromkeys(MARKUP, 0.5), 0.5)
    assert max(image.size) < 1500 and set(shown) <= set(texts)
    columns = [np.zeros((n, 8, 8, 3), np.uint8)] * 3
    image, texts = drawn(figures.contact_sheet, columns, MARKUP, "$title$")
    assert set(shown) <= set(texts) and "$title$" in texts
    history = [{"epoch": 1, "valid_loss": 1.0, "accuracy": 0.5}]
    image, texts = drawn(figures.curves, [(name, history) for name in MARKUP])
    assert {name for name in MARKUP if len(name) < 60} <= {text.strip() for text in texts}, "none left out of the legend"


def test_two_long_names_that_begin_alike_keep_a_bar_each():
    figure = figures.per_class_accuracy({"n" * 200 + end: 0.5 for end in "ab"}, 0.5)
    assert len(figure.axes[0].patches) == 2


def test_pictures_of_many_classes_have_a_size_that_can_be_drawn():
    classes = [f"class {number}" for number in range(1500)]
    image, _ = drawn(figures.confusion_matrix, np.eye(1500, dtype=int), classes)
    assert max(image.size) < 3200
    image, texts = drawn(figures.per_class_accuracy, {name: place / 1500 for place, name in enumerate(classes)}, 0.5)
    assert max(image.size) < 5000 and "class 0" in texts and any("100 hardest of 1,500" in text for text in texts)


def test_no_formula_is_left_where_all_text_is_text():
    lrs = np.geomspace(1e-5, 1, 50)
    _, texts = drawn(figures.lr_search, lrs.tolist(), np.linspace(2, 1, 50).tolist(), {"steep": 1e-3, "slide": 1e-2})
    assert {"0.001", "0.1"} <= set(texts) and not any("$" in text for text in texts)


def test_a_name_that_is_a_broken_formula_is_drawn_as_it_is(tmp_path, capsys):
    figures.draw(tmp_path / "matrix.png", figures.confusion_matrix, np.array([[1, 2], [0, 3]]), ["$\\frac{", "$x$"])
    assert (tmp_path / "matrix.png").stat().st_size > 1000 and capsys.readouterr().err == ""


def test_a_picture_that_cannot_be_drawn_is_a_warning_and_no_file(tmp_path, capsys):
    def broken():
        raise ValueError("no ink\nat all")

    (tmp_path / "old.png").write_bytes(b"of the run before")
    figures.draw(tmp_path / "old.png", broken)
    assert not (tmp_path / "old.png").exists()
    assert capsys.readouterr().err == "warning: old.png could not be drawn (ValueError: no ink).\n"


# --- Markdown, HTML, tables ----------------------------------------------------------------------------------------


def card_of(**fields) -> dict:
    training = {"n_params": 1, "epochs_run": 1, "seed": 1, "hardware": "cpu", "train_seconds": 60, "recipe": "fast"}
    test = {"test_accuracy": 0.5, "test_accuracy_tta": 0.5, "test_accuracy_interval": [0, 1], "test_loss": 1, "ece": 0.1}
    config = {
        "name": "x",
        "classes": ["a"],
        "model": "small",
        "size": 32,
        "input_size": 32,
        "tta_views": ["mirror"],
        "created": "now",
    }
    return config | {"training": training | {"data": "digits"}, "test": test | {"false_alarm_rate": 0.05}} | fields


def test_the_model_card_shows_names_as_they_are():
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(
        model_card(card_of(name="*|<i>$x$", classes=MARKUP))
    )  # fmt: skip
    shown = re.sub(r"<[^>]+>", "", html).replace("&lt;", "<").replace("&gt;", ">")
    assert all(name in shown for name in MARKUP) and "*|<i>$x$" in shown
    assert not re.search(r"<(b|i|em|a)[ >]", html)


def test_no_text_in_the_model_card_breaks_its_table():
    evil = "a | b |\n\n# heading\n\n![x](http://u) ` ``` <script>"
    config = card_of(model=evil, created=evil)
    config["training"] |= {"data": evil, "weights": evil, "hardware": evil, "recipe": evil}
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(model_card(config))
    assert html.count("<h1>") == 1 and html.count("<tr>") == 12 and not re.search("<(script|img|h2|a)", html)
    assert all(row.count("<td>") == 2 for row in html.split("<tr>")[2:])


def test_html_of_reports_is_text():
    shown = report.table(["<i>"], [["<script>alert(1)</script>\u202e\x1b"]]) + report.picture('">x', b"")
    assert "<script" not in shown and "<i>" not in shown and not TROUBLE.search(shown)
    assert shown.count('"') % 2 == 0 and "alt=&quot;" not in shown and 'alt="&quot;&gt;x"' in shown


def test_cells_that_a_spreadsheet_would_compute_begin_with_an_apostrophe():
    from cifar_fastai.fragments import as_csv

    entries = [
        {"name": '=HYPERLINK("http://u")', "label": "+cmd", "confidence": 0.5, "warnings": []},
        {"name": "-1.png", "error": "@SUM(A1)"},
        {"name": "a=b.png", "label": "cat", "confidence": 0.5, "warnings": []},
    ]
    _, first, second, third = csv.reader(io.StringIO(as_csv(entries)))
    assert first == ['\'=HYPERLINK("http://u")', "'+cmd", "0.5", ""]
    assert second == ["'-1.png", "", "", "'@SUM(A1)"] and third == ["a=b.png", "cat", "0.5", ""]


# --- commands to be copied -----------------------------------------------------------------------------------------


def test_commands_that_are_suggested_can_be_pasted(capsys, tmp_path):
    from cifar_fastai.distributed import ALONE
    from cifar_fastai.errors import UserError
    from cifar_fastai.finished import _check_evaluated
    from cifar_fastai.run import tell_of_export

    folder = tmp_path / "my run's; $x"
    tell_of_export(folder, "digest")
    said = [capsys.readouterr().out, f"`{ALONE.way_on(folder)}`"]
    with pytest.raises(UserError) as refused:
        _check_evaluated(folder, {})
    for words in (*said, str(refused.value)):
        assert str(folder) in shlex.split(re.search("`([^`]*)`", words)[1])
