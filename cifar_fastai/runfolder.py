"""The folder of a run: making it, keeping it for one process, telling the way on, and reading it again."""

import dataclasses
import errno
import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from cifar_fastai.checkpoints import write_whole
from cifar_fastai.distributed import Processes
from cifar_fastai.errors import DataError, ProcessLost, UserError
from cifar_fastai.interrupts import Interrupts
from cifar_fastai.manifest import to_json
from cifar_fastai.recipes import DESCRIPTION, Recipe, get_recipe, is_file_name
from cifar_fastai.sources import ImageData
from cifar_fastai.terminal import printable

CHECKPOINTS, CONFIG, METRICS = "checkpoints", "config.json", "metrics.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def make_run_folder(out: Path, name: str, started: float) -> Path:
    """A new folder in `out`, named by time and run. Raises UserError."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}-{name}"
    for attempt in range(1, 100):
        folder = out / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"The run folder {folder} cannot be made: {reason}. Choose another --out.") from None
    raise UserError(f"{out} is full of runs named {stem}.")


@contextmanager
def working_in(folder: Path, processes: Processes):
    """Keep a run folder for these processes, and name the way on if the work is cut short; gives the Interrupts.

    Raises UserError if another process is at work there, when there is no room to write, or when one of several ended.
    """
    way_on = f"go on with: {processes.way_on(folder)}"
    try:
        with (
            _claimed(folder) if processes.first else nullcontext(),
            Interrupts(f"the state is saved; {way_on}") as interrupts,
        ):
            yield interrupts
    except ProcessLost as error:
        raise ProcessLost(f"{error} What was saved last is whole: {way_on}") from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        what, reason = error.filename or folder, error.strerror
        raise UserError(
            f"{what} cannot be written ({reason}). The files before it are whole: make room, then {way_on}"
        ) from None
    except Exception as error:
        if not isinstance(error, UserError):  # a fault: with --debug it can be looked at without training again
            print(printable(f"the state is saved; {way_on}"), file=sys.stderr)
        raise


@contextmanager
def _claimed(folder: Path):
    """Hold a lock of the operating system, which frees it whatever ends the process; beside it stands whose it is."""
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    lock, holder = FileLock(folder / CHECKPOINTS / "lock"), folder / CHECKPOINTS / "holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        process = holder.read_text() if holder.exists() else "?"
        raise UserError(f"{folder} is in use by the process {process}: wait for its end, or stop it first.") from None
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def read_finished(folder: Path) -> tuple[dict, dict]:
    """A finished run's config.json and metrics.json. Raises UserError if one is missing or no JSON object."""
    return _read_json(folder / CONFIG), _read_json(folder / METRICS)


def read_run(folder: Path) -> tuple[Recipe, dict, dict | None]:
    """A run's recipe, config.json and metrics.json, None for the last if it is not there yet. Raises UserError."""
    config = _read_json(folder / CONFIG)
    return recipe_of(config, folder), config, _read_json(folder / METRICS) if (folder / METRICS).exists() else None


def recipe_of(config: dict, folder: Path) -> Recipe:
    """The recipe in a run's config.json. Raises UserError."""
    try:
        return Recipe(**{**config["recipe"], "moms": tuple(config["recipe"]["moms"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} is a damaged run, or another version's ({type(error).__name__}: {error}).") from None


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        kind = "finished run" if path.name == METRICS else "run folder"
        raise UserError(f"{path.parent} is no {kind}: {path.name} is missing.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object).")
    return value


def refuse_changes(folder: Path, config: dict, asked: dict) -> None:
    """Raises UserError, listing the differences, if options of `train` other than a run's own are asked for."""
    recipe = recipe_of(config, folder)
    own = {**dataclasses.asdict(recipe), **config, "recipe": recipe.name, "seeds": 1, "out": folder.parent}
    own |= {tracker: tracker in config["trackers"] for tracker in ("tensorboard", "wandb")}
    changes = []
    for option, value in asked.items():
        if option == "recipe" and is_file_name(value):
            changes += _changes_of_a_file(value, recipe, asked)
        elif value != own[option]:
            changes.append(f"--{option.replace('_', '-')} {value} where the run has {own[option]}")
    if changes:
        raise UserError(f"{folder} goes on as it began. Leave out: {'; '.join(changes)}.")


def _changes_of_a_file(path: str, own: Recipe, asked: dict) -> list[str]:
    """What a recipe file, but for the fields that stand before it as options, has other than a run's recipe."""
    recipe = get_recipe(path)
    fields = (field.name for field in dataclasses.fields(Recipe) if field.name not in (*asked, *DESCRIPTION[1:]))
    values = ((field, getattr(recipe, field), getattr(own, field)) for field in fields)
    return [f"--recipe {path} with {field} {new} where the run has {old}" for field, new, old in values if new != old]


def check_same_data(data: ImageData, fingerprint: str, folder: Path) -> None:
    """Raises DataError if a run was trained on other data."""
    if data.fingerprint != fingerprint:
        raise DataError(f"{data.source} holds other pixels than {folder} was trained on; name the same data with --data.")


def check_same_weights(origin: str, config: dict, folder: Path) -> None:
    """Raises DataError if a run began with other weights than those that stand in for them now."""
    if origin != (then := config.get("initial_weights", origin)):
        raise DataError(f"{folder} began {then}, and would now begin {origin}: put the same weights back.")


def write_json(path: Path, value) -> None:
    """Indented, in UTF-8, in one step."""
    write_whole(path, to_json(value))
