"""Files of a form that is right, or nearly so, and of a size that is not: what `fuzz_images.py` does not find by damage.

Each kind takes dice and gives a file of up to 10 MB: parts repeated, sides of any length, run lengths, scans, frames, blocks
and metadata that name more than there is. A tenth of the files are as large as may be sent.
"""

import io
import math
import random
import struct
import zlib

from PIL import Image

MAX_BYTES = 10_000_000
PNG_MODES = [(0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 8), (4, 8), (4, 16), (6, 8), (6, 16)]
SIDES = (1, 1, 2, 63, 381, 4999, 5000, 16_383, 65_500, 65_501, 65_535, 25_000_000, 0xFFFFFF01, 0xFFFFFFFF)


def hostile(number: int, seed: int) -> tuple[str, bytes]:
    """The kind of file number `number`, and its bytes; kinds take turns."""
    kind = list(KINDS)[number % len(KINDS)]
    return kind, KINDS[kind](random.Random(f"{seed} {number}"))[:MAX_BYTES]


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def size_of(dice) -> tuple[int, int]:
    """Two sides: mostly of few pixels, one time in eight of 25 million, one time in eight of any number."""
    n = dice.randrange(8)
    if n == 0:
        return dice.choice(SIDES), dice.choice(SIDES)
    n_pixels = 25_000_000 if n == 1 else 10 ** dice.uniform(0, 6)
    width = round(math.sqrt(n_pixels) * dice.choice((0.1, 1, 1, 10)))
    return max(1, width), max(1, int(n_pixels / max(1, width)))


def times(dice, n_bytes: int) -> int:
    """How often something of n_bytes is repeated: up to 10 MB of it."""
    most = MAX_BYTES // max(1, n_bytes)
    return most if dice.random() < 0.1 else int(most ** dice.random())


def exif(dice) -> bytes:
    """Directories of up to 65,535 entries that name the same bytes, each other, or what is not there."""
    n = int(65_535 ** dice.random())
    length = dice.choice((1, 8, 1000, 60_000, 1_000_000, 9_000_000))
    entry = struct.pack("<HHLL", dice.choice((270, 274, 330, 34665)), dice.choice((1, 2, 3, 4, 5, 7, 13)), length, 8)
    entries = entry * n
    if dice.random() < 0.5:  # each under a name of its own
        entries = b"".join(struct.pack("<H", tag) + entry[2:] for tag in range(n))
    orientation = struct.pack("<HHLL", 274, 3, 1, dice.randrange(10))
    head = b"II*\0" + struct.pack("<LH", 8, min(65_535, n + 1))
    return b"Exif\0\0" * dice.choice((1, 1, 1, 1000)) + head + entries + orientation + bytes(dice.choice((4, length)))


def xmp(dice) -> bytes:
    return dice.choice((b"tiff:Orientation", b'tiff:Orientation="', b"<", b'tiff:Orientation="6"')) * times(dice, 18)


# --- JPEG --------------------------------------------------------------------------------------------------------


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", min(65_535, len(body) + 2)) + body[:65_533]


def jpeg(width, height, n_components, sof, scans, before=b"", after=b"", samplings=b"\x11" * 4) -> bytes:
    """scans: (components, first and last coefficient, successive bits, data)."""
    components = b"".join(bytes([k + 1, samplings[k], 0]) for k in range(n_components))
    frame = struct.pack(">BHHB", 8, height & 0xFFFF, width & 0xFFFF, n_components) + components
    table = b"".join(
        segment(0xC4, name + b"\1\1" + bytes(14) + symbols) for name, symbols in ((b"\0", b"\0\1"), (b"\x10", b"\0\xe0"))
    )
    parts = [b"\xff\xd8", segment(0xDB, b"\0" + b"\1" * 64), before, segment(sof, frame), table]
    for used, first, last, bits, data in scans:
        names = b"".join(bytes([k + 1, 0]) for k in used)
        parts.append(segment(0xDA, bytes([len(used)]) + names + bytes([first, last, bits])) + data)
    return b"".join([*parts, after, b"\xff\xd9"])


def jpeg_scans(dice) -> bytes:
    """Scans by the thousand, of hardly a byte each or of many, in any process that a frame's marker may name."""
    n = dice.choice((1, 3, 3, 4))
    sof = dice.choice((0xC0, 0xC1, 0xC2, 0xC2, 0xC2, 0xC3, 0xC9, 0xCA))
    data = dice.randbytes(dice.choice((0, 1, 30, 1000, 100_000))).replace(b"\xff", b"\0")
    if sof in (0xC2, 0xCA):
        kinds = [(0, 0, 1), (0, 0, 16), *((k, 63, bits) for k in (1, 6) for bits in (0, 1, 33, 16))]
        first, last, bits = dice.choice(kinds)
        used = range(n) if first == 0 else [dice.randrange(n)]
        scans = [(range(n), 0, 0, 1, b""), *[(used, first, last, bits, data)] * times(dice, len(data) + 10)]
    else:
        first, last = (1, 0) if sof == 0xC3 else (0, 63)
        used = range(n) if dice.random() < 0.5 else [dice.randrange(n)]
        scans = [(used, first, last, 0, data)] * times(dice, len(data) + 10)
    samplings = [dice.choice((0x11, 0x11, 0x11, 0x21, 0x22, 0x41, 0x14, 0x31)) for _ in range(n)]
    return jpeg(*size_of(dice), n, sof, scans, samplings=samplings)


def jpeg_repeated(dice) -> bytes:
    """A real progressive picture, one of its scans again and again."""
    size, mode = dice.choice(((5000, 5000), (3000, 2000), (100, 100))), dice.choice(("L", "RGB", "CMYK"))
    data = encoded(Image.new(mode, size, 99 if mode == "L" else (9, 99, 199, 99)[: len(mode)]), "JPEG", progressive=True)
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"] + [len(data) - 2]
    number = dice.randrange(len(starts) - 1)
    scan = data[starts[number] : starts[number + 1]]
    return data[:-2] + scan * times(dice, len(scan)) + data[-2:]


def jpeg_segments(dice) -> bytes:
    marker = dice.choice((0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xD0, 0x01, 0xC0, 0xFF, 0x00))
    body = dice.choice(
        (
            b"",
            b"x",
            b"Exif\0\0",
            b"ICC_PROFILE\0\1\1",
            b"8BIM" * 20,
            b"Photoshop 3.0\0" + b"8BIM\0\0\0\0" * 99,
            bytes(65_533),
        )
    )
    part = b"\xff" + bytes([marker]) if marker in (0xD0, 0x01, 0xFF, 0x00) else segment(marker, body)
    many = part * times(dice, len(part))
    before, after = (many, b"") if dice.random() < 0.5 else (b"", many)
    return jpeg(*size_of(dice), 3, 0xC0, [(range(3), 0, 63, 0, b"")], before, after)


def jpeg_metadata(dice) -> bytes:
    data = exif(dice)
    parts = [segment(0xE1, b"Exif\0\0" + data[k : k + 65_527]) for k in range(0, len(data), 65_527)]
    text = xmp(dice)[:65_000]
    parts.append(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text) * dice.choice((1, 100)))
    n = int(65_535 ** dice.random())
    index = b"MPF\0II*\0" + struct.pack("<LH", 8, 2)
    index += struct.pack("<HHLL", 0xB001, 4, 1, n) + struct.pack("<HHLL", 0xB002, 7, 16 * n, 38) + bytes(4)
    parts.append(segment(0xE2, index + bytes(16 * min(n, 4000))))
    picture = jpeg(*size_of(dice), 1, 0xC0, [(range(1), 0, 63, 0, b"")], b"".join(parts))
    return picture * times(dice, len(picture)) if dice.random() < 0.3 else picture


# --- PNG ---------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(dice, before=b"", after=b"", pixels=None) -> bytes:
    (width, height), (colour, depth) = size_of(dice), dice.choice(PNG_MODES)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, dice.random() < 0.3)
    if pixels is None:
        n_bytes = (width * depth * channels + 7) // 8
        n_rows = height
        if n_bytes * height > 250_000_000:  # and so too large
            n_bytes = n_rows = 1
        row = bytes([dice.randrange(5)]) + bytes(n_bytes)
        together, compressor = max(1, 100_000 // len(row)), zlib.compressobj(1)
        data = b"".join(compressor.compress(row * together) for _ in range(-(-n_rows // together)))
        pixels = chunk(b"IDAT", data + compressor.flush())
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + before + pixels + after + chunk(b"IEND", b"")


def png_chunks(dice) -> bytes:
    kind = dice.choice(
        (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"gAMA", b"IDAT", b"prVt", b"sBIT", b"acTL")
    )
    part = chunk(kind, dice.choice((b"", b"a\0", b"a\0\0\0\0\0", bytes(8), b"exif\0", bytes(256), b"\xff" * 100_000)))
    many = part * times(dice, len(part))
    return png(dice, many) if dice.random() < 0.5 else png(dice, b"", many)


def png_texts(dice) -> bytes:
    """Texts that unpack to a thousand times their size, under names that are looked for and others."""
    bomb = zlib.compress(dice.choice((b"\n\n\n", b"", xmp(dice)[:1000])) + b"0" * int(10 ** dice.uniform(2, 7)), 9)
    name = dice.choice((b"Raw profile type exif", b"XML:com.adobe.xmp", b"comment", b"exif", b"transparency"))
    part = dice.choice((
        chunk(b"zTXt", name + b"\0\0" + bomb), chunk(b"iTXt", name + b"\0\1\0\0\0" + bomb),
        chunk(b"iCCP", name + b"\0\0" + bomb),
        chunk(b"eXIf", exif(dice)[6:]), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(dice)),
        chunk(b"tEXt", b"Raw profile type exif\0\n\n\n" + exif(dice).hex().encode()),
    ))  # fmt: skip
    return png(dice, part * times(dice, len(part)))


def png_frames(dice) -> bytes:
    n, parts = times(dice, 100), [chunk(b"acTL", struct.pack(">II", dice.choice((0, 1, 1000, 0xFFFFFFFF)), 0))]
    for number in range(min(n, 20_000)):
        control = struct.pack(">IIIIIHHBB", number, 1, 1, 0, 0, 1, 1, dice.randrange(3), dice.randrange(2))
        parts.append(chunk(b"fcTL", control) + chunk(b"fdAT", struct.pack(">I", number) + b"x"))
    return png(dice, parts[0] + parts[-1][:38], b"".join(parts[1:]))


def png_pixels(dice) -> bytes:
    """Pixels in chunks of few bytes, or in compressed blocks that hold nothing."""
    if dice.random() < 0.5:
        data = zlib.compress(bytes(int(10 ** dice.uniform(1, 7))), dice.choice((0, 1)))
        step = dice.choice((1, 1, 10, 1000))
        return png(
            dice, pixels=b"".join(chunk(b"IDAT", data[k : k + step]) for k in range(0, min(len(data), 300_000), step))
        )
    empty = dice.choice((b"\0\0\0\xff\xff", bytes.fromhex("0480e0ffff") + dice.randbytes(8), b"\x02\0\0\0\xff\xff"))
    return png(dice, pixels=chunk(b"IDAT", b"\x78\x01" + empty * times(dice, len(empty))))


# --- GIF ---------------------------------------------------------------------------------------------------------


def blocks(data: bytes, size: int = 255) -> bytes:
    return b"".join(bytes([len(data[k : k + size])]) + data[k : k + size] for k in range(0, len(data), size)) + b"\0"


def gif_frame(dice, width: int, height: int) -> bytes:
    """Its pixels are codes of any value, or nothing but codes that start anew."""
    size = dice.randrange(2, 9)
    data = dice.choice((b"", b"\0", bytes(1000), dice.randbytes(100_000), bytes([1 << min(7, size)]) * times(dice, 1)))
    sides = struct.pack("<HHHHB", 0, 0, width & 0xFFFF, height & 0xFFFF, dice.choice((0, 0x40, 0x80)))
    return b"," + sides + bytes(6 if sides[-1] == 0x80 else 0) + bytes([size]) + blocks(data, dice.choice((1, 2, 255, 255)))


def gif(dice, before=b"", after=b"") -> bytes:
    width, height = size_of(dice)
    if dice.random() < 0.6:
        size = min(width, 65_500), min(height, 65_500, 25_000_000 // min(width, 65_500))
        whole = encoded(Image.new("P", size, 3), "GIF", interlace=dice.randrange(2))
        start = whole.index(b",", 13)
        return whole[:start] + before + whole[start:-1] + after + b";"
    screen = struct.pack(
        "<HHBBB",
        *(dice.choice((side & 0xFFFF,) * 5 + (1, 65_535)) for side in (width, height)),
        dice.choice((0, 0xF7)),
        0,
        0,
    )
    return b"GIF89a" + screen + bytes(768 if screen[4] else 0) + before + gif_frame(dice, width, height) + after + b";"


def gif_frames(dice) -> bytes:
    control = b"!\xf9\x04" + bytes([dice.randrange(32)]) + b"\1\0\0\0"
    frame = control + b"," + struct.pack("<HHHHB", 0, 0, *(dice.choice((1, 100, 5000)) for _ in range(2)), 0) + b"\2\1\0\0"
    return gif(dice, control, frame * times(dice, len(frame)))


def gif_blocks(dice) -> bytes:
    label = dice.choice((0xF9, 0xFE, 0xFE, 0xFF, 0x01, 0x77))
    content = dice.choice((b"", b"\4\1\1\1\1", b"NETSCAPE2.0\3\1\0\0", bytes(times(dice, 1))))
    part = b"!" + bytes([label]) + blocks(content, dice.choice((1, 255)))
    many = dice.choice((part * times(dice, len(part)), bytes(times(dice, 1)), b"!" * times(dice, 1)))
    return gif(dice, many) if dice.random() < 0.5 else gif(dice, b"", many)


# --- WebP --------------------------------------------------------------------------------------------------------


def riff(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def webp(*chunks: bytes) -> bytes:
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def canvas(flags: int, width: int, height: int) -> bytes:
    return riff(
        b"VP8X",
        bytes([flags, 0, 0, 0]) + b"".join(((side - 1) & 0xFFFFFF).to_bytes(3, "little") for side in (width, height)),
    )


def lossless(dice, width: int, height: int) -> bytes:
    """A picture without loss: pixels of no bits, or up to 65,536 groups of codes, each with tables of its own."""
    bits = []

    def put(value: int, n: int):
        bits.append(format(value, f"0{n}b")[::-1][:n])

    def one_symbol():
        put(0b1, 1), put(0, 1), put(0, 1), put(0, 1)  # a simple code, one symbol, of one bit: 0

    def all_symbols(n_zeros: int):
        """256 codes of 8 bits: the lengths 8 and, for more symbols, 0 (of 11 to 138) have codes of one bit."""
        put(0, 1), put(12 - 4, 4)
        for symbol in (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8):
            put(1 if symbol == 8 or symbol == 18 else 0, 3)
        put(0, 1), bits.append("0" * 256)
        if n_zeros:
            put(1, 1), put(n_zeros - 11, 7)

    (
        put(0x2F, 8),
        put(min(width, 16_384) - 1, 14),
        put(min(height, 16_384) - 1, 14),
        put(0, 1),
        put(0, 3),
        put(0, 1),
        put(0, 1),
    )
    groups = dice.choice((1, 1, 1000, 65_536))
    put(groups > 1, 1)
    if groups > 1:
        shift = dice.choice((2, 2, 5, 9))
        n = math.prod((min(side, 16_384) + (1 << shift) - 1) >> shift for side in (width, height))
        groups = min(groups, n)
        put(shift - 2, 3), put(0, 1), all_symbols(24), all_symbols(0), one_symbol(), one_symbol(), one_symbol()
        for k in range(n):
            number = min(k, groups - 1)
            bits.append(format(number & 255, "08b") + format(number >> 8, "08b"))
    bits.append("1000" * 5 * groups)
    text = "".join(bits)
    text += "0" * (-len(text) % 8 + 64)
    return riff(b"VP8L", int(text[::-1], 2).to_bytes(len(text) // 8, "little"))


def webp_frames(dice) -> bytes:
    width, height = size_of(dice)
    image = lossless(dice, 1, 1) if dice.random() < 0.8 else lossless(dice, min(width, 5000), min(height, 5000))
    frame = riff(b"ANMF", bytes(6) + bytes(6) + bytes(4) + image)
    return webp(
        canvas(0x02 | dice.choice((0, 0x10)), width, height), riff(b"ANIM", bytes(6)), frame * times(dice, len(frame))
    )


def webp_chunks(dice) -> bytes:
    width, height = (min(side, 16_383) for side in size_of(dice))
    kind = dice.choice((b"EXIF", b"XMP ", b"ICCP", b"ALPH", b"VP8X", b"junk", b"ANMF", b"VP8L"))
    part = riff(kind, dice.choice((b"", bytes(10), exif(dice), xmp(dice))))
    many = part * times(dice, len(part))
    chunks = [canvas(dice.choice((0, 0x3C, 0x2E)), width, height), lossless(dice, width, height)]
    chunks.insert(dice.randrange(3), many)
    return webp(*chunks)


def webp_lossless(dice) -> bytes:
    return webp(lossless(dice, *size_of(dice)))


def webp_lossy(dice) -> bytes:
    width, height = size_of(dice)
    if dice.random() < 0.3:
        return encoded(
            Image.new("RGBA", (min(width, 5000), min(height, 5000)), (1, 2, 3, 4)),
            "WEBP",
            method=0,
            quality=dice.randrange(101),
        )
    start = (
        (dice.randrange(1 << 19) << 5 | 0x10).to_bytes(3, "little")
        + b"\x9d\x01\x2a"
        + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    )
    return webp(riff(b"VP8 ", start + dice.choice((dice.randbytes(1000), bytes(100_000), dice.randbytes(1_000_000)))))


# --- BMP ---------------------------------------------------------------------------------------------------------


def bmp(dice, compression: int, bits: int, data: bytes, width: int, height: int) -> bytes:
    palette = bytes(dice.choice((0, 4, 1024)))
    kind = dice.choice((12, 40, 40, 40, 40, 64, 108, 124, 16, 0xFFFFFFFF))
    if kind == 12:
        header = struct.pack("<IHHHH", 12, width & 0xFFFF, height & 0xFFFF, 1, bits)
    else:
        colours = dice.choice((0, 0, 0, 2, 256, 65_536, 0xFFFFFFFF))
        sides = (width & 0xFFFFFFFF, (dice.choice((1, 1, -1)) * height) & 0xFFFFFFFF)
        header = struct.pack("<IIIHHIIIIII", kind, *sides, 1, bits, compression, len(data), 0, 0, colours, 0)
        header += bytes(max(0, min(kind, 124) - 40))
    offset = dice.choice((14 + len(header) + len(palette),) * 6 + (0, 0xFFFFFFFF))
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, offset) + header + palette + data


def bmp_runs(dice) -> bytes:
    """Runs of one pixel or many, ends of lines, and jumps over what nobody wrote."""
    width, height = size_of(dice)
    part = dice.choice(
        (
            b"\0\0",
            b"\1\0",
            b"\1\7",
            b"\1\7\0\0",
            b"\xff\x12",
            b"\0\2\xff\xff",
            b"\0\2\0\0",
            b"\0\2\0\1",
            b"\0\x03abc\0",
            b"\0\xfc" + bytes(252),
        )
    )
    ending = dice.choice((b"", b"\0\1", b"\0\2\xff\xff\0\1"))
    eight = dice.random() < 0.5
    return bmp(dice, 1 if eight else 2, 8 if eight else 4, part * times(dice, len(part)) + ending, width, height)


def bmp_sizes(dice) -> bytes:
    width, height = size_of(dice)
    return bmp(
        dice,
        dice.choice((0, 0, 0, 1, 3, 4, 5)),
        dice.choice((1, 4, 8, 16, 24, 32, 2, 0)),
        bytes(times(dice, 1)),
        width,
        height,
    )


KINDS = {
    function.__name__.replace("_", " "): function
    for function in (
        jpeg_scans, jpeg_repeated, jpeg_segments, jpeg_metadata, png_chunks, png_texts, png_frames, png_pixels, png,
        gif_frames, gif_blocks, gif, webp_frames, webp_chunks, webp_lossless, webp_lossy, bmp_runs, bmp_sizes,
    )
}  # fmt: skip
