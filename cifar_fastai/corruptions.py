"""The common corruptions of images, fifteen kinds at five severities, to see how a classifier bears what it was not shown.

D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
https://arxiv.org/abs/1903.12261. Kinds, definitions and amounts are those of CIFAR-10-C
(ImageNet-C/create_c/make_cifar_c.py in https://github.com/hendrycks/robustness), written anew for batches of images:

- CIFAR-10-C itself is one more large download, and of CIFAR-10 alone; this corrupts whatever images there are.
- The package `imagecorruptions` 1.1.2 has the amounts meant for photographs of 224 pixels; beside numpy 2.4 and scikit-image
  0.26 its glass blur, Gaussian blur and fog fail; it works image by image, and brings OpenCV and scikit-image along.

What differs from CIFAR-10-C: values are rounded to 8 bits, not cut off; sizes given in pixels grow with the image (at 32
pixels they are the same); and its frost is laid on from photographs, in whose place a texture is computed here. Figures are
therefore close to those on CIFAR-10-C, not equal to them.
"""

import io
import math

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from cifar_fastai.errors import UserError
from cifar_fastai.imageops import GRAY, resample
from cifar_fastai.recipes import nearest

SEVERITIES = (1, 2, 3, 4, 5)
CIFAR_SIZE = 32  # for which lengths in pixels are given
BLOCK = 250  # images worked on at once


def corrupt(images: np.ndarray, kind: str, severity: int, seed: int = 0) -> np.ndarray:
    """A corrupted copy of `images`, uint8 (N, size, size, 3).

    kind: one of KINDS. severity: 1 to 5. The same images and seed give the same result; every severity draws the same random
    numbers, so that two severities differ by their amount alone. Raises UserError for an unknown kind or severity.
    """
    if kind not in KINDS:
        raise UserError(f"There is no corruption {kind!r}.{nearest(kind, KINDS)} There are: {', '.join(KINDS)}.")
    if severity not in SEVERITIES:
        raise UserError(f"severity must be a whole number from 1 to 5, not {severity!r}.")
    corrupted = np.empty_like(images)
    for start in range(0, len(images), BLOCK):
        block = slice(start, start + BLOCK)
        random = np.random.default_rng([seed, list(KINDS).index(kind), start])
        corrupted[block] = _to_bytes(KINDS[kind](np.float32(images[block]) / 255, severity, random))
    return corrupted


# Each of the kinds takes float32 images (N, size, size, 3) of values 0 to 1, a severity and a source of random numbers, and
# returns float images, whose values may lie beyond 0 and 1.

# --- noise -------------------------------------------------------------------------------------------------------


def gaussian_noise(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """What a sensor adds in low light."""
    deviation = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images + deviation * random.standard_normal(images.shape, dtype=np.float32)


def shot_noise(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Poisson noise, from counting few photons: so many for white."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return random.poisson(images * photons) / np.float32(photons)


def impulse_noise(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Salt and pepper in each channel: this share of the values becomes 0 or 1."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    hit, salt = random.random((2, *images.shape), dtype=np.float32)
    return np.where(hit < share, np.float32(salt < 0.5), images)


# --- blur --------------------------------------------------------------------------------------------------------


def defocus_blur(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Each point spread over a disk with a softened edge."""
    radius, softness = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    scale = _scale(images)
    kernel = torch.from_numpy(_disk(radius * scale, softness * scale, math.ceil(scale)))
    reach = len(kernel) // 2
    padded = F.pad(_to_tensor(images), (reach,) * 4, mode="reflect")
    return _to_array(F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3))


def glass_blur(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """As through frosted glass: blurred, each pixel replaced by one nearby, and blurred again.

    CIFAR-10-C means to swap pixels, but copies them (its two names are views of one array), and so do we.
    """
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    sigma, reach = sigma * _scale(images), round(_scale(images))
    images = _gaussian(images, sigma)
    for _ in range(rounds):
        images = _moved(images, *random.integers(-reach, reach, (2, *images.shape[:3])))
    return _gaussian(images, sigma)


def motion_blur(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """The camera moves while the shutter is open, for each image another way."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return _motion(images, radius, sigma, random.uniform(-45, 45, len(images)))


def zoom_blur(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """The camera moves towards the object: the average over the image enlarged more and more, by steps of 1 %."""
    steps = (7, 12, 16, 21, 26)[severity - 1]
    plain = _to_tensor(images)
    total = plain + sum(_enlarged(plain, 1 + step / 100) for step in range(steps))
    return _to_array(total / (steps + 1))


# --- weather -----------------------------------------------------------------------------------------------------


def snow(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Flakes, blurred by their fall, over a picture gone pale."""
    mean, deviation, size, threshold, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    noise = mean + deviation * random.standard_normal((*images.shape[:3], 1), dtype=np.float32)
    flakes = _to_array(_enlarged(_to_tensor(noise), size * _scale(images)))
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _motion(flakes, radius, sigma, random.uniform(-135, -45, len(images)))
    pale = np.maximum(images, 1.5 * _gray(images) + 0.5)
    return kept * images + (1 - kept) * pale + flakes + flakes[:, ::-1, ::-1]


def frost(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Ice on the window: part of the image, and of a computed texture.

    CIFAR-10-C takes crops of photographs. This texture has the range of their brightness (0.45 to 0.80) and of their
    deviation within a crop (0.05 to 0.13), their blue tint, and much the same detail at every scale; its crystals are the
    ridges of a plasma fractal.
    """
    kept, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    n, size = images.shape[:2]
    crystals = 1 - np.abs(2 * _plasma(n, size, 1.1, random) - 1)
    crystals -= crystals.mean(axis=(1, 2), keepdims=True)
    crystals /= crystals.std(axis=(1, 2), keepdims=True)
    level, deviation = random.uniform(0.45, 0.80, (n, 1, 1, 1)), random.uniform(0.05, 0.13, (n, 1, 1, 1))
    texture = (level + deviation * crystals[..., None]) * (0.9, 1.02, 1.08)
    return kept * images + ice * texture.clip(0, 1)


def fog(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """A plasma fractal's clouds added, and the result brought back to the image's range."""
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    clouds = _plasma(len(images), images.shape[1], decay**2, random)[..., None]
    return (images + amount * clouds) * brightest / (brightest + amount)


def brightness(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """More of HSV's value, the highest of red, green and blue; hue and saturation as they were."""
    amount = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = images.max(axis=-1, keepdims=True)
    raised = np.minimum(value + np.float32(amount), 1)
    return np.divide(images, value, out=np.ones_like(images), where=value > 0) * raised


# --- digital -----------------------------------------------------------------------------------------------------


def contrast(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Each channel drawn towards its mean: this share of the contrast is left."""
    share = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    means = images.mean(axis=(1, 2), keepdims=True)
    return (images - means) * share + means


def elastic_transform(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Three points of the image moved at random, then each pixel a little, smoothly: all lengths in shares of the side.

    As published, the first severities move the three points the furthest.
    """
    strength, smoothness, affine = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    n, size = images.shape[:2]
    triangle = np.float64([[26, 26], [26, 6], [6, 6]]) * 2 / CIFAR_SIZE - 1  # x and y from -1 to 1
    moved = triangle + random.uniform(-2 * affine, 2 * affine, (n, 3, 2))
    noise = random.uniform(-1, 1, (n, size, size, 2))
    matrices = _homogeneous(triangle) @ np.linalg.inv(_homogeneous(moved))
    turned = resample(_to_tensor(images), torch.from_numpy(matrices).float())
    # Smoothing leaves the less of the noise the more pixels it spans, hence the second factor.
    pixels = gaussian_filter(noise, (0, smoothness * size, smoothness * size, 0), mode="reflect", truncate=3)
    shifts = torch.from_numpy(pixels * strength * size * _scale(images)).float() * 2 / size
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(turned.shape), align_corners=False) + shifts
    return _to_array(F.grid_sample(turned, grid, mode="bilinear", padding_mode="reflection", align_corners=False))


def pixelate(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Reduced to this share of the side, and enlarged again, without smoothing."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    size = images.shape[1]
    small = int(size * share)

    def reduce(image):
        return image.resize((small, small), Image.Resampling.BOX).resize((size, size), Image.Resampling.BOX)

    return _each(images, reduce)


def jpeg_compression(images: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Saved as JPEG of this quality."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def save(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(images, save)


GROUPS = {
    "noise": (gaussian_noise, shot_noise, impulse_noise),
    "blur": (defocus_blur, glass_blur, motion_blur, zoom_blur),
    "weather": (snow, frost, fog, brightness),
    "digital": (contrast, elastic_transform, pixelate, jpeg_compression),
}
KINDS = {function.__name__: function for functions in GROUPS.values() for function in functions}


# --- their parts -------------------------------------------------------------------------------------------------


def _to_bytes(images: np.ndarray) -> np.ndarray:
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def _to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _to_array(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def _scale(images: np.ndarray) -> float:
    return images.shape[1] / CIFAR_SIZE


def _gray(images: np.ndarray) -> np.ndarray:
    return images @ np.float32(GRAY)[:, None]


def _each(images: np.ndarray, change) -> np.ndarray:
    """What `change` makes of each image as Pillow's."""
    return np.stack([np.float32(change(Image.fromarray(image))) / 255 for image in _to_bytes(images)])


def _gaussian(images: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")


def _disk(radius: float, softness: float, reach: int) -> np.ndarray:
    """A square kernel of sum 1: a disk, its edge blurred by a Gaussian of sigma `softness`, cut off after `reach` pixels."""
    places = np.arange(-int(radius) - reach, int(radius) + reach + 1)
    disk = np.float32(places**2 + places[:, None] ** 2 <= radius**2)
    return gaussian_filter(disk / disk.sum(), softness, radius=reach)


def _moved(images: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Each pixel replaced by the one so many rows below and columns to the right, or by the border's.

    down, right: whole numbers (N, size, size), or a shape that broadcasts to it.
    """
    n, size = images.shape[:2]
    rows, columns = np.arange(size)[:, None] + down, np.arange(size) + right
    return images[np.arange(n)[:, None, None], rows.clip(0, size - 1), columns.clip(0, size - 1)]


def _motion(images: np.ndarray, radius: float, sigma: float, angles: np.ndarray) -> np.ndarray:
    """Each image averaged along a line that starts at the pixel, with the weights of half a Gaussian.

    It is ImageMagick's motion blur. radius, sigma: in pixels of an image of 32, the line's length and the weights'
    deviation. angles: in degrees, (N,).
    """
    sigma = sigma * _scale(images)
    steps = np.arange(2 * math.ceil(radius * _scale(images)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2)).astype(np.float32)
    directions = np.radians(angles)[:, None, None]
    total = np.zeros_like(images)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down, right = (np.ceil(step * part(directions) - 0.5).astype(int) for part in (np.sin, np.cos))
        total += weight * _moved(images, down, right)
    return total


def _enlarged(images: Tensor, factor: float) -> Tensor:
    """`images` (N, C, size, size) enlarged by `factor` and cut to their size, both to whole pixels as CIFAR-10-C does."""
    size = images.shape[-1]
    part = math.ceil(size / factor)
    start = (size - part) // 2
    large = images[..., start : start + part, start : start + part]
    large = F.interpolate(large, size=(round(part * factor),) * 2, mode="bilinear", align_corners=True)
    start = (large.shape[-1] - size) // 2
    return large[..., start : start + size, start : start + size]


def _plasma(n: int, size: int, decay: float, random: Generator) -> np.ndarray:
    """Plasma fractals (n, size, size) of values 0 to 1, by the diamond-square algorithm.

    Each halving of the distance between points divides the amount of chance by `decay`. A. Fournier, D. Fussell and
    L. Carpenter, Computer Rendering of Stochastic Models, 1982.
    """
    side = 2 ** math.ceil(math.log2(size))
    grid = np.zeros((n, side, side), np.float32)
    step, amount = side, 1.0

    def middle(*neighbours):
        return sum(neighbours) / 4 + amount * random.uniform(-1, 1, neighbours[0].shape)

    while step > 1:
        half = step // 2
        corners = grid[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        grid[:, half::step, half::step] = centres = middle(pairs, np.roll(pairs, -1, axis=2))
        grid[:, ::step, half::step] = middle(corners, np.roll(corners, -1, axis=2), centres, np.roll(centres, 1, axis=1))
        grid[:, half::step, ::step] = middle(corners, np.roll(corners, -1, axis=1), centres, np.roll(centres, 1, axis=2))
        step, amount = half, amount / decay
    grid -= grid.min(axis=(1, 2), keepdims=True)
    return (grid / grid.max(axis=(1, 2), keepdims=True))[:, :size, :size]


def _homogeneous(points: np.ndarray) -> np.ndarray:
    """Points (..., n, 2) as the columns of matrices (..., 3, n)."""
    return np.concatenate([points, np.ones_like(points[..., :1])], axis=-1).swapaxes(-1, -2)
