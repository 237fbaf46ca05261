"""Model files that are wrong, damaged or forged are refused, and the model stays as it is."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fedomc
from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    PayloadError,
    PolicyError,
    load_model,
    materialize_,
    save_model,
)
from fedomc.serialization import frame
from tests.conftest import dense, randn
from tests.serialization.forging import signed, signed_again
from tests.serialization.models import Model, W, on_meta, snapshot, trained

Parts = tuple[dict[str, Tensor], dict[str, Any]]


def reframed(fmt: str, kind: int = frame.VARIABLE, shape: tuple[int, ...] = (64, 40)) -> Tensor:
    packed = CompressedTensor.from_dense(randn(*shape), fmt).base
    return torch.tensor(list(frame.to_bytes(packed, shape, kind)), dtype=torch.uint8)


def forge(tensors: dict[str, Tensor], path: Path, texts: dict[str, str]) -> None:
    """Write a file that is wrong, with the digests of what it holds."""
    save_file(tensors, path, texts)
    path.write_bytes(signed_again(path.read_bytes()))


def with_tensor(key: str, value: Tensor | None) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        tensors, content = parts
        tensors = {k: v for k, v in tensors.items() if k != key}
        return ({**tensors, key: value} if value is not None else tensors), content

    return change


def with_field(key: str, value: object) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        parts[1]["variables"][W][key] = value
        return parts

    return change


def with_content(**content: object) -> Callable[[Parts], Parts]:
    return lambda parts: (parts[0], {**parts[1], **content})


def damaged(key: str) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        parts[0][key][100] ^= 1
        return parts

    return change


WRONG = {
    "missing variable": (with_tensor("inner.0.bias", None), r"inner\.0\.bias missing"),
    "missing frame": (with_tensor(W, None), r"lacks inner\.0\.weight,"),
    "missing update": (with_tensor(W + ".update", None), r"lacks inner\.0\.weight\.update,"),
    "unknown variable": (with_tensor("else", torch.ones(2)), "else unknown"),
    "wrong shape": (with_tensor("inner.0.bias", torch.ones(63)), r"inner\.0\.bias has shape"),
    "wrong dtype": (with_tensor("inner.0.bias", torch.ones(64).double()), r"inner\.0\.bias has dtype"),
    "half": (with_tensor("inner.0.bias", torch.ones(64).half()), r"inner\.0\.bias has dtype"),
    "nan": (with_tensor("inner.0.bias", torch.full((64,), math.nan)), r"inner\.0\.bias has a value that is NaN"),
    "infinite half": (with_tensor("buffer_float16", torch.full((3,), math.inf).half()), "buffer_float16 has a value"),
    "damaged base": (damaged(W), r"inner\.0\.weight: the checksum"),
    "damaged update": (damaged(W + ".update"), r"inner\.0\.weight: the checksum"),
    "short frame": (with_tensor(W, torch.zeros(5, dtype=torch.uint8)), r"inner\.0\.weight: 5 bytes"),
    "empty frame": (with_tensor(W, torch.zeros(0, dtype=torch.uint8)), r"inner\.0\.weight: 0 bytes"),
    "not bytes": (
        with_tensor(W, torch.zeros(64, 40)),
        r"inner\.0\.weight is torch\.float32 .* must be the bytes of a frame",
    ),
    "bytes in two dimensions": (
        with_tensor(W, reframed("S1E2M3").view(2, -1)),
        r"inner\.0\.weight is .* must be the bytes",
    ),
    "other format": (with_tensor(W, reframed("S1E3M7")), r"inner\.0\.weight: .* S1E3M7.* S1E2M3"),
    "other kind": (with_tensor(W, reframed("S1E2M3", frame.UPDATE)), r"inner\.0\.weight: .* kind 1"),
    "other frame shape": (with_tensor(W, reframed("S1E2M3", shape=(40, 64))), r"inner\.0\.weight: .* \(40, 64\)"),
    "shape of another model": (
        lambda parts: with_field("shape", [40, 64])(with_tensor(W, reframed("S1E2M3", shape=(40, 64)))(parts)),
        r"inner\.0\.weight: ",
    ),
    "version": (with_content(version=3), "version 3"),
    "no version": (with_content(version=None), "version None"),
    "no variables": (with_content(variables=None), "no variables"),
    "no ties": (with_content(tied=[]), "no tied"),
    "tied to a number": (with_content(tied={"a": 3}), "tied"),
    "tied to nothing": (with_content(tied={"output.weight": "else"}), "else"),
    "tied to another shape": (with_content(tied={"output.weight": "inner.0.bias"}), "output.weight"),
    "unknown tie": (with_content(tied={"else": "embedding.weight"}), "else unknown"),
    "format": (with_field("format", "S1E9M3"), r"inner\.0\.weight: .*S1E9M3"),
    "format of no kind": (with_field("format", ["S1E2M3"]), r"inner\.0\.weight: "),
    "update format": (with_field("update_format", 3), r"inner\.0\.weight: "),
    "update format left out": (with_field("update_format", None), r"inner\.0\.weight: .*draws"),
    "transform": (with_field("transform", "magic"), r"inner\.0\.weight: .*magic"),
    "no transform": (with_field("transform", ""), r"inner\.0\.weight: .*transform"),
    "rounding": (with_field("rounding", None), r"inner\.0\.weight: .*rounding"),
    "seed": (with_field("seed", True), r"inner\.0\.weight: .*seed=True"),
    "shape": (with_field("shape", [64, -40]), r"inner\.0\.weight: .*shape"),
    "shape of texts": (with_field("shape", ["64", "40"]), r"inner\.0\.weight: .*shape"),
    "draws": (with_field("draws", [1, 2**63]), r"inner\.0\.weight: .*draws"),
    "no draws": (with_field("draws", []), r"inner\.0\.weight: .*draws"),
    "update not told": (with_field("draws", [1, 0]), r"inner\.0\.weight\.update unknown"),
    "fields": (lambda parts: (parts[0], {**parts[1], "variables": {W: 3}}), r"inner\.0\.weight: "),
}


@pytest.mark.parametrize("into", [on_meta, lambda: trained("one part")])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_and_the_model_stays(path: Path, name: str, into: Callable[[], Model]) -> None:
    change, says = WRONG[name]
    save_model(trained("two parts"), path)
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["fedomc"])
    tensors, content = change((load_file(path), content))
    forge(tensors, path, {"fedomc": json.dumps(content)})
    model = into()
    before = snapshot(model)
    with pytest.raises(PayloadError, match=says):
        load_model(model, path)
    assert snapshot(model) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"version": 2' + "0" * 5000 + "}", "NaN"])
def test_metadata_that_are_none(path: Path, text: str) -> None:
    forge({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path, {"fedomc": text})
    with pytest.raises(PayloadError, match=r"model\.safetensors: "):
        load_model(nn.Linear(2, 2), path)


def test_metadata_of_any_depth(path: Path) -> None:
    """Somewhere the parser gives up, and what shows a value in an error must not do so earlier."""
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 5):
        shape = "[" * depth + "]" * depth
        text = '{"version":2,"tied":{},"variables":{"weight":{"format":"S1E2M3","seed":0,"transform":"none",'
        text += f'"rounding":"nearest","draws":[0],"shape":{shape}}}}}}}'
        forge({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path, {"fedomc": text})
        with pytest.raises(PayloadError):
            load_model(nn.Linear(2, 2), path)


def test_a_sum_of_two_parts_that_leaves_the_range_is_refused(path: Path) -> None:
    """Each part is finite, the sum is not."""
    model = nn.Linear(40, 40, bias=False)
    fedomc.compress_(model, CompressionPolicy("S1E8M7", update_format="S1E8M7", transform="none").select(model))
    with torch.no_grad():
        model.weight.add_(1.0)
    save_model(model, path)
    with safetensors.safe_open(path, "pt") as file:
        texts = file.metadata()
    tensors = load_file(path)
    for key, kind in (("weight", frame.VARIABLE), ("weight.update", frame.UPDATE)):
        packed = CompressedTensor.from_dense(torch.full((40, 40), 3e38), "S1E8M7", transform="none").base
        tensors[key] = torch.tensor(list(frame.to_bytes(packed, (40, 40), kind)), dtype=torch.uint8)
    forge(tensors, path, texts)
    before = snapshot(model)
    with pytest.raises(PayloadError, match="weight has a value"):
        load_model(model, path)
    assert snapshot(model) == before


def test_a_file_of_others_is_for_materialize(path: Path) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path)
    with pytest.raises(PayloadError, match="materialize_"):
        load_model(nn.Linear(2, 2), path)


def test_no_file_is_no_payload(path: Path) -> None:
    for wrong in (path, path.parent):
        with pytest.raises(OSError):
            load_model(nn.Linear(2, 2), wrong)


def test_a_model_that_is_stepped_in_backward_is_refused_whole(path: Path) -> None:
    model = trained("two parts")
    save_model(model, path)
    other = trained("fp32")
    other.inner.requires_grad_(False)  # so that the first variables could be replaced
    fedomc.step_in_backward(other, torch.optim.SGD, lr=0.1)
    before = snapshot(other)
    with pytest.raises(PolicyError, match=r"remove\(\)"):
        load_model(other, path)
    assert snapshot(other) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6, bias=False))
    encoding = CompressionPolicy("S1E2M3", update_format="S1E2M1").encoding()
    fedomc.compress_(model, dict.fromkeys(("0.weight", "2.weight"), encoding))
    with torch.no_grad():
        model[0].weight.add_(0.1)
    save_model(model, path, {"note": "x"})
    return path, path.read_bytes()


def refused_or_whole(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6, bias=False))
    try:
        load_model(model, path)
    except PayloadError:
        assert all(value.is_meta for value in model.state_dict().values())
        return True
    assert all(bool(torch.isfinite(dense(value)).all()) for value in model.state_dict().values())
    return False


def test_every_truncation_is_found(small: tuple[Path, bytes]) -> None:
    path, data = small
    for length in range(0, len(data), 7):
        assert refused_or_whole(path, data[:length])
    assert refused_or_whole(path, data + b"\0")
    assert not refused_or_whole(path, data)


def test_no_flipped_bit_is_taken_for_a_good_value(small: tuple[Path, bytes]) -> None:
    """One bit of every byte, each of the eight in turn; what loads all the same is what was saved."""
    path, data = small

    def loaded(content: bytes) -> dict[str, Any] | None:
        path.unlink()  # the one before may still be mapped
        path.write_bytes(content)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6, bias=False))
        for fill in (load_model, materialize_):
            try:
                fill(model, path)
            except PayloadError:
                continue
            return snapshot(model)
        return None

    expected = loaded(data)
    assert expected is not None
    accepted = []
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        if loaded(bytes(changed)) is not None:
            accepted.append(at)
    assert accepted == []


@given(st.data())
def test_damaged_files_are_refused_or_harmless(small: tuple[Path, bytes], data: st.DataObject) -> None:
    path, original = small
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        if data.draw(st.booleans()):
            changed[at] = data.draw(st.integers(0, 255))
        else:
            changed[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    refused_or_whole(path, bytes(changed))


NAMES = ("0.weight", "0.weight.update", "0.bias", "1.running_mean", "1.num_batches_tracked", "2.weight", "other")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*NAMES, "S1E2M3", "nearest", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_forged_headers_are_refused_or_harmless(small: tuple[Path, bytes], data: st.DataObject) -> None:
    """Well-formed, so that what is behind the parser is reached."""
    path, original = small
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    content = json.loads(header["__metadata__"]["fedomc"])
    places = [header, content, content["variables"], *content["variables"].values()]
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(places))
        key = data.draw(st.sampled_from(sorted(where)) | st.sampled_from(NAMES))
        if key != "__metadata__":
            where[key] = data.draw(JSON if where is not header else headers())
    header["__metadata__"]["fedomc"] = json.dumps(content)
    refused_or_whole(path, signed(header, original[8 + length :]))


def headers() -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "F4", "F6_E2M3", "F8_E8M0", "U8", "BOOL", "C64", "I64", "?"]),
            "shape": st.lists(st.integers(0, 9) | st.integers(0, 2**64), max_size=3),
            "data_offsets": st.lists(st.integers(0, 3000), min_size=2, max_size=2),
        }
    )
