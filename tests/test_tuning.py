"""The search for a recipe: with several workers, through interruptions, on the validation split alone."""

import csv
import dataclasses
import json
import resource
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from helpers.commands import assert_clear_error, call_here, environment
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from PIL import Image

from cifar_fastai import get_recipe
from cifar_fastai.cache import load_data
from cifar_fastai.errors import UserError
from cifar_fastai.recipes import search_space
from cifar_fastai.run import RunOptions
from cifar_fastai.tuning import open_study, tune

OPTIONS = ("--data", "digits", "--recipe", "mine.toml", "--subset", "120", "--bs", "16")
SHORT = get_recipe("classic-adam", epochs=3, bs=16)
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def worker(*arguments, cwd):
    command = [sys.executable, "-m", "cifar_fastai", "tune", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def read_until(process, words: str) -> None:
    assert any(words in line for line in process.stdout), process.stderr.read()


def read_study(path, name):
    return optuna.load_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name=name)


def rows_of(folder) -> list[dict]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """One study: two workers at once, one of them killed in a trial; then a third, which is asked to stop; then a last."""
    cwd = tmp_path_factory.mktemp("tuning")
    (cwd / "mine.toml").write_text('base = "classic-adam"\nepochs = 2\nlr = 0.003\n')
    doomed, other = (worker(*OPTIONS, "--trials", 5, cwd=cwd) for _ in range(2))
    read_until(doomed, "epoch 1/2")
    doomed.kill()
    doomed.communicate()
    _, errors = other.communicate(timeout=300)
    assert other.returncode == 0, errors
    stopped = worker(*OPTIONS, "--trials", 50, cwd=cwd)
    read_until(stopped, "epoch 1/2")
    stopped.send_signal(signal.SIGTERM)
    _, words = stopped.communicate(timeout=120)
    (folder,) = (cwd / "runs").iterdir()
    before = read_study(folder / "study.journal", "mine-digits").trials
    assert call_here("tune", *OPTIONS, "--trials", "7", cwd=cwd).returncode == 0
    study = read_study(folder / "study.journal", "mine-digits")
    stopped = SimpleNamespace(returncode=stopped.returncode, stderr=words, trials=before)
    return SimpleNamespace(cwd=cwd, folder=folder, study=study, stopped=stopped)


@pytest.mark.slow
def test_two_workers_share_a_study_and_one_outlives_the_other(tuned):
    trials = tuned.study.trials
    own = [trial for trial in trials if trial.params["lr"] == 0.003]
    assert [trial.number for trial in own] == [0], "one worker begins with the recipe's own values, and only one"
    assert own[0].params == {"lr": 0.003, "wd": 1e-5, "pct_start": 0.25, "label_smoothing": 0, "crop_pad": 0, "cutout": 0}
    assert len({tuple(trial.params.values()) for trial in trials}) >= len(trials) - 1, "no two workers draw alike"
    assert sum(trial.state == TrialState.RUNNING for trial in trials) == 1, "the one whose process was killed"
    assert len([trial for trial in trials if trial.state in FINISHED]) == 7


def test_a_signal_stops_it_and_the_trial_is_repeated(tuned):
    assert tuned.stopped.returncode == 143
    assert tuned.stopped.stderr == ("interrupted: the trials that ended are kept; the same command goes on with the study\n")
    *_, failed, waiting = tuned.stopped.trials
    assert (failed.state, waiting.state) == (TrialState.FAIL, TrialState.WAITING)
    assert tuned.study.trials[waiting.number].params == failed.params
    assert tuned.study.trials[waiting.number].state in FINISHED


def test_the_table_has_every_trial_that_ended(tuned):
    rows = rows_of(tuned.folder)
    trials = [trial for trial in tuned.study.trials if trial.state in FINISHED]
    assert [int(row["trial"]) for row in rows] == [trial.number + 1 for trial in trials]
    for row, trial in zip(rows, trials, strict=True):
        assert {field: float(row[field]) for field in trial.params} == trial.params
        assert row["state"] == trial.state.name.lower() and int(row["epochs"]) == len(trial.intermediate_values)
        assert row["valid_accuracy"] == ("" if trial.value is None or row["state"] == "pruned" else str(trial.value))


def test_the_best_recipe_trains_to_the_same_accuracy(tuned):
    """The file holds the best trial's values over the recipe's, and a run by it has the trial's validation accuracy."""
    best = max((row for row in rows_of(tuned.folder) if row["valid_accuracy"]), key=lambda row: float(row["valid_accuracy"]))
    path = tuned.folder / "best.toml"
    space = search_space(get_recipe("classic-adam"))
    values = {field: type(low)(float(best[field])) for field, (low, *_) in space.items()}
    expected = dataclasses.replace(get_recipe(tuned.cwd / "mine.toml", bs=16), **values)
    assert dataclasses.replace(get_recipe(path), name="mine", about="", measured="") == expected
    assert f"{float(best['valid_accuracy']):.2%}" in get_recipe(path).about

    again = ("--data", "digits", "--subset", "120", "--recipe", path, "--out", "tries")
    assert call_here("train", *again, cwd=tuned.cwd).returncode == 0
    (folder,) = (tuned.cwd / "tries").iterdir()
    assert json.loads((folder / "metrics.json").read_text())["valid_accuracy"] == pytest.approx(
        float(best["valid_accuracy"]), abs=1e-6
    )
    assert get_recipe(folder / "recipe.toml") == get_recipe(path)


def test_the_pictures_show_something(tuned):
    for name in ("history.png", "importances.png"):
        pixels = np.asarray(Image.open(tuned.folder / name).convert("RGB"))
        blue = np.abs(pixels.astype(int) - (0x00, 0x72, 0xB2)).sum(axis=2) < 30
        assert pixels.shape[0] > 200 and blue.sum() > 200, name
    assert sorted(path.name for path in tuned.folder.iterdir()) == [
        "best.toml", "history.png", "importances.png", "study.journal", "trials.csv"
    ]  # fmt: skip


def test_a_study_goes_on_only_as_it_began(tuned):
    done = call_here("tune", *OPTIONS, "--seed", "1", "--lr", "0.1", cwd=tuned.cwd)
    assert_clear_error(done, 2, "was begun with another lr, another seed, another space: repeat its command")


# --- in this process ---------------------------------------------------------------------------------------------


def options_for(tmp_path, source="digits", **kwargs):
    return RunOptions(source=source, subset=120, out=tmp_path, **kwargs)


def test_the_test_split_decides_nothing(tmp_path):
    """With other test images and labels every trial comes out the same, and a study goes on with them."""
    data = load_data("digits")
    images, labels = data.images.copy(), data.labels.copy()
    images[data.n_train :], labels[data.n_train :] = 255 - images[data.n_train :], 0
    changed = dataclasses.replace(data, images=images, labels=labels)
    first, second = (
        tune(SHORT, options_for(tmp_path / name, source), 2, fixed=("cutout",))
        for name, source in (("first", data), ("second", changed))
    )
    kept = [[{**row, "seconds": ""} for row in rows_of(folder)] for folder in (first, second)]
    assert len(kept[0]) == 2 and kept[0] == kept[1]
    assert tune(SHORT, options_for(tmp_path / "first", changed), 2, fixed=("cutout",)) == first

    images[0] = 255 - images[0]  # a training image
    with pytest.raises(UserError, match="begun with another data: repeat"):
        tune(SHORT, options_for(tmp_path / "first", changed), 2, fixed=("cutout",))


def test_a_trial_behind_the_median_of_the_others_is_ended(tmp_path):
    """The others are made up here, perfect from their second epoch on; a third of the epochs is waited for."""
    folder = tune(SHORT, options_for(tmp_path), 1)
    study = read_study(folder / "study.journal", "classic-adam-digits")
    (own,) = study.trials
    for _ in range(4):
        others = {"params": own.params, "distributions": own.distributions, "value": 1.0}
        study.add_trial(optuna.trial.create_trial(**others, intermediate_values={0: 0.0, 1: 1.0, 2: 1.0}))
    tune(SHORT, options_for(tmp_path), 6)
    *_, last = rows_of(folder)
    assert (last["state"], last["epochs"], last["valid_accuracy"]) == ("pruned", "2", "")


def test_a_trial_that_diverges_counts_and_nothing_is_left_of_it(tmp_path, capsys):
    folder = tune(dataclasses.replace(SHORT, lr=1e30, optimizer="sgd"), options_for(tmp_path), 1)
    assert [path.name for path in folder.iterdir()] == ["study.journal"]
    assert "ended early, diverged" in capsys.readouterr().out
    (trial,) = read_study(folder / "study.journal", "classic-adam-digits").trials
    assert trial.state == TrialState.PRUNED


def test_a_database_keeps_a_study_too(tmp_path):
    address = f"sqlite:///{tmp_path / 'study.db'}"
    folder = tune(SHORT, options_for(tmp_path), 1, address, fixed=("lr",))
    study = optuna.load_study(storage=address, study_name="classic-adam-digits")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] and "lr" not in study.trials[0].params
    assert get_recipe(folder / "best.toml").lr == SHORT.lr


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "damaged.journal").write_text('{"op_code": 0, "worker_id"\n{}\n')
    setup = {"epochs": 3, "space": {}}
    with pytest.raises(UserError, match=r"damaged.journal cannot be opened \(\w+: .*--study takes a file, or a database"):
        open_study(str(tmp_path / "damaged.journal"), "study", setup)
    with pytest.raises(UserError, match=r"^The study sqlite:////nowhere/study.db cannot be opened"):
        open_study("sqlite:////nowhere/study.db", "study", setup)
    with pytest.raises(UserError) as error:
        open_study("mysql://me:secret@localhost/studies", "study", setup)
    assert "secret" not in str(error.value)


def test_something_must_be_left_to_tune(tmp_path):
    with pytest.raises(UserError, match="Nothing is left to tune"):
        tune(SHORT, options_for(tmp_path), 1, fixed=tuple(search_space(SHORT)))


def test_what_a_killed_trial_has_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    left = tmp_path / "temporary" / "cifar_fastai-trial-dead"
    (left / "trial").mkdir(parents=True)
    (left / "lock").touch()
    tune(SHORT, options_for(tmp_path), 1)
    assert not list((tmp_path / "temporary").iterdir())


def test_a_study_that_cannot_be_written_any_more(tmp_path):
    """The limit on the size of a file is met as a full disk is, while the trials' own files have room."""
    options = options_for(tmp_path)
    folder = options.out / "tune-classic-adam-digits"
    tune(SHORT, options, 1)
    study = read_study(folder / "study.journal", "classic-adam-digits")
    study.set_user_attr("padding", "x" * 20_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "study.journal").stat().st_size + 1500, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written .*File too large.*repeat the command") as caught:
            tune(SHORT, options, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", ["/proc/version", "/dev/full", "sqlite:////proc/study.db"])
def test_a_study_where_nothing_can_be_written(tmp_path, at):
    with pytest.raises(UserError, match=r"^The study .* cannot be opened \(") as caught:
        tune(SHORT, options_for(tmp_path), 1, at)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "params", [{"weights": "/dev/zero"}, {"lr": 1e9}, {"epochs": 10**9}, {"bs": 1}], ids=["path", "far", "epochs", "bs"]
)
def test_a_study_of_somebody_elses_decides_values_of_the_space_alone(tmp_path, params):
    options = options_for(tmp_path)
    folder = tune(SHORT, options, 1)
    best = (folder / "best.toml").read_bytes()
    study = read_study(folder / "study.journal", "classic-adam-digits")
    ((name, value),) = params.items()
    kind = CategoricalDistribution([value]) if isinstance(value, str) else FloatDistribution(0, 1e10)
    study.add_trial(optuna.create_trial(params={name: value}, distributions={name: kind}, value=1.0))
    with pytest.raises(UserError, match="holds other things than this command writes"):
        tune(SHORT, options, 2)
    assert (folder / "best.toml").read_bytes() == best
