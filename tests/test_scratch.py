"""Folders for a while, and what becomes of them when their process is killed."""

import subprocess
import sys
import tempfile

import pytest
from helpers.commands import environment

from cifar_fastai.scratch import scratch_folder

HOLDER = """
import sys, time
from cifar_fastai.scratch import scratch_folder
with scratch_folder("serve") as folder:
    (folder / "upload.png").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_scratch_folder_is_empty_and_gone_afterwards(temporary):
    with scratch_folder("trial") as folder, scratch_folder("trial") as other:
        assert folder != other and not list(folder.iterdir())
        (folder / "file").write_text("x")
        assert [path.stat().st_mode & 0o077 for path in temporary.iterdir()] == [0, 0]
    assert not list(temporary.iterdir())


def test_the_next_one_sweeps_what_a_killed_process_left_and_nothing_else(temporary, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "lock").write_text("")
    (temporary / "cifar_fastai-link").symlink_to(elsewhere)
    for name, mode in (
        ("cifar_fastai-shared", 0o777),
        ("cifar_fastai-without a lock", 0o700),
        ("of another program", 0o700),
    ):
        (temporary / name).mkdir()
        (temporary / name).chmod(mode)
        (temporary / name / ("file" if "without" in name else "lock")).write_text("")
    kept = set(temporary.iterdir())
    variables = environment(TMPDIR=str(temporary))
    start = [sys.executable, "-c", HOLDER]
    processes = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env=variables) for _ in range(2)]
    try:
        left, used = (temporary / process.stdout.readline().strip() for process in processes)
        processes[0].kill()
        processes[0].wait()
        assert (left / "upload.png").is_file()
        with scratch_folder("trial") as folder:
            assert not left.parent.exists()
            assert (used / "upload.png").is_file()
            assert set(temporary.iterdir()) == {*kept, used.parent, folder.parent}
        assert (elsewhere / "lock").is_file()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
