"""What visitors send: archives opened within limits, whatever they claim about themselves."""

import io
import stat
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from cifar_fastai import uploads
from cifar_fastai.images import MAX_BYTES, BadImage
from cifar_fastai.uploads import TooMany, find_uploads


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def archive(path, members: dict[str, bytes], method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def reason(upload) -> str:
    with pytest.raises(BadImage) as caught:
        upload.read()
    return str(caught.value)


def test_files_and_the_members_of_archives_in_their_order(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("day 1/x.png", picture())
        file.mkdir("day 2")
        file.writestr("../../y.png", picture()[:50])
        for hidden in (link, "__MACOSX/._x.png", ".DS_Store", "day 1/.thumbs/x.png"):
            file.writestr(hidden, b"/etc/passwd")
    found = find_uploads([("b.zip", tmp_path / "b.zip"), ("holiday.png", tmp_path / "a.png")])
    assert [upload.name for upload in found] == ["b.zip/day 1/x.png", "b.zip/../../y.png", "holiday.png"]
    assert [upload.read() for upload in found] == [picture(), picture()[:50], picture()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.zip"], "nothing is unpacked"


def test_an_archive_is_known_by_its_content(tmp_path):
    path = archive(tmp_path / "photo.png", {"x.png": picture()})
    assert [upload.name for upload in find_uploads([("photo.png", path)])] == ["photo.png/x.png"]
    path.write_bytes(picture())
    assert [upload.name for upload in find_uploads([("photo.zip", path)])] == ["photo.zip"]


def test_archives_in_archives_stay_closed(tmp_path):
    inner = archive(tmp_path / "inner.zip", {"x.png": picture()}).read_bytes()
    (upload,) = find_uploads([("outer.zip", archive(tmp_path / "outer.zip", {"inner.ZIP": inner}))])
    assert reason(upload) == "An archive within an archive is not opened."


def test_members_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    path = archive(tmp_path / "a.zip", {"says so.png": bytes(1001), "just not.png": bytes(1000)})
    honest, largest = find_uploads([("a.zip", path)])
    assert reason(honest) == "The file is larger than 10 MB." and len(largest.read()) == 1000
    data = path.read_bytes()
    path.write_bytes(data.replace((1001).to_bytes(4, "little"), (7).to_bytes(4, "little")))  # in both of its headers
    liar, _ = find_uploads([("a.zip", path)])
    assert len(reason(liar)) > 0


def test_what_comes_out_of_archives_in_all(tmp_path, monkeypatch):
    """A megabyte compresses to a thousandth; the room is shared by all archives of an upload."""
    monkeypatch.setattr(uploads, "MAX_REQUEST_BYTES", 3_000_000)
    paths = [archive(tmp_path / f"{n}.zip", {f"{k}.bmp": bytes(1_000_000) for k in range(3)}) for n in range(2)]
    assert sum(path.stat().st_size for path in paths) < 10_000
    found = find_uploads([(path.name, path) for path in paths])
    assert [len(upload.read()) for upload in found[:3]] == [1_000_000] * 3
    for upload in found[3:]:
        assert reason(upload) == "Left out: more than 3 MB come out of the archives."
    assert [len(upload.read()) for upload in find_uploads([("0.zip", paths[0])])] == [1_000_000] * 3, (
        "the next has room again"
    )


def test_members_that_turn_out_to_be_damaged_count_too(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_REQUEST_BYTES", 3_000_000)
    path = archive(tmp_path / "a.zip", {f"{k}.bmp": bytes(1_000_000) for k in range(9)})
    data, sum_of_zeros = path.read_bytes(), zlib.crc32(bytes(1_000_000)).to_bytes(4, "little")
    path.write_bytes(data.replace(sum_of_zeros, b"\0\0\0\0"))
    reasons = [reason(upload) for upload in find_uploads([("a.zip", path)])]
    assert ["Bad CRC" in each for each in reasons] == [True] * 3 + [False] * 6
    assert all("more than 3 MB" in each for each in reasons[3:])


def test_too_many_archives(tmp_path):
    path = archive(tmp_path / "a.zip", {"x.png": b"x"})
    assert len(find_uploads([("a.zip", path)] * 50)) == 50
    with pytest.raises(TooMany, match="more than 50 archives"):
        find_uploads([("a.zip", path)] * 51)


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_FILES", 3)
    path = archive(tmp_path / "a.zip", {f"{k}.png": b"x" for k in range(3)})
    assert len(find_uploads([("a.zip", path)])) == 3
    with pytest.raises(TooMany, match="more than 3 files"):
        find_uploads([("a.zip", path), ("b.zip", path)])


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions(tmp_path, method):
    (upload,) = find_uploads([("a.zip", archive(tmp_path / "a.zip", {"x.png": picture()}, method))])
    assert "in a way that is not read here" in reason(upload)


def test_a_password(tmp_path):
    path = archive(tmp_path / "a.zip", {"x.png": picture()})
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag of encryption in the member's header, and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    (upload,) = find_uploads([("a.zip", path)])
    assert reason(upload) == "The archive asks for a password."


def test_damaged_archives_raise_nothing_but_bad_image(tmp_path):
    path = archive(tmp_path / "a.zip", {f"{k}.png": picture() for k in range(3)})
    whole, chance = path.read_bytes(), np.random.default_rng(0)
    bad = 0
    for _ in range(500):
        data = bytearray(whole)
        for place in chance.integers(0, len(data), 3):
            data[place] = chance.integers(0, 256)
        path.write_bytes(data[: chance.integers(10, len(data))] if chance.random() < 0.2 else data)
        for upload in find_uploads([("a.zip", path)]):
            try:
                assert len(upload.read()) <= MAX_BYTES + 1
            except BadImage as error:
                bad += 1
                assert str(error) and "Traceback" not in str(error)
    assert bad > 300


def test_an_archive_of_nothing(tmp_path):
    (upload,) = find_uploads([("a.zip", archive(tmp_path / "a.zip", {}))])
    assert upload.name == "a.zip" and reason(upload) == "There is no file in this archive."
