import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as oracle
from torchvision.transforms.v2 import InterpolationMode

from cifar_fastai import augment as ours
from cifar_fastai.recipes import RECIPES, Recipe

BILINEAR = InterpolationMode.BILINEAR
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8))
PLAIN = Recipe(name="plain", flip=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def augmented(seed=0, images=IMAGES, **fields):
    return ours.augment(images, Recipe(name="test", **{"flip": False, **fields}), generator(seed))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


# --- whole pixels ------------------------------------------------------------------------------------------------


def test_flip_and_shift_against_numpy():
    flips, down, right = (
        torch.tensor([False, True] * 3),
        torch.tensor([0, 2, -2, 1, 0, -1]),
        torch.tensor([1, 0, -1, 2, -2, 0]),
    )
    result = ours.flip_and_shift(IMAGES, flips, down, right)
    assert result.dtype == torch.uint8
    for image, flip, dy, dx, moved in zip(IMAGES.numpy(), flips, down, right, result.numpy(), strict=True):
        image = image[:, :, ::-1] if flip else image
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        assert np.array_equal(moved, padded[:, 2 - dy : 34 - dy, 2 - dx : 34 - dx])


def test_half_the_images_are_mirrored_and_shifts_are_uniform():
    ramp = torch.arange(32, dtype=torch.uint8).expand(20_000, 3, 32, 32)  # a pixel tells its column
    result = augmented(images=ramp, flip=True, crop_pad=2)[:, 0, 16, 15:17].int()
    mirrored = result[:, 1] < result[:, 0]
    assert abs(mirrored.float().mean() - 0.5) < 0.02
    shifts = torch.where(mirrored, result[:, 0] - 16, 15 - result[:, 0])
    assert torch.bincount(shifts + 2).tolist() == pytest.approx([4000] * 5, rel=0.06)


# --- geometry ----------------------------------------------------------------------------------------------------


def smooth(n=1):
    """Images without sharp edges, so that two bilinear samplers agree to rounding."""
    coarse = torch.rand(n, 3, 6, 6, generator=generator(5)) * 255
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255)


def assert_same_inside(result, expected, inside):
    """Equal wherever the oracle sampled from within the image; beyond its border it fills and we reflect."""
    inside = (inside > 0.999).expand_as(expected)
    assert inside.float().mean() > 0.5
    assert (result - expected)[inside].abs().max() < 0.05


@pytest.mark.parametrize("angle", [10.0, -25.0, 90.0])
def test_rotation_against_torchvision(angle):
    image, ones = smooth(), torch.ones(1, 1, 32, 32)
    result = ours.resample(image, ours.affine_matrices(tensor(math.radians(angle)), tensor(1), tensor(0), tensor(0)))
    assert_same_inside(result, oracle.rotate(image, angle, BILINEAR), oracle.rotate(ones, angle, BILINEAR))


def test_affine_against_torchvision():
    image, ones = smooth(), torch.ones(1, 1, 32, 32)
    arguments = {"angle": -12.0, "translate": [3.0, -2.0], "scale": 1.1, "shear": [0.0], "interpolation": BILINEAR}
    matrix = ours.affine_matrices(tensor(math.radians(12.0)), tensor(1.1), tensor(3 * 2 / 32), tensor(-2 * 2 / 32))
    assert_same_inside(ours.resample(image, matrix), oracle.affine(image, **arguments), oracle.affine(ones, **arguments))


def test_perspective_against_torchvision():
    image, ones = smooth(), torch.ones(1, 1, 32, 32)
    inwards = torch.tensor([[[0.1, 0.3], [0.25, 0.0], [0.05, 0.2], [0.3, 0.15]]])
    corners = [[0, 0], [32, 0], [32, 32], [0, 32]]
    signs = [[1, 1], [-1, 1], [-1, -1], [1, -1]]
    moved = [
        [x + 16 * sx * dx, y + 16 * sy * dy]
        for (x, y), (sx, sy), (dx, dy) in zip(corners, signs, inwards[0].tolist(), strict=True)
    ]
    arguments = (corners, moved, BILINEAR)
    result = ours.resample(image, ours.perspective_matrices(inwards))
    assert_same_inside(result, oracle.perspective(image, *arguments), oracle.perspective(ones, *arguments))


def test_mirroring_by_resampling_is_exact():
    result = ours.resample(IMAGES, ours.mirror_matrices(torch.tensor([True, False] * 3)))
    assert (result[0] - IMAGES[0].flip(-1)).abs().max() < 0.01
    assert (result[1] - IMAGES[1]).abs().max() < 0.01


def test_all_geometry_is_one_resampling_in_the_order_flip_affine_perspective():
    image = smooth()
    mirror = ours.mirror_matrices(torch.tensor([True]))
    affine = ours.affine_matrices(tensor(0.2), tensor(0.8), tensor(0.1), tensor(-0.05))
    perspective = ours.perspective_matrices(torch.full((1, 4, 2), 0.1) * torch.arange(1.0, 5)[:, None])
    at_once = ours.resample(image, mirror @ affine @ perspective)
    in_steps = ours.resample(ours.resample(ours.resample(image, mirror), affine), perspective)
    assert (at_once - in_steps)[..., 8:24, 8:24].abs().mean() < 4  # each step of the three blurs a little


def test_drawn_angles_fill_their_range():
    draw = ours._Draw(50_000, generator())
    matrices = ours.random_matrices((50_000, 3, 32, 32), Recipe(name="r", flip=False, rotate=10.0), draw)
    degrees = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert degrees.abs().max() <= 10.001 and degrees.mean().abs() < 0.1
    assert degrees.std() == pytest.approx(20 / 12**0.5, rel=0.02)


# --- colour ------------------------------------------------------------------------------------------------------


def test_colour_against_torchvision():
    brightness, contrast, saturation = tensor(1.3, 0.7, 1), tensor(0.6, 1.4, 1), tensor(1.5, 0.2, 1)
    result = ours.colour_jitter(IMAGES[:3].float(), brightness, contrast, saturation)
    for image, b, c, s, jittered in zip(IMAGES, brightness, contrast, saturation, result, strict=False):
        expected = oracle.adjust_brightness(image / 255, b.item())
        expected = oracle.adjust_saturation(oracle.adjust_contrast(expected, c.item()), s.item())
        assert (jittered - expected * 255).abs().max() < 0.1
    assert torch.equal(result[2], IMAGES[2].float())


# --- the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_vary_images_within_range_and_repeat_by_seed(recipe):
    first, again, other = (ours.augment(IMAGES, recipe, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == IMAGES.shape and first.min() >= 0 and first.max() <= 255
    assert first.dtype == (torch.uint8 if recipe.name == "fast" else torch.float32)


def test_a_recipe_without_augmentation_returns_the_images():
    assert ours.augment(IMAGES, PLAIN, generator()) is IMAGES


def test_input_is_left_alone():
    before = IMAGES.clone()
    for recipe in RECIPES.values():
        ours.augment(IMAGES, recipe, generator())
    assert torch.equal(IMAGES, before)
