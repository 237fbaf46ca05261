"""Checkpoints of rounds: the same bytes for the same state, the last few kept, damaged ones passed over."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import fedomc
from fedomc import PayloadError
from fedomc.errors import FolderLockedError
from fedomc.serialization.checkpointing import Checkpoint, Checkpoints


def state(number: int) -> Checkpoint:
    draw = np.random.default_rng(number)
    arrays = {
        "model": {"a/b.weight": draw.standard_normal((3, 4)).astype(np.float32), "steps": np.array(number)},
        "v": {"a/b.weight": np.full((3, 4), np.inf), "flag": np.array([True, False])},
        "none": {},
        "empty": {"rows": np.zeros((0, 4), np.float32), "one": np.zeros(0, np.float32)},
    }
    return Checkpoint({"round": number, "of": ["any", {"kind": None}]}, arrays)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.progress == b.progress and all(
        a.arrays[kind].keys() == b.arrays[kind].keys()
        and all(
            (x := a.arrays[kind][name]).dtype == (y := b.arrays[kind][name]).dtype and np.array_equal(x, y)
            for name in a.arrays[kind]
        )
        for kind in a.arrays.keys() | b.arrays.keys()
    )


def test_what_is_written_is_read_and_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    state(3).write(tmp_path / "one")
    state(3).write(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert same(Checkpoint.read(tmp_path / "one"), state(3))
    assert not same(Checkpoint.read(tmp_path / "one"), state(4))


def test_the_last_ones_are_kept_and_the_last_whole_one_is_loaded(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "runs" / "a", keep=2)
    assert folder.load() is None
    for number in range(8, 12):
        folder.save(number, state(number))
    assert [path.name for path in folder.paths()] == ["round-00000010.safetensors", "round-00000011.safetensors"]
    loaded = folder.load()
    assert loaded is not None and same(loaded, state(11))
    newest, data = folder.paths()[-1], folder.paths()[-1].read_bytes()
    for damaged in (b"", data[:50], data[:-1], b"\xff" * 300, b"\x02\0\0\0\0\0\0\0{}"):
        newest.write_bytes(damaged)
        with pytest.warns(UserWarning, match="round-00000011"):
            loaded = folder.load()
        assert loaded is not None and same(loaded, state(10))
    folder.paths()[0].write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(PayloadError, match="another folder"):
        folder.load()
    with pytest.raises(PayloadError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_no_flipped_bit_is_taken_for_a_good_value(tmp_path: Path) -> None:
    """One bit of every byte, each of the eight in turn."""
    path = tmp_path / "state"
    state(3).write(path)
    data = path.read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.unlink()  # the one before may still be mapped
        path.write_bytes(changed)
        with pytest.raises(PayloadError, match="state"):
            Checkpoint.read(path)


def test_a_flipped_bit_in_the_newest_file_is_reported_and_the_one_before_is_taken(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path)
    for number in (1, 2):
        folder.save(number, state(number))
    newest = folder.paths()[-1]
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"round-00000002.*do not match their digest.*the checkpoint before it"):
        loaded = folder.load()
    assert loaded is not None and same(loaded, state(1))


def test_only_files_with_the_folders_own_names_count(tmp_path: Path) -> None:
    """What is called otherwise is neither loaded nor counted nor removed, wherever it sorts."""
    others = [
        "round-best.safetensors",
        "round-9.safetensors",
        "round-000000012.safetensors",
        "round-00000001.safetensors~",
    ]
    others += ["round-١٢٣٤٥٦٧٨.safetensors"]
    for name in others:
        state(99).write(tmp_path / name)
    (tmp_path / "round-00000077.safetensors").mkdir()
    folder = Checkpoints(tmp_path, keep=1)
    for number in (7, 8, 99_999_999, 100_000_000, 1_000_000_000):
        folder.save(number, state(number))
        assert [path.name for path in folder.paths()] == [f"round-{number:08}.safetensors"]
        loaded = folder.load()
        assert loaded is not None and same(loaded, state(number))
    assert all((tmp_path / name).exists() for name in others)
    with pytest.raises(PayloadError, match="round -1"):
        folder.save(-1, state(1))


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, keep=2)
    for number in (10, 11, 12):
        folder.save(number, state(number))
    for number in (1, 2, 3):  # as a run with another model would, or one that went on from an older checkpoint
        folder.save(number, state(number))
        assert (tmp_path / f"round-{number:08}.safetensors").exists()
    assert [int(path.stem[6:]) for path in folder.paths()] == [2, 3, 11, 12]


LOCKING = """
import sys
from fedomc.serialization.checkpointing import Checkpoint, Checkpoints
folder = Checkpoints(sys.argv[1])
folder.save(5, Checkpoint({"round": 5}))
print("saved", flush=True)
sys.stdin.readline()
"""


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path)
    other = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", LOCKING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "saved\n"
        for write in (lambda: folder.save(1, state(1)), folder.resume):
            with pytest.raises(FolderLockedError, match=rf"process {other.pid} .*another folder"):
                write()
        loaded = folder.load()  # who only reads needs no lock
        assert loaded is not None and loaded.progress == {"round": 5}
    finally:
        other.kill()
        other.wait()
    folder.save(6, state(6))  # the lock of a killed process is no more
    assert folder.resume() is not None
    folder.release()
    folder.release()
    again = subprocess.run([sys.executable, "-c", LOCKING, str(tmp_path)], input="\n", text=True, check=False)  # noqa: S603
    assert again.returncode == 0


def test_a_checkpoint_that_is_removed_while_it_is_looked_for_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Checkpoints(tmp_path, keep=1)
    folder.save(1, state(1))
    read, asked = Checkpoint.read, []

    def late(path: Path) -> Checkpoint:
        asked.append(path.name)
        if len(asked) == 1:
            folder.save(2, state(2))  # another process prunes what was just listed
        return read(path)

    monkeypatch.setattr(Checkpoint, "read", late)
    loaded = folder.load()
    assert loaded is not None and same(loaded, state(2))
    assert asked == ["round-00000001.safetensors", "round-00000002.safetensors"]


def test_a_foreign_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"model/a": np.ones(3)}, tmp_path / "a")
    fedomc.save_model(torch.nn.Linear(2, 2), tmp_path / "b")
    for name in ("a", "b"):
        with pytest.raises(PayloadError, match="not a checkpoint"):
            Checkpoint.read(tmp_path / name)
    state(1).write(tmp_path / "c")
    with pytest.raises(PayloadError, match="was not written by save_model"):
        fedomc.load_model(torch.nn.Linear(2, 2), tmp_path / "c")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failure_leaves_the_former_file_and_nothing_else(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    state(1).write(path)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises(OSError, match="disk full"):
            state(2).write(path)
    assert same(Checkpoint.read(path), state(1))
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
