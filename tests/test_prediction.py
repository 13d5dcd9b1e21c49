"""`predict` on files that are none, folders that lead astray, and more of both than anybody means."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.commands import ROOT
from PIL import Image

from cifar_fastai.cli import main
from cifar_fastai.images import MAX_BYTES, BadImage, decode_image
from cifar_fastai.prediction import _free_name, find_images

EXPORT = ROOT / "exports" / "cifar10"


@pytest.fixture
def predict(capsys):
    """The command in this process."""

    def run(*arguments) -> SimpleNamespace:
        code = main(None, ["predict", "--export", str(EXPORT), *arguments])
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


def paths(*arguments: str) -> list[str]:
    return [answer.path for answer in find_images(arguments)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a test, with a picture in it and one in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a.png", "in/b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def test_files_that_are_none_are_named_and_the_others_answered(folder, predict):
    os.mkfifo("pipe.png")
    Path("zero.jpg").symlink_to("/dev/zero")
    Path("gone.gif").symlink_to("nowhere")
    Path("round.bmp").symlink_to("round.bmp")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.webp")
        done = predict(".", "pipe.png", "*.jpg", "/dev/zero", "in")
    assert done.returncode == 2
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["a.png", "in/b.png", "in/b.png"]
    errors = {line.removeprefix("error: ").partition(": ")[0]: line for line in done.stderr.splitlines()}
    for name in ("pipe.png", "zero.jpg", "socket.webp", "/dev/zero"):
        assert "a pipe, a socket or a device" in errors.pop(name)
    assert "No such file" in errors.pop("gone.gif") and "Too many levels" in errors.pop("round.bmp")
    assert not errors


def test_python_reads_no_pipe_and_no_device_either(folder):
    os.mkfifo("pipe")
    for name in ("pipe", Path("pipe"), "/dev/zero", Path("/dev/tty")):
        with pytest.raises(BadImage, match=r"a pipe, a socket or a device|cannot be read"):
            decode_image(name)
    writer = os.open("pipe", os.O_RDWR)  # somebody has it open, and has written
    os.write(writer, b"\x89PNG")
    with pytest.raises(BadImage, match="name it '-'"):
        decode_image("pipe")
    os.close(writer)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_files_that_announce_nothing_and_never_end():
    """Regular by their kind, of no length by their size."""
    assert Path("/proc/self/pagemap").stat().st_size == 0
    with pytest.raises(BadImage, match="larger than 10 MB"):
        decode_image("/proc/self/pagemap")
    with pytest.raises(BadImage, match="cannot be read"):
        decode_image("/proc/self/mem")
    with pytest.raises(BadImage, match="Not an image"):
        decode_image("/proc/self/status")


def test_no_more_than_the_limit_is_read_of_standard_input(folder, predict, monkeypatch):
    with Path("/dev/zero").open() as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        done = predict("-")
    assert (done.returncode, done.stderr) == (2, "error: standard input: The file is larger than 10 MB.\n")
    read, write = os.pipe()
    os.write(write, Path("a.png").read_bytes())
    os.close(write)
    with os.fdopen(read) as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert predict("-").stdout.startswith("-\t")
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert predict("-").stderr == "error: standard input: The file is empty.\n"
    (folder / "full.png").write_bytes(bytes(MAX_BYTES + 1))
    assert "larger than 10 MB" in predict("full.png").stderr


def test_links_that_lead_back_are_not_followed(folder):
    for name in ("one", "two", "in/three"):
        Path(name).symlink_to(folder)
    start = time.monotonic()
    assert paths(".") == paths("**/*.png") == ["a.png", "in/b.png"]
    assert paths(str(folder)) == paths(f"{folder}/**/*.png") == [f"{folder}/a.png", f"{folder}/in/b.png"]
    assert paths("./**/b.*") == ["./in/b.png"] and paths("**/in/**/*.png") == ["in/b.png"]
    assert paths("one") == ["one/a.png", "one/in/b.png"], "a folder that is named may be a link"
    assert time.monotonic() - start < 5


def test_patterns_mean_what_they_mean_to_a_shell(folder):
    for name in (".hidden.png", "in/.hidden.png", "in/note.txt", "in/[1].png"):
        Path(name).write_bytes(b"")
    assert paths("**") == ["a.png", "in/[1].png", "in/b.png", "in/note.txt"]
    assert paths("in/**") == ["in/[1].png", "in/b.png", "in/note.txt"]
    assert paths("**/[ab].png") == ["a.png", "in/b.png"] and paths("i*/*.txt") == ["in/note.txt"]
    assert paths("in/[1].png") == ["in/[1].png"], "the very name of a file"
    assert find_images(["none/**/*.png"])[0].error == "none/**/*.png: there is no such file."


def test_folders_of_any_depth(folder):
    """Deeper than Python's stack, and then deeper than a path may be long."""
    place, names = os.open(".", os.O_RDONLY), ["d"] * 1100 + ["e" * 200] * 10
    for number, name in enumerate(names):
        os.mkdir(name, dir_fd=place)
        deeper = os.open(name, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = deeper
        if number == 1099:
            os.close(os.open("deep.png", os.O_CREAT, dir_fd=place))
    os.close(place)
    try:
        found, matches = find_images(["."]), paths("**/deep.png")
    finally:
        subprocess.run(["rm", "-rf", "d"], check=True)  # deeper than shutil.rmtree goes
    assert [answer.path for answer in found if not answer.error] == ["a.png", "d/" * 1100 + "deep.png", "in/b.png"]
    (error,) = [answer.error for answer in found if answer.error]
    assert error.endswith("e: this folder cannot be read (File name too long).")
    assert matches == ["d/" * 1100 + "deep.png"]


def test_a_folder_that_may_not_be_read(folder):
    folder.chmod(0o755)
    (folder / "in").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody: root may read all
    try:
        answers = find_images([".", "in"])
    finally:
        os.seteuid(user)
        (folder / "in").chmod(0o755)
    assert [answer.path for answer in answers] == ["a.png", "in", "in"]
    assert {answer.error for answer in answers[1:]} == {"in: this folder cannot be read (Permission denied)."}


def test_ten_thousand_overlays_of_one_name():
    taken = {}
    start = time.process_time()
    names = [_free_name(f"{number}/image.png", taken) for number in range(20_000)]
    assert time.process_time() - start < 2
    assert len({name.lower() for name in names}) == 20_000 and names[:2] + names[-1:] == ["image", "image-2", "image-20000"]
