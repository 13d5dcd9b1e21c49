"""The folder of a run: making it, keeping it for one process, telling the way on, and reading it again."""

import errno
import json
import os
import shlex
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cifar_fastai.checkpoints import write_whole
from cifar_fastai.errors import DataError, UserError
from cifar_fastai.interrupts import Interrupts
from cifar_fastai.recipes import Recipe
from cifar_fastai.sources import ImageData

CHECKPOINTS, CONFIG, METRICS = "checkpoints", "config.json", "metrics.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def make_run_folder(out: Path, name: str, started: float) -> Path:
    """A new folder in `out`, named by time and run. Raises UserError."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}-{name}"
    for attempt in range(1, 100):
        folder = out / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            (folder / CHECKPOINTS).mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"The run folder {folder} cannot be made: {reason}. Choose another --out.") from None
    raise UserError(f"{out} is full of runs named {stem}.")


@contextmanager
def working_in(folder: Path):
    """Keep a run folder for this process, and name the way on if the work is cut short; gives the Interrupts.

    Raises UserError if another process is at work there, or when there is no room to write.
    """
    way_on = f"go on with: {shlex.join(['python', 'train.py', '--resume', str(folder)])}"
    try:
        with _claimed(folder), Interrupts(f"the state is saved; {way_on}") as interrupts:
            yield interrupts
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        what, reason = error.filename or folder, error.strerror
        raise UserError(
            f"{what} cannot be written ({reason}). The files before it are whole: make room, then {way_on}"
        ) from None
    except Exception as error:
        if not isinstance(error, UserError):  # a fault: with --debug it can be looked at without training again
            print(f"the state is saved; {way_on}", file=sys.stderr)
        raise


@contextmanager
def _claimed(folder: Path):
    """Hold a lock of the operating system, which frees it whatever ends the process; beside it stands whose it is."""
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
    own = {**config["recipe"], **config, "recipe": config["recipe"]["name"], "seeds": 1, "out": folder.parent}
    own |= {tracker: tracker in config["trackers"] for tracker in ("tensorboard", "wandb")}
    changes = [
        f"--{option.replace('_', '-')} {value} where the run has {own[option]}"
        for option, value in asked.items()
        if value != own[option]
    ]
    if changes:
        raise UserError(f"{folder} goes on as it began. Leave out: {'; '.join(changes)}.")


def check_same_data(data: ImageData, fingerprint: str, folder: Path) -> None:
    """Raises DataError if a run was trained on other data."""
    if data.fingerprint != fingerprint:
        raise DataError(f"{data.source} holds other pixels than {folder} was trained on; name the same data with --data.")


def write_json(path: Path, value) -> None:
    """Indented, in UTF-8, in one step."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
