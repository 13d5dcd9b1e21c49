"""The corruptions against their definitions, and what they do to a network through the commands."""

import colorsys
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import call, call_here
from helpers.files import write_pictures
from PIL import Image
from scipy import ndimage, stats

from cifar_fastai import corruptions, figures
from cifar_fastai.artifacts import load_export
from cifar_fastai.cache import load_data
from cifar_fastai.corruptions import BLOCK, GROUPS, KINDS, SEVERITIES, corrupt
from cifar_fastai.errors import UserError
from cifar_fastai.metrics import mean_interval
from cifar_fastai.robustness import sample_rows

WITHOUT_CHANCE = "defocus_blur zoom_blur brightness contrast pixelate jpeg_compression".split()
MOVES_PIXELS = "defocus_blur glass_blur motion_blur zoom_blur contrast elastic_transform pixelate".split()


def smooth(n=12, size=32, seed=0):
    """Images of soft shapes, uint8 (n, size, size, 3)."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 255
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255)
    return fine.round().byte().permute(0, 2, 3, 1).numpy()


def flat(level, n=1, size=32):
    return np.full((n, size, size, 3), level, np.uint8)


def by_severity(*amounts):
    return list(enumerate(amounts, start=1))


def distance(images, others):
    return np.sqrt(np.mean((np.float64(images) - others) ** 2))


# --- every kind --------------------------------------------------------------------------------------------------


def test_the_kinds_are_those_of_the_paper():
    assert [len(functions) for functions in GROUPS.values()] == [3, 4, 4, 4] and len(KINDS) == 15


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_is_a_new_image_that_can_be_repeated(kind):
    images = smooth()
    before = images.copy()
    for severity in SEVERITIES:
        corrupted = corrupt(images, kind, severity)
        assert corrupted.dtype == np.uint8 and corrupted.shape == images.shape
        assert (images == before).all() and distance(corrupted, images) > 0.5
        assert (corrupt(images, kind, severity) == corrupted).all()
        assert (corrupt(images, kind, severity, seed=1) == corrupted).all() == (kind in WITHOUT_CHANCE)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"elastic_transform"}))
def test_the_highest_severity_differs_most_from_the_image(kind):
    images = smooth(40)
    lowest, *_, highest = (distance(corrupt(images, kind, severity), images) for severity in SEVERITIES)
    assert highest > 1.2 * lowest


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"glass_blur", "jpeg_compression"}))  # whose grain does not grow
@pytest.mark.parametrize("size", [48, 64])
def test_larger_images_suffer_as_much(kind, size):
    """The same soft shapes on more pixels."""
    large = distance(corrupt(smooth(40, size), kind, 4), smooth(40, size))
    assert large == pytest.approx(distance(corrupt(smooth(40), kind, 4), smooth(40)), rel=0.35)


@pytest.mark.parametrize("kind", MOVES_PIXELS)
def test_what_only_moves_pixels_leaves_one_colour_alone(kind):
    for severity in SEVERITIES:
        assert (corrupt(flat(77), kind, severity) == 77).all()


def test_no_two_images_share_their_noise():
    corrupted = corrupt(flat(128, n=BLOCK + 1), "gaussian_noise", 3)
    assert len(np.unique(corrupted.reshape(BLOCK + 1, -1), axis=0)) == BLOCK + 1


def test_severities_draw_the_same_numbers():
    noises = [corrupt(flat(128), "gaussian_noise", severity).astype(float) - 128 for severity in (1, 5)]
    assert np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("kind", "severity", "words"),
    [
        ("fogg", 1, "no corruption 'fogg'. Did you mean 'fog'?"),
        ("fog", 0, "from 1 to 5, not 0"),
        ("fog", 6, "from 1 to 5, not 6"),
    ],
)
def test_unknown_kinds_and_severities(kind, severity, words):
    with pytest.raises(UserError, match=re.escape(words)):
        corrupt(smooth(1), kind, severity)


# --- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "deviation"), by_severity(0.04, 0.06, 0.08, 0.09, 0.10))
def test_gaussian_noise_has_its_deviation(severity, deviation):
    noise = corrupt(flat(128, n=20), "gaussian_noise", severity) / 255 - 128 / 255
    assert noise.std() == pytest.approx(deviation, rel=0.02) and abs(noise.mean()) < 0.002
    assert stats.kurtosis(noise, axis=None) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(("severity", "photons"), by_severity(500, 250, 100, 75, 50))
def test_shot_noise_varies_as_a_count_of_photons_does(severity, photons):
    for level in (51, 153):
        values = corrupt(flat(level, n=20), "shot_noise", severity) / 255
        assert values.mean() == pytest.approx(level / 255, rel=0.01)
        assert values.var() == pytest.approx(level / 255 / photons, rel=0.05)


@pytest.mark.parametrize(("severity", "share"), by_severity(0.01, 0.02, 0.03, 0.05, 0.07))
def test_impulse_noise_is_salt_and_pepper(severity, share):
    values = corrupt(flat(128, n=20), "impulse_noise", severity)
    assert set(np.unique(values)) == {0, 128, 255}
    for extreme in (0, 255):
        assert (values == extreme).mean() == pytest.approx(share / 2, rel=0.15)


# --- blur --------------------------------------------------------------------------------------------------------


def test_defocus_is_a_gaussian_where_the_disk_is_a_point_and_a_disk_where_it_is_sharp():
    images = smooth()
    gaussian = ndimage.gaussian_filter(np.float64(images), (0, 0.6, 0.6, 0), mode="mirror", radius=(0, 1, 1, 0))
    assert abs(corrupt(images, "defocus_blur", 3) - gaussian).max() < 0.51
    disk = ndimage.uniform_filter(np.float64(images), (1, 3, 3, 1), mode="mirror")  # radius 1.5 takes in all of 3 x 3
    assert abs(corrupt(images, "defocus_blur", 5) - disk).max() < 0.51


@pytest.mark.parametrize("size", [32, 48, 128])
def test_defocus_kernels_sum_to_1_and_fade_out(size):
    for radius, softness in ((0.3, 0.4), (1.5, 0.1)):
        kernel = corruptions._disk(radius * size / 32, softness * size / 32, math.ceil(size / 32))
        assert kernel.sum() == pytest.approx(1, abs=1e-6) and kernel.shape[0] % 2 == 1
        assert np.allclose(kernel, kernel[::-1]) and np.allclose(kernel, kernel.T)
        assert kernel.max() == kernel[len(kernel) // 2, len(kernel) // 2] and kernel[0].max() < kernel.max() / 10


def test_glass_moves_pixels_by_one_at_the_lowest_severity():
    image = np.random.default_rng(0).permutation(32 * 32).reshape(32, 32)
    image = np.stack([image // 256, image % 256, image % 7], axis=-1).astype(np.uint8)  # no two pixels alike
    moved = corrupt(image[None], "glass_blur", 1)[0]
    neighbours = [np.roll(image, (down, right), axis=(0, 1)) for down in (0, 1) for right in (0, 1)]
    same = np.stack([(moved == neighbour).all(axis=-1) for neighbour in neighbours])[:, 1:, 1:]
    assert (same.sum(axis=0) == 1).all() and same.mean(axis=(1, 2)) == pytest.approx([0.25] * 4, abs=0.06)


@pytest.mark.parametrize(("angle", "axis"), [(0, 1), (90, 0), (-90, 0)])
def test_motion_blur_averages_along_a_line_with_half_a_gaussian(angle, axis):
    image = smooth(1)[0] / np.float32(255)
    weights = [math.exp(-(step**2) / (2 * 2**2)) for step in range(13)]  # radius 6, sigma 2
    padded, expected = np.pad(image, ((12, 12), (12, 12), (0, 0)), mode="edge"), 0
    for step, weight in enumerate(weights):
        place = [12, 12]
        place[axis] += -step if angle < 0 else step
        expected = expected + weight * padded[place[0] : place[0] + 32, place[1] : place[1] + 32]
    result = corruptions._motion(image[None], 6, 2, np.array([angle]))[0]
    assert abs(result - expected / sum(weights)).max() < 1e-5


def test_motion_blur_spreads_a_dot_over_a_line_of_its_own_for_each_image():
    dots = np.zeros((30, 64, 64, 3), np.float32)
    dots[:, 32, 32] = 1
    lines = KINDS["motion_blur"](dots, 5, np.random.default_rng(0))
    assert lines.sum(axis=(1, 2)) == pytest.approx(np.ones((30, 3)), abs=1e-5)
    rows, columns = (np.tensordot(lines[..., 0].sum(axis=axis), np.arange(64), 1) - 32 for axis in (2, 1))
    angles = np.degrees(np.arctan2(-rows, -columns))
    assert abs(angles).max() < 48 and angles.std() == pytest.approx(90 / math.sqrt(12), rel=0.3)


def test_zoom_blur_against_scipys_zoom():
    images, total = smooth(4), smooth(4).astype(float)
    factors = np.arange(1, 1.16, 0.01)
    for factor in factors:
        side = math.ceil(32 / factor)
        start = (32 - side) // 2
        cut = images[:, start : start + side, start : start + side].astype(float)
        zoomed = ndimage.zoom(cut, (1, factor, factor, 1), order=1)
        start = (zoomed.shape[1] - 32) // 2
        total += zoomed[:, start : start + 32, start : start + 32]
    assert abs(corrupt(images, "zoom_blur", 3) - total / (len(factors) + 1)).max() < 0.6


# --- weather -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_only_brightens_and_falls_from_both_sides(severity):
    images = smooth()
    whitened = corrupt(images, "snow", severity).astype(int) - images
    assert whitened.min() >= 0 and whitened.mean() > 5
    night = corrupt(flat(0, n=5), "snow", severity)
    assert (night == night[:, ::-1, ::-1]).all() and (night == night[..., :1]).all() and night.std() > 2


@pytest.mark.parametrize(("severity", "ice"), by_severity(0.2, 0.3, 0.4, 0.4, 0.45))
def test_frost_has_the_light_of_the_photographs_in_whose_place_it_stands(severity, ice):
    texture = corrupt(flat(0, n=200), "frost", severity) / 255 / ice
    levels = texture.mean(axis=(1, 2, 3))
    assert levels.min() == pytest.approx(0.45, abs=0.02) and levels.max() == pytest.approx(0.80, abs=0.02)
    deviations = texture.mean(axis=3).std(axis=(1, 2))
    assert 0.04 < deviations.min() < 0.06 and 0.11 < deviations.max() < 0.14
    red, green, blue = texture.mean(axis=(0, 1, 2))
    assert red < green < blue


@pytest.mark.parametrize(("severity", "amount"), by_severity(0.2, 0.5, 0.75, 1, 1.5))
def test_fog_keeps_the_range(severity, amount):
    """Where there is no cloud a flat image sinks to v * v / (v + amount); where it is thickest v remains."""
    values = corrupt(flat(153, n=10), "fog", severity)
    v = 153 / 255
    assert (values.min(axis=(1, 2, 3)) == round(255 * v * v / (v + amount))).all()
    assert (values.max(axis=(1, 2, 3)) == 153).all() and (values == values[..., :1]).all()


def test_plasma_is_coarse_where_chance_fades_fast():
    fine, coarse = (corruptions._plasma(50, 32, decay, np.random.default_rng(0)) for decay in (1.1, 9))
    assert fine.shape == (50, 32, 32) and fine.min() == 0 and fine.max() == 1
    steps = [abs(np.diff(plasma, axis=1)).mean() for plasma in (fine, coarse)]
    assert steps[0] > 2 * steps[1]
    assert corruptions._plasma(2, 48, 2, np.random.default_rng(0)).shape == (2, 48, 48)


@pytest.mark.parametrize(("severity", "amount"), by_severity(0.05, 0.1, 0.15, 0.2, 0.3))
def test_brightness_against_colorsys(severity, amount):
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    colours[0, :5] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 1], [90, 90, 90]]
    result = corrupt(colours[None], "brightness", severity)[0]
    for before, after in zip(colours[:4].reshape(-1, 3), result[:4].reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1))
        assert after == pytest.approx(np.array(expected) * 255, abs=0.51)


# --- digital -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "share"), by_severity(0.75, 0.5, 0.4, 0.3, 0.15))
def test_contrast_is_a_share_of_the_way_from_each_channels_mean(severity, share):
    image = smooth(1)[0]
    for channel in range(3):
        values = image[..., channel].ravel().tolist()
        mean = sum(values) / len(values)
        expected = [mean + share * (value - mean) for value in values]
        assert corrupt(image[None], "contrast", severity)[0, ..., channel].ravel() == pytest.approx(expected, abs=0.51)


def coordinates(n):
    """Images whose red and green tell the place, 4 a pixel, and where they came from after the elastic transform."""
    rows, columns = np.mgrid[64:192:4, 64:192:4]
    return np.repeat(np.stack([columns, rows, rows], axis=-1)[None], n, axis=0).astype(np.uint8)


def bends(severity):
    """Where the middle of each image is taken from, in pixels (N, 10, 10, 2), and how far from affine that is."""
    sources = (corrupt(coordinates(60), "elastic_transform", severity)[:, 11:21, 11:21, :2].astype(float) - 64) / 4
    places = np.stack([*np.mgrid[11:21, 11:21][::-1], np.ones((10, 10))], axis=-1).reshape(100, 3)
    fits = np.linalg.lstsq(places, sources.transpose(1, 2, 0, 3).reshape(100, -1), rcond=None)
    return sources, math.sqrt(fits[1].mean() / 100)


def test_the_elastic_transform_is_affine_at_first_and_bends_more_and_more():
    amounts = [bends(severity)[1] for severity in SEVERITIES]
    assert amounts[0] < 0.1 and amounts == sorted(amounts)
    for amount, strength, sigma in zip(amounts[2:], (0.08, 0.1, 0.1), (0.06, 0.04, 0.03), strict=True):
        weights = ndimage.gaussian_filter1d(np.eye(1, 65, 32)[0], sigma * 32, truncate=3)
        deviation = strength * 32 * (weights**2).sum() / math.sqrt(3)  # of smoothed uniform noise; some of it is affine
        assert 0.65 * deviation < amount < deviation


@pytest.mark.parametrize(("severity", "affine"), [(1, 0.08), (2, 0.07)])
def test_the_elastic_transform_moves_by_its_share_of_the_side(severity, affine):
    """The image's middle lies halfway between two of the points, each moved uniformly by up to 2.56 or 2.24 pixels."""
    shifts = bends(severity)[0][:, 5, 5] - 16
    assert shifts.std() == pytest.approx(affine * 32 / math.sqrt(3) / math.sqrt(2), rel=0.15)


@pytest.mark.parametrize(("severity", "side"), by_severity(30, 28, 27, 24, 20))
def test_pixelate_against_pillow(severity, side):
    images = smooth(3)
    for image, result in zip(images, corrupt(images, "pixelate", severity), strict=True):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
        assert (np.asarray(small.resize((32, 32), Image.Resampling.BOX)) == result).all()


@pytest.mark.parametrize(("severity", "quality"), by_severity(80, 65, 58, 50, 40))
def test_jpeg_compression_against_pillow(severity, quality):
    images = smooth(3)
    for image, result in zip(images, corrupt(images, "jpeg_compression", severity), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        assert (np.asarray(Image.open(file)) == result).all()


# --- the sample --------------------------------------------------------------------------------------------------


def test_a_sample_has_each_class_in_proportion():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [700, 200, 100]))
    rows = sample_rows(labels, 100, seed=0)
    assert np.bincount(labels[rows]).tolist() == [70, 20, 10] and (np.diff(rows) > 0).all()
    assert (rows == sample_rows(labels, 100, seed=0)).all() and set(rows) != set(sample_rows(labels, 100, seed=1))


def test_a_small_split_is_taken_whole_and_classes_without_images_do_no_harm():
    assert sample_rows(np.array([3, 0, 3, 0, 5]), 1000, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert len(sample_rows(np.array([3, 0, 3, 0, 5]), 4, seed=0)) == 4


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corrupted_run(digits_run, tmp_path_factory):
    """A copy of the digits run, judged: its folder, what was printed and corruptions.json."""
    cwd = tmp_path_factory.mktemp("corrupted")
    folder = shutil.copytree(digits_run.folder, cwd / "run")
    done = call("-m", "cifar_fastai", "evaluate", "run", "--corruptions", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, json.loads((folder / "corruptions.json").read_text())


@pytest.mark.slow
def test_the_figures_against_the_exports_own_answers(corrupted_run, digits_run):
    _, _, found = corrupted_run
    data, export = load_data("digits"), load_export(digits_run.export)
    images, labels = data.images[data.n_train :], data.labels[data.n_train :]

    def right(images):
        return export.probabilities(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy().argmax(axis=1) == labels

    kinds = {kind: accuracies for group in found["accuracy"].values() for kind, accuracies in group.items()}
    assert list(kinds) == list(KINDS)
    for kind in ("shot_noise", "zoom_blur", "fog", "pixelate"):
        recomputed = [right(corrupt(images, kind, severity)).mean() for severity in SEVERITIES]
        assert kinds[kind] == pytest.approx(recomputed)
    means = {kind: sum(accuracies) / 5 for kind, accuracies in kinds.items()}
    assert found["kind_accuracy"] == pytest.approx(means)
    assert means[found["worst_kind"]] == min(means.values())
    assert found["clean_accuracy"] == pytest.approx(right(images).mean())
    assert found["mean_corruption_accuracy"] == pytest.approx(sum(means.values()) / 15)
    assert found["drop"] == pytest.approx(right(images).mean() - sum(means.values()) / 15)
    low, high = found["mean_corruption_accuracy_interval"]
    assert 0.005 < high - low < 0.1 and (low + high) / 2 == pytest.approx(found["mean_corruption_accuracy"])
    assert (found["source"], found["n_images"], found["n_test"], found["seed"]) == ("digits", 360, 360, 0)


def test_the_interval_of_a_mean_against_scipy():
    values = np.random.default_rng(0).random(50)
    interval = stats.norm.interval(0.95, loc=values.mean(), scale=stats.sem(values, ddof=0))
    assert mean_interval(values) == pytest.approx(interval, abs=1e-6)


def test_what_is_printed_is_what_is_written(corrupted_run):
    _, printed, found = corrupted_run
    assert "360 of 360 test images of digits (lossless), drawn with seed 0" in printed
    for kinds in found["accuracy"].values():
        for kind, accuracies in kinds.items():
            cells = [f"{share:.1%}" for share in (*accuracies, found["kind_accuracy"][kind])]
            assert [kind, *cells] in [line.split() for line in printed.splitlines()]
    assert f"corruption accuracy {found['mean_corruption_accuracy']:.2%}" in printed
    assert f"{found['drop'] * 100:.2f} points below clean" in printed
    assert f"worst    {found['worst_kind']}, " in printed


@pytest.mark.slow
def test_the_export_is_judged_the_same_and_nothing_is_written(corrupted_run, digits_run, tmp_path):
    _, printed, _ = corrupted_run
    done = call_here("evaluate", digits_run.export, "--corruptions", "--data", "digits", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == re.sub(r"report .*\n", "", printed) and not list(tmp_path.iterdir())


def test_the_report_shows_it(corrupted_run):
    folder, _, found = corrupted_run
    html = (folder / "report.html").read_text()
    assert "How it bears corrupted images" in html and html.count('src="data:image/png;base64,') == 12
    assert f"mean corruption accuracy {found['mean_corruption_accuracy']:.2%}" in html
    assert all(f"<td>{kind.replace('_', ' ')}</td>" in html for kind in KINDS)
    picture = np.asarray(Image.open(folder / "corruptions.png").convert("RGB"))
    assert min(picture.shape[:2]) > 500 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_the_picture_tells_its_finding_and_every_figure():
    accuracies = {"noise": {"salt": [0.9, 0.8], "shot_noise": [0.5, 0.25]}, "blur": {"glass": [0.7, 0.6]}}
    figure = figures.corruptions(accuracies, clean=0.95)
    assert figure.get_suptitle().split() == (
        "95.0% of the clean images are recognised, 62.5% of the corrupted ones; hardest: shot noise, 37.5%".split()
    )
    axes = figure.axes[0]
    shares = "90.0% 80.0% 85.0% 50.0% 25.0% 37.5% 70.0% 60.0% 65.0%".split()
    assert [text.get_text() for text in axes.texts] == shares
    assert [label.get_text() for label in axes.get_yticklabels()] == ["salt", "shot noise", "glass"]


def test_misuse(digits_run, tmp_path):
    colours = write_pictures(tmp_path / "colours")
    done = call_here("evaluate", digits_run.export, "--corruptions", "--data", colours, cwd=tmp_path)
    assert done.returncode == 2 and "does not know the classes blue, green, red" in done.stderr and done.stdout == ""
    run = shutil.copytree(digits_run.folder, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["unfamiliar_below"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    done = call_here("evaluate", run, "--corruptions", cwd=tmp_path)
    assert done.returncode == 2 and "was evaluated by an older version" in done.stderr and done.stdout == ""


def test_a_sheet_of_all_kinds(tmp_path):
    done = call_here("data", "--data", "digits", "--show-corruptions", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "corruptions.png\n", done.stderr
    sheet = np.asarray(Image.open(tmp_path / "corruptions.png").convert("RGB"))
    assert sheet.shape[0] > 1500 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
