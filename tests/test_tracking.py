"""What trackers were told, read back from their own files and held against the run's."""

import csv
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import call, environment
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

ARGUMENTS = ("--data", "digits", "--subset", "200", "--recipe", "fast", "--bs", "60", "--epochs", "2", "--name", "logged")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A training that was logged to both trackers, and beside it the same without."""
    cwd = tmp_path_factory.mktemp("tracking")
    (cwd / "plain").mkdir()
    done = call("train.py", *ARGUMENTS, "--tensorboard", "--wandb", cwd=cwd, env=environment(WANDB_MODE="offline"))
    assert done.returncode == 0, done.stderr
    assert call("train.py", *ARGUMENTS, cwd=cwd / "plain").returncode == 0
    (folder,) = (cwd / "runs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    return SimpleNamespace(cwd=cwd, folder=folder, metrics=metrics, output=done.stdout)


@pytest.fixture(scope="module")
def events(logged):
    accumulator = EventAccumulator(str(logged.folder / "tensorboard"), size_guidance={"images": 0})
    return accumulator.Reload()


@pytest.mark.slow
def test_logging_changes_no_weight(logged):
    weights = [cwd / "exports" / "logged" / "model.safetensors" for cwd in (logged.cwd, logged.cwd / "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_tensorboard_has_the_history(logged, events):
    history = list(csv.DictReader((logged.folder / "history.csv").open()))
    for name in ("train_loss", "valid_loss", "accuracy"):
        values = [(event.step, event.value) for event in events.Scalars(f"epoch/{name}")]
        assert values == [(int(row["epoch"]), pytest.approx(float(row[name]), rel=1e-6)) for row in history]
    steps = [event.step for event in events.Scalars("raw_loss")]
    assert len(steps) == 6 and steps == sorted(set(steps))  # 180 images, three batches of 60 in each epoch
    rates = [event.value for event in events.Scalars("lr_1")]
    assert rates[-1] == pytest.approx(float(history[-1]["lr"]), rel=1e-5)


def test_tensorboard_has_the_figures_and_the_pictures(logged, events):
    for name in ("test_accuracy", "valid_loss", "ece"):
        assert events.Scalars(f"final/{name}")[0].value == pytest.approx(logged.metrics[name], rel=1e-6)
    assert {tag.removeprefix("pictures/") for tag in events.Tags()["images"]} == {
        path.stem for path in logged.folder.glob("*.png")
    }
    logged_picture = events.Images("pictures/confusion_matrix")[0]
    with Image.open(logged.folder / "confusion_matrix.png") as picture:
        assert (logged_picture.width, logged_picture.height) == picture.size


def test_tensorboard_has_the_hyperparameters(events):
    plugin = events.PluginTagToContent("hparams")
    assert any(b"label_smoothing" in content and b"lookahead_steps" in content for content in plugin.values())


def wandb_records(folder):
    """The records of an offline run: a file of seven bytes of head, then LevelDB's log format, in blocks of 32 kB."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_has_figures_configuration_and_pictures_offline(logged):
    summary, config, steps = {}, {}, []
    for record in wandb_records(logged.folder):
        kind = record.WhichOneof("record_type")
        if kind == "summary":
            summary |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
        elif kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            steps.append({(item.key or item.nested_key[0]): item.value_json for item in record.history.item})
    assert summary["test_accuracy"] == logged.metrics["test_accuracy"]
    assert np.array_equal(summary["confusion_matrix"], logged.metrics["confusion_matrix"])
    assert config["recipe"]["label_smoothing"] == 0.2 and config["seed"] == 42
    assert sum("train_loss" in step for step in steps) >= 6
    assert len(list(logged.folder.glob("wandb/offline-run-*/files/media/images/pictures/*.png"))) == len(
        list(logged.folder.glob("*.png"))
    )


def test_it_says_where_to_look(logged):
    assert "tensorboard --logdir runs" in logged.output and "wandb sync" in logged.output


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_anything_is_done(name, tmp_path):
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"  # what makes an import of it fail
        f"from cifar_fastai.cli import main; sys.exit(main('train', ['--data', 'digits', '--{name}']))"
    )
    done = call("-c", code, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("auto") and not (tmp_path / "runs").exists()
    assert done.stderr == f"error: the package {name!r} is missing: `pip install {name}`.\n"


def test_without_a_login_it_is_said_before_anything_is_done(tmp_path):
    alone = environment(HOME=str(tmp_path), WANDB_MODE="online", WANDB_API_KEY="")
    done = call("train.py", "--data", "digits", "--wandb", cwd=tmp_path, env=alone)
    assert done.returncode == 2 and "WANDB_MODE=offline" in done.stderr and not (tmp_path / "runs").exists()
