"""One run from images to export: the steps in their order, and the record they leave."""

import dataclasses
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.learner import Learner

from cifar_fastai.artifacts import check_fits, check_target, write_export
from cifar_fastai.augment import tta_views
from cifar_fastai.cache import load_data
from cifar_fastai.checkpoints import BEST, LAST, load, load_last, write_whole
from cifar_fastai.data import dataloaders
from cifar_fastai.distributed import ALONE, Processes, check_alone, joined
from cifar_fastai.errors import Interrupted, UserError
from cifar_fastai.evaluation import draw_evaluation, draw_training, evaluate
from cifar_fastai.interrupts import Interrupts
from cifar_fastai.learner import create_learner, precision
from cifar_fastai.metrics import with_interval
from cifar_fastai.models import MODELS, count_flops, count_parameters
from cifar_fastai.pretrained import FROM_SCRATCH, network_side, try_model, weights_origin
from cifar_fastai.recipes import Recipe, recipe_toml
from cifar_fastai.report import write_report
from cifar_fastai.runfolder import (
    CHECKPOINTS,
    check_plain,
    check_same_data,
    check_same_weights,
    make_run_folder,
    read_finished,
    read_run,
    refuse_changes,
    refuse_edits,
    working_in,
    write_json,
)
from cifar_fastai.schema import EXPORTED_FIGURES, RunConfig, written
from cifar_fastai.sources import ImageData
from cifar_fastai.terminal import say
from cifar_fastai.tracking import check_trackers, track
from cifar_fastai.training import Training, train

SPREAD = ("test_accuracy", "test_accuracy_tta", "test_loss", "valid_accuracy", "valid_loss", "train_seconds")
LONGEST_NAME = 100  # see recipes.NAME
PACKAGES = ("torch", "torchvision", "fastai", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run needs beside its recipe."""

    source: str
    seed: int = 42
    subset: int | None = None
    device: str = "cpu"
    deterministic: bool = False  # see be_deterministic
    out: Path = Path("runs")
    exports: Path = Path("exports")
    name: str | None = None  # of the run and its export; recipe and data by default
    trackers: tuple[str, ...] = ()  # to log to as well: tensorboard, wandb
    command: str = ""  # that repeats the run


def pick_device(wanted: str | None) -> str:
    """`wanted` if it is there, else an error; the best device present if None."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted is None:
        return next(name for name, there in present.items() if there)
    if not present.get(wanted):
        there = ", ".join(name for name, is_there in present.items() if is_there)
        raise UserError(f"device {wanted!r} is not to be had on this machine; there is: {there}.")
    return wanted


def run(recipe: Recipe, options: RunOptions) -> Path:
    """Train, evaluate, export and report; returns the run folder. Raises UserError and its kinds, and Interrupted."""
    check_trackers(options.trackers)
    if options.name is not None:
        check_target(options.exports, options.name)  # before the data, which can take long
    started = time.time()
    with joined(options.device) as processes:
        learn = prepare(recipe, options, processes=processes)
        name = run_name(recipe, options, learn.dls.data.source)
        processes.from_first(lambda: check_target(options.exports, name, _export_bytes(learn)))
        config = configuration(name, recipe, options, learn)
        written(RunConfig, "the run's config.json", config)
        folder = processes.from_first(lambda: make_run_folder(options.out, name, started))
        with working_in(folder, processes) as interrupts:
            if processes.first:
                write_json(folder / "config.json", config)
            _carry_out(learn, recipe, options, config, folder, interrupts)
    return folder


def resume(folder: Path, source: str | None = None, **asked) -> Path:
    """Go on with a run where its last checkpoint, or its evaluation or export, left off; returns its folder.

    source: where the run's data lies now, if not where it lay then. asked: options of `train` by name, which must be the
    run's own. Raises as `run` does.
    """
    check_plain(folder)
    recipe, config, _ = read_run(folder)
    if config["fingerprint"] is None:
        raise UserError(f"{folder} is of an older version, which kept too little to go on from.")
    refuse_changes(folder, config, asked)
    device = pick_device(config["device"])
    with joined(device) as processes, working_in(folder, processes) as interrupts:
        _, _, metrics = read_run(folder)  # anew: who worked in the folder before may just have finished
        if metrics and "export" in metrics:
            say("run", f"{folder} is finished; its export is {metrics['export']}")
            return folder
        data = load_data(source or config["data"], recipe.size)
        check_same_data(data, config["fingerprint"], folder)
        kept = {key: config[key] for key in ("name", "seed", "subset", "deterministic", "trackers", "command")}
        options = RunOptions(source=config["data"], device=device, out=folder.parent, **kept)
        processes.from_first(lambda: check_target(options.exports, config["name"]))
        begun = processes.from_first(lambda: check_state(folder, recipe, config, len(data.classes)))
        check_trackers(options.trackers)
        for name, now in versions().items():
            if now != (then := config["versions"].get(name)):
                say("warning", f"{name} was {then} and is {now} now: results may differ in the last digits")
        if not begun:
            check_same_weights(weights_origin(recipe), config, folder)
        learn = prepare(recipe, options, data, processes, blank=begun)
        _carry_out(learn, recipe, options, config, folder, interrupts, resume=True)
    return folder


def prepare(
    recipe: Recipe, options: RunOptions, data: ImageData | None = None, processes: Processes = ALONE, blank: bool = False
) -> Learner:
    """The learner of a run, ready to train.

    data: instead of the options' source. processes: that train together. blank: as for `create_learner`. Raises UserError
    and DataError.
    """
    if data is None:
        try_model(recipe)  # before the data, which can take long
        data = load_data(options.source, recipe.size)
    processes.check_same(f"{data.fingerprint} {recipe} {options.seed} {options.subset}")
    if options.deterministic:
        be_deterministic()
    dls = dataloaders(data, recipe, options.seed, subset=options.subset, device=torch.device(options.device))
    learn = create_learner(dls, recipe, seed=options.seed, blank=blank)
    learn.processes = processes
    return learn


def check_state(folder: Path, recipe: Recipe, config: dict, n_classes: int) -> bool:
    """Whether the training in a run folder has begun. Raises UserError if what it has kept does not suffice to resume it, or
    was kept for another configuration."""
    state = load_last(folder / CHECKPOINTS, quiet=True)
    if state is None:
        return False
    if "config" in state:  # older versions kept none
        refuse_edits(folder, config, state["config"])
    _check_weights(state.get("model"), folder / CHECKPOINTS / LAST, recipe, n_classes)
    if state.get("epoch"):
        best_weights(folder, recipe, n_classes)
    return True


def best_weights(folder: Path, recipe: Recipe, n_classes: int) -> dict:
    """The weights of a run's best epoch, checked before a network is built for them. Raises UserError."""
    path = folder / CHECKPOINTS / BEST
    try:
        weights = load(path).get("model")
        _check_weights(weights, path, recipe, n_classes)
    except UserError as error:
        words = str(error).rstrip(".")
        raise UserError(f"{words}. The best epoch's weights are in no other file: put it back, or train anew.") from None
    return weights


def _check_weights(weights, path: Path, recipe: Recipe, n_classes: int) -> None:
    try:
        if not isinstance(weights, dict):
            raise UserError("it holds no weights")
        check_fits(weights, path.name, recipe.model, n_classes, recipe.size, network_side(recipe, recipe.size))
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def _export_bytes(learn: Learner) -> int:
    """About how large its export will be: the weights twice, in their own file and in the pickle."""
    return 2 * sum(value.nbytes for value in learn.model.state_dict().values())


def _carry_out(learn, recipe: Recipe, options: RunOptions, config: dict, folder: Path, interrupts, resume=False) -> None:
    """From the training, or what is left of it, to the export; "export" in metrics.json says that all is done."""
    if not learn.processes.first:
        train(learn, recipe, folder, resume=resume, interrupts=interrupts, config=config)
        return
    write_whole(folder / "recipe.toml", recipe_toml(recipe).encode())
    origin = config["initial_weights"]
    announce(learn, recipe, origin, options.device, folder)

    with track(options.trackers, folder, config) as trackers:
        for tracker in trackers:
            say("logging", tracker.where)
        training = train(learn, recipe, folder, cbs=trackers, resume=resume, interrupts=interrupts, config=config)

        found, test = evaluate(learn, folder, tta_views(recipe))
        metrics = found | _record(learn, recipe, origin, training, options)
        write_json(folder / "metrics.json", metrics)
        export = options.exports / config["name"]
        digest = export_run(export, learn, config["name"], recipe, metrics)  # before the pictures, whatever becomes of them
        learn.model.to(learn.dls.device)
        draw_training(learn, training, folder)
        draw_evaluation(learn, found, test, folder)
        report_metrics(folder, metrics, config)
        tell_of_export(export, digest)
        for tracker in trackers:
            tracker.record(folder, metrics)
        write_json(folder / "metrics.json", metrics | {"export": str(export)})


def be_deterministic() -> None:
    """Have torch choose operations that give the same bits each time, on a GPU too, where they can be slower."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's matrix library starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def report_metrics(folder: Path, metrics: dict, config: dict) -> None:
    """Write report.html, and say what came out."""
    accuracy = with_interval(metrics["test_accuracy"], metrics["test_accuracy_interval"])
    say(
        "test",
        f"accuracy {accuracy}, with TTA {metrics['test_accuracy_tta']:.2%}, loss {metrics['test_loss']:.4f} (best epoch "
        f"{metrics['best_epoch']} by validation loss)",
    )
    say("report", write_report(folder, metrics, config))


def run_seeds(recipe: Recipe, options: RunOptions, n: int) -> Path:
    """Run n times, with seeds from options.seed on; leave every figure and the spread in a JSON file and return its path.

    Each run has a folder and an export of its own, with its seed in their names; the file is written anew after each. Raises
    as `run` does.
    """
    check_alone("--seeds")
    last = options.seed + n - 1
    name = run_name(recipe, options, Path(options.source).name)[: LONGEST_NAME - len(f"-seed{last}")]
    for seed in range(options.seed, last + 1):
        check_target(options.exports, f"{name}-seed{seed}")
    runs: list[dict] = []
    try:
        with Interrupts("the seed that had just begun is not saved"):  # in a run its own ones, which save
            for seed in range(options.seed, last + 1):
                say("seed", f"{seed}, run {len(runs) + 1} of {n}")
                folder = run(recipe, dataclasses.replace(options, seed=seed, name=f"{name}-seed{seed}"))
                _, metrics = read_finished(folder)
                runs.append({"folder": folder.name, "seed": seed, **{key: metrics[key] for key in SPREAD}})
                path = options.out / f"{runs[0]['folder']}-to-{last}.json"
                write_json(path, _spread(name, runs))
    except Interrupted as signal:
        done = f"\nFinished: {len(runs)} of {n} seeds" + (f", their spread is in {path}." if runs else ".")
        raise Interrupted(signal.signal_number, f"{signal}{done}{_remaining(options, name, seed, last)}") from None
    summary = _spread(name, runs)
    for key in ("test_accuracy", "test_accuracy_tta"):
        each = ", ".join(f"{row[key]:.2%}" for row in runs)
        say("seeds", f"{key}: mean {summary['mean'][key]:.2%}, standard deviation {summary['std'][key]:.2%} ({each})")
    say("seeds", path)
    return path


def _spread(name: str, runs: list[dict]) -> dict:
    """What the JSON file over several seeds holds. One alone has no standard deviation."""
    columns = {key: [row[key] for row in runs] for key in SPREAD}
    mean = {key: statistics.mean(values) for key, values in columns.items()}
    std = {key: statistics.stdev(values) if len(runs) > 1 else None for key, values in columns.items()}
    return {"name": name, "n": len(runs), "mean": mean, "std": std, "runs": runs}


def _remaining(options: RunOptions, name: str, interrupted: int, last: int) -> str:
    """How to train the seeds after the one that was interrupted; `compare` takes all of them together."""
    n = last - interrupted
    if not n or not options.command:
        return ""
    same_name = f" --name {name}-seed{last}" if n == 1 else ""  # one seed alone is not in the name by itself
    command = f"{options.command} --seed {interrupted + 1} --seeds {n}{same_name}"
    return f" Then train the rest with: {command}; `compare` takes all the run folders together."


def run_name(recipe: Recipe, options: RunOptions, source: str) -> str:
    """The name that was asked for, else recipe and data, as far as there is room; the recipe for digits has them in its
    name."""
    data = _as_name(source)
    return options.name or (data if recipe.name == data else f"{recipe.name}-{data}")[:LONGEST_NAME]


def configuration(name: str, recipe: Recipe, options: RunOptions, learn: Learner) -> dict:
    """The whole configuration, enough to repeat the run."""
    chosen = {key: getattr(options, key) for key in ("seed", "subset", "device", "deterministic", "trackers", "command")}
    chosen["processes"] = learn.processes.size
    begins = {
        "data": options.source,
        "fingerprint": learn.dls.data.fingerprint,
        "initial_weights": weights_origin(recipe),
    }
    return {"name": name, "recipe": dataclasses.asdict(recipe), **begins, **chosen, "versions": versions()}


def announce(learn: Learner, recipe: Recipe, origin: str, device: str, folder: Path) -> None:
    """Say what is about to be trained, on what, and where it goes. origin: of its weights, as `weights_origin` says it."""
    dls, data = learn.dls, learn.dls.data
    for warning in data.warnings:
        say("warning", warning)
    own = " (the source's own; --valid-pct is not used)" if data.n_valid else ""
    counts = f"{len(dls.train_ds):,} training, {len(dls.valid_ds):,} validation{own}, {data.n_test:,} test"
    say("data", f"{data.source}: {counts} images of {len(data.classes)} classes ({data.encoding})")
    cost = f"{count_parameters(learn.model):,} parameters, {count_flops(learn.model, data.size) / 1e9:.2f} GFLOP an image"
    arithmetic = precision(recipe, dls.device, learn.model)
    say("recipe", f"{recipe.name}: model {recipe.model}, {cost}, on {device} in {arithmetic}")
    if recipe.model not in MODELS:
        side = learn.model.side
        say("weights", f"{origin}; images are brought to {side} x {side} pixels")
    say("run", folder)


def _record(learn: Learner, recipe: Recipe, origin: str, training: Training, options: RunOptions) -> dict:
    """What metrics.json holds beside the figures of the evaluation: the cost, the data and the circumstances."""
    dls, data = learn.dls, learn.dls.data
    about_data = {key: getattr(data, key) for key in ("source", "encoding", "sha256", "n_files", "fingerprint")}
    return {
        "n_params": count_parameters(learn.model),
        "weights": origin,
        "flops_per_image": count_flops(learn.model, data.size),
        "epochs_run": len(training.history),
        "best_epoch": training.best_epoch,
        "train_accuracies": training.train_accuracies,
        "train_seconds": training.seconds,
        "images_per_second": training.images_per_second,
        "peak_memory_mb": peak_memory_mb(options.device),
        "data": {**about_data, "n_train": len(dls.train_ds), "n_valid": len(dls.valid_ds), "n_test": data.n_test},
        "versions": versions(),
        "device": options.device,
        "precision": precision(recipe, dls.device, learn.model),
        "hardware": hardware(options.device),
        "processes": learn.processes.size,
        "seed": options.seed,
        "git_commit": git_commit(),
    }


def export_run(folder: Path, learn, name: str, recipe: Recipe, metrics: dict) -> str:
    """Export a run's learner with the figures of its metrics.json; returns the export's digest."""
    data = metrics["data"]
    training_data = f"{data['source']}, {data['n_train']:,} images ({data['encoding']})"
    keys = ("n_params", "epochs_run", "best_epoch", "seed", "device", "hardware", "train_seconds", "git_commit")
    return write_export(
        folder,
        learn,
        name=name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        model=recipe.model,
        temperature=metrics["temperature"],
        unfamiliar_below=metrics["unfamiliar_below"],
        training={
            "recipe": recipe.name,
            "data": training_data,
            "weights": metrics.get("weights", FROM_SCRATCH),  # older runs know no others
            **{key: metrics[key] for key in keys},
        },
        test={key: metrics[key] for key in EXPORTED_FIGURES},
        versions=metrics["versions"],
        tta_views=tta_views(recipe),
    )


def tell_of_export(folder: Path, digest: str) -> None:
    command = f"python -m cifar_fastai predict --export {shlex.quote(str(folder))} IMAGE"
    say("export", f"{folder}: try `{command}`, or `serve` instead of `predict`")
    say("digest", f"{digest}: to be given to --expect-digest where the export is used")


def _as_name(source: str) -> str:
    stem = re.sub(r"\.(tar\.gz|tgz|zip|tar)$", "", source)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "data"


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a result."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def hardware(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads"


def peak_memory_mb(device: str) -> float | None:
    """The most memory in use so far, in 10^6 bytes: the device's where it counts it, else the process's (not on Windows)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:  # not getrusage, which on Linux counts what the process was forked from
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def git_commit() -> str | None:
    """The commit the package was run from, with "-dirty" behind it if files differ; None outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # an installed package may lie in somebody else's checkout
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
