"""Logging a run to TensorBoard and to Weights & Biases while it goes on: fastai's callbacks, and what they leave out."""

import cifar_fastai.compat  # noqa: F401  before torchvision, which fastai's two callbacks import

# isort: split
import importlib
import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fastai.callback.core import Callback
from PIL import Image

from cifar_fastai.errors import TrackingWarning, UserError
from cifar_fastai.recipes import DESCRIPTION

COMPARED = (  # figures of metrics.json shown beside the hyperparameters
    "test_accuracy", "test_accuracy_tta", "test_loss", "ece", "valid_accuracy", "valid_loss", "best_epoch",
    "train_seconds", "n_params",
)  # fmt: skip
FINISH_TIMEOUT = 300  # seconds that W&B may take for what is still to be sent when a run is over


def check_trackers(names: tuple[str, ...]) -> None:
    """Find out early whether the trackers, "tensorboard" and "wandb", can be used.

    Raises ModuleNotFoundError if a package is missing, and UserError if W&B knows no login or cannot be reached.
    """
    for name in names:
        importlib.import_module(f"fastai.callback.{name}")
    if "wandb" in names:
        _check_login()


def _check_login():
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases cannot be used: {_words(error)}\n"
            "Log in with `wandb login`, or set WANDB_MODE=offline: what is logged stays here until `wandb sync` sends it."
        ) from None


@contextmanager
def track(names: tuple[str, ...], folder: Path, config: dict) -> Iterator[list["Tracker"]]:
    """Callbacks that log one training to each of `names`; whatever ends the block, their logs are brought to an end.

    folder: the run's. config: as in config.json. A tracker that cannot start is left out with a TrackingWarning.
    """
    trackers = []
    for name in names:
        try:
            trackers.append(TRACKERS[name](folder, config))
        except Exception as error:
            _warn(name, error)
    failed = True
    try:
        yield trackers
        failed = False
    finally:
        for tracker in trackers:
            tracker.end(failed)


class Tracker(Callback):
    """What the two trackers have in common. It stands before fastai's callback among the bases of each.

    A fault in a tracker never ends a training: there is one TrackingWarning, and the tracker is silent from then on.
    """

    run_valid = False  # batches of the validation are no steps
    where = ""  # the log is to be seen, in words
    failed = False

    def __call__(self, event_name):
        if not self.failed:
            self._guarded(super().__call__, event_name)

    def record(self, folder: Path, metrics: dict) -> None:
        """Log a run's pictures and final figures."""
        if not self.failed:
            self._guarded(self.log_results, sorted(folder.glob("*.png")), metrics)

    def end(self, failed: bool) -> None:
        """Bring the log to an end. failed: whether the run did not come to its own."""
        self._guarded(self.close, failed)

    def _guarded(self, function, *arguments):
        try:
            function(*arguments)
        except Exception as error:
            if not self.failed:
                _warn(self.name, error)
            self.failed = True


def _tensorboard(folder: Path, config: dict) -> Tracker:
    from fastai.callback.tensorboard import TensorBoardCallback

    class Tensorboard(Tracker, TensorBoardCallback):
        """fastai's scalars by step, the loss of each batch as it is, and the figures of each epoch by epoch."""

        where = f"`tensorboard --logdir {shlex.quote(str(folder.parent))}` shows this run beside the others"

        def after_batch(self):
            super().after_batch()
            self.writer.add_scalar("raw_loss", self.loss, self.train_iter)

        def after_epoch(self):
            super().after_epoch()
            for name, value in zip(self.recorder.metric_names[1:-1], self.recorder.log[1:-1], strict=True):
                self.writer.add_scalar(f"epoch/{name}", value, self.epoch + 1)
            self.writer.flush()

        def log_results(self, pictures, metrics):
            for path in pictures:
                self.writer.add_image(f"pictures/{path.stem}", np.array(Image.open(path).convert("RGB")), dataformats="HWC")
            figures = {f"final/{key}": metrics[key] for key in COMPARED}
            self.writer.add_hparams(_hyperparameters(config), figures, run_name=".")  # part of this run, not one below it

        def close(self, failed):
            if hasattr(self, "writer"):
                self.writer.close()

    return Tensorboard(log_dir=folder / "tensorboard", trace_model=False, log_preds=False)


def _wandb(folder: Path, config: dict) -> Tracker:
    import wandb
    from fastai.callback.wandb import WandbCallback

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "cifar-fastai",
        name=folder.name,
        dir=folder,
        config=config,
        settings=wandb.Settings(silent=True, console="off", finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=True),
    )

    class Wandb(Tracker, WandbCallback):
        """fastai's scalars by step, with the epoch beside them."""

        where = f"{Path(run.dir).parent}: `wandb sync` sends it" if run.offline else run.url

        def before_fit(self):
            # fastai's draws a validation batch here, and with it from torch's generator, to add its internals to the config
            self._wandb_step, self._wandb_epoch = -1, 0

        def log_results(self, pictures, metrics):
            run.log({f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures})
            run.summary.update(metrics)

        def close(self, failed):
            try:
                run.finish(exit_code=int(failed))
            finally:
                wandb.teardown()  # of its service: one that died would end this process with a traceback

    return Wandb(log_preds=False)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _hyperparameters(config: dict) -> dict[str, bool | int | float | str]:
    fields = {key: value for key, value in config["recipe"].items() if key not in DESCRIPTION}
    fields |= {"recipe": config["recipe"]["name"], **{key: config[key] for key in ("data", "subset", "seed", "device")}}
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in fields.items()}


def _warn(name: str, error: Exception):
    words = f"{name} failed and gets nothing more of this run, which goes on: {_words(error)}"
    warnings.warn(words, TrackingWarning, stacklevel=2)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
