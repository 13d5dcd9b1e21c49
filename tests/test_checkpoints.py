"""Files that are whole or refused."""

import os
import pickle
import random
import zipfile

import pytest
import torch

from cifar_fastai.checkpoints import LAST, PREVIOUS, load, load_last, save, save_last, write_whole
from cifar_fastai.errors import UserError

STATE = {"weights": torch.arange(6000.0), "epoch": 3, "name": "x", "rows": [{"loss": 0.5}], "big": 1 << 100}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key] for key, value in a.items()
    )


def test_what_is_saved_comes_back(tmp_path):
    save(STATE, tmp_path / LAST)
    assert same(load(tmp_path / LAST), STATE)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


def test_a_changed_file_is_refused_or_gives_the_same(tmp_path):
    """A bit flipped anywhere, an end cut off anywhere: torch alone reads many of these without complaint."""
    path, chance = tmp_path / LAST, random.Random(0)
    save(STATE, path)
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(load(path), STATE)
        except UserError as error:
            assert str(error).startswith(f"{path} cannot be used: ")
            refused += 1
    assert refused > 250  # the rest lies in what zip files hold twice, or nobody reads
    for _ in range(50):
        path.write_bytes(whole[: chance.randrange(len(whole))])
        with pytest.raises(UserError, match="cannot be used"):
            load(path)


def test_a_bit_flipped_in_the_directory_of_a_checkpoint(tmp_path):
    """There zipfile raises errors without words, and torch takes a tensor marked as a folder for one without content."""
    path = tmp_path / LAST
    save(STATE, tmp_path / PREVIOUS)
    whole = (tmp_path / PREVIOUS).read_bytes()
    for place in range(whole.index(b"PK\1\2"), len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert same(load(path), STATE)
            except UserError as error:
                assert str(error).startswith(f"{path} cannot be used: ")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    torch.save({"format": 1, "x": Hostile()}, tmp_path / LAST)
    with zipfile.ZipFile(tmp_path / LAST) as file:
        assert b"mkdir" in file.read("last/data.pkl") and file.testzip() is None
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile()))
    for name, reason in ((LAST, "other things than tensors and plain values"), ("plain.pth", "not a zip file")):
        with pytest.raises(UserError, match=f"cannot be used: .*{reason}"):
            load(tmp_path / name)
    assert not (tmp_path / "canary").exists()


def test_the_last_two_are_kept_and_a_damaged_one_gives_way(tmp_path, capsys):
    assert load_last(tmp_path) is None
    for epoch in range(3):
        save_last({"epoch": epoch}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]
    assert load_last(tmp_path)["epoch"] == 2
    (tmp_path / LAST).write_bytes(b"x")
    assert load_last(tmp_path)["epoch"] == 1 and f"warning: {tmp_path / LAST} cannot be used" in capsys.readouterr().err
    (tmp_path / LAST).unlink()  # between the two renamings
    assert load_last(tmp_path)["epoch"] == 1
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(UserError, match=r"No checkpoint in .* is whole"):
        load_last(tmp_path)


def test_another_versions_state_is_refused(tmp_path):
    save({"format": 0}, tmp_path / LAST)
    with pytest.raises(UserError, match="another version"):
        load_last(tmp_path)


def test_a_write_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"before")
    part = tmp_path / "file.part"
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(path, b"after")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"after")
    assert path.read_bytes() == b"after"
