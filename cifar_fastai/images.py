"""From whatever somebody calls an image to an RGB picture, and from a picture to the network's square."""

import io
import math
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cifar_fastai.imagebounds import (
    FORMATS,
    NO_FORMAT,
    TOO_MANY_PIXELS,
    BadImage,
    check_size,
    find_still,
    hexadecimal,
    orientation,
)

MAX_BYTES = 10_000_000
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
TOO_LARGE = f"The file is larger than {MAX_BYTES // 1_000_000} MB."
FIRST_FRAME = "first frame of an animation"
BACKGROUND = (255, 255, 255)  # shines through transparent pixels
TURNS = {  # that undo EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 274  # EXIF's tag
SCALED_AT_ONCE = 1_000_000  # values


def decode_image(source) -> Image.Image:
    """A new RGB PIL image from a path, bytes, a PIL image, an HWC (or HW) array or a CHW tensor.

    JPEG, PNG, WebP, GIF and BMP are read, up to 10 MB, 25 megapixels and 65,500 pixels a side, whatever the file is called.
    A PIL image that is not loaded yet is read from its file, within the same bounds. The camera's rotation is applied,
    transparency laid over white, 16-bit and float values scaled to 8 bits (floats count from 0 to 1), and of an animation
    the first frame is taken; `info["warnings"]` of the picture lists remarks like this
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
    this, half of each, is never far behind the better one (benchmarks/fitting.py). Raises BadImage if there are more pixels
    than `decode_image` gives.
    """
    check_size(*image.size)
    if image.size == (size, size):
        return image
    width, height = image.size
    side = math.sqrt(width * height)
    left, top = max(width - side, 0) / 2, max(height - side, 0) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, width - left, height - top))


def _read_file(path: Path) -> bytes:
    """No more than the first byte beyond MAX_BYTES, of regular files alone: others may never end, or never begin."""
    try:
        _refuse_unless_regular(path.stat().st_mode)
        with open(path, "rb", opener=_without_waiting) as file:  # Path.open takes no opener
            _refuse_unless_regular(os.fstat(file.fileno()).st_mode)  # it may have been replaced
            return file.read(MAX_BYTES + 1) or b""  # None: one of /proc, with nothing to tell now
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise BadImage(f"The file cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag, and no pipes among its files


def _refuse_unless_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise BadImage("This is a folder, not an image.")
    if not stat.S_ISREG(mode):
        raise BadImage("This is a pipe, a socket or a device, not a file. Send a pipe to standard input, and name it '-'.")


@contextmanager
def _pillows_errors():
    """Everything that Pillow raises over a bad image, as BadImage."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(NO_FORMAT) from None
    except Image.DecompressionBombError:
        raise BadImage(TOO_MANY_PIXELS) from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise BadImage(f"The image is damaged ({error or type(error).__name__}).") from None


def _from_bytes(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("The file is empty.")
    if len(data) > MAX_BYTES:
        raise BadImage(TOO_LARGE)
    still = find_still(data)
    with _pillows_errors():
        picture = _to_rgb(_turned(_decoded(still.format, still.data), still.orientation))
    return _without_metadata(picture, still.animated)


def _decoded(format: str, data: bytes) -> Image.Image:
    """A copy, since with its file the buffers of its decoder go too: for WebP three times the picture."""
    with Image.open(io.BytesIO(data), formats=[format]) as file:
        check_size(*file.size)
        return file.copy()


def _from_pil(image: Image.Image) -> Image.Image:
    file = getattr(image, "fp", None)  # until it is loaded
    if file and image.format not in (*FORMATS, "MPO"):
        raise BadImage(f"{image.format} files are not read here ({', '.join(FORMATS)}). Load the image before: image.load()")
    if file and image.tell() == 0:
        return _from_bytes(_all_of(file))
    check_size(*image.size)
    with _pillows_errors():
        animated = getattr(image, "is_animated", False) and image.format != "MPO"  # a JPEG with further pictures in it
        picture = _to_rgb(_turned(image, _orientation(image)))
        return _without_metadata(image.copy() if picture is image else picture, animated)


def _all_of(file) -> bytes:
    with _pillows_errors():
        place = file.tell()
        file.seek(0)
        data = file.read(MAX_BYTES + 1)
        file.seek(place)
    return data


def _orientation(image: Image.Image) -> int:
    exif, digits = image.info.get("exif"), image.info.get("Raw profile type exif")
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    if exif is None and isinstance(digits, str):
        exif = hexadecimal(digits.encode())
    if isinstance(exif, bytes):
        return orientation(exif, xmp.encode() if isinstance(xmp, str) else bytes(xmp))
    return image.getexif().get(ORIENTATION, 1)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _without_metadata(picture: Image.Image, animated: bool) -> Image.Image:
    """The file's own metadata stays behind: whoever saves the picture would write it again, or fail over it."""
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
    if tensor.ndim in (2, 3):
        check_size(*tensor.shape[:-3:-1])
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
    check_size(array.shape[1], array.shape[0])
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
    scaled, step = np.empty(array.shape, np.uint8), max(1, SCALED_AT_ONCE // array[0].size)
    for row in range(0, len(array), step):
        scaled[row : row + step] = (np.clip(array[row : row + step] / white, 0, 1) * 255).round()
    return scaled
