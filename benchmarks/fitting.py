"""How a photo of any size and shape becomes the network's square: which fitting gives the best answers.

    CIFAR10_DATA=… python benchmarks/fitting.py [--export PATH] [--images 1000] [--photos FOLDER …] [--json FILE]

Shapes: the centred square (`crop`), the whole picture pressed into a square (`squash`), half-way between the two (`half`),
the whole picture with borders of a colour (`pad-…`). Filters: Pillow's. For each the accuracy and the mean negative log of
the true class's probability (the loss), on

- enlarged: validation images (of the split that seed 42 makes, never the test split), enlarged by a kernel and to a size
  drawn anew for each, saved as JPEG; clean, or with grain, which is finer than the network's pixels and has to be averaged
  away. An enlarged image holds no detail beyond its 32 x 32 pixels, where a photo does: clean, even `nearest` is right;
- framed: the same, as a part of a wide or tall picture with mirrored surroundings, in the middle or anywhere; or, `filling`,
  stretched to that shape, as when a subject fills the frame;
- photos: folders <class>/<image> of your own, classes named as the export's.

Then what it takes to fit a JPEG of 12 megapixels, and by how much quicker ways change the network's input.
"""

import argparse
import io
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from cifar_fastai import BadImage, dataloaders, decode_image, get_recipe
from cifar_fastai.artifacts import Export, find_export, load_export
from cifar_fastai.cache import load_data
from cifar_fastai.run import hardware, versions

FILTERS = {kernel.name.lower(): kernel for kernel in Image.Resampling}
ENLARGING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
ASPECTS = (4 / 3, 3 / 2, 16 / 9)
GRAIN = 16  # standard deviation of the noise, of 255
JPEG_QUALITY = 90


# --- shapes ------------------------------------------------------------------------------------------------------


def crop(image, size, kernel):
    return ImageOps.fit(image, (size, size), kernel)


def squash(image, size, kernel):
    return image.resize((size, size), kernel)


def half(image, size, kernel):
    """The longer side cut to the geometric mean of both, the rest pressed into a square."""
    width, height = image.size
    side = (width * height) ** 0.5
    dx, dy = max(width - side, 0) / 2, max(height - side, 0) / 2
    return image.resize((size, size), kernel, box=(dx, dy, width - dx, height - dy))


def pad(image, size, kernel, colour):
    return ImageOps.pad(image, (size, size), kernel, color=colour)


SHAPES = {"crop": crop, "half": half, "squash": squash}
SHAPES |= {f"pad-{colour}": partial(pad, colour=colour) for colour in ("black", "gray", "white")}
BY_SHAPE = {f"{name} bicubic": partial(shape, kernel=FILTERS["bicubic"]) for name, shape in SHAPES.items()}
BY_FILTER = {
    f"half {name}": partial(half, kernel=kernel) for name, kernel in FILTERS.items()
}  # of squares, all shapes are one


# --- pictures ----------------------------------------------------------------------------------------------------


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def enlarged(image: np.ndarray, random, side: int | None = None) -> np.ndarray:
    """By 2 to 16 times, if side is not given."""
    side = side or int(len(image) * 2 ** random.uniform(1, 4))
    return np.asarray(Image.fromarray(image).resize((side, side), ENLARGING[random.integers(3)]))


def grainy(image: np.ndarray, random) -> np.ndarray:
    large = enlarged(image, random)
    return np.clip(large + random.normal(0, GRAIN, large.shape), 0, 255).astype(np.uint8)


def framed(image: np.ndarray, random, where: str) -> np.ndarray:
    large = enlarged(image, random)
    side, aspect = len(large), ASPECTS[random.integers(len(ASPECTS))]
    upright = random.random() < 0.5
    if where == "filling":
        size = (round(side * aspect), side)
        return np.asarray(Image.fromarray(large).resize(size[::-1] if upright else size, Image.Resampling.BICUBIC))
    margin = round(side * (aspect - 1))
    before = margin // 2 if where == "middle" else random.integers(margin + 1)
    margins = [(0, 0), (before, margin - before), (0, 0)]
    return np.pad(large, margins[1::-1] + margins[2:] if upright else margins, mode="symmetric")


SETS = {
    "enlarged, clean": enlarged,
    "enlarged, grain": grainy,
    "framed, middle": partial(framed, where="middle"),
    "framed, anywhere": partial(framed, where="anywhere"),
    "framed, filling": partial(framed, where="filling"),
}


# --- measuring ---------------------------------------------------------------------------------------------------


def figures(export: Export, images: list[Image.Image], labels: list[int], way) -> dict:
    pixels = np.stack([np.asarray(way(image, export.size)) for image in images])
    batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(250)
    probabilities = torch.cat([export.probabilities(batch) for batch in batches])
    right = (probabilities.argmax(dim=1) == torch.tensor(labels)).sum().item()
    loss = -probabilities[range(len(labels)), labels].log().mean().item()
    return {"right": right, "accuracy": right / len(labels), "loss": loss}


def table(export: Export, name: str, images: list[Image.Image], labels: list[int], ways: dict) -> dict:
    rows = {way: figures(export, images, labels, function) for way, function in ways.items()}
    print(f"\n{name}: {len(images)} images")
    for way, row in rows.items():
        print(f"  {way:<18} {row['right']:>5} right  {row['accuracy']:>7.2%}  loss {row['loss']:.4f}", flush=True)
    return {"n": len(images), "ways": rows}


def from_validation(export: Export, source, n: int) -> dict:
    data = load_data(source, export.size)
    rows = np.array(list(dataloaders(data, get_recipe("cpu", size=export.size), seed=42).valid.dataset.items))
    rows = np.random.default_rng(0).permutation(rows)[:n]
    numbers = [export.classes.index(name) for name in data.classes]
    labels = [numbers[data.labels[row]] for row in rows]
    unchanged = [Image.fromarray(data.images[row]) for row in rows]
    result = {"unchanged": table(export, "unchanged", unchanged, labels, {"as it is": lambda image, size: image})}
    for name, make in SETS.items():
        random = np.random.default_rng(1)
        images = [decode_image(jpeg(make(data.images[row], random))) for row in rows]
        result[name] = table(export, name, images, labels, BY_SHAPE if name.startswith("framed") else BY_FILTER)
    return result


def from_photos(export: Export, folder: Path) -> dict:
    images, labels, paths = [], [], sorted(folder.glob("*/*"))
    for path in paths:
        try:
            images.append(decode_image(path))
            labels.append(export.classes.index(path.parent.name))
        except (BadImage, ValueError) as error:
            raise SystemExit(f"{path}: {error}") from None
    result = table(export, folder.name, images, labels, BY_SHAPE | BY_FILTER)
    return result | {"files": [path.relative_to(folder).as_posix() for path in paths]}


def quicker_ways(size: int) -> dict:
    """Milliseconds, medians of 5, to read and fit a JPEG of 12 megapixels with grain; how the network's input differs."""
    random = np.random.default_rng(2)
    coarse = Image.fromarray(random.integers(0, 256, (96, 128, 3), dtype=np.uint8)).resize((4000, 3000))
    content = jpeg(np.clip(coarse + random.normal(0, 4, (3000, 4000, 3)), 0, 255).astype(np.uint8))

    def full(reducing_gap=None):
        return decode_image(content).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=reducing_gap)

    def draft(times):
        image = Image.open(io.BytesIO(content))
        image.draft("RGB", (times * size, times * size))
        return decode_image(image).resize((size, size), Image.Resampling.BICUBIC)

    ways = {"all pixels": full} | {f"reducing_gap {gap}": partial(full, gap) for gap in (2, 3)}
    ways |= {f"draft {times} x": partial(draft, times) for times in (2, 8)}
    expected, result = np.asarray(full(), dtype=int), {}
    for name, way in ways.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            pixels = np.asarray(way(), dtype=int)
            seconds.append(time.perf_counter() - start)
        off = np.abs(pixels - expected)
        result[name] = {"ms": 1000 * statistics.median(seconds), "mean_off": off.mean().item(), "most_off": off.max().item()}
        print(f"  {name:<18} {result[name]['ms']:>6.0f} ms, off by {off.mean():.2f} of 255, {off.max()} at most", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", help="default: the newest in exports/")
    parser.add_argument("--data", default=os.environ.get("CIFAR10_DATA", "cifar10"))
    parser.add_argument("--images", type=int, default=1000, help="of the validation split")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    export = load_export(find_export(options.export))
    result = {"export": export.config["name"], "created": export.config["created"]}
    result["validation"] = from_validation(export, options.data, options.images)
    result["photos"] = {folder.name: from_photos(export, folder) for folder in options.photos}
    print("\nreading and fitting 12 megapixels")
    result["quicker"] = quicker_ways(export.size)
    result |= {"hardware": hardware("cpu"), "versions": versions()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
