"""The bytes as docs/format.md has them: checked-in examples, and two readers that must agree on any."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    FloatFormat,
    PayloadError,
    compress_,
    load_model,
    save_model,
)
from fedomc.methods import Packed, encode
from fedomc.serialization import frame
from tests import independent_reader
from tests.conftest import dense, pack_by_design

VECTORS = Path(__file__).parents[1] / "vectors"
FRAMES = sorted(path.stem for path in VECTORS.glob("*.frame"))


def vector(name: str) -> tuple[bytes, Any, np.ndarray]:
    expected = json.loads((VECTORS / f"{name}.json").read_text())
    values = np.array(expected["values"], dtype=np.float32).reshape(expected["shape"])
    return (VECTORS / f"{name}.frame").read_bytes(), expected, values


def decoded(packed: Any) -> np.ndarray:
    return packed.decode(torch.empty(packed.numel)).numpy()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def codes_sent(expected: Any) -> Packed | None:
    """Give the codes that a vector's are a difference to."""
    if not expected.get("sent"):
        return None
    fmt = FloatFormat(expected["exponent_bits"], expected["mantissa_bits"])
    words = torch.from_numpy(pack_by_design(expected["sent"], fmt.bits))
    return Packed(fmt, len(expected["sent"]), (words, torch.tensor([1.0, 0.0])))


def test_the_vectors_are_there() -> None:
    assert len(FRAMES) == 22 and (VECTORS / "model.safetensors").exists()


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_has_the_values_that_are_written_beside_it(name: str) -> None:
    data, expected, values = vector(name)
    found = frame.from_bytes(data, sent=codes_sent(expected))
    fmt = FloatFormat(expected["exponent_bits"], expected["mantissa_bits"])
    assert (found.kind, found.packed.method, list(found.shape)) == (expected["kind"], fmt, expected["shape"])
    assert found.packed.fields[1].tolist() == np.float32([expected["factor"], expected["offset"]]).tolist()
    assert same(decoded(found.packed).reshape(values.shape), values)


@pytest.mark.parametrize("name", FRAMES)
def test_the_independent_reader_finds_the_same(name: str) -> None:
    data, expected, values = vector(name)
    found = independent_reader.read_frame(data, expected.get("sent"))
    assert [found.kind, found.exponent_bits, found.mantissa_bits] == [
        expected[key] for key in ("kind", "exponent_bits", "mantissa_bits")
    ]
    assert found.shape == tuple(expected["shape"]) and same(found.values, values)


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_is_written_again_byte_by_byte(name: str) -> None:
    data, expected, values = vector(name)
    sent = codes_sent(expected)
    found = frame.from_bytes(data, sent=sent)
    if "coding" in expected:  # of planes the writer chooses; zstd may pack otherwise in another version
        again = frame.to_bytes(found.packed, found.shape, found.kind, lossless=True, sent=sent)
        assert len(again) < frame.size_of(found.packed, found.shape)
        assert same(independent_reader.read_frame(again, expected["sent"]).values, values)
        return
    assert frame.to_bytes(found.packed, found.shape, found.kind) == data
    if expected["factor"] == 1 and expected["offset"] == 0 and "unused" not in name:
        packed = encode(torch.from_numpy(values.copy()), found.packed.method, "none")
        packed.fields[1] = found.packed.fields[1]  # of the vectors, one has an offset of -0
        assert frame.to_bytes(packed, found.shape, found.kind) == data


def test_a_model_file_has_the_values_that_are_written_beside_it(tmp_path: Path) -> None:
    path = VECTORS / "model.safetensors"
    expected = json.loads((VECTORS / "model.json").read_text())
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "embedding": nn.Embedding(10, 6), "hidden": nn.Linear(30, 40), "fresh": nn.Linear(5, 5, bias=False),
                "output": nn.Linear(6, 10, bias=False),
            }
        )  # fmt: skip
        model.register_buffer("count", torch.zeros((), dtype=torch.int64))
        model.register_buffer("narrow", torch.zeros(1, 2, dtype=torch.float16))
    load_model(model, path)
    assert model["output"].weight is model["embedding"].weight
    read = independent_reader.read_model(path.read_bytes())
    assert expected.keys() == read.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        values = np.array(expected[name]["values"], dtype=expected[name]["dtype"]).reshape(expected[name]["shape"])
        assert same(dense(value).numpy(), values) and same(read[name], values), name
    save_model(model, tmp_path / "again", {"note": "a test vector"})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


FORMATS = st.builds(FloatFormat, st.integers(1, 8), st.integers(0, 23))
SHAPES = st.lists(st.integers(0, 5), max_size=4) | st.lists(st.integers(0, 2300), min_size=1, max_size=1)
TRANSFORMS = st.sampled_from(["none", "affine", "scaled", "scaled-affine"])


def variable(shape: list[int], seed: int, exponent: int) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(math.prod(shape), dtype=np.float32)
    return torch.from_numpy(values * np.float32(2.0**exponent)).reshape(shape)


@given(
    FORMATS, SHAPES, TRANSFORMS, st.sampled_from(["nearest", "stochastic"]), st.integers(0, 99), st.integers(-60, 60)
)
def test_the_independent_reader_reads_whatever_is_written(
    fmt: FloatFormat, shape: list[int], transform: str, rounding: str, seed: int, exponent: int
) -> None:
    packed = encode(variable(shape, seed, exponent), fmt, transform, rounding, seed)
    found = independent_reader.read_frame(frame.to_bytes(packed, shape, seed % 2))
    assert (found.kind, found.exponent_bits, found.mantissa_bits) == (seed % 2, fmt.exponent_bits, fmt.mantissa_bits)
    assert found.shape == tuple(shape) and same(found.values.reshape(-1), decoded(packed))


@given(FORMATS, FORMATS, SHAPES, st.integers(0, 99), st.integers(0, 2))
def test_the_independent_reader_reads_whatever_model_is_written(
    tmp_path_factory: pytest.TempPathFactory,
    fmt: FloatFormat,
    update: FloatFormat,
    shape: list[int],
    seed: int,
    steps: int,
) -> None:
    model = nn.ParameterDict(
        {"two": variable(shape, seed, 0), "one": variable(shape, seed + 1, -9), "bias": torch.ones(3)}
    )
    encodings = {
        "two": CompressionPolicy(fmt, update_format=update, rounding="stochastic").encoding(),
        "one": CompressionPolicy(fmt).encoding(),
    }
    compress_(model, encodings)
    with torch.no_grad():
        for step in range(steps):
            model["two"].add_(variable(shape, seed + step, 0), alpha=0.01)
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(model, path)
    read = independent_reader.read_model(path.read_bytes())
    assert read.keys() == {"two", "one", "bias"}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, CompressedTensor) == (name != "bias")
        assert same(read[name], dense(parameter).numpy()), name


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 9), st.integers(0, 24), st.lists(st.integers(0, 4), max_size=3),
    st.floats(width=32), st.floats(width=32),
)  # fmt: skip
def test_both_readers_refuse_and_accept_the_same(
    seed: int, e: int, m: int, shape: list[int], factor: float, offset: float
) -> None:
    """Any codes, the unused exponent too; any factor and offset."""
    count, width = math.prod(shape), 1 + e + m
    codes = [int(code) & (2**width - 1) for code in np.random.default_rng(seed).integers(0, 2**32, count)]
    words = pack_by_design(codes, width).astype("<i4").tobytes() if width <= 32 else b""
    head = b"FOMC" + struct.pack("<BBBBff", 3, 0, e, m, factor, offset)
    tail = struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + words
    data = head + struct.pack("<I", xxhash.xxh3_64_intdigest(head + tail) % 2**32) + tail
    try:
        expected = independent_reader.read_frame(data).values
    except independent_reader.Refused:
        with pytest.raises(PayloadError):
            frame.from_bytes(data)
    else:
        values = decoded(frame.from_bytes(data).packed)
        assert np.isfinite(values).all() and same(values, expected.reshape(-1))


def test_the_independent_reader_is_independent() -> None:
    source = Path(independent_reader.__file__).read_text()
    assert not re.search(r"^\s*(import|from) (fedomc|tests)", source, flags=re.MULTILINE)
