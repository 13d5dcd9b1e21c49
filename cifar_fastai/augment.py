"""Augmentation of whole batches of images by chance, and the transforms of training and evaluation side by side.

All geometry of a recipe is one resampling; a recipe of flips, whole-pixel shifts and cutout alone needs none and stays
in uint8. Every part draws from a random stream of its own, so that a seed repeats it whatever the other parts do.
"""

import math
import zlib

import numpy as np
import torch
from fastai.data.transforms import Normalize
from fastai.vision.core import TensorImage
from fasttransform import Transform
from torch import Tensor

from cifar_fastai import imageops
from cifar_fastai.recipes import Recipe

COLOURS = ("brightness", "contrast", "saturation")  # in the order in which they are applied


def batch_transforms(recipe: Recipe, mean, std, seed: int) -> list[Transform]:
    """What the DataBlock does to a batch: augmentation in training alone, normalisation always.

    mean, std: of each channel, in units of the full range (0 to 1).
    """
    return [Augment(recipe, seed, mean), Normalize.from_stats(mean, std, cuda=False)]


class Augment(Transform):
    """Draws a fresh variation of every image of a training batch (N, 3, H, W) of values 0 to 255.

    mean: the colour of cutout's squares, each channel 0 to 1. Where a batch has an attribute `rows`, the numbers of its
    images, they and `epoch` decide the alternating flip. share: (i, n) where several processes divide the batch and this one
    has part i of n, every n-th image of it; each image is varied as it would be if one process had them all.
    """

    share = (0, 1)
    split_idx = 0  # training only
    order = 5  # before IntToFloatTensor (10) and Normalize (99)

    def __init__(self, recipe: Recipe, seed: int = 42, mean=(0.5, 0.5, 0.5)):
        self.recipe, self.seed, self.mean = recipe, seed, mean
        self.epoch = 0
        self.random_state = {}
        self.fill = None

    def __getstate__(self):
        return {**self.__dict__, "streams": None, "states": self.random_state, "fill": None}  # generators belong to a device

    @property
    def random_state(self) -> dict[str, Tensor]:
        """How far each random stream has got; another Augment of the same recipe and seed can go on from there."""
        return self.states | (self.streams.states() if self.streams else {})

    @random_state.setter
    def random_state(self, states: dict[str, Tensor]):
        self.streams, self.states = None, states  # the streams are made when the images' device is known

    def encodes(self, x: TensorImage):
        images = x.as_subclass(Tensor)  # a subclass costs Python code on every operation
        if self.streams is None or self.streams.device != images.device:
            self.streams = Streams(self.seed, images.device, self.states)
            self.fill = torch.tensor(self.mean, device=images.device) * 255
        self.streams.share = self.share
        rows = getattr(x, "rows", None)
        return TensorImage(augment(images, self.recipe, self.streams, rows=rows, epoch=self.epoch, fill=self.fill))


class Streams:
    """A random stream for each part of the augmentation, all from one seed; `states` says how far some have got."""

    share = (0, 1)  # as Augment's

    def __init__(self, seed: int, device: torch.device | str = "cpu", states: dict[str, Tensor] | None = None):
        self.seed, self.device, self.start = seed, torch.device(device), states or {}
        self.generators: dict[str, torch.Generator] = {}

    def states(self) -> dict[str, Tensor]:
        return {part: generator.get_state() for part, generator in self.generators.items()}

    def draw(self, part: str, n: int, device=None) -> "Draw":
        """Random numbers for one part and n images, on another device if one is named."""
        if part not in self.generators:
            seed = self.seed ^ zlib.crc32(part.encode())
            self.generators[part] = torch.Generator(device or self.device).manual_seed(seed)
            if part in self.start:
                self.generators[part].set_state(self.start[part])
        return Draw(n, self.generators[part], *self.share)


class Draw:
    """Random numbers for n images, shape (n,): of those for `size` times as many images, every size-th, from `rank` on."""

    def __init__(self, n: int, generator: torch.Generator, rank: int = 0, size: int = 1):
        self.n, self.own, self.generator = n * size, slice(rank, None, size), generator

    def share(self, *shape) -> Tensor:
        """Uniform between 0 and 1."""
        return torch.rand(self.n, *shape, generator=self.generator, device=self.generator.device)[self.own]

    def spread(self, amount: float) -> Tensor:
        """Uniform between -amount and amount."""
        return (self.share() * 2 - 1) * amount

    def coin(self) -> Tensor:
        return self.share() < 0.5

    def whole(self, least: int, most: int) -> Tensor:
        """Whole numbers from least to most."""
        shape, device = (self.n,), self.generator.device
        return torch.randint(least, most + 1, shape, generator=self.generator, device=device)[self.own]


def augment(images: Tensor, recipe: Recipe, streams: Streams, *, rows=None, epoch=0, fill=None) -> Tensor:
    """`images` (N, 3, H, W), values 0 to 255, each varied as `recipe` says: uint8 if only pixels moved, else float32.

    rows: the numbers of the images (N,), for the alternating flip; fill: the colour of cutout (3,), 0 to 255, black by
    default. mixup and CutMix, which change labels too, are the learner's part.
    """
    n, size = len(images), images.shape[-1]
    trivial = TrivialAugment(streams.draw("trivial augment", n, "cpu")) if recipe.trivial_augment else None
    if _resamples(recipe):
        images = imageops.resample(images, random_matrices(recipe, streams, n, size, rows, epoch, trivial))
    elif recipe.flip != "off" or recipe.crop_pad:
        flips = random_flips(recipe, streams, n, rows, epoch)
        images = imageops.flip_and_shift(images, flips, *random_shifts(recipe, streams, n))
    if recipe.brightness or recipe.contrast or recipe.saturation:
        factors = (1 + streams.draw(part, n).spread(getattr(recipe, part)) for part in COLOURS)
        images = imageops.colour_jitter(images.float(), *factors)
    if trivial:
        images = trivial.colour(images)
    if recipe.cutout:
        draw, last = streams.draw("cutout", n), size - recipe.cutout
        fill = torch.zeros(3, device=images.device) if fill is None else fill.round()
        images = imageops.cutout(images, draw.whole(0, last), draw.whole(0, last), recipe.cutout, fill)
    return images


def tta_views(recipe: Recipe) -> list[str]:
    """The views for `tta_logits` that show an image as training with this recipe may have shown it: mirrored, if it mirrors;
    shifted, if it moves images. What is only turned or zoomed in training is not shifted."""
    moves = recipe.crop_pad or recipe.translate or recipe.trivial_augment
    return ["mirror"] * (recipe.flip != "off") + ["shift"] * bool(moves)


def _resamples(recipe: Recipe) -> bool:
    return bool(recipe.rotate or recipe.translate or recipe.scale or recipe.perspective or recipe.trivial_augment)


def random_flips(recipe: Recipe, streams: Streams, n: int, rows: Tensor | None, epoch: int) -> Tensor:
    """Whether each image is mirrored (n,).

    Alternating (Keller Jordan, https://arxiv.org/abs/2404.00498): by chance in the first epoch, and from then on the
    other way round each time, so that two epochs show every image and its mirror image.
    """
    if recipe.flip == "off":
        return torch.zeros(n, dtype=torch.bool, device=streams.device)
    if recipe.flip == "alternating" and rows is not None:
        return _coin_of(rows, streams.seed) ^ bool(epoch % 2)
    return streams.draw("flip", n).coin()


def _coin_of(rows: Tensor, seed: int) -> Tensor:
    """A fair coin for each row number, always the same for a seed: the mixing steps of splitmix64 (G. Steele, 2014)."""
    mixed = rows * 0x1E3779B97F4A7C15 + seed  # int64 arithmetic wraps
    mixed = (mixed ^ (mixed >> 30)) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
    return ((mixed >> 31) & 1).bool()


def random_shifts(recipe: Recipe, streams: Streams, n: int) -> tuple[Tensor, Tensor]:
    """How far each image moves down and to the right, in whole pixels."""
    draw = streams.draw("shift", n)
    return draw.whole(-recipe.crop_pad, recipe.crop_pad), draw.whole(-recipe.crop_pad, recipe.crop_pad)


def random_matrices(recipe: Recipe, streams: Streams, n: int, size: int, rows=None, epoch=0, trivial=None) -> Tensor:
    """(N, 3, 3) matrices from output to input coordinates, -1 to 1 from edge to edge.

    What happens first to an image stands leftmost in the product: flip, affine, perspective, trivial augment.
    """
    matrices = trivial.geometry(size).to(streams.device) if trivial else imageops.identities(n, streams.device)
    if recipe.perspective:
        inwards = streams.draw("perspective", n).share(4, 2) * recipe.perspective
        matrices = imageops.perspective_matrices(inwards) @ matrices
    if recipe.rotate or recipe.translate or recipe.scale or recipe.crop_pad:
        angle = streams.draw("rotate", n).spread(math.radians(recipe.rotate))
        zoom = 1 + streams.draw("scale", n).spread(recipe.scale)
        moves, (down, right) = streams.draw("translate", n), random_shifts(recipe, streams, n)
        right = 2 * (moves.spread(recipe.translate) + right / size)
        down = 2 * (moves.spread(recipe.translate) + down / size)
        matrices = imageops.affine_matrices(angle, zoom, right, down) @ matrices
    if recipe.flip != "off":
        matrices = imageops.mirror_matrices(random_flips(recipe, streams, n, rows, epoch)) @ matrices
    return matrices


def mix(images: Tensor, recipe: Recipe, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each float image (N, 3, H, W) with some of another: the mixtures, each one's other image (N,), the share that stays.

    mixup (H. Zhang et al., https://arxiv.org/abs/1710.09412) blends the two, CutMix (S. Yun et al.,
    https://arxiv.org/abs/1905.04899) pastes a rectangle of the other. The share is drawn for each image from Beta(a, a),
    a being the recipe's `mixup` or `cutmix`; with both, the batch takes either.
    """
    n, device = len(images), images.device
    blends = recipe.mixup and (not recipe.cutmix or random.random() < 0.5)
    alpha = recipe.mixup if blends else recipe.cutmix
    drawn = np.stack([random.beta(alpha, alpha, n), random.random(n), random.random(n)])
    share, y, x = torch.from_numpy(drawn).to(device, torch.float32, non_blocking=True)
    others = torch.from_numpy(random.permutation(n)).to(device, non_blocking=True)
    if blends:
        return imageops.blend(images, images[others], share), others, share
    mixtures, share = imageops.paste(images, images[others], share, y, x)
    return mixtures, others, share


class TrivialAugment:
    """One of 14 operations for each image, of one of 31 strengths: S. Müller and F. Hutter, https://arxiv.org/abs/2103.10158.

    Operations and strengths are those of torchvision's TrivialAugmentWide, which gives a whole batch the same one. What
    comes in from beyond the border is the image reflected, where torchvision has black. All is drawn on the CPU, which
    has to know what to do; only the amounts go to the images' device.
    """

    OPERATIONS = (
        "identity", "shear x", "shear y", "translate x", "translate y", "rotate", "brightness", "contrast", "saturation",
        "sharpness", "posterize", "solarize", "autocontrast", "equalize",
    )  # fmt: skip
    LEVELS = 31

    def __init__(self, draw: Draw):
        self.operation = draw.whole(0, len(self.OPERATIONS) - 1)
        self.strength = draw.whole(0, self.LEVELS - 1) / (self.LEVELS - 1)  # 0 to 1
        self.signed = torch.where(draw.coin(), self.strength, -self.strength)

    def _amount(self, operation: str, most: float) -> Tensor:
        """-most to most for the images that get this operation, 0 for the others."""
        return torch.where(self.operation == self.OPERATIONS.index(operation), self.signed * most, 0.0)

    def geometry(self, size: int) -> Tensor:
        """(N, 3, 3) matrices as for `resample`, on the CPU."""
        right, down = (torch.trunc(self._amount(f"translate {axis}", 32.0)) * 2 / size for axis in "xy")
        angle, zoom = torch.deg2rad(self._amount("rotate", 135.0)), torch.ones(len(self.operation))
        affine = imageops.affine_matrices(angle, zoom, right, down)
        return affine @ imageops.shear_matrices(self._amount("shear x", 0.99), self._amount("shear y", 0.99))

    def colour(self, images: Tensor) -> Tensor:
        """`images`, float and changed in place, after each one's operation if that is one of colour."""
        import cifar_fastai.compat  # noqa: F401, I001  before torchvision
        from torchvision.transforms.v2 import functional as torchvision_ops

        factors = torch.stack([1 + self._amount(name, 0.99) for name in COLOURS])
        self._apply(images, (factors != 1).any(dim=0), imageops.colour_jitter, *factors)
        self._apply(images, self._got("sharpness"), imageops.sharpen, 1 + self.signed * 0.99)
        self._apply(images, self._got("posterize"), imageops.posterize, (8 - self.strength * 6).round())
        self._apply(images, self._got("solarize"), imageops.solarize, (1 - self.strength) * 255)
        self._apply(images, self._got("autocontrast"), lambda some: torchvision_ops.autocontrast(some / 255) * 255)
        self._apply(images, self._got("equalize"), lambda some: torchvision_ops.equalize(some.round().byte()).float())
        return images

    def _got(self, operation: str) -> Tensor:
        return self.operation == self.OPERATIONS.index(operation)

    def _apply(self, images: Tensor, which: Tensor, function, *amounts: Tensor) -> None:
        places = which.nonzero().squeeze(1)
        if len(places):
            on_device = places.to(images.device)
            images[on_device] = function(images[on_device], *(amount[places].to(images.device) for amount in amounts))
