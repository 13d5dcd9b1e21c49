"""The command line: arguments become calls. Nothing heavy is imported until a command runs."""

import argparse
import atexit
import gc
import os
import re
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from cifar_fastai import auto
from cifar_fastai.errors import DataError, DataWarning, ExportWarning, Interrupted, TrackingWarning, UserError
from cifar_fastai.recipes import MAX_SIZE, MAX_VALID_PCT, MIN_SIZE, MIN_VALID_PCT, NAME, RECIPES, Recipe, get_recipe, nearest
from cifar_fastai.terminal import keep_streams, printable, say, tell_of_trouble, trouble, warn

MAX_SEED = 1 << 32  # NumPy's generators take 32 bits
MOST_SEEDS = 1000
TRACKERS = ("tensorboard", "wandb")  # packages that few need
ANSWERS = (None, "predict", "evaluate", "compare", "data")  # commands that are run for what they print; None: --help


def main(command: str | None = None, argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. command: given by the scripts that are one (train.py and so on)."""
    atexit.register(gc.freeze)  # a last search for garbage among all that was imported would take Python two seconds
    keep_streams()
    name = None
    try:
        options = _parse(command, sys.argv[1:] if argv is None else argv)
        name = options.command if getattr(options, "recipe", None) != "help" else None
        if name not in ANSWERS:
            tell_of_trouble()
        code = _run(options)
    except SystemExit as end:  # argparse's, or a second signal's
        code = end.code
    sys.stdout.flush()
    lost = trouble(sys.stdout)
    if lost is None or isinstance(lost, BrokenPipeError):  # a reader that has left has had enough
        return code
    if name in ANSWERS:
        print(f"error: standard output cannot be written: {lost.strerror}.", file=sys.stderr)
    return code or (UserError.exit_code if name in (*ANSWERS, "find-lr") else 0)


def _parse(command: str | None, argv: list[str]) -> argparse.Namespace:
    options = _parser(command).parse_args(argv)
    options.argv = argv if command else argv[1:]
    options.program = f"python {Path(sys.argv[0]).name}" if command else f"{_program()} {argv[0]}"
    return options


def _run(options) -> int:
    warnings.filterwarnings("ignore")  # libraries' remarks to their programmers
    for category in (DataWarning, ExportWarning, TrackingWarning):
        warnings.filterwarnings("always", category=category)
    warnings.showwarning = lambda message, *_: warn(message)
    try:
        return options.function(options)
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            import traceback

            _print_error(traceback.format_exc().rstrip())
        words, code = _explain(error)
        _print_error(words)
        return code


def _print_error(text: str) -> None:
    """With its own line breaks; all else in it that rules a terminal may be text of users."""
    print(*map(printable, text.split("\n")), sep="\n", file=sys.stderr)


def _explain(error: BaseException) -> tuple[str, int]:
    """What a user is told of whatever ended a command, and the exit code."""
    if isinstance(error, UserError):
        return f"error: {error}", error.exit_code
    if isinstance(error, Interrupted):
        return f"interrupted: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ModuleNotFoundError):
        what = error.name if error.name in TRACKERS else "-r requirements.txt"
        return f"error: the package {error.name!r} is missing: `pip install {what}`.", 1
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"error: {error.filename} cannot be used: {error.strerror}.", UserError.exit_code
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"error: internal error, please report it ({reason}). --debug shows the traceback.", 1


def _program() -> str:
    """The package as it was called: by its installed command or through Python."""
    return "cifar-fastai" if Path(sys.argv[0]).stem == "cifar-fastai" else "python -m cifar_fastai"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default once: none where there is none, nor where the text tells it already."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "(default: " in action.help:
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line with a hint."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse_known_args(self, *args, **kwargs):
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:  # said by the command's own parser, which knows its options; argparse leaves it to the one above
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message):
        known = [option for action in self._actions for option in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (-\S+)", message)
        hint = nearest(unknown[1], known) if unknown else ""
        self.exit(2, f"error: {printable(message)}.{hint} `{self.prog} --help` lists what can be given.\n")


def _parser(command: str | None) -> argparse.ArgumentParser:
    if command is not None:
        parser = _Parser(description=COMMANDS[command][2])
        _add_command(parser, command)
        return parser
    parser = _Parser(prog=_program(), description="Train, use and serve image classifiers with fastai.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, _, about) in COMMANDS.items():
        _add_command(commands.add_parser(name, help=about, description=about), name)
    return parser


def _add_command(parser, name: str):
    function, add_arguments, _ = COMMANDS[name]
    add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(function=function, command=name)


# --- train -------------------------------------------------------------------------------------------------------


def _add_train_arguments(parser):
    _add_training_arguments(parser)
    add = parser.add_argument
    add("--seeds", type=int, default=1, metavar="N", help="train N times, with seeds S to S+N-1, and report their spread")
    add("--tensorboard", action="store_true", help="also log to TensorBoard: `tensorboard --logdir runs` shows all runs")
    add(
        "--wandb",
        action="store_true",
        help="also log to Weights & Biases; WANDB_MODE=offline does so without login or network",
    )
    add("--deterministic", action="store_true", help="the same bits each time on a GPU too, where that can be slower")
    add("--resume", type=Path, metavar="RUN", help="go on with an interrupted run, given its folder, bit for bit")


def _add_training_arguments(parser):
    """What every command that trains takes."""
    add = parser.add_argument
    recipe = argparse.SUPPRESS  # the default is the recipe's own value, which the help text says
    text = "length of the one-cycle schedule, in epochs (default: the recipe's; of those with a name 30)"
    add("--epochs", type=int, default=recipe, metavar="N", help=text)
    _add_data_argument(parser)
    text = "a named set of everything below, 'help' lists them; or a recipe file, its name ending in .toml"
    add("--recipe", default="auto", metavar="NAME", help=text)
    _add_size_argument(parser)
    add(
        "--model",
        default=recipe,
        metavar="NAME",
        help="small, base, slim, deep, large, or resnet18 and the like (default: the recipe's)",
    )
    start = parser.add_mutually_exclusive_group()
    text = "start torchvision's and timm's models from published weights (the default for those)"
    start.add_argument("--pretrained", action="store_true", default=recipe, help=text)
    text = "start them from random weights"
    start.add_argument("--from-scratch", action="store_false", dest="pretrained", default=recipe, help=text)
    add("--weights", default=recipe, metavar="FILE", help="start them from the weights in this .pth or .safetensors file")
    text = "side in pixels to which smaller images are enlarged for them (default: the recipe's)"
    add("--input-size", type=int, default=recipe, metavar="N", help=text)
    add(
        "--valid-pct",
        type=float,
        default=recipe,
        metavar="P",
        help=f"validation share of the training split, {MIN_VALID_PCT:.2f} to {MAX_VALID_PCT:.2f}, where the data has no "
        "validation split of its own (default: the recipe's)",
    )
    add("--bs", type=int, default=recipe, metavar="N", help="images in a batch (default: the recipe's)")
    add("--lr", type=float, default=recipe, metavar="X", help="highest learning rate (default: the recipe's)")
    add("--wd", type=float, default=recipe, metavar="X", help="weight decay (default: the recipe's)")
    add(
        "--patience",
        type=int,
        default=recipe,
        metavar="N",
        help="stop after this many epochs without a lower validation loss, once the learning rate has fallen to half of its "
        "peak (default: the recipe's)",
    )
    add("--seed", type=int, default=42, metavar="S", help="of every random choice: division, weights, order, augmentation")
    add(
        "--subset",
        type=int,
        metavar="N",
        help="train on N images, drawn class by class, for trying things out (default: all)",
    )
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="where run folders go")
    add("--name", metavar="NAME", help="of the run and of its export in exports/ (default: recipe and data)")
    add("--device", choices=("cuda", "mps", "cpu"), default=recipe, help="what to train on (default: the best present)")


def _add_data_argument(parser):
    parser.add_argument(
        "--data",
        default=os.environ.get("CIFAR10_DATA") or "auto",
        metavar="SOURCE",
        help="auto (cifar10, but digits where no mirror of it can be reached), cifar10 (downloaded once), digits (no "
        "network), a folder or .tgz or .zip of train/<class>/*, valid/<class>/* and test/<class>/*, "
        "cifar-10-python.tar.gz or its extracted folder; $CIFAR10_DATA changes the default",
    )


def _add_size_argument(parser):
    text = (
        f"side of the images in pixels, {MIN_SIZE} to {MAX_SIZE}; photos are made square "
        "(default: the recipe's; of those with a name 32)"
    )
    parser.add_argument("--size", type=int, default=argparse.SUPPRESS, metavar="N", help=text)


def _train(options) -> int:
    if options.recipe == "help":
        return _list_recipes()
    if options.resume:
        from cifar_fastai.run import resume

        asked = _given(options)
        resume(asked.pop("resume"), auto.place(asked.pop("data", None)), **asked)
        return 0
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds must be at least 1 and at most {MOST_SEEDS}, not {options.seeds}.")
    recipe, run_options, instead = _training(options)
    from cifar_fastai.run import run, run_seeds

    trackers = tuple(tracker for tracker in TRACKERS if getattr(options, tracker))
    run_options = replace(run_options, trackers=trackers, deterministic=options.deterministic)
    if options.seeds == 1:
        run(recipe, run_options)
    else:
        run_seeds(recipe, run_options, options.seeds)
    auto.tell_again(instead)
    return 0


def _training(options):
    """Recipe and RunOptions of a command that trains, and what `auto.tell_again` is to tell at its end."""
    overrides, automatic = _overrides(options), options.recipe == "auto"
    recipe = Recipe(name="auto", **overrides) if automatic else get_recipe(options.recipe, **overrides)
    _check_name(options.name)

    n_seeds = getattr(options, "seeds", 1)
    if not 0 <= options.seed <= MAX_SEED - n_seeds:
        raise UserError(f"--seed must lie between 0 and {MAX_SEED - n_seeds}, not {options.seed}.")

    source, instead = auto.find_data(options.data, recipe.size)
    from cifar_fastai.models import MODELS
    from cifar_fastai.run import RunOptions, pick_device

    device = pick_device(getattr(options, "device", None))
    if automatic:
        recipe = auto.choose_recipe(overrides, source, device, options.subset, options.seed)
    if recipe.model in MODELS and (alien := [field for field in ("pretrained", "input_size") if overrides.get(field)]):
        option = f"--{alien[0].replace('_', '-')}"
        raise UserError(
            f"{option} is for models such as resnet18; {recipe.model!r} starts from scratch, on images as they are."
        )
    run_options = RunOptions(
        source=source,
        seed=options.seed,
        subset=options.subset,
        device=device,
        out=options.out,
        name=f"{options.name}-digits" if options.name and instead else options.name,
        command=f"{options.program} {shlex.join(options.argv)}",
    )
    return recipe, run_options, instead


def _overrides(options) -> dict:
    """The fields of the recipe that were given as options."""
    fields = (
        "epochs", "size", "model", "pretrained", "weights", "input_size", "valid_pct", "bs", "lr", "wd", "patience",
    )  # fmt: skip
    return {field: getattr(options, field) for field in fields if hasattr(options, field)}


def _given(options) -> dict:
    """The options of train that stand on the command line, defaults left out."""
    unset = argparse.Namespace(**dict.fromkeys(vars(options)))
    given = vars(_parser("train").parse_args(options.argv, unset))
    return {name: value for name, value in given.items() if value is not None and name != "debug"}


def _list_recipes() -> int:
    for recipe in RECIPES.values():
        print(f"{recipe.name}\n    {recipe.about}\n    {recipe.measured or 'not measured yet'}")
    return 0


def _check_name(name: str | None) -> None:
    if name is not None and not re.fullmatch(NAME, name):
        raise UserError(f"--name {name!r}: use letters, digits, '.', '_' and '-', up to 100 of them.")


# --- find-lr -----------------------------------------------------------------------------------------------------


def _find_lr(options) -> int:
    if options.recipe == "help":
        return _list_recipes()
    recipe, run_options, instead = _training(options)
    from cifar_fastai.lrfinder import CHOICE, find_lr

    _, search = find_lr(recipe, run_options)
    words = [*_without("--lr", options.argv), "--lr", f"{search.suggestions[CHOICE]:.2g}"]
    say("try", f"{_program()} train {shlex.join(words)}")
    auto.tell_again(instead)
    return 0


def _without(option: str, words: list[str]):
    """A command line without an option that takes a value."""
    rest = iter(words)
    for word in rest:
        if word == option:
            next(rest)
        elif not word.startswith(f"{option}="):
            yield word


# --- tune --------------------------------------------------------------------------------------------------------


def _add_tune_arguments(parser):
    add = parser.add_argument
    add("--trials", type=int, default=20, metavar="N", help="trainings in all, those of earlier calls counted")
    text = (
        "where the trials are kept, for several processes or machines to share: a file, or a database's address as "
        "SQLAlchemy takes it (default: a file in the folder of the results)"
    )
    add("--study", metavar="FILE|URL", help=text)
    _add_training_arguments(parser)


def _tune(options) -> int:
    if options.recipe == "help":
        return _list_recipes()
    if options.trials < 1:
        raise UserError(f"--trials must be at least 1, not {options.trials}.")
    recipe, run_options, instead = _training(options)
    from cifar_fastai.tuning import tune

    tune(recipe, run_options, options.trials, options.study, fixed=_overrides(options))
    auto.tell_again(instead)
    return 0


# --- predict -----------------------------------------------------------------------------------------------------


def _add_predict_arguments(parser):
    add = parser.add_argument
    text = "image files, folders of them, patterns such as 'holiday/*.jpg', or '-' for bytes on standard input"
    add("images", nargs="+", metavar="IMAGE", help=text)
    _add_export_argument(parser)
    add("--topk", type=int, metavar="K", help="likeliest classes told of each image (default: 1; with --json and --csv 3)")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="one JSON object a line: path, label, confidence (0 to 1), topk")
    style.add_argument("--csv", action="store_true", help="a table: path, label, confidence (0 to 1), label_2, and so on")
    add("--tta", action="store_true", help="average over the views of an image that the training allows: slower, better")
    add("--gradcam", type=Path, metavar="DIR", help="write DIR/<name>-gradcam.png: where in each image the evidence lies")


def _add_export_argument(parser):
    parser.add_argument("--export", metavar="PATH", help="folder of the export (default: the newest in exports/)")
    _add_digest_argument(parser)


def _add_digest_argument(parser):
    text = "refuse any export but the one whose making has printed this digest"
    parser.add_argument("--expect-digest", metavar="SHA256", help=text)


def _predict(options) -> int:
    style = "json" if options.json else "csv" if options.csv else "text"
    topk = (1 if style == "text" else 3) if options.topk is None else options.topk
    if topk < 1:
        raise UserError(f"--topk must be at least 1, not {topk}.")
    from cifar_fastai.artifacts import find_export
    from cifar_fastai.inference import Classifier
    from cifar_fastai.prediction import classify, classify_and_draw, find_images, print_answers

    classifier = Classifier(find_export(options.export), options.expect_digest)
    found = find_images(options.images)
    if options.gradcam:
        answers = classify_and_draw(classifier, found, options.gradcam, options.tta)
    else:
        answers = classify(classifier, found, options.tta)
    n_errors = print_answers(answers, len(found), style, min(topk, len(classifier.classes)))
    return UserError.exit_code if n_errors else 0


# --- serve -------------------------------------------------------------------------------------------------------


def _add_serve_arguments(parser):
    add = parser.add_argument
    _add_export_argument(parser)
    host, port = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1", os.environ.get("GRADIO_SERVER_PORT") or "7860"
    add("--host", default=host, metavar="ADDRESS", help="to listen on; 0.0.0.0 lets other machines in")
    add("--port", type=int, default=port, metavar="N", help="to listen on")
    add("--share", action="store_true", help="also open a public link through Gradio's servers")
    add("--auth", metavar="USER:PASSWORD", help="ask visitors to sign in, to the page and the API")
    add("--max-queue", type=int, default=100, metavar="N", help="requests that may wait; more are told to come back")


def _serve(options) -> int:
    user, colon, password = (options.auth or "").partition(":")
    if options.auth is not None and not (user and colon and password):
        raise UserError("--auth takes USER:PASSWORD.")
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port must lie between 1 and 65535, not {options.port}.")
    if options.max_queue < 1:
        raise UserError(f"--max-queue must be at least 1, not {options.max_queue}.")

    from cifar_fastai.artifacts import find_export
    from cifar_fastai.batching import BatchingClassifier
    from cifar_fastai.web import serve

    serve(
        BatchingClassifier(find_export(options.export), options.expect_digest),
        host=options.host,
        port=options.port,
        share=options.share,
        auth=None if options.auth is None else (user, password),
        max_queue=options.max_queue,
    )
    return 0


# --- evaluate and export -----------------------------------------------------------------------------------------


def _add_evaluate_arguments(parser):
    add = parser.add_argument
    add("what", metavar="RUN|EXPORT", help="a run folder, whose figures are made anew, or an export")
    add("--data", metavar="SOURCE", help="as for train (default: the run's own; for an export $CIFAR10_DATA or auto)")
    text = (
        "which of its images an export is judged on: test, train, valid or all, plain folders of classes too (default: test "
        "where there is test/, else all)"
    )
    add("--split", choices=("test", "train", "valid", "all"), help=text)
    add("--corruptions", action="store_true", help="judge a sample of these images corrupted in 15 ways instead")
    _add_digest_argument(parser)


def _evaluate(options) -> int:
    from cifar_fastai.artifacts import find_export, load_export
    from cifar_fastai.cache import load_data
    from cifar_fastai.finished import corrupt_export, corrupt_run, evaluate_export, evaluate_run, pick_split
    from cifar_fastai.metrics import with_interval

    if (Path(options.what) / "checkpoints").is_dir():
        _refuse_digest(options)
        if options.split:
            raise UserError(
                f"--split is for exports, and {options.what} is a run folder: its figures are of its own test split."
            )
        if options.corruptions:
            corrupt_run(Path(options.what), auto.place(options.data))
        else:
            evaluate_run(Path(options.what), auto.place(options.data))
        return 0
    export = load_export(find_export(options.what), options.expect_digest)
    source = auto.data_for(options.data or os.environ.get("CIFAR10_DATA") or "auto", export.classes)
    data = load_data(source, export.size, labelled=True)
    for warning in data.file_warnings:
        print(f"warning   {printable(warning)}")
    split, data = pick_split(data, options.split)
    words = {"train": "training", "valid": "validation", "test": "test", "all": "labelled"}[split]
    if split in ("all", "train"):
        print("note      if it was trained on images among these, the figures are too high")
    if options.corruptions:
        corrupt_export(export, data)
        return 0
    print(f"data      {data.n_test:,} {words} images of {printable(data.source)} ({data.encoding})")
    figures = evaluate_export(export, data)
    print(f"accuracy  {with_interval(figures['test_accuracy'], figures['test_accuracy_interval'])}")
    print(f"with TTA  {figures['test_accuracy_tta']:.2%}")
    print(f"top 2     {figures['test_top2_accuracy']:.2%}")
    print(f"loss      {figures['test_loss']:.4f}, calibration error {figures['ece']:.4f}")
    for name, row in figures["per_class"].items():
        recall = f"{row['recall']:>7.2%}" if row["support"] else f"{'-':>7}"
        shares = f"recall {recall}  precision {row['precision']:>7.2%}"
        print(f"  {printable(name):<16} {shares}  {row['support']:>6,} images")
    return 0


def _add_export_arguments(parser):
    add = parser.add_argument
    add("what", type=Path, metavar="RUN|EXPORT", help="a run folder, whose export is written anew; or with --onnx an export")
    add("--onnx", action="store_true", help="add model.onnx to the export, for ONNX Runtime; checked against torch first")
    add("--name", metavar="NAME", help="of the export (default: the run's)")
    add("--data", metavar="SOURCE", help="where the run's data lies (default: where it lay then)")
    _add_digest_argument(parser)


def _export(options) -> int:
    _check_name(options.name)
    if options.onnx:
        from cifar_fastai.onnx_export import require_packages, write_onnx

        require_packages()  # before anything is written
    if options.onnx and not (options.what / "checkpoints").is_dir():
        if options.name or options.data:
            raise UserError(f"{options.what} is no run folder, so it takes neither --name nor --data.")
        from cifar_fastai.artifacts import find_export

        folder = find_export(options.what)
    else:
        from cifar_fastai.finished import reexport_run
        from cifar_fastai.manifest import MANIFEST

        if (options.what / MANIFEST).exists():
            raise UserError(f"{options.what} is an export already; --onnx adds model.onnx to one.")
        _refuse_digest(options)
        folder = reexport_run(options.what, Path("exports"), options.name, auto.place(options.data))
    if options.onnx:
        path, difference, digest = write_onnx(folder, options.expect_digest)
        say("onnx", f"{path}: 1,000 images checked, probabilities differ from torch's by up to {difference:.0e}")
        say("digest", f"{digest}: the export's new one")
    return 0


def _refuse_digest(options) -> None:
    if options.expect_digest:
        raise UserError(f"--expect-digest is for exports, and {options.what} is a run folder.")


# --- compare -----------------------------------------------------------------------------------------------------


def _add_compare_arguments(parser):
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs, at least two")
    add("--out", type=Path, default=Path("comparison.html"), metavar="FILE", help="the page to write")


def _compare(options) -> int:
    from cifar_fastai.compare import compare

    compare(options.runs, options.out)
    return 0


# --- data --------------------------------------------------------------------------------------------------------


def _add_data_arguments(parser):
    add = parser.add_argument
    add("--verify", action="store_true", help="read everything that is kept and check its digests")
    add("--show", metavar="RECIPE", help="draw what this recipe's augmentation (a name or a .toml file) makes of images")
    add("--show-corruptions", action="store_true", help="write a picture of what evaluate --corruptions makes of an image")
    _add_data_argument(parser)
    _add_size_argument(parser)


def _data(options) -> int:
    recipe = get_recipe("fast" if options.show is None else options.show, **_overrides(options))
    if options.show is not None:
        from cifar_fastai.contactsheet import write_contact_sheet

        print(write_contact_sheet(options.data, recipe, Path(f"augmentation-{recipe.name}.png")))
        return 0
    if options.show_corruptions:
        from cifar_fastai.contactsheet import write_corruptions

        print(write_corruptions(options.data, recipe.size, Path("corruptions.png")))
        return 0
    from cifar_fastai.cache import cache_entries, cache_folder

    entries = cache_entries(options.verify)
    print(f"kept in {printable(cache_folder())}: {sum(entry.bytes for entry in entries) / 1e6:,.1f} MB")
    for entry in entries:
        verdict = (entry.damage and f"DAMAGED: {entry.damage}") or ((options.verify and "whole") or "")
        about = printable(f"{entry.path.name}  {entry.about}  {verdict}")
        print(f"  {entry.bytes / 1e6:>8,.1f} MB  {about}".rstrip())
    print(f"--data: {printable(options.data)}")
    return DataError.exit_code if any(entry.damage for entry in entries) else 0


COMMANDS = {
    "train": (_train, _add_train_arguments, "Train a classifier, evaluate it and export it."),
    "find-lr": (_find_lr, _add_training_arguments, "Search for a learning rate; takes train's options."),
    "tune": (
        _tune,
        _add_tune_arguments,
        "Search for a better recipe by many trainings; takes train's options, and keeps what they fix.",
    ),
    "predict": (_predict, _add_predict_arguments, "Say what is in pictures: path, class, confidence."),
    "serve": (_serve, _add_serve_arguments, "Serve an export as a web page with Gradio."),
    "evaluate": (
        _evaluate,
        _add_evaluate_arguments,
        "Make a run's figures anew, or judge an export on any images with labels.",
    ),
    "compare": (_compare, _add_compare_arguments, "Compare finished runs: figures, curves, and what is more than chance."),
    "export": (_export, _add_export_arguments, "Write the export of a finished run again, or an export as ONNX."),
    "data": (_data, _add_data_arguments, "Show where data is kept and how large it is; check it; show an augmentation."),
}
