"""Commands of the program, in this process or in one of their own."""

import contextlib
import ctypes
import io
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from cifar_fastai.cli import main

ROOT = Path(__file__).parent.parent.parent


def call(*arguments, cwd, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of the project, or python itself, as a user would, in `cwd`."""
    arguments = [str(ROOT / word) if word in ("train.py", "predict.py", "app.py") else str(word) for word in arguments]
    kwargs = {"capture_output": True, "text": True, "timeout": 600, "env": environment(), **kwargs}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, **kwargs)


def call_here(command, *arguments, cwd) -> SimpleNamespace:
    """A command of the program in this process, which spares its start."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(cwd)
        patch.delenv("CIFAR10_DATA", raising=False)  # as in `environment`
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code = main(None, [command, *map(str, arguments)])
            except SystemExit as end:  # argparse's
                code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())


def environment(**extra) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name != "CIFAR10_DATA"}
    return {**plain, "PYTHONPATH": str(ROOT), **extra}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_clear_error(done, code, *words):
    """One or two lines, the words among them, no traceback, and the exit code."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 2 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in done.stderr


@contextlib.contextmanager
def bound_by_permissions():
    """Permissions count within it for root too, whose right to pass over them is laid down. Linux."""
    if os.geteuid() != 0:
        yield
        return
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # the kernel's capget and capset
        if libc.capget(header, before):
            pytest.skip("capabilities cannot be read here")
    except AttributeError:
        pytest.skip("root passes over permissions here")
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, without)
    try:
        yield
    finally:
        libc.capset(header, before)
