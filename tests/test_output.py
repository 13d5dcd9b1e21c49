"""Where output goes: readers that leave, closed descriptors, full devices, terminals that hang up, other encodings."""

import errno
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers.commands import ROOT, call_here, environment
from helpers.files import RUN_FILES, write_pictures
from PIL import Image

from cifar_fastai import cli, terminal

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
QUICK = ("--recipe", "classic-sgd", "--epochs", "1", "--bs", "16")


def in_shell(line: str, cwd, **extra) -> subprocess.CompletedProcess:
    """A command line of a shell in which `python` is this one; exits with the first code that is not 0."""
    words = ["bash", "-c", f'set -o pipefail; python() {{ "{sys.executable}" "$@"; }}; {line}']
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=environment(**extra), timeout=600)


# --- the streams ---------------------------------------------------------------------------------------------------


def stream_to(descriptor: int, encoding="utf-8") -> io.TextIOWrapper:
    """A standard stream of a process whose descriptor this is."""
    return terminal.lasting(io.TextIOWrapper(os.fdopen(descriptor, "wb"), encoding), 1)


def told_by(stream) -> list[str]:
    told = []
    stream.buffer.raw.tell = lambda error: told.append(error.strerror)
    return told


def test_a_reader_that_leaves_is_told_of_once_and_all_that_follows_is_dropped():
    reading, writing = os.pipe()
    stream = stream_to(writing)
    told = told_by(stream)
    print("first", file=stream, flush=True)
    assert os.read(reading, 100) == b"first\n" and terminal.trouble(stream) is None
    os.close(reading)
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)
    assert told == ["Broken pipe"] and isinstance(terminal.trouble(stream), BrokenPipeError)
    stream.close()


@FULL
def test_a_full_device_and_a_closed_descriptor():
    full, closed = stream_to(os.open("/dev/full", os.O_WRONLY)), terminal.lasting(None, 1)
    for stream, words in ((full, "No space left on device"), (closed, "it is closed")):
        told = told_by(stream)
        print("lost", file=stream, flush=True)
        assert told == [words] and terminal.trouble(stream).strerror == words and not stream.isatty()


def test_what_an_encoding_lacks_is_escaped():
    reading, writing = os.pipe()
    stream = stream_to(writing, "cp1252")
    print("café 図 \udcff", file=stream, flush=True)
    assert os.read(reading, 100) == b"caf\xe9 \\u56f3 \\udcff\n"
    os.close(reading)
    stream.close()


def test_a_pipe_that_does_not_block_loses_nothing():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    received = bytearray()

    def read():
        time.sleep(0.1)  # until the pipe is full
        while block := os.read(reading, 4096):
            received.extend(block)

    reader = threading.Thread(target=read)
    reader.start()
    stream = stream_to(writing)
    print("0123456789" * 50_000, file=stream)
    stream.close()
    stream.buffer.raw.raw.close()
    reader.join(30)
    os.close(reading)
    assert received == b"0123456789" * 50_000 + b"\n" and terminal.trouble(stream) is None


def test_a_terminal_that_hangs_up_and_the_bar_on_it():
    terminal_side, inside = pty.openpty()
    stream = stream_to(inside)
    with terminal.progress_bar(stream) as bar:
        bar.add_task("[bold]10 %[/bold]", total=10)
        bar.refresh()
        shown = ""
        while "left" not in shown:
            shown += os.read(terminal_side, 10_000).decode()
        os.close(terminal_side)
        bar.console.print("[red]still here")
        bar.refresh()
    assert "[bold]10 %[/bold]" in shown and terminal.trouble(stream).errno == errno.EIO


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory):
    """Pictures in a folder and of classes whose names are markup to someone, and Chinese to cp1252."""
    folder = tmp_path_factory.mktemp("図 'and' $x^2$") / "a b;図"
    write_pictures(folder, n_train=30, n_test=6)
    names = {"blue": "$1_front", "green": "$5_front", "red": f"_図[bold]<b>|*{'x' * 200}"}
    for split in ("train", "test"):
        for old, new in names.items():
            (folder / split / old).rename(folder / split / new)
    return folder


@pytest.fixture(scope="module")
def left_alone(odd_pictures, tmp_path_factory):
    """A training whose reader leaves after a line, in an encoding that lacks what its data is called."""
    cwd = tmp_path_factory.mktemp("left")
    shutil.copytree(odd_pictures, cwd / odd_pictures.name)
    command = f"python {ROOT / 'train.py'} --data '{odd_pictures.name}' {' '.join(QUICK)} --name odd | head -n 1"
    done = in_shell(command, cwd, PYTHONIOENCODING="cp1252")
    (folder,) = (cwd / "runs").iterdir()
    return cwd, folder, done


def test_a_training_outlasts_its_reader(left_alone):
    cwd, folder, done = left_alone
    assert done.returncode == 0 and done.stdout.startswith("data     a b;\\u56f3: 81 training"), done.stderr
    assert done.stdout.count("\n") == 1
    words = "warning: standard output can no longer be written (Broken pipe); the work goes on without it.\n"
    assert done.stderr == words
    assert (cwd / "exports" / "odd" / "MANIFEST.json").exists() and (folder / "report.html").exists()


def test_names_that_are_markup_cost_no_picture(left_alone):
    _, folder, _ = left_alone
    sizes = [Image.open(folder / name).size for name in RUN_FILES if name.endswith(".png")]
    assert len(sizes) == 11 and max(side for size in sizes for side in size) < 3000


@pytest.mark.slow
def test_a_training_without_any_standard_stream(tmp_path):
    arguments = ("--data", "digits", "--subset", "200", *QUICK, "--name", "closed")
    done = in_shell(f"python {ROOT / 'train.py'} {' '.join(arguments)} <&- >&- 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "exports" / "closed" / "MANIFEST.json").exists()
    (folder,) = (tmp_path / "runs").iterdir()
    files = [path for path in (*folder.rglob("*"), *(tmp_path / "exports").rglob("*")) if path.is_file()]
    assert not any(b"accuracy 1" in path.read_bytes() for path in files if path.suffix in (".pth", ".png", ".csv"))


# Every case in a process of its own, forked from one that has imported what is slow, with descriptors as a shell makes them.
CASES = """
import json, os, sys
from cifar_fastai import prediction
from cifar_fastai.cli import main

def case(arguments, streams):
    errors = os.memfd_create("errors")
    child = os.fork()
    if not child:
        os.dup2(errors, 2)
        for number, name in ((0, "stdin"), (1, "stdout")):
            if streams.get(name) == "closed":
                os.close(number)
                setattr(sys, name, None)
                setattr(sys, f"__{name}__", None)
            elif name in streams:
                os.dup2(os.open(streams[name], os.O_RDWR if number else os.O_RDONLY), number)
        if streams.get("left"):
            reading, writing = os.pipe()
            os.dup2(writing, 1)
            os.close(reading)
            os.close(writing)
        sys.exit(main(*arguments))
    _, status = os.waitpid(child, 0)
    os.lseek(errors, 0, os.SEEK_SET)
    return os.waitstatus_to_exitcode(status), os.read(errors, 10000).decode()

print(json.dumps([case(*each) for each in json.loads(sys.argv[1])]))
"""


@FULL
@pytest.mark.skipif(sys.platform != "linux", reason="memfd_create")
def test_what_becomes_of_answers_that_cannot_be_written(digits_run, tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "photo.png")
    predict = ["predict", ["--export", str(digits_run.export), *["photo.png"] * 3]]
    from_input = ["predict", ["--export", str(digits_run.export), "-"]]
    full, closed, left = {"stdout": "/dev/full"}, {"stdout": "closed"}, {"left": True}
    no_room = "error: standard output cannot be written: No space left on device.\n"
    shut = "error: standard output cannot be written: it is closed.\n"
    empty = "error: standard input: The file is empty.\n"
    folder = f"error: standard input cannot be read: {os.strerror(errno.EISDIR)}.\n"
    expected = [
        (predict, full, 2, no_room),
        (predict, closed, 2, shut),
        (predict, left, 0, ""),
        (["predict", [*predict[1], "--json"]], full, 2, no_room),
        (["predict", [*predict[1], "--csv"]], left, 0, ""),
        (from_input, {"stdin": "closed"}, 2, empty),
        (from_input, {"stdin": "/"}, 2, folder),
        (["data", []], full, 2, no_room),
        (["data", []], left, 0, ""),
        (["train", ["--help"]], full, 2, no_room),
        (["train", ["--help"]], left, 0, ""),
        (["train", ["--recipe", "help"]], full, 2, no_room),
        (["train", ["--recipe", "help"]], left, 0, ""),
        (["compare", [str(digits_run.folder)]], full, 2, "error: A comparison takes at least two run folders, not 1.\n"),
    ]  # fmt: skip
    cases = json.dumps([each[:2] for each in expected])
    done = subprocess.run(
        [sys.executable, "-c", CASES, cases], cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=600
    )
    assert done.returncode == 0, done.stderr
    for (arguments, streams, *right), found in zip(expected, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert found == right, (arguments, streams)


def test_predict_reads_no_more_once_nobody_reads(digits_run, tmp_path, monkeypatch):
    from cifar_fastai.prediction import Answer, print_answers

    reading, writing = os.pipe()
    os.close(reading)
    stream = stream_to(writing)
    monkeypatch.setattr("sys.stdout", stream)
    answers = (Answer(f"{number}.png", {"cat": 1.0}) for number in range(100))
    assert print_answers(answers, 100, "text", 1) == 0
    assert next(answers).path == "1.png"
    stream.close()


@pytest.mark.parametrize(("ignored", "shown"), [(False, "129"), (True, "on and on")])
def test_a_terminal_that_closes_saves_and_under_nohup_changes_nothing(ignored, shown):
    code = (
        "import os, signal\n"
        "from cifar_fastai.errors import Interrupted\nfrom cifar_fastai.interrupts import Interrupts\n"
        "try:\n"
        "    with Interrupts('saved') as interrupts, interrupts.deferred():\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('on and on')\n"
        "except Interrupted as signal: print(signal.exit_code)\n"
    )
    manner = signal.SIG_IGN if ignored else signal.SIG_DFL
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, manner),
    )  # fmt: skip
    assert done.stdout == f"{shown}\n", done.stderr


def test_a_server_goes_on_without_its_output(tmp_path):
    """What the server does of its own: it is told once, and prints on."""
    code = (
        "from cifar_fastai import cli\n"
        "cli._serve = lambda options: [print('serving', flush=True) for _ in range(3)] and 0\n"
        "cli.COMMANDS['serve'] = (cli._serve, *cli.COMMANDS['serve'][1:])\n"
        "raise SystemExit(cli.main('serve', []))\n"
    )
    (tmp_path / "server.py").write_text(code)
    done = in_shell("python server.py >&-", tmp_path)
    words = "warning: standard output can no longer be written (it is closed); the work goes on without it.\n"
    assert (done.returncode, done.stderr) == (0, words)


def test_streams_that_are_not_the_processs_own_are_left_alone(tmp_path):
    done = call_here("data", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("kept in ")
    assert cli.main("data", ["--size", "7"]) == 2
