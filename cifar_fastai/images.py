"""From whatever somebody calls an image to an RGB picture, and from a picture to the network's square."""

import io
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_fastai.errors import UserError

MAX_BYTES = 10_000_000
MAX_PIXELS = 25_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
TOO_LARGE = f"The file is larger than {MAX_BYTES // 1_000_000} MB."
TOO_MANY_PIXELS = f"The image has more than {MAX_PIXELS // 1_000_000} megapixels."
FIRST_FRAME = "first frame of an animation"
BACKGROUND = (255, 255, 255)  # shines through transparent pixels


class BadImage(UserError):
    """Not an image that can be read; the message says why, in words fit to show anybody."""


def decode_image(source) -> Image.Image:
    """A new RGB PIL image from a path, bytes, a PIL image, an HWC (or HW) array or a CHW tensor.

    JPEG, PNG, WebP, GIF and BMP are read, up to 10 MB and 25 megapixels, whatever the file is called. The camera's
    rotation is applied, transparency laid over white, 16-bit and float values scaled to 8 bits (floats count from
    0 to 1), and of an animation the first frame is taken; `info["warnings"]` of the picture lists remarks like this
    one. Raises BadImage.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if hasattr(source, "detach"):
        return _from_array(_hwc(source))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (str, Path)):
        try:
            return _from_bytes(_read_file(Path(source)))
        except BadImage as error:
            raise BadImage(f"{source}: {error}") from None
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source))
    raise BadImage(f"A {type(source).__name__} is no image: give a path, bytes, a PIL image, an array or a tensor.")


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """`image` as a square of `size` x `size` pixels, resampled with antialiasing; one of that size is left as it is.

    The longer side is cut, evenly at both ends, to the geometric mean of both sides, and what is left is pressed into the
    square. Cutting to a square loses subjects that fill the frame, pressing all of it in distorts those that do not, and
    this, half of each, is never far behind the better one (benchmarks/fitting.py).
    """
    if image.size == (size, size):
        return image
    width, height = image.size
    side = math.sqrt(width * height)
    left, top = max(width - side, 0) / 2, max(height - side, 0) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, width - left, height - top))


def _read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise BadImage("This is a folder, not an image.")
        if path.stat().st_size > MAX_BYTES:
            raise BadImage(TOO_LARGE)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise BadImage(f"The file cannot be read: {getattr(error, 'strerror', None) or error}.") from None


@contextmanager
def _pillows_errors():
    """Everything that Pillow raises over a bad image, as BadImage."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"Not an image in a format that is read here ({', '.join(FORMATS)}).") from None
    except Image.DecompressionBombError:
        raise BadImage(TOO_MANY_PIXELS) from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise BadImage(f"The image is damaged ({error or type(error).__name__}).") from None


def _from_bytes(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("The file is empty.")
    if len(data) > MAX_BYTES:
        raise BadImage(TOO_LARGE)
    with _pillows_errors():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    return _from_pil(image)


def _from_pil(image: Image.Image) -> Image.Image:
    if math.prod(image.size) > MAX_PIXELS:
        raise BadImage(TOO_MANY_PIXELS)
    with _pillows_errors():
        animated = getattr(image, "is_animated", False) and image.format != "MPO"  # a JPEG with further pictures in it
        picture = _to_rgb(ImageOps.exif_transpose(image))  # decodes a lazy image, and copies
    # The file's own metadata stays behind: whoever saves the picture would write it again, or fail over it.
    picture.info = {"warnings": [FIRST_FRAME] if animated else []}
    return picture


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_array(np.asarray(image))
    if image.has_transparency_data and not isinstance(image.info.get("transparency"), str):  # which is a text of that name
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _hwc(tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy knows no bfloat16
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise BadImage(
            f"An array or tensor of shape {tuple(array.shape)} is no image: arrays are height x width x channels, "
            "tensors channels x height x width, with 1, 3 or 4 channels."
        )
    if math.prod(array.shape[:2]) > MAX_PIXELS:
        raise BadImage(TOO_MANY_PIXELS)
    return _from_pil(Image.fromarray(_to_uint8(array)))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """8-bit values: floats count from 0 to 1, integers of more bits from 0 to 65,535, unless the values say otherwise."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not (np.issubdtype(array.dtype, np.number) and np.isrealobj(array) and np.isfinite(array).all()):
        raise BadImage(f"An array of {array.dtype} with values that are no finite numbers is no image.")
    highest = float(array.max())
    if np.issubdtype(array.dtype, np.floating):
        white = 1.0 if highest <= 1 else max(255.0, highest)
    else:
        white = max(65535.0, highest) if array.dtype.itemsize == 2 or highest > 255 else 255.0
    return (np.clip(array / white, 0, 1) * 255).round().astype(np.uint8)
