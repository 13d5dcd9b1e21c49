"""Tuning: a recipe trained again and again with other values, judged by the validation split alone.

The trials are kept in a study, a file or a database, that outlives the processes that work on it; there may be several.
"""

import csv
import dataclasses
import errno
import json
import os
import re
import tempfile
from collections.abc import Collection
from contextlib import contextmanager, suppress
from pathlib import Path

from fastai.callback.core import Callback

from cifar_fastai import figures
from cifar_fastai.cache import load_data
from cifar_fastai.distributed import check_alone
from cifar_fastai.errors import TrainingDiverged, UserError, first_line
from cifar_fastai.interrupts import Interrupts
from cifar_fastai.pretrained import try_model
from cifar_fastai.recipes import DESCRIPTION, Recipe, recipe_toml, search_space
from cifar_fastai.run import RunOptions, prepare, run_name
from cifar_fastai.scratch import scratch_folder
from cifar_fastai.sources import ImageData
from cifar_fastai.terminal import say
from cifar_fastai.training import StopOnDivergence, train

N_STARTUP_TRIALS = 5  # completed, before one is compared with them
LEAST_TO_EXPLAIN = 4  # completed trials, before fields are compared by what they matter


def tune(
    recipe: Recipe, options: RunOptions, n_trials: int, study_at: str | None = None, fixed: Collection[str] = ()
) -> Path:
    """Try values for the fields of `search_space` until `n_trials` trials have ended, earlier ones of the study counted.

    The first trial has the recipe's own values, as far as they lie in the space; the others are drawn by TPE. One that
    falls behind the median of the others after a third of its epochs is ended. study_at: a file or a database's address as
    SQLAlchemy takes it, a file in the returned folder by default; of several processes at work on one study, each finishes
    the trial it is at. fixed: fields that keep the recipe's value. The folder gets best.toml, trials.csv and pictures, also
    when it is interrupted. Raises UserError and its kinds, and Interrupted.
    """
    check_alone("tune")
    try_model(recipe)  # before the data, which can take long
    data = without_test_split(load_data(options.source, recipe.size))
    name = run_name(recipe, options, data.source)
    folder = options.out / f"tune-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made: {error.strerror or error}. Choose another --out.") from None
    space = {field: span for field, span in search_space(recipe).items() if field not in fixed}
    if not space:
        raise UserError("Nothing is left to tune: every field of search_space is fixed.")
    setup = _setup(recipe, options, data, space)
    study = open_study(study_at or str(folder / "study.journal"), name, setup)
    say("data", f"{data.source}: {data.n_train:,} images to train and validate on; the test split stays out of it")
    say("study", f"{name}: {len(_ended(study))} of {n_trials} trials done; values for {', '.join(space)}")
    with _writing(folder):
        try:
            with Interrupts("the trials that ended are kept; the same command goes on with the study"):
                while len(_ended(study)) < n_trials:
                    _next_trial(study, space, recipe, options, data)
        finally:
            _write_results(study, recipe, setup, data.source, folder)
    return folder


@contextmanager
def _writing(folder: Path):
    """Raises UserError where the study or what is made of it cannot be written or read any more."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (OSError, StorageInternalError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"The study or its results in {folder} cannot be written ({reason}). The trials that ended are kept: make room, "
            "or give the leave to write there, and repeat the command."
        ) from None


def without_test_split(data: ImageData) -> ImageData:
    """The training split alone."""
    rows = slice(data.n_train)  # validation images included
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows], held_out=False)


def open_study(at: str, name: str, setup: dict):
    """The Optuna study called `name` at a file or address, begun if it is not there.

    setup: what its trials have in common, as `_setup` gives it. Raises UserError, also if the study was begun with another.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage, RDBStorage
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise UserError(f"Tuning needs the package {error.name!r}: `pip install optuna`.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner(N_STARTUP_TRIALS, n_warmup_steps=setup["epochs"] // 3)
    try:
        if "://" not in at and os.path.lexists(at) and not os.path.isfile(at):  # noqa: PTH113  /dev/zero would be read for ever
            raise OSError(errno.EINVAL, "it is no regular file")
        storage = RDBStorage(at) if "://" in at else JournalStorage(JournalFileBackend(at))
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize", pruner=pruner)
            study.enqueue_trial(_own_values(setup))
        except optuna.exceptions.DuplicatedStudyError:  # of several processes, one begins the study
            study = optuna.load_study(storage=storage, study_name=name, pruner=pruner)
        if "setup" not in study.user_attrs:
            study.set_user_attr("setup", setup)
    except Exception as error:  # a damaged file or a database that is away makes them raise nearly anything
        words = getattr(error, "strerror", None) or error
        where, reason = (re.sub(r"//[^@/]*@", "//…@", str(text).partition("\n")[0]) for text in (at, words))
        raise UserError(
            f"The study {where} cannot be opened ({type(error).__name__}: {reason}). --study takes a file, or a database's "
            "address such as sqlite:///study.db."
        ) from None
    begun = study.user_attrs["setup"]
    if isinstance(begun, dict) and (differing := [key for key in setup if begun.get(key) != setup[key]]):
        raise UserError(
            f"The study {name} was begun with another {', another '.join(differing)}: repeat its command, or begin a new "
            "one with --name."
        )
    if begun != setup or not all(_is_sound(trial, setup["space"]) for trial in study.get_trials(deepcopy=False)):
        raise UserError(f"The study {name} holds other things than this command writes: begin a new one with --name.")
    return study


def _is_sound(trial, space: dict) -> bool:
    """Whether a trial, which somebody else may have written, has values of these fields alone, each within its span."""
    return all(
        field in space and type(value) in (int, float) and 0.999 * space[field][0] <= value <= 1.001 * space[field][1]
        for field, value in trial.params.items()
    )


class Prune(Callback):
    """Tells the study each epoch's validation accuracy, and ends a training that falls behind the others."""

    order = StopOnDivergence.order + 1  # before the checkpoints, which would be in vain

    def __init__(self, trial):
        self.trial = trial

    def after_epoch(self):
        from optuna import TrialPruned

        self.trial.report(self.recorder.values[-1][2], step=self.epoch)
        if self.trial.should_prune():
            raise TrialPruned("behind the others")  # without words fastai fails to pass it on


def _next_trial(study, space: dict, recipe: Recipe, options: RunOptions, data: ImageData) -> None:
    """One trial from the choice of its values to its verdict. If it is interrupted, its values wait for the next one."""
    from optuna import TrialPruned
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    trial = study.ask()
    try:
        # By number, so that a study repeats and yet no two workers draw alike. multivariate would draw before `ask` returns.
        study.sampler = TPESampler(seed=options.seed + trial.number, multivariate=False)
        values = {field: _suggest(trial, field, *span) for field, span in space.items()}
        say("trial", f"{trial.number + 1}: {', '.join(f'{field} {value:.3g}' for field, value in values.items())}")
        accuracy = _validation_accuracy(trial, dataclasses.replace(recipe, **values), options, data)
        study.tell(trial, accuracy)
        best = study.best_trial
        say("trial", f"{trial.number + 1}: accuracy {accuracy:.2%}, best {best.value:.2%} (trial {best.number + 1})")
    except (TrialPruned, TrainingDiverged) as reason:
        study.tell(trial, state=TrialState.PRUNED)
        why = "behind the others" if isinstance(reason, TrialPruned) else "diverged"
        say("trial", f"{trial.number + 1}: ended early, {why}")
    except BaseException as reason:
        with suppress(OSError):  # the reason may be that nothing can be written
            study.tell(trial, state=TrialState.FAIL)
            if isinstance(reason, KeyboardInterrupt):
                study.enqueue_trial(trial.params)
        raise


def _suggest(trial, field: str, low, high, log: bool):
    if isinstance(low, int):
        return trial.suggest_int(field, low, high, log=log)
    return trial.suggest_float(field, low, high, log=log)


def _own_values(setup: dict) -> dict:
    """The recipe's values for what is tuned, or the nearest that lie in the space."""
    return {field: min(max(setup[field], low), high) for field, (low, high, _) in setup["space"].items()}


def _validation_accuracy(trial, recipe: Recipe, options: RunOptions, data: ImageData) -> float:
    """Of the epoch that the training keeps, which is the one of lowest validation loss.

    Not the loss itself: label smoothing, which is tuned too, changes its scale.
    """
    learn = prepare(recipe, options, data)
    with scratch_folder("trial") as scratch:
        training = train(learn, recipe, scratch, cbs=[Prune(trial)])
    return training.history[training.best_epoch - 1]["accuracy"]


def _ended(study) -> list:
    """The trials that count: completed or pruned. One whose process was killed stays 'running' and does not."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _setup(recipe: Recipe, options: RunOptions, data: ImageData, space: dict) -> dict:
    """What the trials of a study must have in common to be compared, as JSON gives it back."""
    fields = {field: value for field, value in dataclasses.asdict(recipe).items() if field not in DESCRIPTION[1:]}
    circumstances = {"data": data.fingerprint, "seed": options.seed, "subset": options.subset, "space": space}
    return json.loads(json.dumps(fields | circumstances))


def _write_results(study, recipe: Recipe, setup: dict, source: str, folder: Path) -> None:
    """best.toml, trials.csv and the pictures, each replaced at once, since several workers may write them."""
    ended = _ended(study)
    completed = [trial for trial in ended if trial.state.name == "COMPLETE"]
    if not completed:
        say("best", "none yet: no trial was completed")
        return
    best = study.best_trial
    about = f"{recipe.name} tuned on {source}: the best of {len(ended)} trials, validation accuracy {best.value:.2%}"
    tuned = dataclasses.replace(recipe, name=f"{recipe.name[:90]}-tuned", about=about, measured="", **best.params)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as made:
        scratch = Path(made)
        (scratch / "best.toml").write_text(recipe_toml(tuned), encoding="utf-8")
        _write_trials(scratch / "trials.csv", ended)
        own = next((trial.value for trial in completed if trial.params == _own_values(setup)), None)
        values = {trial.number + 1: trial.value if trial in completed else None for trial in ended}
        figures.draw(scratch / "history.png", figures.tuning_history, values, own)
        if importances := _importances(study, completed, setup["seed"]):
            figures.draw(scratch / "importances.png", figures.tuning_importances, importances, len(completed))
        for path in scratch.iterdir():
            path.replace(folder / path.name)
    say("best", f"trial {best.number + 1}: {about}")
    say("best", f"{folder / 'best.toml'}: try `--recipe` with it, and --seeds: the best of many is lucky, too")


def _write_trials(path: Path, trials: list) -> None:
    fields = list(trials[0].params)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", "valid_accuracy", "epochs", "seconds", *fields])
        for trial in trials:
            accuracy = "" if trial.state.name == "PRUNED" else trial.value
            seconds = round(trial.duration.total_seconds(), 1)
            epochs = len(trial.intermediate_values)
            values = (trial.params[field] for field in fields)
            writer.writerow([trial.number + 1, trial.state.name.lower(), accuracy, epochs, seconds, *values])


def _importances(study, completed: list, seed: int) -> dict[str, float]:
    """Each field's share of the differences in accuracy (fANOVA); empty where there is too little to tell."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if len(completed) < LEAST_TO_EXPLAIN or len({trial.value for trial in completed}) < 2:
        return {}
    try:
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
    except RuntimeError:  # no field goes along with the accuracy
        return {}
