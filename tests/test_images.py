import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, call
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cifar_fastai import images
from cifar_fastai.images import BadImage, decode_image, fit_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    png = encoded(Image.fromarray(PIXELS))
    (tmp_path / "a.png").write_bytes(png)
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), png, bytearray(png), Image.fromarray(PIXELS), PIXELS, tensor]
    for source in [*sources, tensor.float() / 255, PIXELS / 255.0, PIXELS.astype(np.uint16) * 257]:
        assert np.array_equal(decode_image(source), PIXELS), type(source)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "JPEG"])
def test_formats(format):
    gray = Image.new("RGB", (20, 10), (128, 128, 128))
    assert np.abs(np.asarray(decode_image(encoded(gray, format)), dtype=int) - 128).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))
    else:
        image = Image.new("RGB", (8, 8), "white").convert("RGB" if mode == "F" else mode)
        if mode == "F":
            image = Image.fromarray(np.ones((8, 8), dtype=np.float32))
    assert image.mode == mode
    result = decode_image(image)
    assert (result.mode, result.size) == ("RGB", (8, 8))
    assert np.asarray(result).min() >= 250


def test_transparency_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 128, 255)  # red, from invisible to opaque
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    for source in (Image.fromarray(rgba), encoded(Image.fromarray(rgba)), rgba):
        assert np.abs(np.asarray(decode_image(source))[0].astype(int) - expected).max() <= 1
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30])
    assert np.array_equal(decode_image(encoded(palette, transparency=0)), np.full((1, 2, 3), 255))


def test_one_colour_that_is_transparent():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(file, "PNG", transparency=(200, 0, 0))
    assert set(decode_image(file.getvalue()).get_flattened_data()) == {(255, 255, 255)}


def test_the_files_metadata_stays_behind():
    """Pillow writes it again where the picture is saved, or fails over it."""
    file, described = io.BytesIO(), PngInfo()
    described.add_text("transparency", "x" * 1000)
    described.add_text("icc_profile", "x" * 1000)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=described)
    for source in (file.getvalue(), Image.new("L", (8, 8)), np.zeros((8, 8)), torch.zeros(3, 8, 8)):
        assert decode_image(source).info == {"warnings": []}


def test_further_pictures_in_a_jpeg_are_no_animation():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    assert Image.open(file).is_animated and decode_image(file.getvalue()).info["warnings"] == []


def test_tensors_of_half_precision():
    for kind in (torch.bfloat16, torch.float16):
        assert decode_image(torch.ones(3, 8, 8, dtype=kind)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    assert np.asarray(decode_image(encoded(Image.fromarray(ramp))))[0, :, 0].tolist() == [0, 100, 255]


def test_the_cameras_rotation_is_applied():
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[274] = 6  # turn a quarter clockwise to show
    turned = decode_image(encoded(image, "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(PIXELS, -1))


def test_a_pil_image_is_read_like_its_file_and_left_alone(tmp_path):
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[274] = 3
    image.save(tmp_path / "a.png", exif=exif)
    lazy = Image.open(tmp_path / "a.png")
    result = decode_image(lazy)
    assert np.array_equal(result, PIXELS[::-1, ::-1]) and np.array_equal(result, decode_image(tmp_path / "a.png"))
    assert np.array_equal(lazy, PIXELS) and decode_image(image) is not image


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(gif).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "empty"),
        (b"hello", "Not an image"),
        (b"<html><body>404</body></html>", "Not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "Not an image"),
        (encoded(Image.fromarray(PIXELS))[:-300], "damaged"),
        (encoded(Image.fromarray(PIXELS), "TIFF"), "Not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(images.MAX_BYTES), "larger than 10 MB"),
        (encoded(Image.new("1", (5001, 5000))), "more than 25 megapixels"),
        (encoded(Image.new("1", (20000, 20000))), "more than 25 megapixels"),
        (np.zeros((3, 3, 5), dtype=np.uint8), "shape"),
        (np.zeros((0, 3, 3), dtype=np.uint8), "shape"),
        (torch.zeros(2, 3, 8, 8), "shape"),
        (np.full((2, 2), np.nan), "finite"),
        (np.array([["a", "b"]]), "finite"),
        (42, "int is no image"),
        (None, "NoneType is no image"),
    ],
)
def test_what_is_no_image(source, words):
    with pytest.raises(BadImage, match=words):
        decode_image(source)


def test_a_path_is_named(tmp_path):
    for source, words in ((tmp_path, "folder"), (tmp_path / "none.png", "No such file"), ("a\0b", "null")):
        with pytest.raises(BadImage, match=words):
            decode_image(source)
    (tmp_path / "big.png").write_bytes(bytes(images.MAX_BYTES + 1))
    with pytest.raises(BadImage, match=r"big\.png: The file is larger"):
        decode_image(tmp_path / "big.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (31, 33), (640, 480)])
def test_any_shape_fits(size):
    pixels = np.asarray(fit_image(Image.new("RGB", size, "navy"), 32))
    assert pixels.shape == (32, 32, 3) and (pixels == (0, 0, 128)).all()


def test_the_right_size_is_left_alone_and_other_squares_are_only_resized():
    square = Image.fromarray(PIXELS[:20, :20])
    assert fit_image(square, 20) is square
    assert np.array_equal(fit_image(square, 32), square.resize((32, 32), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("upright", [False, True])
def test_the_longer_side_is_cut_to_the_geometric_mean_and_the_rest_pressed_in(upright):
    """160 x 40 pixels: of the longer side the middle 80 remain. What resampling makes of a ramp is known by hand."""
    along, across = np.meshgrid(np.arange(160), np.arange(40))
    ramps = np.stack([along, across, across], axis=2).astype(np.uint8)
    fitted = np.asarray(fit_image(Image.fromarray(ramps.swapaxes(0, 1) if upright else ramps), 20), dtype=float)
    fitted = fitted.swapaxes(0, 1) if upright else fitted
    place = np.arange(20) + 0.5
    assert np.abs(fitted[:, :, 0] - (40 + 4 * place - 0.5)).max() <= 0.5
    assert np.abs(fitted[1:-1, :, 1] - (2 * place - 0.5)[1:-1, None]).max() <= 0.5  # the outermost see the image's end


def test_detail_finer_than_the_networks_pixels_is_averaged():
    checks = np.indices((320, 480)).sum(axis=0) % 2 * 255
    fitted = np.asarray(fit_image(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), 32), dtype=int)
    assert np.abs(fitted - 127.5).max() <= 2


# --- whatever may come -------------------------------------------------------------------------------------------

TURNS = {  # of EXIF's orientations, by their definition: where the first row and the first column of the file belong
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[:, ::-1], 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}  # fmt: skip
LOSSLESS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "BMP": ("1", "L", "P", "RGB"), "GIF": ("1", "L", "P"),
    "WEBP": ("RGB", "RGBA"),
}  # fmt: skip
WITH_EXIF = ("PNG", "WEBP", "JPEG")


def picture_and_meaning(mode: str, shape: tuple[int, int], seed: int) -> tuple[Image.Image, np.ndarray]:
    """A random picture of a mode, and the colours that it shows, by hand."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (*shape, 4), dtype=np.uint8)
    gray, colour, alpha = values[..., 0], values[..., :3], values[..., 3:]

    def over_white(colours):
        return (colours * (alpha / 255) + 255 * (1 - alpha / 255)) + np.zeros(3)

    if mode == "1":
        return Image.fromarray(gray > 127), np.where(gray > 127, 255, 0)[..., None] + np.zeros(3)
    if mode == "I;16":
        return Image.fromarray(gray.astype(np.uint16) * 251), (gray * 251.0 / 257)[..., None] + np.zeros(3)
    if mode == "P":
        palette, image = random.integers(0, 256, (256, 3), dtype=np.uint8), Image.fromarray(gray, "L")
        image.putpalette(palette.tobytes())
        return image, palette[gray]
    if mode == "LA":
        return Image.fromarray(np.dstack([gray, alpha])), over_white(gray[..., None])
    return {
        "L": lambda: (Image.fromarray(gray), gray[..., None] + np.zeros(3)),
        "RGB": lambda: (Image.fromarray(colour), colour),
        "RGBA": lambda: (Image.fromarray(values), over_white(colour)),
    }[mode]()


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    kind=st.sampled_from([(format, mode) for format, modes in LOSSLESS.items() for mode in modes]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    turn=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_any_mode_size_rotation_and_lossless_format_shows_its_colours(kind, shape, turn, seed):
    format, mode = kind
    image, meaning = picture_and_meaning(mode, shape, seed)
    assert image.mode == mode
    options = {"WEBP": {"lossless": True, "exact": True}}.get(format, {})
    if format in WITH_EXIF:
        options["exif"] = image.getexif()
        options["exif"][274] = turn
        meaning = TURNS.get(turn, TURNS[1])(meaning)  # 0 and 9 mean nothing
    result = decode_image(encoded(image, format, **options))
    assert (result.mode, result.size) == ("RGB", (meaning.shape[1], meaning.shape[0]))
    assert np.abs(np.asarray(result) - np.asarray(meaning, dtype=float)).max() <= 1
    assert fit_image(result, 32).size == (32, 32)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    turn=st.integers(0, 9),
    progressive=st.booleans(),
)
def test_any_jpeg_shows_its_colour(mode, colour, shape, turn, progressive):
    image = Image.new("RGB", shape, colour).convert(mode)
    exif = image.getexif()
    exif[274] = turn
    result = decode_image(encoded(image, "JPEG", quality=95, progressive=progressive, exif=exif))
    assert (result.mode, result.size) == ("RGB", shape[::-1] if turn in (5, 6, 7, 8) else shape)
    expected = np.asarray(image.convert("RGB"), dtype=int)[0, 0]
    assert np.abs(np.asarray(result, dtype=int) - expected).max() <= 5


def test_every_other_format_is_refused():
    Image.init()
    refused = []
    for format in sorted(Image.SAVE.keys() - {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB"}):
        for mode in ("RGB", "L", "1", "F"):
            try:
                data = encoded(Image.new(mode, (64, 64)), format)
            except (OSError, ValueError, KeyError):  # not a mode, or not a format, that can be written here
                continue
            with pytest.raises(BadImage, match="Not an image in a format"):
                decode_image(data)
            refused.append(format)
            break
    assert {"TIFF", "EPS", "PDF", "PPM", "ICO", "TGA", "PCX"} <= set(refused)
    with pytest.raises(BadImage, match="Not an image in a format"):
        decode_image(b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800))  # FITS


def test_what_is_too_large_is_refused_by_its_header_alone():
    for width, height, words in ((5001, 5000, "25 megapixels"), (65_000, 65_000, "25 megapixels"), (5000, 5000, "damaged")):
        png = encoded(Image.new("1", (1, 1)))
        header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
        content = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
        with pytest.raises(BadImage, match=words):
            decode_image(content)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_cut_anywhere_is_refused_or_whole(format):
    """Cut behind its last pixel a file may still be read, but then it shows all of the picture."""
    whole = encoded(Image.fromarray(PIXELS), format)
    for length in range(0, len(whole), 7):
        try:
            assert np.array_equal(decode_image(whole[:length]), decode_image(whole))
        except BadImage as error:
            assert str(error)
    with pytest.raises(BadImage):
        decode_image(whole[: len(whole) // 2])


def test_thousands_of_damaged_files_let_nothing_but_bad_image_escape(tmp_path):
    arguments = ("--files", "4000", "--structured", "72", "--json", "result.json")
    done = call(ROOT / "benchmarks" / "fuzz_images.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["files"], result["faults"]) == (4000, 0) and "fault" not in result["outcomes"]
    assert min(result["outcomes"]["read"], result["outcomes"]["The image is damaged"]) > 400, "damage that tests something"
    built = result["structured"]
    assert (built["files"], built["faults"], len(built["kinds"])) == (72, 0, 18)
    assert sum(kind["read"] for kind in built["kinds"].values()) > 20, "what is only refused tests no decoder"
