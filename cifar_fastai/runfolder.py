"""The folder of a run: making it, keeping it for one process, telling the way on, and reading it again."""

import dataclasses
import errno
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from cifar_fastai.checkpoints import write_whole
from cifar_fastai.distributed import Processes
from cifar_fastai.errors import DataError, ProcessLost, UserError, shown
from cifar_fastai.interrupts import Interrupts
from cifar_fastai.manifest import CONFIG, parse_json, to_json
from cifar_fastai.recipes import DESCRIPTION, Recipe, get_recipe, is_file_name
from cifar_fastai.schema import METRICS, Metrics, RunConfig, checked, read, to_recipe, written
from cifar_fastai.sources import ImageData
from cifar_fastai.terminal import printable

CHECKPOINTS = "checkpoints"
DECIDING = ("fingerprint", "initial_weights", "seed", "subset", "device", "deterministic", "processes")  # with the recipe
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
        process = holder.read_text()[:20] if holder.exists() else "?"
        raise UserError(f"{folder} is in use by the process {process}: wait for its end, or stop it first.") from None
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def check_plain(folder: Path) -> None:
    """Raises UserError if what lies in a run folder, which somebody else may have made, could lead out of it."""
    for place in (folder, folder / CHECKPOINTS):
        try:
            entries = list(os.scandir(place))
        except OSError:  # the first file that is read says it better
            continue
        for entry in entries:
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise UserError(f"{shown(entry.name)} in {place} is a link or a device; a run folder holds plain files.")


def read_finished(folder: Path, whole: bool = True) -> tuple[dict, dict]:
    """A finished run's config.json and metrics.json. whole: the former with the defaults of what it lacks.

    Raises UserError if one is missing or not what schema.py says.
    """
    return _read(RunConfig, folder / CONFIG, whole), _read(Metrics, folder / METRICS)


def read_run(folder: Path) -> tuple[Recipe, dict, dict | None]:
    """A run's recipe, config.json and metrics.json, None for the last if it is not there yet. Raises UserError."""
    config = _read(RunConfig, folder / CONFIG, whole=True)
    return to_recipe(config["recipe"]), config, _read(Metrics, folder / METRICS) if (folder / METRICS).exists() else None


def _read(kind, path: Path, whole: bool = False) -> dict:
    try:
        return read(kind, path, whole)
    except (FileNotFoundError, NotADirectoryError):
        what = "finished run" if path.name == METRICS else "run folder"
        raise UserError(f"{path.parent} is no {what}: {path.name} is missing.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def refuse_changes(folder: Path, config: dict, asked: dict) -> None:
    """Raises UserError, listing the differences, if options of `train` other than a run's own are asked for."""
    recipe = to_recipe(config["recipe"])
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


def refuse_edits(folder: Path, config: dict, begun: dict) -> None:
    """Raises UserError, listing the differences, if a run's config.json has become another since its training began.

    begun: the configuration as the checkpoint has it.
    """
    path = folder / CONFIG
    then, now = (
        _deciding(checked(RunConfig, str(path), each, whole=True)) for each in (parse_json(CONFIG, to_json(begun)), config)
    )
    if changes := [
        f"{field} {shown(now[field])} where it was {shown(then[field])}" for field in now if now[field] != then[field]
    ]:
        raise UserError(f"{path} was changed since the training began: {'; '.join(changes)}. Put it back to resume the run.")


def _deciding(config: dict) -> dict:
    recipe = {name: value for name, value in config["recipe"].items() if name not in DESCRIPTION}
    return recipe | {field: config[field] for field in DECIDING}


def check_same_data(data: ImageData, fingerprint: str, folder: Path) -> None:
    """Raises DataError if a run was trained on other data."""
    if data.fingerprint != fingerprint:
        raise DataError(f"{data.source} holds other pixels than {folder} was trained on; name the same data with --data.")


def check_same_weights(origin: str, config: dict, folder: Path) -> None:
    """Raises DataError if a run began with other weights than those that stand in for them now."""
    if origin != (then := config["initial_weights"]):
        raise DataError(f"{folder} began {then}, and would now begin {origin}: put the same weights back.")


def write_json(path: Path, value) -> None:
    """Indented, in UTF-8, in one step. A config.json or metrics.json that could not be read again is a UserError instead."""
    kind = {CONFIG: RunConfig, METRICS: Metrics}.get(path.name)
    write_whole(path, written(kind, str(path), value) if kind else to_json(value))
