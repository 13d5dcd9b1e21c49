"""Damaged image files by the thousand: `decode_image` may let nothing but BadImage escape, in bounded time and memory.

    python benchmarks/fuzz_images.py [--files 50000] [--structured 5400] [--seed 0] [--json FILE]

Good files of every format and many modes are cut, spliced, flipped and overwritten at random, half of the PNGs with their
checksums repaired, so that the damage gets further. Then come files that somebody built to take long or much
(`hostile_images.py`), each judged in a process of its own, so that its memory is known. More than three seconds of computing
or a gigabyte is a fault. Each file is made from its number alone: a fault names the number, and the number makes it again.
"""

import argparse
import json
import os
import random
import resource
import signal
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from hostile_images import encoded, hostile
from PIL import Image

from cifar_fastai.images import BadImage, decode_image, fit_image

LIMIT_SECONDS = 3  # of computing
LIMIT_MB = 1000
MOST = ("seconds_read", "seconds_refused", "memory_mb")
PNG_START = b"\x89PNG\r\n\x1a\n"
EXTREMES = [
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\0\0\0\x01",
    b"\x01\0\0\0",
    b"\0\x01\0\0",
]


class TooSlow(BaseException):
    """Not an Exception: nothing that is meant for damaged images may catch it."""


# --- good files --------------------------------------------------------------------------------------------------


def good_files() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    smooth = Image.fromarray(pixels[:4, :5]).resize((53, 37), Image.Resampling.BICUBIC)
    rgba, rgb = smooth, smooth.convert("RGB")
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    exif = rgb.getexif()
    exif[274], exif[270] = 6, "a picture"
    sixteen = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    files = [
        *(encoded(image, "PNG") for image in (rgba, rgb, sixteen, *(rgb.convert(mode) for mode in ("1", "L", "P")))),
        encoded(rgba.convert("LA"), "PNG"),
        encoded(rgb.convert("P"), "PNG", transparency=3),
        encoded(rgb, "PNG", exif=exif, icc_profile=bytes(200)),
        encoded(rgb, "PNG", **frames),
        *(encoded(rgb.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")),
        encoded(rgb, "JPEG", progressive=True, exif=exif, quality=50),
        encoded(rgb, "JPEG", subsampling=2, restart_marker_rows=1, icc_profile=bytes(200)),
        encoded(rgb, "MPO", **frames),
        *(encoded(image, "WEBP", exif=exif, lossless=lossless) for image in (rgb, rgba) for lossless in (False, True)),
        encoded(rgb, "WEBP", **frames),
        encoded(rgb, "GIF"),
        encoded(rgb, "GIF", **frames),
        encoded(rgb.convert("P"), "GIF", transparency=0, interlace=0),
        *(encoded(rgb.convert(mode), "BMP") for mode in ("RGB", "L", "P", "1")),
        encoded(rgba, "BMP"),
    ]
    for file in files:
        assert decode_image(file).mode == "RGB"
    return files


# --- damage ------------------------------------------------------------------------------------------------------


def mutant(files: list[bytes], number: int, seed: int) -> bytes:
    dice = random.Random(f"{seed} {number}")
    data = bytearray(dice.choice(files))
    for _ in range(dice.choice((1, 1, 1, 1, 2, 3, 10))):
        damage = dice.choice((flip, overwrite, extreme, cut, remove, repeat, splice))
        damage(data, dice, files)
    if data.startswith(PNG_START) and dice.random() < 0.5:
        repair_checksums(data)
    return bytes(data)


def place_in(data: bytearray, dice: random.Random) -> int:
    """Anywhere, a third of the time within the first 200 bytes, where the headers are."""
    return dice.randrange(max(1, min(len(data), 200) if dice.random() < 1 / 3 else len(data)))


def flip(data, dice, _):
    if data:
        data[place_in(data, dice)] ^= 1 << dice.randrange(8)


def overwrite(data, dice, _):
    place, n = place_in(data, dice), dice.randrange(1, 9)
    data[place : place + n] = dice.randbytes(n)


def extreme(data, dice, _):
    place, value = place_in(data, dice), dice.choice(EXTREMES)
    value = value[: dice.choice((1, 2, 4))]
    data[place : place + len(value)] = value


def cut(data, dice, _):
    del data[place_in(data, dice) :]


def remove(data, dice, _):
    place = place_in(data, dice)
    del data[place : place + dice.randrange(1, 65)]


def repeat(data, dice, _):
    place = place_in(data, dice)
    data[place:place] = data[place : place + dice.randrange(1, 65)] * dice.choice((1, 1, 2, 100))


def splice(data, dice, files):
    other = dice.choice(files)
    data[place_in(data, dice) :] = other[dice.randrange(len(other)) :]


def repair_checksums(png: bytearray) -> None:
    place = len(PNG_START)
    while place + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, place)
        end = place + 8 + length
        if end + 4 > len(png):
            return
        struct.pack_into(">I", png, end, zlib.crc32(png[place + 4 : end]))
        place = end + 4


# --- judging -----------------------------------------------------------------------------------------------------


def judge(data: bytes) -> str:
    """What became of a file: "read", the reason it was refused for, or "fault: …"."""
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    try:
        picture = fit_image(decode_image(data), 32)
        return "read" if (picture.mode, picture.size) == ("RGB", (32, 32)) else f"fault: {picture}"
    except BadImage as error:
        return str(error).partition("(")[0].strip() if str(error) else "fault: refused without a reason"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"fault: {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def too_slow(*_):
    raise TooSlow(f"more than {LIMIT_SECONDS} seconds")


def judge_apart(data: bytes) -> tuple[str, float, float]:
    """What became of a file in a process of its own, the seconds that this computed, and the megabytes that it grew by."""
    ours, its = os.pipe()
    child = os.fork()
    if not child:
        memory = peak_mb()
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # what never returns to Python is ended too
        start = time.process_time()
        outcome = judge(data)
        os.write(its, json.dumps((outcome, time.process_time() - start, peak_mb() - memory)).encode())
        os._exit(0)
    os.close(its)
    with os.fdopen(ours, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    outcome, seconds, memory = json.loads(said) if said else ("fault: ended by the system", 60.0, 0.0)
    if memory > LIMIT_MB:
        outcome = f"fault: {memory:.0f} MB"
    return outcome, seconds, memory


def judge_structured(n: int, seed: int) -> dict:
    """Files built to take long or much, as figures by kind. Where a machine is busy, what took long is measured thrice."""
    kinds, n_faults = {}, 0
    for number in range(n):
        kind, data = hostile(number, seed)
        results = [judge_apart(data)]
        while results[-1][1] > 1 and len(results) < 3:
            results.append(judge_apart(data))
        outcome, seconds, memory = min(results, key=lambda result: result[1])
        if outcome.startswith("fault"):
            n_faults += 1
            print(f"structured file {number}, {kind}: {outcome}", file=sys.stderr)
        figures = kinds.setdefault(
            kind, {"read": 0, "refused": 0, "seconds_read": 0.0, "seconds_refused": 0.0, "memory_mb": 0.0}
        )
        end = "read" if outcome == "read" else "refused"
        figures[end] += 1
        figures[f"seconds_{end}"] = max(figures[f"seconds_{end}"], seconds)
        figures["memory_mb"] = max(figures["memory_mb"], memory)
    most = {f"most_{name}": max((kind[name] for kind in kinds.values()), default=0) for name in MOST}
    return {"files": n, "faults": n_faults, **most, "kinds": kinds}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--structured", type=int, default=5400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's remarks about what it mends
    signal.signal(signal.SIGPROF, too_slow)
    files, outcomes, slowest, n_faults = good_files(), Counter(), 0.0, 0
    for number in range(options.files):
        data = mutant(files, number, options.seed)
        start = time.process_time()
        outcome = judge(data)
        slowest = max(slowest, time.process_time() - start)
        if outcome.startswith("fault"):
            n_faults += 1
            print(f"file {number}: {outcome}", file=sys.stderr)
        outcomes[outcome.partition(":")[0]] += 1
    result = {
        "files": options.files,
        "faults": n_faults,
        "outcomes": dict(outcomes.most_common()),
        "slowest_seconds": slowest,
        "peak_memory_mb": peak_mb(),
        "structured": judge_structured(options.structured, options.seed),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if n_faults or result["structured"]["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
