"""Changes to an export's files, thousands of them: each is refused, or provably without effect.

    python benchmarks/tamper.py [--export NAME] [--flips 2000] [--cuts 200] [--resealed 500] [--seed 0] [--json FILE]

A flip changes one byte, at a random place of a random file, to a random other value; a cut leaves a random part of a file,
or nothing. Afterwards the export must be refused with ExportError (exit code 5), or give the very predictions and texts that
it gave before. It gets an export.pkl and a model.onnx too, if it has none, so that there is one of each file. A resealed
change is one that whoever made it has listed in MANIFEST.json: there the parsers themselves are met. It may have an effect,
but nothing except ExportError may escape. Each change is made from its number alone.
"""

import argparse
import json
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
from cifar_fastai.errors import ExportError
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", default="exports/cifar10")
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--resealed", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # that probabilities differ a little
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(find_export(options.export), Path(scratch) / "export")
        for name in (PICKLE, ONNX):  # nothing opens them
            if not (folder / name).exists():
                (folder / name).write_bytes(random.Random(0).randbytes(10_000))
        write_manifest(folder)
        result = tamper(folder, options.flips, options.cuts, options.resealed, options.seed)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
