"""The first picture of a file and nothing else of it, found by the file's structure before a decoder sees anything.

Files hold much that no pixel depends on: further frames, comments, text, colour profiles, previews. Pillow reads it all the
same, and some of it takes time or memory out of proportion to its bytes. So each format's parts are walked here once, what
the pixels depend on is copied, and the rest stays behind. That bounds the work by the bytes and pixels; where it does not
(scans and run lengths make much of few bytes), the work is counted, and what would be too much is refused.
"""

import re
import struct
import zlib
from typing import NamedTuple

from cifar_fastai.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 25_000_000
MAX_SIDE = 65_500  # the longest that libjpeg takes; WebP ends at 16,383
MAX_PARTS = 100_000  # 10 MB of PNG in libpng's chunks have 1,200, of GIF in full blocks 40,000
# A scan costs about 50 ns for each block of 8 x 8 pixels and component, even if it has no more bytes than its header. The
# usual 10 scans are 5.5 million blocks of a colour picture of 25 megapixels, and 9.4 million of one in CMYK.
MAX_BLOCKS = 15_000_000
# Other blocks cost a multiple of that: each of 64 samples is decoded by itself; up to 20 decisions about each of 64
# coefficients take next to no bytes.
LOSSLESS, ARITHMETIC = 8, 64
# Pillow's decoder of run lengths is written in Python and takes up to 0.2 µs a pixel and a byte: 1.8 s.
MAX_RUN_LENGTHS = 9_000_000  # pixels and bytes together: a screen of 3840 x 2160 fits in
MAX_TEXT = 1_000_000  # bytes that a compressed text of a PNG is unpacked to, as Pillow has it

TOO_MANY_PIXELS = f"The image has more than {MAX_PIXELS // 1_000_000} megapixels."
TOO_LONG = f"The image is more than {MAX_SIDE:,} pixels wide or high."
TOO_MANY_PARTS = f"The file consists of more than {MAX_PARTS:,} parts. Save the image anew."
TOO_MANY_SCANS = "The JPEG has too many scans for its size. Save it with the usual settings."
TOO_MUCH_RUN_LENGTH = "A BMP of this size is read only without run-length compression. Save it as PNG."
NO_FORMAT = f"Not an image in a format that is read here ({', '.join(FORMATS)})."


class BadImage(UserError):
    """Not an image that can be read; the message says why, in words fit to show anybody."""


class Still(NamedTuple):
    """A file of one picture and no metadata."""

    format: str  # Pillow's name of it
    data: bytes
    orientation: int = 1  # as EXIF counts them
    animated: bool = False  # whether further frames were left behind


def find_still(data: bytes) -> Still:
    """The first picture of a file. What is damaged may pass, and fail in the decoder. Raises BadImage over what is in no
    format that is read here, or would take too long or too much memory to decode."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _gif(data)
        if data.startswith(b"BM"):
            return _bmp(data)
    except (struct.error, IndexError):
        raise BadImage("The image is damaged (it is cut short).") from None
    raise BadImage(NO_FORMAT)


def check_size(width: int, height: int) -> None:
    """Raises BadImage if there are more pixels, altogether or in a line, than are read."""
    if width * height > MAX_PIXELS:
        raise BadImage(TOO_MANY_PIXELS)
    if max(width, height) > MAX_SIDE:
        raise BadImage(TOO_LONG)


class _Parts:
    """Counts the parts of a file."""

    n = 0

    def count(self) -> None:
        self.n += 1
        if self.n > MAX_PARTS:
            raise BadImage(TOO_MANY_PARTS)


# --- JPEG --------------------------------------------------------------------------------------------------------

# Those at which libjpeg stops to look. Others may stand within a scan, where they are restarts, data, or skipped.
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
SOI, EOI, SOS, APP0, APP1, APP14, APP15, COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
XMP = b"http://ns.adobe.com/xap/1.0/\0"


def _jpeg(data: bytes) -> Still:
    """To its end of image, where the further pictures of an MPO begin, without comments and the applications' segments;
    those that tell of the colour space stay."""
    parts, kept, exif, xmp = _Parts(), [data[:2]], [], b""
    n_blocks = work = 0  # of a component; of all scans
    cost, place = 1, 2
    while found := MARKER.search(data, place):
        parts.count()
        start, marker = found.start(), data[found.start() + 1]
        if marker == EOI:
            kept.append(data[start : start + 2])
            break
        place = start + 2
        if marker != SOI:
            place += max(2, *struct.unpack_from(">H", data, place))
        body = data[start + 4 : place]
        if marker in FRAMES:
            if n_blocks:
                raise BadImage("The image is damaged (it has two headers).")
            height, width = struct.unpack_from(">HH", body, 1)
            check_size(width, height)
            n_blocks = -(-width // 8) * -(-height // 8)
            cost = ARITHMETIC if marker >= 0xC9 else LOSSLESS if marker in (0xC3, 0xC7) else 1
        elif marker == SOS:
            work += n_blocks * body[0] * cost
            if work > MAX_BLOCKS:
                raise BadImage(TOO_MANY_SCANS)
            following = MARKER.search(data, place)
            place = following.start() if following else len(data)
        elif marker == APP1 and not work:  # Pillow looks no further than to the first scan
            if body.startswith(b"Exif\0\0"):
                exif.append(body[6:] if exif else body)
            elif body.startswith(XMP):
                xmp = body[len(XMP) :]
        if not (APP0 < marker <= APP15 or marker == COM) or marker == APP14:
            kept.append(data[start:place])
    return Still("JPEG", b"".join(kept), orientation(b"".join(exif), xmp))


# --- PNG ---------------------------------------------------------------------------------------------------------

IEND = bytes.fromhex("0000000049454e44ae426082")


def _png(data: bytes) -> Still:
    """The chunks IHDR, PLTE, tRNS and the first row of IDAT: of an animation the picture that everybody sees."""
    parts, kept, place = _Parts(), [data[:8]], 8
    exif, texts, n_frames, n_frame_headers, n_data, within = b"", {}, [], 0, 0, True
    while place + 8 <= len(data):
        parts.count()
        length, kind = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        body, place = chunk[8 : 8 + length], place + 12 + length
        if kind == b"IDAT":
            n_data += within
            if within:
                kept.append(chunk)
            continue
        within = not n_data
        if kind in (b"IHDR", b"PLTE", b"tRNS") and within:
            if kind == b"IHDR":
                check_size(*struct.unpack_from(">II", body))
            kept.append(chunk)
        elif kind == b"acTL" and within:
            n_frames.append(int.from_bytes(body[:4], "big"))
        elif kind == b"fcTL" and within:
            n_frame_headers += 1
        elif kind == b"eXIf":
            exif = body
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            texts[body[:80].partition(b"\0")[0]] = kind, body
        elif kind == b"IEND" or not kind.isalpha():
            break
    if not exif and b"Raw profile type exif" in texts:
        exif = hexadecimal(_png_text(*texts[b"Raw profile type exif"]))
    xmp = _png_text(*texts[b"XML:com.adobe.xmp"]) if b"XML:com.adobe.xmp" in texts else b""
    # Where no frame's header comes before it, the picture is none of the frames.
    animated = len(n_frames) == 1 and 0 < n_frames[0] <= 1 << 31 and n_frames[0] + (not n_frame_headers) > 1
    if place <= len(data):  # else it is cut short, and its end would be read as pixels
        kept.append(IEND)
    return Still("PNG", b"".join(kept), orientation(exif, xmp), animated)


def _png_text(kind: bytes, body: bytes) -> bytes:
    text = body.partition(b"\0")[2]
    compressed = kind == b"zTXt"
    if compressed:
        text = text[1:]
    elif kind == b"iTXt":
        compressed, (*_, text) = text[:1] == b"\1", text[2:].split(b"\0", 2)
    if not compressed:
        return text
    try:
        return zlib.decompressobj().decompress(text, MAX_TEXT)
    except zlib.error:
        return b""


def hexadecimal(text: bytes) -> bytes:
    """What ImageMagick writes as text: three lines about it, then its digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


# --- GIF ---------------------------------------------------------------------------------------------------------

INTRODUCER = re.compile(rb"[!,;]")  # of an extension, a frame, the end


def _gif(data: bytes) -> Still:
    """The screen, the first frame, and which of its colours is transparent."""
    parts = _Parts()
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + _palette_bytes(flags)
    start, transparency = _next_frame(data, place, parts)
    if start is None:
        raise BadImage("The image is damaged (there is no frame in it).")
    left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, start + 1)
    check_size(max(width, left + frame_width), max(height, top + frame_height))  # as Pillow widens the screen
    end = _past_blocks(data, start + 11 + _palette_bytes(flags), parts)
    kept = data[:place] + transparency + data[start:end]
    if end > len(data):
        return Still("GIF", kept)
    return Still("GIF", kept + b";", animated=_next_frame(data, end, parts)[0] is not None)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _next_frame(data: bytes, place: int, parts: _Parts) -> tuple[int | None, bytes]:
    """Where the next frame begins, and the extension before it that makes one of its colours transparent."""
    transparency = b""
    while found := INTRODUCER.search(data, place):
        parts.count()
        start = found.start()
        if found[0] == b";":
            break
        if found[0] == b",":
            return start, transparency
        place = _past_blocks(data, start + 2, parts)
        extension = data[start:place]
        if extension[1:2] == b"\xf9" and len(extension) > 4 and extension[3] & 1:
            transparency = extension
    return None, transparency


def _past_blocks(data: bytes, place: int, parts: _Parts) -> int:
    """Where a row of blocks, each with its length before it, has ended with one of no length; behind the file if it has
    not."""
    while place < len(data) and data[place]:
        parts.count()
        place += data[place] + 1
    return place + 1


# --- WebP --------------------------------------------------------------------------------------------------------

IN_EXIF, IN_XMP, ANIMATION = 0x08, 0x04, 0x02  # flags of VP8X
METADATA = 0x20 | IN_EXIF | IN_XMP


def _webp(data: bytes) -> Still:
    """The canvas and the first frame."""
    parts, kept, flags, n_frames, exif, xmp = _Parts(), [], 0, 0, b"", b""
    place, end = 12, min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])
    while place + 8 <= end:
        parts.count()
        kind, length = struct.unpack_from("<4sI", data, place)
        chunk, place = data[place : min(end, place + 8 + length + length % 2)], place + 8 + length + length % 2
        if kind == b"VP8X":
            flags = chunk[8]
            check_size(*(1 + int.from_bytes(chunk[k : k + 3], "little") for k in (12, 15)))
            kept.append(chunk[:8] + bytes([flags & ~METADATA]) + chunk[9:])
        elif kind in (b"ANIM", b"ALPH"):
            kept.append(chunk)
        elif kind in (b"ANMF", b"VP8 ", b"VP8L"):
            n_frames += 1
            if n_frames > 1:
                continue
            kept.append(chunk)
            if kind == b"VP8L":
                (sides,) = struct.unpack_from("<I", chunk, 9)
                check_size((sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1)
            elif kind == b"VP8 ":
                check_size(*(side & 0x3FFF for side in struct.unpack_from("<HH", chunk, 14)))
        elif kind == b"EXIF" and flags & IN_EXIF:
            exif = exif or chunk[8 : 8 + length]
        elif kind == b"XMP " and flags & IN_XMP:
            xmp = xmp or chunk[8 : 8 + length]
    content = b"WEBP" + b"".join(kept)
    animated = bool(flags & ANIMATION) and n_frames > 1
    return Still("WEBP", b"RIFF" + struct.pack("<I", len(content)) + content, orientation(exif, xmp), animated)


# --- BMP ---------------------------------------------------------------------------------------------------------

RLE8, RLE4 = 1, 2


def _bmp(data: bytes) -> Still:
    """All of it: there is nothing else in a BMP."""
    pixels_at, header_bytes = struct.unpack_from("<II", data, 10)
    if header_bytes == 12:
        check_size(*struct.unpack_from("<HH", data, 18))
        return Still("BMP", data)
    width, height, compression = struct.unpack_from("<II4xI", data, 18)
    if height >= 0xFF000000:  # where Pillow takes it for a negative number, of a picture that begins at its top
        height = (1 << 32) - height
    check_size(width, height)
    if compression in (RLE8, RLE4) and width * height + max(0, len(data) - pixels_at) > MAX_RUN_LENGTHS:
        raise BadImage(TOO_MUCH_RUN_LENGTH)
    return Still("BMP", data)


# --- metadata ----------------------------------------------------------------------------------------------------

ORIENTATION, SHORT, LONG = 274, 3, 4
IN_TEXT = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """How the camera was held, from 1 to 8, as EXIF counts; other numbers mean nothing. XMP is asked where EXIF is silent.

    No more of EXIF is read: Pillow copies each value that a directory names, and thousands of them may name the same
    megabytes.
    """
    start = 0
    while exif.startswith(b"Exif\0\0", start):
        start += 6
    order = ">" if exif.startswith(b"MM", start) else "<"
    try:
        directory = start + struct.unpack_from(order + "L", exif, start + 4)[0]
        for n in range(*struct.unpack_from(order + "H", exif, directory)):
            tag, kind, _ = struct.unpack_from(order + "HHL", exif, directory + 2 + 12 * n)
            if tag == ORIENTATION and kind in (SHORT, LONG):
                return struct.unpack_from(order + ("H" if kind == SHORT else "L"), exif, directory + 10 + 12 * n)[0]
    except struct.error:  # there is no EXIF, or not all of it
        pass
    found = IN_TEXT.search(xmp)
    return int(found[1]) if found else 1
