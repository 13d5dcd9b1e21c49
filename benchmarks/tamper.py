"""Changes to an export's files, thousands of them: each is refused, or provably without effect.

    python benchmarks/tamper.py [--export NAME] [--flips 2000] [--cuts 200] [--resealed 500] [--seed 0] [--json FILE]
    python benchmarks/tamper.py --run RUN [--edits 300] [--seed 0] [--json FILE]

A flip changes one byte, at a random place of a random file, to a random other value; a cut leaves a random part of a file,
or nothing. Afterwards the export must be refused with ExportError (exit code 5), or give the very predictions and texts that
it gave before. It gets an export.pkl and a model.onnx too, if it has none, so that there is one of each file. A resealed
change is one that whoever made it has listed in MANIFEST.json: there the parsers themselves are met. It may have an effect,
but nothing except ExportError may escape. Each change is made from its number alone.

--run takes a finished run instead, of the embedded digits, and edits its config.json and metrics.json: other types, huge
numbers, control characters, paths, fields that are missing or too many, broken JSON. `export`, `evaluate`, `compare` and
`train --resume` meet each of them: they may work or raise UserError, in one line, and nothing but the run's folder and
exports/<name> may change.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from cifar_fastai import Classifier
from cifar_fastai.artifacts import find_export, model_card
from cifar_fastai.errors import ExportError, UserError
from cifar_fastai.manifest import CONFIG, MANIFEST, ONNX, PICKLE, PROBE, WEIGHTS, write_manifest

PICTURES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
REFUSED, WITHOUT_EFFECT, WITH_EFFECT = "refused", "without effect", "with effect"


def served(folder: Path) -> tuple:
    """All that anybody is told of an export, and what it answers to some pictures, to the last bit."""
    classifier = Classifier(folder)
    config = classifier.export.config
    return classifier.predict_batch(PICTURES), json.dumps(config), model_card(config), classifier.classes


def flipped(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ dice.randrange(1, 256)]) + data[place + 1 :]


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.choice((0, dice.randrange(len(data)), len(data) - 1))]


def judge(folder: Path, name: str, data: bytes, expected: tuple, reseal: bool = False) -> str:
    """What comes of one changed file; the export is put right again."""
    before = {file: (folder / file).read_bytes() for file in {name, MANIFEST}}
    try:
        (folder / name).write_bytes(data)
        if reseal:
            write_manifest(folder)
        return WITHOUT_EFFECT if served(folder) == expected else WITH_EFFECT
    except ExportError as error:
        return REFUSED if error.exit_code == 5 and "\n" not in str(error) else f"fault: {error!r}"
    except Exception as error:
        return f"fault: {error!r}"
    finally:
        for file, content in before.items():
            (folder / file).write_bytes(content)


def tamper(folder: Path, n_flips: int, n_cuts: int, n_resealed: int, seed: int) -> dict:
    """Counts of outcomes by file for each kind of change; `faults` lists the changes that should not have come to that."""
    expected, faults = served(folder), []
    names = sorted(path.name for path in folder.iterdir())
    kinds = {"flips": (flipped, n_flips, names, False), "cuts": (cut, n_cuts, names, False),
             "resealed flips": (flipped, n_resealed, [CONFIG, PROBE, WEIGHTS], True)}  # fmt: skip
    result = {}
    for kind, (change, n, files, reseal) in kinds.items():
        counts = {name: Counter() for name in files}
        for number in range(n):
            dice = random.Random(f"{seed} {kind} {number}")
            name = dice.choice(files)
            outcome = judge(folder, name, change((folder / name).read_bytes(), dice), expected, reseal)
            counts[name][outcome] += 1
            if outcome not in (REFUSED, WITHOUT_EFFECT) and not (reseal and outcome == WITH_EFFECT):
                faults.append(f"{kind} {number} of {name}: {outcome}")
        result[kind] = {name: dict(count) for name, count in counts.items()}
    return {**result, "faults": faults}


# --- edits of a run -----------------------------------------------------------------------------------------------

ABSOLUTE = "@victim@"  # stands for the path of what must stay
RAW = ("NaN", "-Infinity", "1e999", "1" + "0" * 400, "[" * 2000, '"\\ud800"', "")  # that json.dumps would not write
VALUES = (
    None, True, -1, 0, 1, 7, 0.5, 1.5, 1e-300, 1e308, 10**18, -(10**18), "", "0", "a" * 300, "evil\x1b[2J\n", "\u202eevil",
    "..", "../victim", "exports/../victim", ABSOLUTE, "evil/name", ".hidden", "cuda", "vit_h_14", "cifar_fastai", [], {},
    [[]], ["a", "a"], [1, 2, 3], {"": 0}, {"name": ABSOLUTE}, [ABSOLUTE] * 3,
    *(f"@raw{number}@" for number in range(len(RAW))),
)  # fmt: skip


def edited(data: bytes, dice: random.Random, victim: Path) -> bytes:
    """The JSON with one thing changed."""
    if dice.random() < 0.05:
        return cut(data, dice)
    content, value = json.loads(data), dice.choice(VALUES)
    place = content
    while isinstance(place, dict | list) and place:
        key = dice.choice([*place] if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or dice.random() < 0.3:
            break
        place = place[key]
    what = dice.random()
    if what < 0.15 and isinstance(place, dict):
        place[str(value)[:40]] = value
    elif what < 0.3:
        del place[key]
    else:
        place[key] = value
    text = json.dumps(content).replace(ABSOLUTE, str(victim))
    for number, raw in enumerate(RAW):
        text = text.replace(f'"@raw{number}@"', raw)
    return text.encode()


def snapshot(place: Path, *but: Path) -> dict:
    """Every file and folder below a place, but for what lies below some, with the files' content."""
    paths = (path for path in sorted(place.rglob("*")) if not any(path.is_relative_to(one) for one in but))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def tamper_with_run(run: Path, n: int, seed: int) -> dict:
    """Counts of outcomes by command; `faults` lists what should not have come to pass. Works in the working folder."""
    from cifar_fastai.compare import compare
    from cifar_fastai.finished import evaluate_run, reexport_run
    from cifar_fastai.run import resume

    here = Path.cwd()
    victim, exports, other, page = here / "victim", here / "exports", here / "other", here / "page.html"
    victim.mkdir()
    (victim / "diary.txt").write_text("to be kept")
    shutil.copytree(run, other)
    commands = {
        "export": lambda folder: reexport_run(folder, Path("exports")),
        "evaluate": evaluate_run,
        "compare": lambda folder: compare([folder, other], page),
        "resume": resume,
    }
    counts, faults = {name: Counter() for name in commands}, []
    for number in range(n):
        dice = random.Random(f"{seed} {number}")
        file, command = dice.choice((CONFIG, "metrics.json")), dice.choice([*commands])
        folder = shutil.copytree(run, here / "run")
        content = edited((folder / file).read_bytes(), dice, victim)
        (folder / file).write_bytes(content)
        if command == "resume" and file == CONFIG:
            (folder / "metrics.json").unlink()  # as if it had been stopped in its evaluation
        before = snapshot(here, folder, exports, page)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                commands[command](folder)
            outcome = "done"
        except UserError as error:
            outcome = REFUSED
            if "\n" in str(error) or "\x1b" in str(error) or len(str(error)) > len(str(here)) * 3 + 600:
                outcome = f"a fault: {error!r}"
        except Exception as error:
            outcome = f"a fault: {error!r}"
        if snapshot(here, folder, exports, page) != before:
            outcome = "a fault: something else was changed"
        made = [path.name for path in exports.iterdir()] if exports.exists() else []
        if made and made != [json.loads((folder / CONFIG).read_bytes())["name"]]:
            outcome = f"a fault: {made} in exports"
        counts[command][outcome if outcome in ("done", REFUSED) else "fault"] += 1
        if outcome not in ("done", REFUSED):
            faults.append(f"edit {number} of {file}, {command}: {outcome}")
        for left in (folder, exports):
            shutil.rmtree(left, ignore_errors=True)
    return {"edits": {name: dict(count) for name, count in counts.items()}, "faults": faults}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", default="exports/cifar10")
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--resealed", type=int, default=500)
    parser.add_argument("--run", type=Path, help="edit this finished run instead")
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # that probabilities differ a little
    with tempfile.TemporaryDirectory() as scratch:
        if options.run:
            run, path = options.run.resolve(), options.json and options.json.resolve()
            os.chdir(scratch)
            result = tamper_with_run(run, options.edits, options.seed)
            os.chdir(run)  # the other will be removed
            report(result, path)
        folder = shutil.copytree(find_export(options.export), Path(scratch) / "export")
        for name in (PICKLE, ONNX):  # nothing opens them
            if not (folder / name).exists():
                (folder / name).write_bytes(random.Random(0).randbytes(10_000))
        write_manifest(folder)
        result = tamper(folder, options.flips, options.cuts, options.resealed, options.seed)
    report(result, options.json)


def report(result: dict, path: Path | None) -> None:
    print(json.dumps(result, indent=1))
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
