import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as oracle
from torchvision.transforms.v2 import InterpolationMode

from cifar_fastai import imageops
from cifar_fastai.augment import Draw, Streams, TrivialAugment, augment, random_flips, random_matrices
from cifar_fastai.recipes import RECIPES, Recipe

BILINEAR = InterpolationMode.BILINEAR
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8))


def recipe(**fields):
    return Recipe(name="test", **{"flip": "off", **fields})


def augmented(seed=0, images=IMAGES, **fields):
    return augment(images, recipe(**fields), Streams(seed))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


# --- whole pixels ------------------------------------------------------------------------------------------------


def test_flip_and_shift_against_numpy():
    flips, down, right = (
        torch.tensor([False, True] * 3),
        torch.tensor([0, 2, -2, 1, 0, -1]),
        torch.tensor([1, 0, -1, 2, -2, 0]),
    )
    result = imageops.flip_and_shift(IMAGES, flips, down, right)
    assert result.dtype == torch.uint8
    for image, flip, dy, dx, moved in zip(IMAGES.numpy(), flips, down, right, result.numpy(), strict=True):
        image = image[:, :, ::-1] if flip else image
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        assert np.array_equal(moved, padded[:, 2 - dy : 34 - dy, 2 - dx : 34 - dx])


def test_half_the_images_are_mirrored_and_shifts_are_uniform():
    ramp = torch.arange(32, dtype=torch.uint8).expand(20_000, 3, 32, 32)  # a pixel tells its column
    result = augmented(images=ramp, flip="random", crop_pad=2)[:, 0, 16, 15:17].int()
    mirrored = result[:, 1] < result[:, 0]
    assert abs(mirrored.float().mean() - 0.5) < 0.02
    shifts = torch.where(mirrored, result[:, 0] - 16, 15 - result[:, 0])
    assert torch.bincount(shifts + 2).tolist() == pytest.approx([4000] * 5, rel=0.06)


# --- geometry ----------------------------------------------------------------------------------------------------


def smooth(n=1):
    """Images without sharp edges, so that two bilinear samplers agree to rounding."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(5)) * 255
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255)


def assert_same_inside(result, expected, inside):
    """Equal wherever the oracle sampled from within the image; beyond its border it fills and we reflect."""
    inside = (inside > 0.999).expand_as(expected)
    assert inside.float().mean() > 0.5
    assert (result - expected)[inside].abs().max() < 0.05


@pytest.mark.parametrize("angle", [10.0, -25.0, 90.0])
def test_rotation_against_torchvision(angle):
    image, ones = smooth(), torch.ones(1, 1, 32, 32)
    result = imageops.resample(image, imageops.affine_matrices(tensor(math.radians(angle)), tensor(1), tensor(0), tensor(0)))
    assert_same_inside(result, oracle.rotate(image, angle, BILINEAR), oracle.rotate(ones, angle, BILINEAR))


def test_affine_against_torchvision():
    image, ones = smooth(), torch.ones(1, 1, 32, 32)
    arguments = {"angle": -12.0, "translate": [3.0, -2.0], "scale": 1.1, "shear": [0.0], "interpolation": BILINEAR}
    matrix = imageops.affine_matrices(tensor(math.radians(12.0)), tensor(1.1), tensor(3 * 2 / 32), tensor(-2 * 2 / 32))
    assert_same_inside(imageops.resample(image, matrix), oracle.affine(image, **arguments), oracle.affine(ones, **arguments))


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
    result = imageops.resample(image, imageops.perspective_matrices(inwards))
    assert_same_inside(result, oracle.perspective(image, *arguments), oracle.perspective(ones, *arguments))


def test_mirroring_by_resampling_is_exact():
    result = imageops.resample(IMAGES, imageops.mirror_matrices(torch.tensor([True, False] * 3)))
    assert (result[0] - IMAGES[0].flip(-1)).abs().max() < 0.01
    assert (result[1] - IMAGES[1]).abs().max() < 0.01


def test_all_geometry_is_one_resampling_in_the_order_flip_affine_perspective():
    image = smooth()
    mirror = imageops.mirror_matrices(torch.tensor([True]))
    affine = imageops.affine_matrices(tensor(0.2), tensor(0.8), tensor(0.1), tensor(-0.05))
    perspective = imageops.perspective_matrices(torch.full((1, 4, 2), 0.1) * torch.arange(1.0, 5)[:, None])
    at_once = imageops.resample(image, mirror @ affine @ perspective)
    in_steps = imageops.resample(imageops.resample(imageops.resample(image, mirror), affine), perspective)
    assert (at_once - in_steps)[..., 8:24, 8:24].abs().mean() < 4  # each step of the three blurs a little


def test_shear_against_torchvision():
    image, ones = smooth(), torch.ones(1, 1, 32, 32)
    for along_x, along_y in ((0.4, 0.0), (0.0, -0.3)):
        degrees = [math.degrees(math.atan(along_x)), math.degrees(math.atan(along_y))]
        arguments = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": degrees, "center": [0, 0]}
        expected, inside = (oracle.affine(it, **arguments, interpolation=BILINEAR) for it in (image, ones))
        result = imageops.resample(image, imageops.shear_matrices(tensor(along_x), tensor(along_y)))
        assert_same_inside(result, expected, inside)


# --- colour ------------------------------------------------------------------------------------------------------


def test_colour_against_torchvision():
    brightness, contrast, saturation = tensor(1.3, 0.7, 1), tensor(0.6, 1.4, 1), tensor(1.5, 0.2, 1)
    result = imageops.colour_jitter(IMAGES[:3].float(), brightness, contrast, saturation)
    for image, b, c, s, jittered in zip(IMAGES, brightness, contrast, saturation, result, strict=False):
        expected = oracle.adjust_brightness(image / 255, b.item())
        expected = oracle.adjust_saturation(oracle.adjust_contrast(expected, c.item()), s.item())
        assert (jittered - expected * 255).abs().max() < 0.1
    assert torch.equal(result[2], IMAGES[2].float())


def test_sharpness_posterize_and_solarize_against_torchvision():
    images, factors = IMAGES[:3].float(), tensor(0.2, 1, 1.9)
    for image, factor, result in zip(images, factors, imageops.sharpen(images, factors), strict=True):
        assert (result - oracle.adjust_sharpness(image / 255, factor.item()) * 255).abs().max() < 0.01
    for image, bits, result in zip(IMAGES, (2, 5, 8), imageops.posterize(images, tensor(2, 5, 8)), strict=False):
        assert torch.equal(result, oracle.posterize(image, bits).float())
    for image, threshold, result in zip(IMAGES, (0, 100, 255), imageops.solarize(images, tensor(0, 100, 255)), strict=False):
        assert torch.equal(result, oracle.solarize(image, threshold).float())


# --- squares and pairs -------------------------------------------------------------------------------------------


def test_cutout_against_numpy():
    fill, top, left = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([0, 20, 5, 9, 1, 24]), torch.tensor([24, 3, 0, 7, 2, 0])
    result = imageops.cutout(IMAGES, top, left, 8, fill)
    assert result.dtype == torch.uint8
    for image, y, x, cut in zip(IMAGES.numpy(), top, left, result.numpy(), strict=True):
        expected = image.copy()
        expected[:, y : y + 8, x : x + 8] = np.array([10, 20, 30])[:, None, None]
        assert np.array_equal(cut, expected)


def test_cutouts_square_lies_anywhere_within():
    white = torch.full((20_000, 3, 32, 32), 255, dtype=torch.uint8)
    cut = augmented(images=white, cutout=8)[:, 0] == 0
    assert (cut.sum(dim=(1, 2)) == 64).all()
    for along in (1, 2):
        first = cut.any(dim=3 - along).int().argmax(dim=1)
        assert torch.bincount(first).tolist() == pytest.approx([20_000 / 25] * 25, rel=0.2)


def test_blend_is_the_weighted_mean():
    images, others, share = IMAGES[:3].float(), IMAGES[3:].float(), tensor(1, 0.25, 0)
    result = imageops.blend(images, others, share)
    assert torch.equal(result[0], images[0]) and torch.equal(result[2], others[2])
    assert (result[1] - (images[1] / 4 + others[1] * 3 / 4)).abs().max() < 1e-3


def test_the_share_that_paste_tells_is_the_share_that_stays():
    n = 500
    zeros, ones, draw = torch.zeros(n, 3, 32, 32), torch.ones(n, 3, 32, 32), Draw(n, torch.Generator().manual_seed(0))
    wanted = draw.share()
    result, share = imageops.paste(zeros, ones, wanted, draw.share(), draw.share())
    assert torch.allclose(1 - result.mean(dim=(1, 2, 3)), share, atol=1e-6)
    assert (share >= wanted - 0.06).all()  # the border cuts off; rounding to pixels adds a little
    _, share = imageops.paste(zeros, ones, wanted, torch.full((n,), 0.5), torch.full((n,), 0.5))
    assert (share - wanted).abs().max() < 0.06


# --- what is drawn -----------------------------------------------------------------------------------------------


def flat(amount):
    """Mean and standard deviation of the uniform distribution from -amount to amount."""
    return pytest.approx(0, abs=amount * 0.02), pytest.approx(amount / 3**0.5, rel=0.02)


def test_drawn_amounts_fill_their_ranges():
    def matrices(**fields):
        return random_matrices(recipe(**fields), Streams(0), 50_000, 32)

    degrees = torch.rad2deg(torch.atan2((m := matrices(rotate=10.0))[:, 1, 0], m[:, 0, 0]))
    assert degrees.abs().max() <= 10.001 and (degrees.mean(), degrees.std()) == flat(10)
    zoom = 1 / matrices(scale=0.2)[:, 0, 0]
    assert (zoom - 1).abs().max() <= 0.2001 and ((zoom - 1).mean(), zoom.std()) == flat(0.2)
    for axis in (0, 1):
        moved = matrices(translate=0.1)[:, axis, 2] / 2
        assert moved.abs().max() <= 0.1001 and (moved.mean(), moved.std()) == flat(0.1)
    pixels = (matrices(crop_pad=2)[:, 0, 2] * 16).round().int()
    assert torch.bincount(pixels + 2).tolist() == pytest.approx([10_000] * 5, rel=0.05)


def test_drawn_corners_fill_their_range():
    white = torch.zeros(2000, 3, 64, 64)
    matrices = random_matrices(recipe(perspective=0.4), Streams(0), 2000, 64)
    corner = torch.tensor([-1.0, -1.0, 1.0])
    places = torch.linalg.solve(matrices, corner.expand(2000, 3))
    inwards = places[:, :2] / places[:, 2:] + 1  # where the upper left corner went
    assert inwards.min() >= -1e-4 and inwards.max() <= 0.4001 and inwards.mean() == pytest.approx(0.2, rel=0.05)
    assert imageops.resample(white, matrices).abs().max() == 0


def test_trivial_augment_draws_every_operation_and_strength_alike():
    trivial = TrivialAugment(Draw(140_000, torch.Generator().manual_seed(0)))
    assert torch.bincount(trivial.operation).tolist() == pytest.approx([10_000] * 14, rel=0.05)
    assert torch.bincount((trivial.strength * 30).round().int()).tolist() == pytest.approx([140_000 / 31] * 31, rel=0.07)
    assert (trivial.signed > 0).float().mean() == pytest.approx(30 / 62, rel=0.02)


@pytest.mark.parametrize("operation", range(14), ids=TrivialAugment.OPERATIONS)
def test_trivial_augment_against_torchvisions(operation):
    """Its own TrivialAugmentWide told to apply the same operation with the same magnitude, where it does not paint black."""
    from torchvision.transforms.v2 import TrivialAugmentWide

    names = "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Contrast Color Sharpness Posterize Solarize "
    name = (names + "AutoContrast Equalize").split()[operation]
    wide = TrivialAugmentWide(interpolation=BILINEAR)
    magnitudes, signed = wide._AUGMENTATION_SPACE[name]
    image, ones = smooth().round(), torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    for level, sign in ((0, 1), (6, 1), (9, -1)):
        trivial = TrivialAugment(Draw(1, torch.Generator()))
        trivial.operation[:], trivial.strength[:], trivial.signed[:] = operation, level / 30, sign * level / 30
        values = magnitudes(31, 32, 32)
        magnitude = 0.0 if values is None else float(values[level]) * (sign if signed else 1)

        def torchvisions(it, magnitude=magnitude):
            return wide._apply_image_or_video_transform(it, name, magnitude, BILINEAR, {torch.Tensor: None})

        inside = torchvisions(ones).float() / 255 if operation < 6 else torch.ones(1, 3, 32, 32)
        result = trivial.colour(imageops.resample(image, trivial.geometry(32)))
        assert_close_inside(result, torchvisions(image.byte()).float(), inside)


def assert_close_inside(result, expected, inside):
    """As above, to what torchvision loses by computing in uint8."""
    inside = inside > 0.999
    assert inside.float().mean() > 0.3
    assert (result - expected)[inside].abs().max() < 2 and (result - expected)[inside].abs().mean() < 1


# --- flips -------------------------------------------------------------------------------------------------------


def test_alternating_flips_show_each_image_and_its_mirror_image_in_turn():
    alternating, rows = recipe(flip="alternating"), torch.arange(20_000)
    first, second, third = (random_flips(alternating, Streams(3), 20_000, rows, epoch) for epoch in range(3))
    assert torch.equal(first, third) and torch.equal(first, ~second)
    assert first.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (first[1:] == first[:-1]).float().mean() == pytest.approx(0.5, abs=0.02)  # neighbours know nothing of each other
    other = random_flips(alternating, Streams(4), 20_000, rows, 0)
    assert (first == other).float().mean() == pytest.approx(0.5, abs=0.02)
    shuffled = torch.randperm(20_000)
    assert torch.equal(random_flips(alternating, Streams(3), 20_000, shuffled, 0), first[shuffled])


# --- the whole ---------------------------------------------------------------------------------------------------

EVERYTHING = {
    "flip": "random", "crop_pad": 2, "rotate": 10.0, "translate": 0.1, "scale": 0.1, "perspective": 0.2, "brightness": 0.2,
    "contrast": 0.2, "saturation": 0.2, "trivial_augment": True, "cutout": 8,
}  # fmt: skip
MANY = {
    **RECIPES,
    "cutout": recipe(cutout=8),
    "trivial": recipe(trivial_augment=True),
    "everything": recipe(**EVERYTHING),
}


@pytest.mark.parametrize("name", MANY)
def test_images_vary_within_range_and_repeat_by_seed(name):
    first, again, other = (augment(IMAGES, MANY[name], Streams(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == IMAGES.shape and first.min() >= 0 and first.max() <= 255 and first.float().isfinite().all()
    resampled = name in ("classic-adam", "classic-sgd", "digits", "trivial", "everything")
    assert first.dtype == (torch.float32 if resampled else torch.uint8)


def test_each_part_repeats_whatever_the_others_do():
    """The same seed flips and cuts the same images at the same places, with or without the rest of the augmentation."""
    white = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    holes = [augmented(images=white, cutout=8, **fields).eq(0) for fields in ({}, {"flip": "random", "crop_pad": 2})]
    assert torch.equal(*holes)
    alone, among = (random_matrices(recipe(**fields), Streams(5), 100, 32) for fields in ({"rotate": 10.0}, EVERYTHING))
    flips = [random_flips(recipe(flip="random", **fields), Streams(5), 100, None, 0) for fields in ({}, {"rotate": 10.0})]
    assert torch.equal(*flips) and not torch.equal(alone, among)


def test_a_recipe_without_augmentation_returns_the_images():
    assert augmented() is IMAGES


def test_input_is_left_alone():
    for images in (IMAGES, IMAGES.float()):
        before = images.clone()
        for some in MANY.values():
            augment(images, some, Streams(0))
        assert torch.equal(images, before)


@pytest.mark.parametrize("field", ["cutout", "rotate", "brightness", "trivial_augment", "crop_pad"])
def test_an_image_keeps_its_place_and_so_its_label(field):
    """Images of one colour each, four alike: none of their colours turns up at another's place."""
    colours = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=torch.uint8).repeat_interleave(4, dim=0)
    images = colours[:, :, None, None].expand(12, 3, 32, 32).contiguous()
    for seed in range(5):
        result = augmented(seed, images, **{field: {"trivial_augment": True, "cutout": 8, "crop_pad": 4}.get(field, 0.5)})
        middle = result.float().mean(dim=(2, 3))
        inverted = middle.sum(dim=1) > 450  # solarized
        strongest = torch.where(inverted, middle.argmin(dim=1), middle.argmax(dim=1))
        flat_ones = middle.std(dim=1) < 1  # turned gray or evened out: they look like nobody
        assert ((strongest == torch.arange(12) // 4) | flat_ones).all()
