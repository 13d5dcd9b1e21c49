import io

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_fitting_takes_the_centred_square_and_leaves_the_right_size_alone():
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert np.asarray(fit_image(Image.fromarray(wide), 10)).min() == 255
    square = Image.fromarray(PIXELS[:20, :20])
    assert fit_image(square, 20) is square
