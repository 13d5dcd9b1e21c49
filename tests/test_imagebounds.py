"""Pictures that a small file makes large, those that only look like them, and what of a file reaches the decoder."""

import io
import itertools
import os
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_fastai import imagebounds
from cifar_fastai.imagebounds import MARKER, BadImage, find_still
from cifar_fastai.images import FIRST_FRAME, decode_image, fit_image

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
TURNED = np.rot90(NOISE, -1)  # as orientation 6 asks for


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def cheaply(data: bytes, seconds=1.5, megabytes=100):
    """What becomes of a picture: the RGB one, or the words it is refused with. Fails if that takes long, or much memory.

    The seconds are those of its own computing: those of the system depend on what else runs.
    """
    assert len(data) <= 10_000_000
    memory, start = peak_mb(), os.times().user
    try:
        picture = decode_image(data)
        fit_image(picture, 32)
    except BadImage as error:
        picture = str(error)
    assert os.times().user - start < seconds
    assert peak_mb() - memory < megabytes
    return picture


# --- building files ----------------------------------------------------------------------------------------------


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def after_start(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def scans_of(jpeg: bytes) -> list[bytes]:
    """The scans, each with its header; the last ends where the picture does."""
    starts, place = [], 2
    while True:
        place = MARKER.search(jpeg, place).start()
        if jpeg[place + 1] in (0xDA, 0xD9):
            starts.append(place)
        if jpeg[place + 1] == 0xD9:
            return [jpeg[start:end] for start, end in itertools.pairwise(starts)]
        place += 2 + struct.unpack_from(">H", jpeg, place + 2)[0]


def with_scans(jpeg: bytes, scans: bytes) -> bytes:
    return jpeg.removesuffix(b"\xff\xd9") + scans + b"\xff\xd9"


def with_sides(jpeg: bytes, width: int, height: int, frame: int | None = None) -> bytes:
    """Another size in its header, and another process of coding."""
    place = next(found.start() for found in MARKER.finditer(jpeg) if jpeg[found.start() + 1] in (0xC0, 0xC2))
    header = jpeg[place : place + 5] + struct.pack(">HH", height, width)
    if frame:
        header = header[:1] + bytes([frame]) + header[2:]
    return jpeg[:place] + header + jpeg[place + 9 :]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def after_header(png: bytes, *chunks: bytes) -> bytes:
    return png[:33] + b"".join(chunks) + png[33:]


def before_end(png: bytes, *chunks: bytes) -> bytes:
    return png[:-12] + b"".join(chunks) + png[-12:]


def blocks(data: bytes) -> bytes:
    return b"".join(bytes([len(data[k : k + 255])]) + data[k : k + 255] for k in range(0, len(data), 255)) + b"\0"


def extension(label: int, data: bytes) -> bytes:
    return b"!" + bytes([label]) + blocks(data)


def before_frame(gif: bytes, extensions: bytes) -> bytes:
    start = find_still(gif).data.index(b",", 13 + (3 << (gif[10] & 7) + 1))
    return gif[:start] + extensions + gif[start:]


def riff(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def webp(*chunks: bytes) -> bytes:
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def canvas(width: int, height: int, flags=0) -> bytes:
    return riff(b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))


def bmp(width: int, height: int, data: bytes, compression=0, bits=8) -> bytes:
    """With the palette of RLE8 or RLE4: number k is the colour (k, 0, 255 - k)."""
    palette = bytes(value for k in range(1 << bits) for value in (255 - k, 0, k, 0)) if bits <= 8 else b""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def tiff(orientation: int | None, n_others=0, length=60_000) -> bytes:
    """EXIF's directory, with n_others entries that each name the same `length` bytes."""
    others = b"".join(struct.pack("<HHLL", 1000 + k, 7, length, 8) for k in range(n_others))
    own = struct.pack("<HHLHH", 274, 3, 1, orientation, 0) if orientation else b""
    n = n_others + bool(orientation)
    return b"II*\0" + struct.pack("<LH", 8, n) + others + own + bytes(4) + bytes(max(0, length - 12 * n) if n_others else 0)


JPEG, PNG, GIF, WEBP = (encoded(Image.fromarray(NOISE), format) for format in ("JPEG", "PNG", "GIF", "WEBP"))
LOSSLESS = encoded(Image.fromarray(NOISE), "WEBP", lossless=True)
XMP = b'<rdf:Description tiff:Orientation="6"/>'


# --- what is refused ---------------------------------------------------------------------------------------------


def test_run_lengths_that_jump_over_what_nobody_wrote():
    data = bmp(25_000_000, 1, bytes([0, 2, 255, 255, 0, 1]), compression=1)
    assert len(data) == 1084
    assert "65,500 pixels" in cheaply(data, megabytes=20)
    assert "run-length" in cheaply(bmp(5000, 5000, bytes([0, 2, 255, 255, 0, 1]), compression=1), megabytes=20)
    assert cheaply(bmp(65_500, 100, bytes([0, 2, 255, 255, 0, 1]), compression=1)).getpixel((0, 0)) == (0, 0, 255)


def test_scans_without_end():
    flat = encoded(Image.new("L", (5000, 5000), 128), "JPEG", progressive=True)
    shortest = min(scans_of(flat)[1:], key=len)
    data = with_scans(flat, shortest * (1_000_000 // len(shortest)))
    assert "too many scans" in cheaply(data, megabytes=20)
    assert cheaply(with_scans(flat, shortest * 5)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_each_scan_repeated(mode):
    flat = encoded(Image.new(mode, (3000, 2000)), "JPEG", progressive=True)
    for scan in scans_of(flat):
        assert "too many scans" in cheaply(with_scans(flat, scan * (9_000_000 // len(scan))), megabytes=50)


def test_scans_behind_what_a_decoder_skips():
    """In a scan with restarts libjpeg skips markers that mean nothing; a length read there would hide all that follows."""
    flat = encoded(Image.new("L", (5000, 5000), 128), "JPEG", progressive=True, restart_marker_rows=1)
    scan = min(scans_of(flat)[1:], key=len)
    hidden = b"\xff\x02\xff\xff" + scan * (60_000 // len(scan))
    assert "too many scans" in cheaply(with_scans(flat, hidden * 20), megabytes=20)


REFUSED = {
    "sides of a JPEG": (with_sides(JPEG, 65_535, 1), "65,500 pixels"),
    "pixels of a JPEG": (with_sides(JPEG, 5001, 5000), "25 megapixels"),
    "arithmetic coding": (with_sides(JPEG, 5000, 5000, 0xC9), "too many scans"),
    "two headers": (with_scans(JPEG, segment(0xC0, bytes.fromhex("0813881388010111" "00"))), "two headers"),
    "segments": (after_start(JPEG, segment(0xFE, b"x") * 200_000), "100,000 parts"),
    "tables": (with_scans(JPEG, segment(0xDD, b"\0\1") * 200_000), "100,000 parts"),
    "sides of a PNG": (PNG[:16] + struct.pack(">II", 65_501, 1) + PNG[24:], "65,500 pixels"),
    "chunks": (after_header(PNG, chunk(b"tEXt", b"a\0b") * 200_000), "100,000 parts"),
    "chunks behind": (before_end(PNG, chunk(b"eXIf", b"") * 200_000), "100,000 parts"),
    "chunks of pixels": (after_header(PNG, chunk(b"IDAT", b"") * 200_000), "100,000 parts"),
    "sides of a GIF": (GIF[:6] + struct.pack("<HH", 65_535, 1) + GIF[10:], "65,500 pixels"),
    "a screen": (GIF[:6] + struct.pack("<HH", 65_000, 65_000) + GIF[10:], "25 megapixels"),
    "extensions": (before_frame(GIF, extension(0xFE, b"") * 1_000_000), "100,000 parts"),
    "blocks": (before_frame(GIF, b"!\xfe" + b"\1x" * 2_000_000 + b"\0"), "100,000 parts"),
    "extensions behind": (GIF[:-1] + extension(0x01, b"") * 1_000_000 + b";", "100,000 parts"),
    "a canvas": (webp(canvas(16_000_000, 200), WEBP[12:]), "25 megapixels"),
    "sides of a canvas": (webp(canvas(100_000, 200), WEBP[12:]), "65,500 pixels"),
    "RIFF chunks": (webp(canvas(30, 20), WEBP[12:], riff(b"junk", b"") * 200_000), "100,000 parts"),
    "sides of a BMP": (bmp(1, -65_501, b""), "65,500 pixels"),
    "four bits": (bmp(5000, 5000, b"\xff\x12" * 100, 2, 4), "run-length"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_take_long_is_refused_before_it_is_decoded(kind):
    data, words = REFUSED[kind]
    assert words in cheaply(data, megabytes=60)


def test_a_frame_that_widens_the_screen():
    start = GIF.index(b",\0\0\0\0", 13 + 768)
    data = GIF[: start + 5] + struct.pack("<HH", 65_000, 65_000) + GIF[start + 9 :]
    assert "25 megapixels" in cheaply(data, megabytes=20)


def test_nothing_at_all_in_ten_megabytes():
    starts = (b"\xff\xd8\xff", PNG[:8], b"GIF89a", b"RIFF\xff\xff\xff\0WEBPVP8X", b"BM")
    for start in starts:
        for filling in (b"\0", b"\xff", b"\xff\0", b"!", b",", b"\1", b"\xff\x01"):
            assert isinstance(cheaply(start + filling * (9_900_000 // len(filling))), str)


def test_pictures_handed_over_have_the_same_bounds():
    row = np.zeros((1, 70_000, 3), dtype=np.uint8)
    for source in (row, torch.from_numpy(row).permute(2, 0, 1), Image.fromarray(row), Image.new("L", (1, 70_000))):
        with pytest.raises(BadImage, match="65,500 pixels"):
            decode_image(source)
    with pytest.raises(BadImage, match="25 megapixels"):
        decode_image(torch.zeros(1, 1, 1).expand(3, 100_000, 100_000))
    with pytest.raises(BadImage, match="25 megapixels"):
        fit_image(Image.new("1", (5001, 5000)), 32)


def test_a_picture_not_loaded_yet_is_read_as_its_file(tmp_path):
    long = Image.open(io.BytesIO(bmp(5000, 5000, bytes([0, 2, 255, 255, 0, 1]), compression=1)))
    flat = encoded(Image.new("L", (3000, 3000), 128), "JPEG", progressive=True)
    scans = Image.open(io.BytesIO(with_scans(flat, scans_of(flat)[1] * 20_000)))
    (tmp_path / "large.png").write_bytes(after_header(PNG, chunk(b"prVt", bytes(10_000_000))))
    for source, words in ((long, "run-length"), (scans, "too many scans"), (Image.open(tmp_path / "large.png"), "10 MB")):
        with pytest.raises(BadImage, match=words):
            decode_image(source)
    tiff_file = Image.open(io.BytesIO(encoded(Image.fromarray(NOISE), "TIFF")))
    with pytest.raises(BadImage, match=r"TIFF files are not read here.*image\.load\(\)"):
        decode_image(tiff_file)
    tiff_file.load()
    assert np.array_equal(decode_image(tiff_file), NOISE)


def test_a_later_frame_that_the_caller_chose():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        image = Image.open(io.BytesIO(encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)))
        assert decode_image(image).getpixel((0, 0)) == (255, 0, 0)
        image.seek(1)
        assert decode_image(image).getpixel((0, 0)) == (0, 255, 0)


# --- what costs nothing any more ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["JPEG", "PNG", "WEBP", "digits"])
def test_a_directory_that_names_the_same_bytes_a_thousand_times(where):
    exif = tiff(6, 4000, 60_000)
    digits = zlib.compress(b"\nexif\n9\n" + exif.hex().encode())
    data = {
        "JPEG": lambda: after_start(encoded(Image.fromarray(NOISE), "JPEG", quality=95), segment(0xE1, b"Exif\0\0" + exif)),
        "PNG": lambda: after_header(PNG, chunk(b"eXIf", exif + bytes(5_000_000))),
        "WEBP": lambda: webp(canvas(30, 20, 0x08), LOSSLESS[12:], riff(b"EXIF", exif)),
        "digits": lambda: after_header(PNG, chunk(b"zTXt", b"Raw profile type exif\0\0" + digits)),
    }[where]()  # fmt: skip
    picture = cheaply(data, megabytes=30)
    assert picture.size == TURNED.shape[1::-1]
    assert where == "JPEG" or np.array_equal(picture, TURNED)
    loaded = Image.open(io.BytesIO(PNG))
    loaded.load()
    loaded.info["exif"] = b"Exif\0\0" * 100_000 + exif
    memory = peak_mb()
    assert np.array_equal(decode_image(loaded), TURNED)
    assert peak_mb() - memory < 30


CHEAP = {
    "comments": before_frame(GIF, extension(0xFE, b"x" * 9_000_000)),
    "applications": before_frame(GIF, extension(0xFF, b"XMP DataXMP" + b"x" * 5_000_000)),
    "filling": after_start(JPEG, b"\xff" * 9_000_000),
    "restarts": after_start(JPEG, b"\xff\xd0" * 4_000_000),
    "profiles": after_start(JPEG, segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(90)) * 90_000),
    "EXIF in pieces": after_start(JPEG, segment(0xE1, b"Exif\0\0" + bytes(65_000)), segment(0xE1, b"Exif\0\0xx") * 90_000),
    "texts": after_header(PNG, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(1_000_000))) * 9000),
    "text": after_header(PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(9_000_000_0)))),
    "profile": after_header(PNG, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
    "pixels bit by bit": PNG[:33] + b"".join(chunk(b"IDAT", PNG[k : k + 1]) for k in range(41, len(PNG) - 16)) + PNG[-12:],
    "metadata behind": WEBP[:4] + webp(canvas(30, 20, 0x2C), WEBP[12:], riff(b"XMP ", b"tiff:Orientation" * 500_000))[4:],
}  # fmt: skip


@pytest.mark.parametrize("kind", CHEAP)
def test_what_no_pixel_depends_on_costs_nothing(kind):
    picture = cheaply(CHEAP[kind], megabytes=100)
    expected = decode_image({"GIF8": GIF, "\x89PNG": PNG, "RIFF": WEBP}.get(CHEAP[kind][:4].decode("latin-1"), JPEG))
    assert np.array_equal(picture, expected)


def animation(format: str, n_frames: int) -> bytes:
    """Its first frame is NOISE, or as much of it as the format keeps."""
    frames = [
        Image.fromarray(NOISE),
        *(Image.new("RGB", (30, 20), (number % 256, number // 256, 0)) for number in range(n_frames - 1)),
    ]
    options = {"lossless": True} if format == "WEBP" else {}
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_costs_as_much_as_its_first_frame(format):
    data = animation(format, 300)
    picture = cheaply(data)
    assert picture.info["warnings"] == [FIRST_FRAME]
    first = decode_image(encoded(Image.fromarray(NOISE), format, **({"lossless": True} if format == "WEBP" else {})))
    assert np.array_equal(picture, first)
    assert len(find_still(data).data) < 5000
    assert decode_image(animation(format, 1)).info["warnings"] == []


def test_frames_by_the_ten_thousand():
    control = b"!\xf9\x04\x0c\1\0\0\0"
    frame = control + b",\0\0\0\0\1\0\1\0\0\2\2L\1\0"
    assert cheaply(GIF[:-1] + frame * 25_000 + b";", megabytes=30).info["warnings"] == [FIRST_FRAME]
    still = encoded(Image.new("RGB", (2, 2), "red"), "WEBP", lossless=True)[12:]
    moving = webp(
        canvas(2, 2, 2), riff(b"ANIM", bytes(6)), riff(b"ANMF", bytes(6) + b"\1\0\0\1\0\0" + bytes(4) + still) * 25_000
    )
    picture = cheaply(moving, megabytes=30)
    assert (picture.getpixel((0, 0)), picture.info["warnings"]) == ((255, 0, 0), [FIRST_FRAME])


def test_an_animated_png_whose_picture_is_none_of_its_frames():
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 30, 20, 0, 0, 1, 1, 0, 0)) + chunk(
        b"fdAT", b"\0\0\0\1" + PNG[41:-16]
    )
    still_first = before_end(after_header(PNG, chunk(b"acTL", struct.pack(">II", 1, 0))), frame)
    for data, warnings in ((still_first, [FIRST_FRAME]), (before_end(PNG, frame), [])):
        picture = decode_image(data)
        assert np.array_equal(picture, NOISE) and picture.info["warnings"] == warnings
        assert decode_image(Image.open(io.BytesIO(data))).info["warnings"] == warnings


def test_further_pictures_in_a_jpeg_stay_behind():
    first = Image.fromarray(NOISE)
    data = encoded(first, "MPO", save_all=True, append_images=[Image.new("RGB", (500, 400), "red")] * 3)
    assert Image.open(io.BytesIO(data)).n_frames == 4
    picture = cheaply(data)
    assert np.array_equal(picture, decode_image(encoded(first, "JPEG"))) and picture.info["warnings"] == []
    assert np.array_equal(decode_image(Image.open(io.BytesIO(data))), picture)
    assert len(find_still(data).data) <= len(encoded(first, "JPEG"))


# --- what must still be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "options"), [("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {})])
def test_a_large_progressive_jpeg(mode, options):
    photo = Image.fromarray(NOISE).resize((6000, 4000), Image.Resampling.BICUBIC).convert(mode)
    data = encoded(photo, "JPEG", progressive=True, quality=85, **options)
    assert len(scans_of(data)) >= 6
    assert np.array_equal(cheaply(data, 3, 1000), Image.open(io.BytesIO(data)).convert("RGB"))


def test_run_lengths_show_their_colours():
    """From the lowest line up: a run and a row of pixels; a jump; nothing written to the line's end."""
    numbers = [[7, 0, 0, 0, 0, 0, 0], [0, 0, 0, 5, 5, 6, 0], [9, 9, 9, 9, 1, 2, 3]]
    data = bytes([4, 9, 0, 3, 1, 2, 3, 0, 0, 0, 0, 2, 3, 0, 2, 5, 1, 6, 0, 0, 1, 7, 0, 0, 0, 1])
    expected = [[(k, 0, 255 - k) for k in row] for row in numbers]
    assert np.asarray(decode_image(bmp(7, 3, data, compression=1))).tolist() == [[list(c) for c in row] for row in expected]
    four = bytes([4, 0x12, 3, 0x33, 0, 0, 0, 4, 0x45, 0x67, 3, 0x88, 0, 1])
    numbers = [[4, 5, 6, 7, 8, 8, 8], [1, 2, 1, 2, 3, 3, 3]]
    picture = np.asarray(decode_image(bmp(7, 2, four, compression=2, bits=4)))
    assert picture.tolist() == [[[k, 0, 255 - k] for k in row] for row in numbers]


def test_a_large_picture_of_run_lengths():
    rows = [bytes([255, k % 256]) * 15 + bytes([15, k % 256, 0, 0]) for k in range(2160)]
    picture = cheaply(bmp(3840, 2160, b"".join(rows) + b"\0\1", compression=1), 2, 300)
    assert np.array_equal(np.asarray(picture)[::-1, 0, 0], np.arange(2160) % 256)
    assert np.array_equal(np.asarray(picture)[:, -1, 2], 255 - np.asarray(picture)[:, 0, 0])


def test_an_interlaced_png():
    """Its seven passes, written by hand."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = (row for x, y, dx, dy in passes for row in NOISE[y::dy, x::dx] if row.size)
    header = PNG[16:28] + b"\1"
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    data = PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", pixels[:50]) + chunk(b"IDAT", pixels[50:]) + PNG[-12:]
    assert np.array_equal(decode_image(data), NOISE)
    flat = zlib.compress(bytes(5000 * (5000 * 4 + 1) + 6 * 5000))
    large = PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 5000, 5000, 8, 6, 0, 0, 1)) + chunk(b"IDAT", flat) + PNG[-12:]
    assert cheaply(large, 3, 1000).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", imagebounds.FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2000, 1600)])
def test_any_shape_is_read(format, size):
    picture = cheaply(encoded(Image.new("RGB", size, "navy"), format), 3, 1000)
    assert picture.size == size
    assert np.abs(np.asarray(fit_image(picture, 32), dtype=int) - (0, 0, 128)).max() <= 2


XMP_SEGMENT = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)
NAME, DIGITS = b"Raw profile type exif\0", b"\nexif\n26\n" + tiff(6).hex().encode()
ORIENTED = {
    "JPEG": after_start(encoded(Image.fromarray(NOISE), "JPEG"), segment(0xE1, b"Exif\0\0" + tiff(6))),
    "JPEG in pieces": after_start(JPEG, *(segment(0xE1, b"Exif\0\0" + piece) for piece in (tiff(6)[:15], tiff(6)[15:]))),
    "JPEG with XMP": after_start(JPEG, XMP_SEGMENT),
    "JPEG with both": after_start(JPEG, segment(0xE1, b"Exif\0\0" + tiff(None)), XMP_SEGMENT),
    "PNG": after_header(PNG, chunk(b"eXIf", tiff(6))),
    "PNG, behind": before_end(PNG, chunk(b"eXIf", tiff(6))),
    "PNG with digits": after_header(PNG, chunk(b"tEXt", NAME + DIGITS)),
    "PNG with digits, compressed": after_header(PNG, chunk(b"zTXt", NAME + b"\0" + zlib.compress(DIGITS))),
    "PNG with XMP": after_header(PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "PNG with XMP, compressed": before_end(PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0key\0" + zlib.compress(XMP))),
    "WebP": webp(canvas(30, 20, 0x08), WEBP[12:], riff(b"EXIF", tiff(6))),
    "WebP with XMP": webp(canvas(30, 20, 0x04), WEBP[12:], riff(b"XMP ", XMP)),
    "none": after_start(JPEG, segment(0xE1, b"Exif\0\0" + tiff(9)), XMP_SEGMENT),
    "none in WebP": webp(canvas(30, 20, 0), WEBP[12:], riff(b"EXIF", tiff(6))),
}  # fmt: skip


@pytest.mark.parametrize("kind", ORIENTED)
def test_the_cameras_rotation_is_found_where_pillow_finds_it(kind):
    from PIL import ImageOps

    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(ORIENTED[kind])))
    assert expected.size == ((30, 20) if kind.startswith("none") else (20, 30))
    loaded = Image.open(io.BytesIO(ORIENTED[kind]))
    loaded.load()
    for source in (ORIENTED[kind], loaded):
        assert np.array_equal(decode_image(source), expected.convert("RGB"))


def test_the_transparent_colour_of_a_gif_and_what_its_encoder_left_around_it():
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    for transparency, colour in ((1, (255, 255, 255)), (0, (200, 0, 0))):
        gif = before_frame(
            encoded(palette, "GIF", transparency=transparency), extension(0xFE, b"hello") + b"\0\0" + extension(0xFF, b"x")
        )
        assert decode_image(gif).getpixel((0, 0)) == colour
