"""The commands as a user runs them: what they print, what they leave, how they end."""

import csv
import hashlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.commands import ROOT, assert_clear_error, call, call_here, environment
from helpers.files import RUN_FILES, write_pictures
from PIL import Image

from cifar_fastai import cli


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# --- train -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_every_file(digits_run):
    assert sorted(path.name for path in digits_run.folder.iterdir()) == RUN_FILES
    assert re.fullmatch(r"\d{8}-\d{6}-digits", digits_run.folder.name)
    assert digits_run.errors == ""


def test_a_run_tells_what_it_does_in_plain_lines(digits_run):
    lines = digits_run.output.splitlines()
    first_words = [line.split()[0] for line in lines]
    assert first_words == ["data", "recipe", "run", "about", *["epoch"] * 8, "test", "report", "export", "digest"]
    assert lines[-1].split()[1].rstrip(":") == hashlib.sha256((digits_run.export / "MANIFEST.json").read_bytes()).hexdigest()
    assert "1,293 training, 144 validation, 360 test images of 10 classes" in lines[0]
    assert "\r" not in digits_run.output and "\x1b" not in digits_run.output


def test_a_folder_of_pictures_to_an_answer(tmp_path):
    """From somebody's own images to a prediction, through an archive's folder layout and class names."""
    write_pictures(tmp_path / "colours", n_train=40)
    train = call("train.py", "--data", "colours", "--epochs", "4", "--bs", "16", cwd=tmp_path)
    assert train.returncode == 0, train.stderr
    Image.new("RGB", (300, 200), (200, 20, 20)).save(tmp_path / "photo.jpg")
    answer = call("predict.py", "photo.jpg", cwd=tmp_path)
    assert re.fullmatch(r"photo\.jpg\tred\t\d+\.\d%\n", answer.stdout), answer.stdout + answer.stderr
    assert (tmp_path / "exports" / "cpu-colours").is_dir()


@pytest.mark.slow
def test_other_sizes_from_training_to_prediction(tmp_path, photo):
    command = ("--data", "digits", "--size", "48", "--recipe", "fast", "--subset", "300", "--epochs", "1", "--bs", "64")
    train = call("train.py", *command, "--lr", "0.1", "--name", "large", cwd=tmp_path)
    assert train.returncode == 0, train.stderr
    config = json.loads((tmp_path / "exports/large/config.json").read_text())
    assert config["size"] == 48
    answer = call("predict.py", "--export", "large", photo, cwd=tmp_path)
    assert re.fullmatch(r".*photo\.png\t\d\t\d+\.\d%\n", answer.stdout), answer.stderr


def test_several_seeds_report_their_spread(tmp_path):
    command = ("--data", "digits", "--subset", "300", "--epochs", "2", "--bs", "32", "--seed", "5", "--seeds", "3")
    command += ("--recipe", "classic-sgd")
    done = call("train.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert [figures["seed"] for figures in metrics] == [5, 6, 7]
    accuracies = [figures["test_accuracy"] for figures in metrics]
    (path,) = (tmp_path / "runs").glob("*.json")
    summary = json.loads(path.read_text())
    assert summary["n"] == 3 and [row["test_accuracy"] for row in summary["runs"]] == accuracies
    assert summary["mean"]["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["std"]["test_accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    assert f"mean {np.mean(accuracies):.2%}, standard deviation {np.std(accuracies, ddof=1):.2%}" in done.stdout
    assert len(list((tmp_path / "exports").iterdir())) == 3


def test_on_a_terminal_a_bar_tells_epoch_loss_accuracy_and_time_left(tmp_path):
    terminal, inside = pty.openpty()
    command = [sys.executable, ROOT / "train.py", "--data", "digits", "--epochs", "2", "--subset", "400", "--bs", "16"]
    command += ["--recipe", "classic-sgd"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=inside, stderr=inside, env=environment(TERM="xterm", COLUMNS="120")
    )
    os.close(inside)
    shown = b""
    while True:
        select.select([terminal], [], [], 120)
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other side has closed
            break
    os.close(terminal)
    assert process.wait() == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    assert re.search(r"epoch 2/2  loss \d\.\d+  accuracy \d+\.\d%.*\d:\d\d:\d\d left", text)
    assert len(re.findall(r"epoch 1/2  train loss", text)) == 1 and "about" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--recipe", "fsat"], 2, ["no recipe 'fsat'", "Did you mean 'fast'"]),
        (["--model", "smal"], 2, ["no model 'smal'", "Did you mean 'small'"]),
        (["--valid-pct", "0.5"], 2, ["between 0.10 and 0.20"]),
        (["--epochs", "0"], 2, ["epochs must be at least 1"]),
        (["--epochs", "three"], 2, ["invalid int value: 'three'"]),
        (["--epoch", "3"], 2, ["Did you mean '--epochs'"]),
        (["--bs", "0"], 2, ["bs must be at least 1"]),
        (["--lr", "-1"], 2, ["lr must be a positive number"]),
        (["--size", "16"], 2, ["size must lie between 32 and 128"]),
        (["--size", "large"], 2, ["invalid int value: 'large'"]),
        (["--seeds", "0"], 2, ["--seeds must be at least 1"]),
        (["--subset", "5"], 2, ["between 100 and 1427, or be all 1437"]),
        (["--name", "../x"], 2, ["--name '../x'"]),
        (["--device", "tpu"], 2, ["invalid choice: 'tpu'"]),
        (["--data", "nowhere"], 3, ["no such file or folder", "--data digits"]),
        (["--data", "empty"], 3, ["no images in train/"]),
        (["--data", "notes.tgz"], 3, ["neither a tar nor a zip archive"]),
        (["--out", "notes.tgz"], 2, ["notes.tgz", "--out"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_of_train(tmp_path, arguments, code, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.tgz").write_text("no archive")
    defaults = [] if "--data" in arguments else ["--data", "digits"]
    assert_clear_error(call_here("train", *defaults, *arguments, cwd=tmp_path), code, *words)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "exports").exists()


def test_a_device_that_is_not_there(tmp_path):
    import torch

    absent = "mps" if torch.cuda.is_available() else "cuda"
    assert_clear_error(call_here("train", "--data", "digits", "--device", absent, cwd=tmp_path), 2, absent, "there is: ")


def test_a_diverging_training_exits_4_without_an_export(tmp_path):
    arguments = ("--data", "digits", "--recipe", "classic-sgd", "--lr", "1e30", "--subset", "300", "--epochs", "2")
    assert_clear_error(call_here("train", *arguments, cwd=tmp_path), 4, "NaN or infinite", "--lr")
    assert not (tmp_path / "exports").exists()


def test_ctrl_c_ends_with_130_and_one_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--data", "digits", "--epochs", "500"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it as ignored
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(
        r"interrupted: the state is saved; go on with: python -m cifar_fastai train --resume runs/\S+\n", errors
    )


def test_recipes_are_listed(tmp_path):
    done = call("train.py", "--recipe", "help", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("classic-adam", "classic-sgd", "fast", "cpu", "slim", "short", "large", "digits", "transfer"):
        assert f"\n{name}\n" in "\n" + done.stdout


@pytest.mark.parametrize("script", ["train.py", "predict.py", "app.py"])
def test_help_names_each_option_once_with_its_default(tmp_path, script):
    done = call(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    options = re.findall(r"^  (--[a-z-]+)", done.stdout, flags=re.M)
    assert len(options) == len(set(options)) > 3
    assert "None" not in done.stdout and "==SUPPRESS==" not in done.stdout


def test_the_package_offers_the_same_commands(tmp_path, digits_run, photo):
    by_package = call("-m", "cifar_fastai", "predict", "--export", digits_run.export, photo, cwd=tmp_path)
    by_script = call("predict.py", "--export", digits_run.export, photo, cwd=tmp_path)
    assert by_package.returncode == 0 and by_package.stdout == by_script.stdout != ""
    assert_clear_error(call("-m", "cifar_fastai", "trian", cwd=tmp_path), 2, "trian")
    assert_clear_error(call("-m", "cifar_fastai", cwd=tmp_path), 2, "COMMAND")


# --- predict -----------------------------------------------------------------------------------------------------


def test_predict_prints_a_line_an_image(digits_run, photo, tmp_path):
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    for name in ("b.png", "a.jpg", ".hidden.png"):
        Image.new("RGB", (40, 40)).save(folder / name)
    (folder / "notes.txt").write_text("x")
    (folder / "folder.png").mkdir()
    done = call("predict.py", "--export", digits_run.export, photo, "folder", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(photo), "folder/deep/a.jpg", "folder/deep/b.png"]
    assert all(line[1] in "0123456789" and re.fullmatch(r"\d+\.\d%", line[2]) for line in lines)


@pytest.fixture
def predict(digits_run, tmp_path, monkeypatch, capsys):
    """predict.py without a process of its own: the folder it runs in is tmp_path."""
    from cifar_fastai.cli import main

    def predict(*arguments):
        monkeypatch.chdir(tmp_path)
        code = main("predict", ["--export", str(digits_run.export), *map(str, arguments)])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return predict


def test_predict_expands_patterns_that_the_shell_left_alone(predict, tmp_path):
    for name in ("b.png", "a.png", "deep/c.png", "x[1].png", "x1.png", "page.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name, "PNG")
    done = predict("[ab].png", "**/c.*", "x[1].png", f"{tmp_path}/?.png", "none*.png")
    found = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert found == ["a.png", "b.png", "deep/c.png", "x[1].png", f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert_clear_error(done, 2, "error: none*.png: there is no such file.")


def test_predict_json_and_standard_input(digits_run, photo, tmp_path):
    command = ("predict.py", "--export", digits_run.export, "--json", "--topk", "2")
    from_file = json.loads(call(*command, photo, cwd=tmp_path).stdout)
    with photo.open("rb") as file:
        from_pipe = json.loads(call(*command, "-", cwd=tmp_path, stdin=file).stdout)
    assert from_file["path"] == str(photo) and from_pipe["path"] == "-"
    assert from_file["topk"] == from_pipe["topk"] and len(from_file["topk"]) == 2
    assert from_file["topk"][0] == [from_file["label"], from_file["confidence"]]
    assert 0 < from_file["topk"][1][1] <= from_file["confidence"] <= 1
    nothing = call(*command, "-", cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert_clear_error(nothing, 2, "error: standard input: The file is empty.")


def test_predict_csv_can_be_read_back(predict, digits_run, photo, tmp_path):
    """Names with everything that a table has to quote, and the confidences to their last digit."""
    from cifar_fastai import Classifier

    names = ['a, "b".png', "new\nline.png", "Ω 猫.png"]
    for name in names:
        shutil.copy(photo, tmp_path / name)
    header, *rows = csv.reader(io.StringIO(predict("--csv", *names).stdout))
    assert header == ["path", "label", "confidence", "label_2", "confidence_2", "label_3", "confidence_3"]
    assert [row[0] for row in rows] == names
    objects = [json.loads(line) for line in predict("--json", *names).stdout.splitlines()]
    assert [[value for pair in about["topk"] for value in map(str, pair)] for about in objects] == [row[1:] for row in rows]
    confidences = Classifier(digits_run.export).predict(photo)
    for row in rows:
        assert row[1::2] == list(confidences)[:3]
        assert list(map(float, row[2::2])) == pytest.approx(list(confidences.values())[:3], abs=1e-6)
    assert predict("--csv", "--topk", "99", photo).stdout.splitlines()[0].endswith(",label_10,confidence_10")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_predict_on_a_terminal_without_unicode_and_names_that_are_no_text(digits_run, photo, tmp_path):
    names = [os.fsdecode(b"\xff.png"), "Ω.png"]
    for name in names:
        shutil.copy(photo, tmp_path / name)
    environ = environment(PYTHONIOENCODING="ascii")
    done = call("predict.py", "--export", digits_run.export, "--json", *names, cwd=tmp_path, env=environ, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == names


def test_predict_text_with_several_classes(predict, photo):
    assert re.fullmatch(r".*photo\.png\t\d\t\d+\.\d%\t\d\t\d+\.\d%\n", predict("--topk", "2", photo).stdout)


def test_many_files_in_their_order_with_the_bad_ones_named(predict, digits_run, tmp_path):
    """Several batches, of files that take different times to read; each answer is that of its file alone."""
    from cifar_fastai import Classifier

    noise = np.random.default_rng(0)
    bad, good = {f"{number:03}.png" for number in (0, 63, 64, 149)}, []
    for number in range(150):
        name, side = f"{number:03}.png", 700 if number % 20 == 0 else 30
        if name in bad:
            (tmp_path / name).write_text("no image")
            continue
        pixels = noise.integers(0, 256, (side, side, 3)) if number % 3 else np.full((9, 9, 3), number)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
        good.append(name)
    classifier = Classifier(digits_run.export)
    for options, tta in ((), False), (("--tta",), True):
        done = predict("--json", *options, "*.png")
        assert done.returncode == 2
        assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == sorted(bad)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [answer["path"] for answer in answers] == good
        for answer in answers[::7]:
            alone = classifier.predict(tmp_path / answer["path"], tta=tta)
            assert answer["label"] == next(iter(alone))
            assert answer["confidence"] == pytest.approx(alone[answer["label"]], abs=1e-6)


def test_predict_draws_where_the_evidence_lies(predict, digits_run, tmp_path):
    from cifar_fastai import Classifier, decode_image
    from cifar_fastai.explainer import Explainer

    noise, classifier = np.random.default_rng(0), Classifier(digits_run.export)
    names = ["a.png", "sub/A.png", "a-2.png", "b.c.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "bad.png").write_text("no image")
    plain = predict("--json", *names, "bad.png")
    done = predict("--json", *names, "bad.png", "--gradcam", "new/folder")
    assert (done.returncode, done.stdout, done.stderr) == (2, plain.stdout, plain.stderr), "the answers are the same"
    drawn = ["a-gradcam.png", "A-2-gradcam.png", "a-2-2-gradcam.png", "b.c-gradcam.png"]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(drawn)
    for name, file in zip(names, drawn, strict=True):
        picture = decode_image(tmp_path / name)
        overlay = Explainer(classifier).overlay(classifier.tensor(picture), picture, next(iter(classifier.predict(picture))))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "folder" / file)), np.asarray(overlay))

    (tmp_path / "new" / "folder" / "a-gradcam.png").unlink()
    (tmp_path / "new" / "folder" / "a-gradcam.png").mkdir()
    done = predict("a.png", "b.c.png", "--gradcam", "new/folder")
    assert done.returncode == 2 and [line.split("\t")[0] for line in done.stdout.splitlines()] == ["a.png", "b.c.png"]
    assert done.stderr == "error: new/folder/a-gradcam.png: the overlay cannot be written (Is a directory).\n"


def test_predict_cannot_make_the_folder_of_the_overlays(digits_run, photo, tmp_path):
    (tmp_path / "file").touch()
    done = call("predict.py", "--export", digits_run.export, photo, "--gradcam", "file", cwd=tmp_path)
    assert_clear_error(done, 2, "--gradcam file: this folder cannot be made (File exists)")
    assert done.stdout == ""


def test_answers_stream_and_no_more_is_read_than_will_soon_be_classified(digits_run):
    from cifar_fastai import Classifier
    from cifar_fastai.inference import MAX_BATCH
    from cifar_fastai.prediction import Answer, classify

    taken = []

    def endless():
        while True:
            taken.append(Answer("nowhere.png"))
            yield taken[-1]

    answers = classify(Classifier(digits_run.export), endless())
    assert "nowhere.png: The file cannot be read" in next(answers).error
    assert len(taken) == 2 * MAX_BATCH
    answers.close()


def test_a_bar_only_for_many_files_whose_answers_go_elsewhere(digits_run, photo, tmp_path):
    def shown(n, stdout):
        """What a terminal shows as standard error while n files are classified."""
        terminal, inside = pty.openpty()
        command = [sys.executable, ROOT / "predict.py", "--export", digits_run.export, "no.png", *[photo] * n]
        out = inside if stdout is None else stdout.open("w")
        subprocess.run(command, cwd=tmp_path, stdout=out, stderr=inside, env=environment(TERM="xterm", COLUMNS="80"))
        os.close(inside)
        text = b""
        while select.select([terminal], [], [], 0)[0]:
            try:
                text += os.read(terminal, 65536)
            except OSError:
                break
        os.close(terminal)
        return text

    many = shown(120, tmp_path / "answers")
    assert b"classifying" in many and b"121/121" in many and b"error: no.png: The file cannot be read" in many
    lines = (tmp_path / "answers").read_text().splitlines()
    assert len(lines) == 120 and set(lines) == {lines[0]} and lines[0].startswith(str(photo))
    assert b"classifying" not in shown(120, None)


def test_ctrl_c_ends_the_wait_for_standard_input(digits_run, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "predict.py", "--export", digits_run.export, "--csv", "-"],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline().startswith("path,label")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and process.stderr.read() == "interrupted\n"
    process.stdin.close()


def test_a_bad_image_among_good_ones(digits_run, photo, tmp_path):
    (tmp_path / "page.png").write_text("<script>alert(1)</script>")
    done = call("predict.py", "--export", digits_run.export, "page.png", photo, "none.png", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout.startswith(f"{photo}\t")
    first, second = done.stderr.splitlines()
    assert first.startswith("error: page.png: Not an image") and "script" not in first
    assert second == "error: none.png: The file cannot be read: No such file or directory."


@pytest.mark.parametrize("script", ["predict.py", "app.py"])
def test_no_export(tmp_path, photo, script):
    images = [photo] if script == "predict.py" else []
    done = call(script, "--export", "nowhere", *images, cwd=tmp_path)
    assert_clear_error(done, 5, "There is no export at nowhere", "train.py")


def test_wrong_usage_of_predict(digits_run, tmp_path):
    (tmp_path / "empty").mkdir()
    export = ("--export", digits_run.export)
    assert_clear_error(call("predict.py", *export, "empty", cwd=tmp_path), 2, "empty: no images in this folder")
    assert_clear_error(call("predict.py", *export, "--topk", "0", "x.png", cwd=tmp_path), 2, "--topk")
    assert_clear_error(call("predict.py", *export, "--json", "--csv", "x.png", cwd=tmp_path), 2, "not allowed with")
    assert_clear_error(call("predict.py", cwd=tmp_path), 2, "IMAGE")


def test_a_reader_that_leaves_early_is_no_fault(digits_run, photo, tmp_path):
    command = f"{sys.executable} {ROOT / 'predict.py'} --export {digits_run.export} {photo} {photo} | head -n 0"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(("longest", "recipe"), [(0, "slim"), (86_400, "cpu")])
def test_auto_on_a_cpu_takes_what_can_be_waited_for(monkeypatch, capsys, pictures, longest, recipe):
    monkeypatch.setattr("cifar_fastai.auto.MANY_IMAGES", 50)
    monkeypatch.setattr("cifar_fastai.auto.LONGEST", longest)
    monkeypatch.setattr("cifar_fastai.run.run", lambda recipe, options: chosen.append(recipe))
    chosen = []
    command = ["--data", str(pictures), "--epochs", "40", "--lr", "0.1", "--bs", "8", "--device", "cpu"]
    assert cli.main("train", command) == 0
    assert [(each.name, each.epochs, each.lr) for each in chosen] == [(recipe, 40, 0.1)]
    told = capsys.readouterr().out
    assert told.startswith(f"auto     recipe {recipe} on cpu: ") and told.count("\n") == 1
    assert (" for 30 epochs here" in told) == (recipe == "slim")


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        (["--data", "digits"], "digits"),
        (["--data", "digits", "--model", "base"], "cpu"),  # few images
        (["--data", "elsewhere", "--subset", "30000"], "large"),  # many, and nothing is read to know that
        (["--data", "elsewhere", "--subset", "30000", "--model", "base"], "fast"),
        (["--data", "elsewhere", "--subset", "30000", "--model", "resnet18"], "transfer"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, capsys, arguments, recipe):
    monkeypatch.setattr("cifar_fastai.run.pick_device", lambda asked: "cuda")
    monkeypatch.setattr("cifar_fastai.run.run", lambda recipe, options: chosen.append((recipe, options)))
    chosen = []
    assert cli.main("train", arguments) == 0
    assert [(recipe.name, options.device) for recipe, options in chosen] == [(recipe, "cuda")]
    assert capsys.readouterr().out.startswith(f"auto     recipe {recipe} on cuda: ")
