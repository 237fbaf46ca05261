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
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    PayloadError,
    compress_,
    load_model,
    save_model,
)
from fedomc.methods import FloatFormat, Method, Packed, encode, parse_method
from fedomc.methods.block_floats import BlockFloat
from fedomc.serialization import frame
from tests import independent_reader
from tests.conftest import dense, pack_by_design
from tests.serialization.test_frame import sealed

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
    method = parse_method(expected["method"])
    packed = Packed.zeros(method, len(expected["sent"]), "cpu")
    packed.codes.copy_(torch.from_numpy(pack_by_design(expected["sent"], method.code_bits)))
    return packed


def parameters(expected: Any) -> list[float]:
    """Give what a vector has beside its codes: scale and offset, or a scale for each block."""
    if "factor" in expected:
        return np.float32([expected["factor"], expected["offset"]]).tolist()  # type: ignore[no-any-return]
    return np.float32(expected["scales"]).tolist()  # type: ignore[no-any-return]


def test_the_vectors_are_there() -> None:
    assert len(FRAMES) == 48 and (VECTORS / "model.safetensors").exists()


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_has_the_values_that_are_written_beside_it(name: str) -> None:
    data, expected, values = vector(name)
    found = frame.from_bytes(data, sent=codes_sent(expected))
    method = parse_method(expected["method"])
    assert (found.kind, found.packed.method, list(found.shape)) == (expected["kind"], method, expected["shape"])
    assert found.packed.codes.tolist() == pack_by_design(expected["codes"], method.code_bits).tolist()
    assert found.packed.fields[1].tolist() == parameters(expected)
    assert same(decoded(found.packed).reshape(values.shape), values)


@pytest.mark.parametrize("name", FRAMES)
def test_the_independent_reader_finds_the_same(name: str) -> None:
    data, expected, values = vector(name)
    found = independent_reader.read_frame(data, expected.get("sent"))
    assert (found.kind, found.method) == (expected["kind"], str(parse_method(expected["method"])))
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
    if expected.get("factor") == 1 and expected["offset"] == 0 and "unused" not in name:
        packed = encode(torch.from_numpy(values.copy()), found.packed.method, "none")
        packed.fields[1].copy_(found.packed.fields[1])  # one of the vectors has an offset of -0
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


def test_a_file_for_other_programs_has_the_values_that_are_written_beside_it(tmp_path: Path) -> None:
    path = VECTORS / "interchange.safetensors"
    expected = json.loads((VECTORS / "interchange.json").read_text())
    model = nn.ParameterDict({name: torch.zeros(how["shape"], device="meta") for name, how in expected.items()})
    load_model(model, path)
    read = independent_reader.read_model(path.read_bytes())
    assert expected.keys() == read.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        values = np.array(expected[name]["values"], dtype=np.float32).reshape(expected[name]["shape"])
        assert same(dense(value).numpy(), values) and same(read[name], values), name
    save_model(model, tmp_path / "again", {"note": "a test vector"}, interchange=True)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


BLOCKWISE = [f"{name}/{block}" for name in ("INT8", "INT4", "NF4") for block in (32, 64, 128, 256)]
OCP = ["MXFP8", "MXFP8E5M2", "MXFP6", "MXFP6E3M2", "MXFP4"]
FORMATS = st.builds(FloatFormat, st.integers(1, 8), st.integers(0, 23))
BLOCK_FLOATS = st.builds(BlockFloat, st.sampled_from([32, 64, 128, 256]), st.integers(1, 5), st.integers(0, 6))
METHODS = FORMATS | BLOCK_FLOATS | st.sampled_from([parse_method(name) for name in BLOCKWISE + OCP])
SHAPES = st.lists(st.integers(0, 5), max_size=4) | st.lists(st.integers(0, 2300), min_size=1, max_size=1)
TRANSFORMS = st.sampled_from(["none", "affine", "scaled", "scaled-affine"])


def variable(shape: list[int], seed: int, exponent: int) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(math.prod(shape), dtype=np.float32)
    return torch.from_numpy(values * np.float32(2.0**exponent)).reshape(shape)


@given(
    METHODS, SHAPES, TRANSFORMS, st.sampled_from(["nearest", "stochastic"]), st.integers(0, 99), st.integers(-60, 60)
)
def test_the_independent_reader_reads_whatever_is_written(
    method: Method, shape: list[int], transform: str, rounding: str, seed: int, exponent: int
) -> None:
    packed = encode(variable(shape, seed, exponent), method, transform, rounding, seed)
    found = independent_reader.read_frame(frame.to_bytes(packed, shape, seed % 2))
    assert (found.kind, found.method, found.shape) == (seed % 2, str(method), tuple(shape))
    assert same(found.values.reshape(-1), decoded(packed))


@given(METHODS, METHODS, SHAPES, st.integers(0, 99), st.integers(0, 2))
def test_the_independent_reader_reads_whatever_model_is_written(
    tmp_path_factory: pytest.TempPathFactory,
    method: Method,
    update: Method,
    shape: list[int],
    seed: int,
    steps: int,
) -> None:
    model = nn.ParameterDict(
        {"two": variable(shape, seed, 0), "one": variable(shape, seed + 1, -9), "bias": torch.ones(3)}
    )
    encodings = {
        "two": CompressionPolicy(method, update_format=update, rounding="stochastic").encoding(),
        "one": CompressionPolicy(method).encoding(),
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


def framed(tag: int, header: bytes, shape: list[int], codes: list[int], width: int, scales: bytes) -> bytes:
    """Write a frame of any codes and scales, of methods that do not exist too."""
    words = pack_by_design(codes, width).astype("<i4").tobytes() if width <= 32 else b""
    head = b"FOMC" + struct.pack("<BBBBIBBBB", 4, 0, tag, len(header), 0, len(shape), 0, 0, 2)
    head += struct.pack(f"<{len(shape)}Q2Q", *shape, len(words), len(scales)) + header + bytes(-len(header) % 8)
    return sealed(head + words + scales + bytes(-len(scales) % 4))


def both_agree(data: bytes) -> None:
    """Check that either both readers refuse a frame, or both find the same finite values."""
    try:
        expected = independent_reader.read_frame(data).values
    except independent_reader.Refused:
        with pytest.raises(PayloadError):
            frame.from_bytes(data)
    else:
        values = decoded(frame.from_bytes(data).packed)
        assert np.isfinite(values).all() and same(values, expected.reshape(-1))


def any_codes(seed: int, count: int, width: int) -> list[int]:
    return [int(code) & (2**width - 1) for code in np.random.default_rng(seed).integers(0, 2**32, count)]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 9), st.integers(0, 24), st.lists(st.integers(0, 4), max_size=3),
    st.floats(width=32), st.floats(width=32),
)  # fmt: skip
def test_both_readers_refuse_and_accept_the_same_floats(
    seed: int, e: int, m: int, shape: list[int], scale: float, offset: float
) -> None:
    """Any codes, the unused exponent too; any scale and offset."""
    codes = any_codes(seed, math.prod(shape), 1 + e + m)
    both_agree(framed(1, bytes([e, m]), shape, codes, 1 + e + m, struct.pack("<ff", scale, offset)))


@given(
    st.integers(0, 2**64 - 1),
    st.sampled_from([(2, 8), (3, 4), (4, 4), (6, 4), (0, 8)]),
    st.integers(4, 9),
    st.integers(0, 300),
    st.lists(st.floats(width=32) | st.floats(2.0**118, 2.0**122, width=32), min_size=10, max_size=10),
)
def test_both_readers_refuse_and_accept_the_same_blocks(
    seed: int, how: tuple[int, int], log: int, count: int, scales: list[float]
) -> None:
    """Any codes, -128 and -8 too; any scales, and unknown tags."""
    tag, width = how
    second = struct.pack("<10f", *scales)[: 4 * -(-count // 2**log)]
    both_agree(framed(tag, bytes([log]), [count], any_codes(seed, count, width), width, second))


@given(
    st.integers(0, 2**64 - 1), st.integers(1, 6), st.integers(0, 4), st.integers(0, 300),
    st.binary(min_size=10, max_size=10) | st.binary(min_size=3, max_size=3).map(lambda data: data * 4),
    st.integers(0, 255),
)  # fmt: skip
def test_both_readers_refuse_and_accept_the_same_ocp_formats(
    seed: int, e: int, m: int, count: int, scales: bytes, most: int
) -> None:
    """Any codes, NaN and infinity too; any scales up to ``most``."""
    second = bytes(min(scale, most) for scale in scales[: -(-count // 32)])
    both_agree(framed(5, bytes([e, m]), [count], any_codes(seed, count, 1 + e + m), 1 + e + m, second))


@pytest.mark.parametrize("scale", [2.0**121, float.fromhex("0x1.fep+120"), float.fromhex("0x1.fffffep+120")])
@pytest.mark.parametrize("code", [0x80, 0x81, 0x7F, 0])
@pytest.mark.parametrize(("tag", "width"), [(2, 8), (3, 4)])
def test_an_integer_beyond_those_that_are_written_may_not_become_infinite(
    tag: int, width: int, code: int, scale: float
) -> None:
    code, scale = code >> (8 - width) | code & 1, scale * 2.0 ** (8 - width)
    both_agree(framed(tag, b"\6", [3], [0, code & (2**width - 1), 1], width, struct.pack("<f", scale)))


def test_the_independent_reader_is_independent() -> None:
    source = Path(independent_reader.__file__).read_text()
    assert not re.search(r"^\s*(import|from) (fedomc|tests)", source, flags=re.MULTILINE)
