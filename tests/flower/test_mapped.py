"""Arrays in files: to Flower, and to whoever reads them, they are plain arrays of the same values."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from safetensors.torch import save_file
from torch import nn

import fedomc
from fedomc.codec.heap import heap
from fedomc.flower import install, mapped, open_arrays
from fedomc.flower.arrays import Bfloat16Array, dense_array, read_dense, view_dense
from fedomc.flower.mapped import MappedArray, ViewArray, nbytes_of, parts_of

TENSORS = {
    "large": torch.randn(300, 70),
    "small": torch.arange(3.0),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(5),
    "half": torch.randn(33).half(),
    "bfloat16": torch.randn(7, 5).bfloat16(),
    "double": torch.randn(9, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
}

CHUNK = 1000


@pytest.fixture
def arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArrayRecord:
    monkeypatch.setattr(mapped, "CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK)
    save_file(TENSORS, tmp_path / "model.safetensors")
    return open_arrays(tmp_path / "model.safetensors")


def plain(name: str) -> Array:
    tensor = TENSORS[name]
    return Bfloat16Array(tensor) if tensor.dtype is torch.bfloat16 else dense_array(tensor.numpy())


def sent(array: Array) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    record = ArrayRecord()
    record["x"] = array
    push_objects(get_all_nested_objects(RecordDict({"arrays": record})), contents.__setitem__)
    return contents


@pytest.mark.parametrize("name", TENSORS)
def test_it_is_a_plain_array_to_flower(arrays: ArrayRecord, name: str) -> None:
    array, like = arrays[name], plain(name)
    assert isinstance(array, MappedArray)
    assert (array.dtype, tuple(array.shape), array.stype) == (like.dtype, tuple(like.shape), like.stype)
    assert array.data == like.data == b"".join(bytes(part) for part in parts_of(array))
    assert nbytes_of(array) == nbytes_of(like) == len(like.data)
    assert sent(array) == sent(like)
    for other in (pickle.loads(pickle.dumps(array)), copy.deepcopy(array)):  # noqa: S301
        assert other.data == like.data
        assert np.array_equal(view_dense(other, name), like.numpy())


def test_what_flower_sends_arrives(arrays: ArrayRecord) -> None:
    content, like = RecordDict({"arrays": arrays}), ArrayRecord()
    for name in arrays:
        like[name] = plain(name)
    assert get_object_tree(content) == get_object_tree(RecordDict({"arrays": like}))
    contents: dict[str, bytes] = {}
    push_objects(get_all_nested_objects(content), contents.__setitem__)
    arrived = inflate_object_from_contents(content.object_id, contents)
    assert isinstance(arrived, RecordDict)
    assert {n: a.data for n, a in arrived["arrays"].items()} == {n: a.data for n, a in like.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", TENSORS)
def test_the_values_are_those_of_the_file_whatever_becomes_of_a_copy(arrays: ArrayRecord, name: str) -> None:
    wanted = TENSORS[name].float().numpy() if name == "bfloat16" else TENSORS[name].numpy()
    changed = arrays[name].numpy()
    assert np.array_equal(changed, wanted) and changed.dtype == wanted.dtype
    changed[...] = 0
    assert np.array_equal(arrays[name].numpy(), wanted)
    viewed = view_dense(arrays[name], name)
    assert np.array_equal(viewed, wanted)
    assert torch.equal(read_dense(arrays[name], name), TENSORS[name])
    if name != "bfloat16":
        with pytest.raises(ValueError, match="read-only"):
            viewed[...] = 1


def test_a_model_is_filled_from_a_file_without_its_bytes_being_joined(
    arrays: ArrayRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, record = nn.Module(), ArrayRecord()
    for name, values in TENSORS.items():
        module.register_buffer(f"the_{name}", torch.zeros_like(values))
        record[f"the_{name}"] = arrays[name]
    monkeypatch.delattr(mapped.ViewArray, "__getattr__")  # which joins header and values
    install(module, RecordDict({"arrays": record}))
    assert all(torch.equal(module.get_buffer(f"the_{name}"), values) for name, values in TENSORS.items())


def test_the_file_may_be_removed(arrays: ArrayRecord, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    assert np.array_equal(arrays["large"].numpy(), TENSORS["large"].numpy())


def test_only_what_is_modified_takes_memory(tmp_path: Path) -> None:
    """Of 64 MB, reading takes file pages; only the megabyte that is written is the process's own."""
    save_file({"x": torch.ones(2**24)}, tmp_path / "x.safetensors")
    (array,) = open_arrays(tmp_path / "x.safetensors").values()
    before = anonymous()
    values = array.numpy()
    total = values.sum()
    values[: 2**18] = 2
    assert anonymous() - before < 2**24 and total == 2**24 and values.sum() == 2**24 + 2**18


def anonymous() -> int:
    """Return the bytes of memory that belong to no file, without what the allocator holds for later."""
    heap.trim()
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def test_a_value_that_is_not_finite_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.tensor([1.0, float("nan")])}, tmp_path / "x.safetensors")
    with pytest.raises(fedomc.PayloadError, match="x has a value that is NaN"):
        view_dense(open_arrays(tmp_path / "x.safetensors")["x"], "x")
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    with pytest.raises(fedomc.PayloadError, match=r"y.safetensors is damaged or not a safetensors file"):
        open_arrays(tmp_path / "y.safetensors")


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
@pytest.mark.parametrize("header", [b"", b"h" * 80, b"h" * (CHUNK + 3)])
def test_a_view_with_any_header_is_sent_like_its_bytes(
    size: int, header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK)
    data = np.random.default_rng(size).bytes(size)
    view = ViewArray("float32", (size,), "any", memoryview(data), header)
    like = Array("float32", (size,), "any", header + data)
    assert view.data == like.data and sent(view) == sent(like)
