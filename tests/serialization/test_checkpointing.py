"""Checkpoints of rounds: the same bytes for the same state, the last few kept, damaged ones passed over."""

import os
from pathlib import Path

import numpy as np
import pytest

from fedomc import PayloadError
from fedomc.serialization.checkpointing import Checkpoint, Checkpoints


def state(number: int) -> Checkpoint:
    draw = np.random.default_rng(number)
    arrays = {
        "model": {"a/b.weight": draw.standard_normal((3, 4)).astype(np.float32), "steps": np.array(number)},
        "v": {"a/b.weight": np.full((3, 4), np.inf), "flag": np.array([True, False])},
        "none": {},
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
