"""Augmentation of whole batches of images, and the transforms of training and evaluation side by side.

The geometry of one image is a 3 x 3 matrix, so flip, rotation, translation, zoom and perspective multiply into one
and cost a single resampling. A recipe of flips and whole-pixel shifts alone needs no resampling and stays in uint8.
"""

import math

import torch
from fastai.data.transforms import Normalize
from fastai.vision.core import TensorImage
from fasttransform import Transform
from torch import Tensor
from torch.nn import functional as F

from cifar_fastai.recipes import Recipe

GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness (ITU-R 601-2)


def batch_transforms(recipe: Recipe, mean, std, seed: int) -> list[Transform]:
    """What the DataBlock does to a batch: augmentation in training alone, normalisation always.

    mean, std: of each channel, in units of the full range (0 to 1).
    """
    return [Augment(recipe, seed), Normalize.from_stats(mean, std, cuda=False)]


class Augment(Transform):
    """Draws a fresh variation of every image of a training batch (N, 3, H, W) of values 0 to 255.

    All randomness comes from a generator of its own, so that a seed repeats it whatever else draws numbers.
    """

    split_idx = 0  # training only
    order = 5  # before IntToFloatTensor (10) and Normalize (99)

    def __init__(self, recipe: Recipe, seed: int = 42):
        self.recipe, self.seed = recipe, seed
        self.generator = None

    def __getstate__(self):
        return {**self.__dict__, "generator": None}  # an export has no use for it

    def encodes(self, x: TensorImage):
        images = x.as_subclass(Tensor)  # a subclass costs Python code on every operation
        if self.generator is None or self.generator.device != images.device:
            self.generator = torch.Generator(images.device).manual_seed(self.seed)
        return TensorImage(augment(images, self.recipe, self.generator))


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """`images` (N, 3, H, W), values 0 to 255, each varied as `recipe` says: uint8 if only pixels moved, else float32."""
    draw = _Draw(len(images), generator)
    if _resamples(recipe):
        images = resample(images, random_matrices(images.shape, recipe, draw))
    elif recipe.flip or recipe.crop_pad:
        images = flip_and_shift(images, *random_moves(recipe, draw))
    if recipe.brightness or recipe.contrast or recipe.saturation:
        factors = (1 + draw.spread(amount) for amount in (recipe.brightness, recipe.contrast, recipe.saturation))
        images = colour_jitter(images.float(), *factors)
    return images


def _resamples(recipe: Recipe) -> bool:
    return bool(recipe.rotate or recipe.translate or recipe.scale or recipe.perspective)


class _Draw:
    """Random numbers, one an image, shape (N,)."""

    def __init__(self, n: int, generator: torch.Generator):
        self.n, self.generator = n, generator

    def share(self, *shape) -> Tensor:
        """Uniform between 0 and 1."""
        return torch.rand(self.n, *shape, generator=self.generator, device=self.generator.device)

    def spread(self, amount: float) -> Tensor:
        """Uniform between -amount and amount."""
        return (self.share() * 2 - 1) * amount

    def coin(self) -> Tensor:
        return self.share() < 0.5

    def pixels(self, most: int) -> Tensor:
        """Whole numbers from -most to most."""
        shape, device = (self.n,), self.generator.device
        return torch.randint(-most, most + 1, shape, generator=self.generator, device=device)


# --- whole pixels ------------------------------------------------------------------------------------------------


def random_moves(recipe: Recipe, draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
    """For each image: whether it is mirrored, and its shift down and to the right in pixels."""
    flips = draw.coin() if recipe.flip else torch.zeros(draw.n, dtype=torch.bool, device=draw.generator.device)
    return flips, draw.pixels(recipe.crop_pad), draw.pixels(recipe.crop_pad)


def flip_and_shift(images: Tensor, flips: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Mirror `images` (N, C, H, W) where `flips`, then shift each by whole pixels, the border reflected."""
    n, channels, height, width = images.shape
    rows = _reflect(torch.arange(height, device=images.device) - down[:, None], height)
    columns = _reflect(torch.arange(width, device=images.device) - right[:, None], width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    places = (rows[:, :, None] * width + columns[:, None, :]).view(n, -1, 1).expand(-1, -1, channels)
    pixels = images.permute(0, 2, 3, 1).reshape(n, height * width, channels)
    return pixels.gather(1, places).view(n, height, width, channels).permute(0, 3, 1, 2)


def _reflect(index: Tensor, length: int) -> Tensor:
    """Indices beyond either end folded back, the border pixel not repeated."""
    return (length - 1) - ((length - 1) - index.abs()).abs()


# --- any geometry ------------------------------------------------------------------------------------------------


def random_matrices(shape, recipe: Recipe, draw: _Draw) -> Tensor:
    """(N, 3, 3) matrices from output to input coordinates, -1 to 1 from edge to edge."""
    height, width = shape[-2:]
    matrices = _identities(draw.n, draw.generator.device)
    if recipe.perspective:
        inwards = draw.share(4, 2) * recipe.perspective
        matrices = perspective_matrices(inwards) @ matrices
    if recipe.rotate or recipe.translate or recipe.scale or recipe.crop_pad:
        angle = draw.spread(math.radians(recipe.rotate))
        zoom = 1 + draw.spread(recipe.scale)
        right = 2 * (draw.spread(recipe.translate) + draw.pixels(recipe.crop_pad) / width)
        down = 2 * (draw.spread(recipe.translate) + draw.pixels(recipe.crop_pad) / height)
        matrices = affine_matrices(angle, zoom, right, down) @ matrices
    if recipe.flip:
        matrices = mirror_matrices(draw.coin()) @ matrices
    return matrices


def _identities(n: int, device) -> Tensor:
    return torch.eye(3, device=device).repeat(n, 1, 1)


def mirror_matrices(flips: Tensor) -> Tensor:
    """(N, 3, 3) matrices that mirror left and right where `flips` (N,)."""
    matrices = _identities(len(flips), flips.device)
    matrices[:, 0, 0] = 1 - 2 * flips.float()
    return matrices


def affine_matrices(angle: Tensor, zoom: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """The input coordinates of an image rotated by `angle` (radians, counter-clockwise), enlarged `zoom` times and
    then moved by `right` and `down` (in half sides). Each argument (N,); returns (N, 3, 3)."""
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    matrices = _identities(len(angle), angle.device)
    matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 0, 2] = cos, -sin, -cos * right + sin * down
    matrices[:, 1, 0], matrices[:, 1, 1], matrices[:, 1, 2] = sin, cos, -sin * right - cos * down
    return matrices


def perspective_matrices(inwards: Tensor) -> Tensor:
    """The input coordinates of images whose corners were moved towards the centre.

    inwards: (N, 4, 2), how far each corner (top left, top right, bottom right, bottom left) moves along x and y,
    in half sides. Returns (N, 3, 3). Closed form for a square's image: P. Heckbert, Fundamentals of Texture Mapping
    and Image Warping, 1989, section 2.2.3.
    """
    signs = inwards.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    corners = signs * (1 - inwards)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (corner.unbind(-1) for corner in corners.unbind(1))
    dx1, dx2, dx3 = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, dy3 = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    determinant = dx1 * dy2 - dx2 * dy1
    g, h = (dx3 * dy2 - dx2 * dy3) / determinant, (dx1 * dy3 - dx3 * dy1) / determinant
    rows = (x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h, torch.ones_like(g))
    from_unit_square = torch.stack(rows, dim=-1).view(-1, 3, 3)
    to_unit_square = inwards.new_tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])
    return torch.linalg.inv(from_unit_square @ to_unit_square)


def resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear samples of `images` (N, C, H, W) where `matrices` (N, 3, 3) say, reflected at the border; float32."""
    n, _, height, width = images.shape
    y = (torch.arange(height, device=images.device) * 2 + 1) / height - 1
    x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
    y, x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, -1, 3)
    places = points @ matrices.transpose(1, 2)
    grid = (places[..., :2] / places[..., 2:]).view(n, height, width, 2)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)


# --- colour ------------------------------------------------------------------------------------------------------


def colour_jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Brightness, then contrast, then saturation, each by a factor an image (N,), as torchvision defines them.

    images: float (N, 3, H, W), values 0 to 255, and so the result.
    """
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in (brightness, contrast, saturation))
    images = (images * brightness).clamp_(0, 255)
    images = torch.lerp(_gray(images).mean(dim=(2, 3), keepdim=True), images, contrast).clamp_(0, 255)
    return torch.lerp(_gray(images), images, saturation).clamp_(0, 255)


def _gray(images: Tensor) -> Tensor:
    return sum(weight * images[:, channel : channel + 1] for channel, weight in enumerate(GRAY))
