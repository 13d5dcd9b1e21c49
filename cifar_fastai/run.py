"""One run from images to export: the steps in their order, and the record they leave."""

import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.learner import Learner

from cifar_fastai.artifacts import write_export
from cifar_fastai.augment import tta_views
from cifar_fastai.cache import load_data
from cifar_fastai.checkpoints import LAST, PREVIOUS, write_whole
from cifar_fastai.data import dataloaders
from cifar_fastai.distributed import ALONE, Processes, check_alone, joined
from cifar_fastai.errors import UserError
from cifar_fastai.evaluation import draw_training, evaluate
from cifar_fastai.learner import create_learner, precision
from cifar_fastai.metrics import with_interval
from cifar_fastai.models import MODELS, count_flops, count_parameters
from cifar_fastai.pretrained import FROM_SCRATCH, try_model, weights_origin
from cifar_fastai.recipes import Recipe, recipe_toml
from cifar_fastai.report import write_report
from cifar_fastai.runfolder import (
    CHECKPOINTS,
    check_same_data,
    check_same_weights,
    make_run_folder,
    read_run,
    refuse_changes,
    working_in,
    write_json,
)
from cifar_fastai.sources import ImageData
from cifar_fastai.tracking import check_trackers, track
from cifar_fastai.training import Training, train

SPREAD = ("test_accuracy", "test_accuracy_tta", "test_loss", "valid_accuracy", "valid_loss", "train_seconds")
EXPORTED_FIGURES = (
    "test_accuracy", "test_accuracy_interval", "test_accuracy_tta", "test_loss", "ece", "reliability", "per_class",
    "confusion_matrix", "risk_coverage", "false_alarm_rate",
)  # fmt: skip
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
    started = time.time()
    with joined(options.device) as processes:
        learn = prepare(recipe, options, processes=processes)
        name = run_name(recipe, options, learn.dls.data)
        folder = processes.from_first(lambda: make_run_folder(options.out, name, started))
        config = configuration(name, recipe, options, learn)
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
    recipe, config, _ = read_run(folder)
    if "fingerprint" not in config:
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
        check_trackers(options.trackers)
        for name, now in versions().items():
            if now != (then := config["versions"].get(name)):
                say("warning", f"{name} was {then} and is {now} now: results may differ in the last digits")
        begun = processes.from_first(lambda: any((folder / CHECKPOINTS / name).exists() for name in (LAST, PREVIOUS)))
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


def _carry_out(learn, recipe: Recipe, options: RunOptions, config: dict, folder: Path, interrupts, resume=False) -> None:
    """From the training, or what is left of it, to the export; "export" in metrics.json says that all is done."""
    if not learn.processes.first:
        train(learn, recipe, folder, resume=resume, interrupts=interrupts)
        return
    write_whole(folder / "recipe.toml", recipe_toml(recipe).encode())
    origin = config.get("initial_weights", FROM_SCRATCH)  # older runs know no others
    announce(learn, recipe, origin, options.device, folder)

    with track(options.trackers, folder, config) as trackers:
        for tracker in trackers:
            say("logging", tracker.where)
        training = train(learn, recipe, folder, cbs=trackers, resume=resume, interrupts=interrupts)

        draw_training(learn, training, folder)
        metrics = evaluate(learn, folder, tta_views(recipe)) | _record(learn, recipe, origin, training, options)
        record_metrics(folder, metrics, config)
        export = options.exports / config["name"]
        export_run(export, learn, config["name"], recipe, metrics)
        for tracker in trackers:
            tracker.record(folder, metrics)
        write_json(folder / "metrics.json", metrics | {"export": str(export)})


def be_deterministic() -> None:
    """Have torch choose operations that give the same bits each time, on a GPU too, where they can be slower."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's matrix library starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def record_metrics(folder: Path, metrics: dict, config: dict) -> None:
    """Write metrics.json and report.html, and say what came out."""
    write_json(folder / "metrics.json", metrics)
    accuracy = with_interval(metrics["test_accuracy"], metrics["test_accuracy_interval"])
    say(
        "test",
        f"accuracy {accuracy}, with TTA {metrics['test_accuracy_tta']:.2%}, loss {metrics['test_loss']:.4f} (best epoch "
        f"{metrics['best_epoch']} by validation loss)",
    )
    say("report", write_report(folder, metrics, config))


def run_seeds(recipe: Recipe, options: RunOptions, n: int) -> Path:
    """Run n times, with seeds from options.seed on; leave every figure and the spread in a JSON file and return its path.

    Each run has a folder and an export of its own, with its seed in their names. Raises as `run` does.
    """
    check_alone("--seeds")
    name = options.name or f"{recipe.name}-{_as_name(Path(options.source).name)}"
    runs = []
    for seed in range(options.seed, options.seed + n):
        say("seed", f"{seed}, run {len(runs) + 1} of {n}")
        folder = run(recipe, dataclasses.replace(options, seed=seed, name=f"{name}-seed{seed}"))
        metrics = json.loads((folder / "metrics.json").read_bytes())
        runs.append({"folder": folder.name, "seed": seed, **{key: metrics[key] for key in SPREAD}})
    columns = {key: [row[key] for row in runs] for key in SPREAD}
    summary = {"name": name, "n": n, "mean": {}, "std": {}, "runs": runs}
    for key, values in columns.items():
        summary["mean"][key], summary["std"][key] = statistics.mean(values), statistics.stdev(values)
    path = options.out / f"{runs[0]['folder']}-to-{runs[-1]['seed']}.json"
    write_json(path, summary)
    for key in ("test_accuracy", "test_accuracy_tta"):
        each = ", ".join(f"{value:.2%}" for value in columns[key])
        say("seeds", f"{key}: mean {summary['mean'][key]:.2%}, standard deviation {summary['std'][key]:.2%} ({each})")
    say("seeds", path)
    return path


def run_name(recipe: Recipe, options: RunOptions, data: ImageData) -> str:
    """The name that was asked for, else recipe and data."""
    return options.name or f"{recipe.name}-{_as_name(data.source)}"


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
    counts = f"{len(dls.train_ds):,} training, {len(dls.valid_ds):,} validation, {data.n_test:,} test"
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


def export_run(folder: Path, learn, name: str, recipe: Recipe, metrics: dict) -> None:
    """Export a run's learner with the figures of its metrics.json, and say where it is."""
    data = metrics["data"]
    training_data = f"{data['source']}, {data['n_train']:,} images ({data['encoding']})"
    keys = ("n_params", "epochs_run", "best_epoch", "seed", "device", "hardware", "train_seconds", "git_commit")
    digest = write_export(
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
    say("export", f"{folder}: try `python -m cifar_fastai predict --export {folder} IMAGE`, or `serve` instead of `predict`")
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


def say(what: str, words) -> None:
    """A line of progress: what it is about, and the words."""
    print(f"{what:<8} {words}", flush=True)
