"""The page in a real browser: what visitors do, and what they must never meet."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from helpers.commands import ROOT, environment, free_port
from PIL import Image

from cifar_fastai import Classifier
from cifar_fastai.artifacts import load_export
from cifar_fastai.inference import Verdict
from cifar_fastai.page import EXAMPLE_NAMES, EXAMPLES, Shelf

pytestmark = pytest.mark.browser
SHIPPED = ROOT / "exports" / "cifar10"


@pytest.fixture(scope="module")
def exports(digits_run, tmp_path_factory):
    """A folder of three exports: the shipped one, one for digits, and a damaged one."""
    folder = tmp_path_factory.mktemp("page") / "exports"
    shutil.copytree(SHIPPED, folder / "cifar10")
    shutil.copytree(digits_run.export, folder / "digits")
    shutil.copytree(digits_run.export, folder / "torn")
    (folder / "torn" / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def address(exports):
    port = free_port()
    command = [sys.executable, ROOT / "app.py", "--export", exports / "cifar10", "--port", str(port)]
    process = subprocess.Popen(command, cwd=exports.parent, stdout=subprocess.PIPE, text=True, env=environment())
    assert [process.stdout.readline().split()[0] for _ in range(3)] == ["export", "serving", "api"]
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def classifier():
    return Classifier(SHIPPED)


@pytest.fixture
def visit(browser, address):
    """A function that opens the page; afterwards: no error on a console, no request to another machine."""
    errors, requests, contexts = [], [], []

    def open_page(query="", **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address + query)
        page.wait_for_selector("#picture input[type=file]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert requests and all(url.startswith((address, "data:", "blob:")) for url in requests), requests


def answered(page, label: str) -> None:
    """Waits for the answer and for the two views that belong to it."""
    page.locator("#answer").get_by_test_id("label-output-value").get_by_text(label, exact=True).wait_for(timeout=20_000)
    page.locator(f".views img[alt$='speak for {label}']").wait_for(timeout=20_000)


def sentence(page) -> str:
    return page.locator("#sentence [role=status]").inner_text().strip()


def overlay(page) -> np.ndarray:
    return pixels_of(page.locator(".views img").nth(1))


def pixels_of(image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.get_attribute("src").partition(",")[2]))))


def example(page, name: str):
    return page.locator("#examples").get_by_role("button", name=name)


# --- one picture -------------------------------------------------------------------------------------------------


def test_an_upload_and_all_that_is_said_of_it(visit, classifier):
    page = visit()
    assert sentence(page) == "Choose a picture, or try one of the examples."
    page.set_input_files("#picture input[type=file]", EXAMPLES / "cat.jpg")
    answered(page, "cat")
    expected = classifier.predict(EXAMPLES / "cat.jpg")
    rows = page.locator("#answer .confidence-set")
    assert [row.inner_text().split() for row in rows.all()] == [
        [label, f"{share:.0%}"] for label, share in list(expected.items())[:5]
    ]
    assert sentence(page) == "Very likely cat."
    seen = page.locator(".views img").first
    decoded = classifier.tensor(Image.open(EXAMPLES / "cat.jpg")).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels_of(seen), decoded), "what the network sees, to the pixel"
    assert seen.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert overlay(page).shape == (320, 320, 3)
    assert page.locator("#picture img").first.get_attribute("alt") == "The picture to be classified"


def test_pasting(visit):
    page = visit()
    for name, label in (("ship", "ship"), ("frog", "frog")):  # the second in place of the first
        data = base64.b64encode((EXAMPLES / f"{name}.jpg").read_bytes()).decode()
        page.evaluate(PASTE, data)
        answered(page, label)
    assert sentence(page) == "Probably frog, perhaps bird."


PASTE = """async (data) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "image.png", { type: "image/jpeg" }));
  document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
}"""


def test_pasting_with_the_button(visit, browser):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    with io.BytesIO() as file:
        Image.open(EXAMPLES / "airplane.jpg").save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
    page.evaluate(
        "async data => navigator.clipboard.write([new ClipboardItem({'image/png':"
        " await (await fetch('data:image/png;base64,' + data)).blob()})])",
        data,
    )
    page.get_by_label("Paste from clipboard").click()
    answered(page, "airplane")


def test_the_camera(visit):
    page = visit()
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0", timeout=20_000)
    page.get_by_label("capture photo").click()
    page.locator(".views img").nth(1).wait_for(timeout=20_000)
    assert page.locator("#answer .confidence-set").count() == 5 and sentence(page)


def test_every_example_and_its_sentence(visit, classifier):
    page = visit()
    for name in EXAMPLE_NAMES:
        example(page, name).click()
        (verdict,) = classifier.verdicts(classifier.tensor(Image.open(EXAMPLES / f"{name}.jpg"))[None])
        answered(page, next(iter(verdict.confidences)))
        assert [word in sentence(page) for word in ("Unlike the training images", "Low confidence", "Very likely")] == [
            verdict.unfamiliar,
            verdict.unsure,
            not verdict.unfamiliar and max(verdict.confidences.values()) >= 0.9,
        ]
        assert ("wrongly, of 4.8% of its test images" in sentence(page)) == verdict.unfamiliar


def test_the_evidence_for_another_class(visit, classifier):
    page = visit()
    label, second_label, *_ = classifier.predict(EXAMPLES / "coffee.jpg")
    example(page, "coffee").click()
    answered(page, label)
    first, said = overlay(page), sentence(page)
    page.locator("#answer").get_by_role("button", name=second_label).click()
    answered_for = page.locator(f".views img[alt$='speak for {second_label}']")
    answered_for.wait_for(timeout=20_000)
    second = overlay(page)
    assert np.abs(first.astype(int) - second).mean() > 5
    assert label in said and sentence(page) == said, "the answer stays"


def test_a_slow_pictures_answer_does_not_come_under_the_next_one(visit, tmp_path):
    page = visit()
    shutil.copy(EXAMPLES / "ship.jpg", tmp_path / "ship.jpg")
    Image.open(tmp_path / "ship.jpg").resize((5000, 4900)).save(tmp_path / "large.jpg", quality=50)
    page.set_input_files("#picture input[type=file]", tmp_path / "large.jpg")
    page.locator("#picture img").wait_for(timeout=20_000)
    example(page, "frog").click()
    answered(page, "frog")
    page.wait_for_timeout(3000)
    answered(page, "frog")
    assert "frog" in sentence(page) and "ship" not in sentence(page)


def test_a_second_click_on_an_example_is_answered_too(visit):
    page = visit()
    for _ in range(3):
        example(page, "cat").click()
        page.wait_for_timeout(50)
    answered(page, "cat")


def test_who_names_the_export_to_be_trusted_is_offered_no_other(exports):
    digest = load_export(exports / "cifar10").sealed.digest
    assert Shelf(Classifier(exports / "cifar10")).names == ["cifar10", "digits", "torn"]
    assert Shelf(Classifier(exports / "cifar10", digest)).names == ["cifar10"]


def test_with_the_keyboard_alone(visit):
    page = visit()
    focused = "document.activeElement.textContent.trim()"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate(focused) == "automobile":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle != 'none'"
                         "|| getComputedStyle(document.activeElement).boxShadow != 'none'")  # fmt: skip
    page.keyboard.press("Enter")
    answered(page, "automobile")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate(focused).startswith("truck"):
            break
    page.keyboard.press("Enter")
    page.locator(".views img[alt$='speak for truck']").wait_for(timeout=20_000)


def test_a_bad_file_and_a_removed_one_leave_no_answer(visit, tmp_path):
    page = visit()
    (tmp_path / "page.png").write_text("<html><script>alert(1)</script></html>")
    example(page, "ship").click()
    answered(page, "ship")
    page.get_by_label("Remove Image").click()
    page.locator(".views").wait_for(state="detached")
    assert sentence(page) == "" and page.get_by_test_id("label-output-value").count() == 0
    page.set_input_files("#picture input[type=file]", tmp_path / "page.png")
    page.get_by_text("Not an image in a format that is read here").wait_for(timeout=20_000)
    assert "script" not in page.locator("#sentence").inner_html()
    assert page.get_by_test_id("label-output-value").count() == 0 and page.locator(".views").count() == 0


# --- many pictures -----------------------------------------------------------------------------------------------


def many(page, *files) -> list[list[str]]:
    """The rows of the table for these files."""
    page.get_by_role("tab", name="Many pictures").click()
    page.get_by_role("tabpanel").locator("input[type=file]").last.set_input_files(list(files))
    page.locator(".answers").wait_for(timeout=30_000)
    return [row.locator("td").all_inner_texts() for row in page.locator(".answers tbody tr").all()]


def test_many_files_with_a_bad_one_and_their_csv(visit, classifier, tmp_path):
    bad = tmp_path / "<b>bad.png"
    bad.write_text("no image")
    files = [EXAMPLES / "cat.jpg", bad, EXAMPLES / "moon.jpg", EXAMPLES / "coffee.jpg"]
    page = visit()
    rows = many(page, *files)
    assert [row[1] for row in rows] == ["cat.jpg", "<b>bad.png", "moon.jpg", "coffee.jpg"], "names are no HTML"
    assert "Not an image" in rows[1][4] and rows[1][2] == ""
    assert page.locator(".answers img").count() == 3
    with page.expect_download() as caught:
        page.get_by_role("link", name="Save as CSV").click()
    with caught.value.path().open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert caught.value.suggested_filename == "answers.csv" and [line["file"] for line in lines] == [row[1] for row in rows]
    for path, line in zip(files, lines, strict=True):
        if path == bad:
            assert line["label"] == line["confidence"] == "" and "Not an image" in line["note"]
            continue
        (verdict,) = classifier.verdicts(classifier.tensor(Image.open(path))[None])
        label, confidence = next(iter(verdict.confidences.items()))
        assert line["label"] == label and float(line["confidence"]) == pytest.approx(confidence, abs=1e-5)
        assert line["note"] == "; ".join(verdict.warnings)
    page.get_by_label("Remove this file").nth(1).click()
    page.get_by_text("3 files", exact=True).wait_for(timeout=20_000)
    page.get_by_label("Clear").click()
    page.locator(".answers").wait_for(state="detached")


def test_a_zip_archive(visit, classifier, tmp_path):
    with zipfile.ZipFile(tmp_path / "holiday.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(("ship", "frog", "airplane")):
            archive.write(EXAMPLES / f"{name}.jpg", f"../{number}/{name}.jpg")
        archive.writestr("__MACOSX/._ship.jpg", b"x")
        archive.writestr("notes.txt", "none")
    rows = many(visit(), tmp_path / "holiday.zip")
    assert [row[2] for row in rows] == ["ship", "frog", "airplane", ""]
    assert [row[1] for row in rows][::3] == ["holiday.zip/../0/ship.jpg", "holiday.zip/notes.txt"]
    assert not (tmp_path.parent / "0").exists()


# --- the rest ----------------------------------------------------------------------------------------------------


def test_how_good_it_is(visit):
    page = visit()
    page.get_by_role("tab", name="How good is it").click()
    test = load_export(SHIPPED).config["test"]
    rows = [row.locator("td").all_inner_texts() for row in page.locator(".matrix tbody tr").all()]
    assert [[int(cell.replace(",", "").replace("·", "0")) for cell in row] for row in rows] == test["confusion_matrix"]
    text = page.get_by_role("tabpanel").last.inner_text()
    recalls = [f"{row['recall']:.1%}" for row in test["per_class"].values()]
    assert re.findall(r"[\d.]+%", text[text.index("Recognised") :])[: 2 * len(recalls) : 2] == recalls
    for words in (f"{test['test_accuracy']:.2%}", f"{test['test_accuracy_tta']:.2%}", "not for decisions about people"):
        assert words in text
    diagram = page.locator("svg.chart")
    points = [[float(dot.get_attribute(key)) for key in ("cx", "cy")] for dot in diagram.locator("circle").all()]
    bins = [[300 * row["confidence"], 200 - 200 * row["accuracy"]] for row in test["reliability"]]
    assert np.allclose(points, bins, atol=0.1)
    assert f"right of {test['reliability'][-1]['count']:,} with" in diagram.get_attribute("aria-label")


def test_another_export_and_a_damaged_one(visit, exports):
    page = visit()
    example(page, "cat").click()
    answered(page, "cat")
    choose(page, "digits")
    page.locator("#header").get_by_text("0, 1, 2, 3, 4, 5, 6, 7, 8, 9").wait_for(timeout=20_000)
    assert page.get_by_test_id("label-output-value").count() == 0 and page.locator(".views").count() == 0
    assert page.locator("#picture img").count() == 0, "nothing stays that came from the other network"
    example(page, "cat").click()
    answered(page, next(iter(Classifier(exports / "digits").predict(EXAMPLES / "cat.jpg"))))
    choose(page, "torn")
    page.get_by_text("The export torn cannot be used: model.safetensors is not the file").wait_for(timeout=20_000)
    assert "airplane" in page.locator("#header").inner_text()
    assert page.get_by_label("Export").input_value() == "cifar10"
    example(page, "cat").click()
    answered(page, "cat")
    other = visit()
    assert "airplane" in other.locator("#header").inner_text(), "a visitor's choice is a visitor's own"
    assert str(exports) not in page.content()


def choose(page, name: str) -> None:
    page.get_by_label("Export").click()
    page.get_by_role("option", name=name).click()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone(visit, theme, tmp_path):
    page = visit(f"?__theme={theme}", viewport={"width": 390, "height": 844})
    example(page, "moon").click()
    answered(page, "bird")
    many(page, EXAMPLES / "cat.jpg", EXAMPLES / "LICENSES.md")
    page.get_by_role("tab", name="How good is it").click()
    for tab in ("One picture", "Many pictures", "How good is it"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    style = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
    ground, _ = page.locator("gradio-app").evaluate(style)
    _, ink = page.locator("#header h1").evaluate(style)
    brightness = [np.mean([int(value) for value in re.findall(r"\d+", colour)[:3]]) for colour in (ground, ink)]
    assert abs(brightness[0] - brightness[1]) > 150
    assert (brightness[0] < brightness[1]) == (theme == "dark")


def test_every_picture_and_control_has_its_words(visit, classifier):
    page = visit()
    example(page, "rocket").click()
    answered(page, next(iter(classifier.predict(EXAMPLES / "rocket.jpg"))))
    assert (
        page.evaluate("[...document.images].filter(i => i.checkVisibility() && !i.alt && !i.closest('button')).length") == 0
    )
    unnamed = """[...document.querySelectorAll('button')].filter(
        b => b.checkVisibility() && !(b.textContent.trim() || b.ariaLabel || b.title)).map(b => b.outerHTML)"""
    assert page.evaluate(unnamed) == []


# --- without a browser -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "unfamiliar", "start"),
    [(0.95, False, "Very likely <b>a&lt;</b>."), (0.6, False, "Probably <b>a&lt;</b>, perhaps b."),
     (0.4, False, "Perhaps <b>a&lt;</b> or <b>b</b>. Low confidence"), (0.95, True, "Closest to <b>a&lt;</b>. Unlike")],
)  # fmt: skip
def test_sentences(share, unfamiliar, start):
    from cifar_fastai.fragments import sentence

    words = sentence(Verdict({"a<": share, "b": (1 - share) / 2, "c": (1 - share) / 2}, unfamiliar), [], 0.048)
    assert re.sub(r"^<p[^>]*>", "", words).startswith(start)


def test_nothing_from_an_export_becomes_markup():
    from cifar_fastai import fragments

    evil = "<img src=x onerror=alert(1)>![x](http://x/y.png)[z](javascript:alert(1))"
    config = json.loads(json.dumps(load_export(SHIPPED).config).replace('"cat"', json.dumps(evil)))
    config |= {"name": evil, "model": f"{evil}`{evil}"}
    entries = [
        {"name": evil, "label": evil, "confidence": 0.5, "warnings": [evil]},
        {"name": evil, "error": evil},
    ]
    verdict = Verdict({evil: 0.9, "b": 0.1}, False)
    image = Image.new("RGB", (4, 4))
    parts = [
        fragments.header(config), fragments.quality(config), fragments.table(entries, ["data:"]), fragments.failure(evil),
        fragments.sentence(verdict, [evil], 0.05), fragments.views(image, evil, image),
    ]  # fmt: skip
    for part in parts:
        tags = re.findall(r"<(\w+)([^>]*)>", part)
        assert tags and not any("onerror" in rest for name, rest in tags if name != "img")
        assert all(rest.strip().startswith(("alt=", "class=")) for name, rest in tags if name == "img")
        assert not re.search(r"<img src=|<script|href=.(?!data:)", part)
