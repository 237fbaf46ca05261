"""Files that are written a stretch at a time: the bytes of a file that was written at once, or no file at all."""

import errno
import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedomc
from fedomc.serialization.checkpointing import Checkpoint, CheckpointDraft, Checkpoints
from fedomc.serialization.mapped_file import FileDraft, MappedFile, Scratch, Zeros, scratch
from fedomc.serialization.tensor_file import TensorFile

ARRAYS = {
    "model": {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.array(7), "e": np.zeros((0, 2), np.float32)},
    "v": {"a": np.linspace(0, 1, 12).reshape(3, 4)},
}


def drafted(folder: Path, stretch: int, progress: dict[str, object]) -> CheckpointDraft:
    described = {kind: {n: (a.dtype, a.shape) for n, a in each.items()} for kind, each in ARRAYS.items()}
    draft = CheckpointDraft(folder, described, progress)
    for kind, each in ARRAYS.items():
        for name, array in each.items():
            for start in range(0, array.size, stretch):
                draft.write(kind, name, array.reshape(-1)[start : start + stretch])
    return draft


@given(stretch=st.integers(1, 13), length=st.sampled_from([0, 100, 10**6]))
@settings(deadline=None, max_examples=15)
def test_a_draft_is_the_checkpoint_that_is_written_at_once(
    tmp_path_factory: pytest.TempPathFactory, stretch: int, length: int
) -> None:
    """A progress that is longer than the room that was reserved for it is no exception."""
    folder = tmp_path_factory.mktemp("draft")
    draft = drafted(folder, stretch, {"round": 0})
    for kind, each in ARRAYS.items():
        for name, array in each.items():
            assert np.array_equal(draft.array(kind, name), array)
    path = Checkpoints(folder).save(1, Checkpoint({"text": "x" * length}), draft)
    read = Checkpoint.read(path)
    assert read.progress == {"text": "x" * length}
    for kind, each in ARRAYS.items():
        assert list(read.arrays[kind]) == sorted(each)
        for name, array in each.items():
            assert read.arrays[kind][name].tobytes() == array.tobytes() == draft.array(kind, name).tobytes()
            assert read.arrays[kind][name].dtype == array.dtype and read.arrays[kind][name].shape == array.shape
    assert sorted(each.name for each in folder.iterdir()) == [".lock", "round-00000001.safetensors"]


def test_a_discarded_draft_leaves_nothing_but_what_was_read_of_it(tmp_path: Path) -> None:
    draft = drafted(tmp_path, 5, {})
    values = draft.array("v", "a")
    draft.discard()
    draft.discard()
    assert list(tmp_path.iterdir()) == [] and np.array_equal(values, ARRAYS["v"]["a"])


def test_an_incomplete_tensor_is_noticed(tmp_path: Path) -> None:
    draft = FileDraft(tmp_path, {"a": (torch.float32, (4,))}, 100)
    draft.write("a", np.ones(3, np.float32))
    draft.commit(tmp_path / "file", {})
    with TensorFile.open(tmp_path / "file") as file, pytest.raises(fedomc.PayloadError, match=r"a in .* is damaged"):
        file.tensor("a")
    with pytest.raises(fedomc.PayloadError, match=r"a in .* is damaged"):
        MappedFile.open(tmp_path / "file")


def test_a_full_disk_is_an_error_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        drafted(tmp_path, 5, {})
    with pytest.raises(OSError, match="No space"):
        scratch(tmp_path, 10, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_run_removes_what_a_killed_one_has_left(tmp_path: Path) -> None:
    draft = drafted(tmp_path, 5, {})
    assert Checkpoints(tmp_path).resume() is None
    assert any(path.name.startswith(".fedomc") for path in tmp_path.iterdir())  # whose process lives
    draft._draft._close()
    del draft  # as if it had ended
    gc.collect()
    Checkpoints(tmp_path).resume()
    Checkpoints(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_scratch_is_zeros_without_a_name(tmp_path: Path) -> None:
    values = scratch(tmp_path, 1000, torch.float64)
    assert values.shape == (1000,) and not values.any() and list(tmp_path.iterdir()) == []
    values += 1
    assert values.sum() == 1000 and scratch(tmp_path, 0, torch.float32).numel() == 0


@given(sizes=st.lists(st.integers(0, 3 * 2**18), max_size=12))
@settings(deadline=None, max_examples=20)
def test_bytes_that_are_put_aside_stay(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    aside = Scratch(tmp_path_factory.mktemp("scratch"))
    draw = np.random.default_rng(sum(sizes))
    wanted = [draw.bytes(size) for size in sizes]
    views = [aside.put(data) for data in wanted]
    assert [bytes(view) for view in views] == wanted


def test_what_is_mapped_is_the_file_that_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be replaced by another one, with its tensors in other places, while it is opened."""
    path, other, own = tmp_path / "x", tmp_path / "y", TensorFile.open
    Checkpoint({}, {"m": {"a": np.full(3, 1.0), "b": np.full(5, 2.0)}}).write(path)
    Checkpoint({}, {"m": {"a": np.full(7, 3.0), "b": np.full(2, 4.0), "c": np.full(9, 5.0)}}).write(other)

    def replaced_before(name: Path) -> object:
        os.replace(other, path)
        return own(name)

    monkeypatch.setattr(TensorFile, "open", replaced_before)
    mapped = MappedFile.open(path)
    found = {key: mapped.values(key).tolist() for key in mapped.places}
    assert found == {"m/a": [3.0] * 7, "m/b": [4.0] * 2, "m/c": [5.0] * 9}


def test_zeros_are_given_again_from_the_same_file_only_if_the_size_is_the_same(tmp_path: Path) -> None:
    zeros = Zeros(tmp_path)
    first, other = zeros.take(1000, torch.float32), zeros.take(1000, torch.float32)
    place = first.data_ptr()
    assert other.data_ptr() != place  # the first has not been given back
    zeros.give_back(first.fill_(3.0))
    del first
    again = zeros.take(1000, torch.float32)
    assert again.data_ptr() == place and not again.any()
    zeros.give_back(again.fill_(3.0))
    for numel, dtype in ((999, torch.float32), (1000, torch.float64)):
        assert not zeros.take(numel, dtype).any() and zeros.take(numel, dtype).shape == (numel,)
    assert list(tmp_path.iterdir()) == []
