import math
import random
import struct

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fedomc import CompressedTensor, Encoding, FloatFormat, PayloadError
from fedomc.methods import Packed, encode
from fedomc.serialization import frame
from tests.conftest import allocations, pack_by_design, randn

HEADER = struct.Struct("<4sBBBBffIBBBB")
FIELDS = (
    "magic", "version", "kind", "exponent_bits", "mantissa_bits", "factor", "offset", "checksum",
    "dimensions", "coding", "difference", "zero",
)  # fmt: skip


def a_frame(name: str = "S1E2M3", shape: tuple[int, ...] = (7, 9), kind: int = frame.VARIABLE) -> bytes:
    return frame.to_bytes(encode(randn(*shape), FloatFormat.parse(name)), shape, kind)


def checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) % 2**32


def sealed(data: bytes) -> bytes:
    """Put the right checksum into a forged frame."""
    return data[:16] + struct.pack("<I", checksum(data[:16] + data[20:])) + data[20:]


def forged(data: bytes, **fields: object) -> bytes:
    values = dict(zip(FIELDS, HEADER.unpack_from(data), strict=True)) | fields
    return sealed(HEADER.pack(*values.values()) + data[HEADER.size :])


def with_shape(shape: tuple[int, ...], codes: bytes = b"", **fields: object) -> bytes:
    head = HEADER.pack(b"FOMC", frame.VERSION, 0, 2, 3, 1.0, 0.0, 0, len(shape), 0, 0, 0) + struct.pack(
        f"<{len(shape)}Q", *shape
    )
    return forged(head + codes, **fields)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", [frame.VARIABLE, frame.UPDATE])
@pytest.mark.parametrize("name", ["S1E1M0", "S1E2M3", "S1E3M7", "S1E8M23"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (1024,), (1025, 2), (0, 3), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_round_trip(shape: tuple[int, ...], name: str, kind: int, copy: bool) -> None:
    fmt = FloatFormat.parse(name)
    packed = Packed.zeros(fmt, 0, "cpu") if 0 in shape else encode(randn(*shape), fmt)
    data = frame.to_bytes(packed, shape, kind)
    assert len(data) == 24 + 8 * len(shape) + packed.codes.nbytes
    found = frame.from_bytes(data, copy=copy)
    assert (found.shape, found.kind, found.packed.method, found.packed.numel) == (shape, kind, fmt, math.prod(shape))
    assert torch.equal(found.packed.codes, packed.codes) and torch.equal(found.packed.fields[1], packed.fields[1])
    assert found.packed.codes.dtype == torch.int32 and found.packed.fields[1].dtype == torch.float32
    assert frame.to_bytes(found.packed, shape, kind) == data == frame.to_bytes(packed, shape, kind)


def test_bytes_are_those_of_the_description() -> None:
    values = torch.tensor([[1.0, -0.5, 0.0], [7.5, 0.125, -7.5]])
    data = frame.to_bytes(encode(values, FloatFormat(2, 3), "none"), (2, 3), frame.UPDATE)
    codes = pack_by_design([0b001000, 0b100100, 0, 0b011111, 0b000001, 0b111111], 6)
    head = b"FOMC" + bytes([3, 1, 2, 3]) + struct.pack("<ff", 1.0, 0.0)
    tail = struct.pack("<IQQ", 2, 2, 3) + codes.astype("<i4").tobytes()
    assert data == head + struct.pack("<I", checksum(head + tail)) + tail


def test_zero_copy_shares_the_memory() -> None:
    data = bytearray(a_frame())
    shared, own = frame.from_bytes(data, copy=False).packed, frame.from_bytes(data).packed
    before = own.codes.clone()
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    assert shared.codes.data_ptr() == address + 24 + 16 and own.codes.data_ptr() != shared.codes.data_ptr()
    data[40] ^= 1
    assert not torch.equal(shared.codes, before) and torch.equal(own.codes, before)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda b: memoryview(b"xyz" + b)[3:]])
def test_any_buffer_at_any_address(wrap: type) -> None:
    data = a_frame()
    for copy in (True, False):
        found = frame.from_bytes(wrap(data), copy=copy)
        assert frame.to_bytes(found.packed, found.shape) == data


def test_a_received_base_is_never_written() -> None:
    values = randn(40, 60)
    data = frame.to_bytes(encode(values, FloatFormat(2, 3)), (40, 60))
    before = bytes(bytearray(data))
    found = frame.from_bytes(data, copy=False)
    encoding = Encoding(FloatFormat(2, 3), FloatFormat(2, 3))
    p = CompressedTensor.from_packed(found.packed, encoding, found.shape)
    p.add_(values).mul_(0.5)
    p[0] = 1.0
    p.copy_(CompressedTensor.from_dense(values + 1, "S1E2M3", update_format="S1E2M3"))
    assert data == before


@pytest.mark.parametrize("name", ["S1E2M3", "S1E3M7"])
def test_every_damaged_byte_is_found(name: str) -> None:
    data = a_frame(name)
    rng = random.Random(0)  # noqa: S311
    for at in range(len(data)):
        for value in {data[at] ^ 1, data[at] ^ 0x80, rng.randrange(256)} - {data[at]}:
            with pytest.raises(PayloadError, match=r"^encoder\.weight: "):
                frame.from_bytes(data[:at] + bytes([value]) + data[at + 1 :], "encoder.weight")


def test_every_truncation_and_addition_is_found() -> None:
    data = a_frame()
    for length in range(len(data)):
        with pytest.raises(PayloadError, match=r"^encoder\.weight: "):
            frame.from_bytes(data[:length], "encoder.weight")
    for more in (1, 4, 128):
        with pytest.raises(PayloadError, match=r"^encoder\.weight: "):
            frame.from_bytes(data + bytes(more), "encoder.weight")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magic": b"PK\3\4"}, "not a compressed variable"),
        ({"version": 2}, "version 2"),
        ({"kind": 3}, "kind 3"),
        ({"coding": 3}, "coding 3"),
        ({"difference": 1}, "coding 0, 1"),
        ({"coding": 1, "difference": 2}, "coding 1, 2"),
        ({"zero": 1}, "coding 0, 0, 1"),
        ({"coding": 1}, "planes"),
        ({"exponent_bits": 0}, "S1E0M3"),
        ({"exponent_bits": 9}, "S1E9M3"),
        ({"mantissa_bits": 24}, "S1E2M24"),
        ({"mantissa_bits": 20}, "codes of shape"),
        ({"factor": math.nan}, "not finite"),
        ({"factor": -math.inf}, "not finite"),
        ({"offset": math.inf}, "not finite"),
        ({"factor": 1e38}, "range of float32"),
        ({"factor": -4e37, "offset": 3e38}, "range of float32"),
        ({"dimensions": 9}, "9 dimensions"),
        ({"dimensions": 255}, "dimensions"),
        ({"dimensions": 1}, "codes of shape"),
    ],
)
def test_a_forged_header_with_the_right_checksum(fields: dict[str, object], message: str) -> None:
    data = a_frame()
    assert forged(data) == data
    with pytest.raises(PayloadError, match=f"^x: .*{message}"):
        frame.from_bytes(forged(data, **fields), "x")


@pytest.mark.parametrize(
    "shape",
    [
        (2**63,), (2**64 - 1,), (2**32, 2**32), (2**31, 2**31, 4), (2**48,), (2**47, 2), (2**64 - 1, 2**64 - 1, 0),
        (0, 2**49), (2**20, 2**20), (1,) * 7 + (2**40,), (0, 2**48, 2**48),
    ],
)  # fmt: skip
def test_huge_shapes_allocate_nothing(shape: tuple[int, ...]) -> None:
    data = with_shape(shape)

    def parse() -> None:
        with pytest.raises(PayloadError, match=r"^x: "):
            frame.from_bytes(data, "x")

    assert sum(size for size in allocations(parse) if size > 0) == 0


def test_what_is_accepted_can_be_used() -> None:
    """Codes of the unused exponent and lanes beyond the last value may be anything; every value is finite."""
    for e, m in ((8, 7), (8, 23), (2, 3)):
        fmt = FloatFormat(e, m)
        codes = b"\xff" * 4 * (32 * math.ceil(fmt.bits / 32))
        found = frame.from_bytes(with_shape((3,), codes, exponent_bits=e, mantissa_bits=m))
        values = found.packed.decode(torch.empty(3))
        assert values.tolist() == [-fmt.max_value] * 3
        p = CompressedTensor.from_packed(found.packed, Encoding(fmt), found.shape)
        p.mul_(0.5).add_(1)
        assert torch.isfinite(p.dequantize()).all()


def test_what_only_rounding_makes_infinite_is_refused() -> None:
    """Exactly, factor * 7.5 + offset is the largest float32; but the product is rounded up, and then the sum."""
    factor, offset = float.fromhex("0x1.fae15p+124"), float.fromhex("0x1.266618p+124")
    assert factor * 7.5 + offset <= torch.finfo(torch.float32).max
    assert torch.tensor(factor) * 7.5 + offset == math.inf
    with pytest.raises(PayloadError, match=r"^x: .*range of float32"):
        frame.from_bytes(with_shape((1,), bytes(128), factor=factor, offset=offset), "x")


def test_extreme_factors_can_be_used() -> None:
    for factor in (1e-45, 1e-38, -1e30, 0.0):
        found = frame.from_bytes(with_shape((3,), bytes(128), factor=factor, offset=0.25))
        p = CompressedTensor.from_packed(found.packed, Encoding(found.packed.method), found.shape)
        assert p.dequantize().tolist() == [0.25] * 3
        assert p.add_(1).dequantize().tolist() == pytest.approx([1.25] * 3)


def parses(data: bytes) -> bool:
    try:
        found = frame.from_bytes(data, "x")
    except PayloadError as error:
        assert str(error).startswith("x: ")
        return False
    values = CompressedTensor.from_packed(found.packed, Encoding(found.packed.method), found.shape).dequantize()
    return bool(torch.isfinite(values).all())


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    assert not parses(data)
    assert not parses(b"FOMC\2\0\2\3" + data)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "kind": st.integers(0, 255),
            "exponent_bits": st.integers(0, 255),
            "mantissa_bits": st.integers(0, 255),
            "factor": st.floats(width=32),
            "offset": st.floats(width=32),
            "dimensions": st.integers(0, 255) | st.integers(0, 9),
            "coding": st.integers(0, 3),
            "difference": st.integers(0, 2),
        },
    ),
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 70), max_size=9),
    st.integers(0, 6),
)
def test_forged_headers_are_refused_or_harmless(fields: dict[str, object], shape: list[int], lanes: int) -> None:
    """With the right checksum, so that every other check counts."""
    data = with_shape(tuple(shape), bytes(128 * lanes), **fields)
    if parses(data):
        assert fields.get("kind", 0) in (0, 1, 2)
        assert 1 <= fields.get("exponent_bits", 2) <= 8 and 0 <= fields.get("mantissa_bits", 3) <= 23


@given(st.data())
def test_mutated_frames(data: st.DataObject) -> None:
    original = bytearray(a_frame())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 39))
        original[at] = data.draw(st.integers(0, 255))
    parses(sealed(bytes(original)))


def test_too_many_dimensions_cannot_be_written() -> None:
    with pytest.raises(PayloadError, match=r"^x has 9 dimensions"):
        frame.to_bytes(encode(torch.ones(1), FloatFormat(2, 3)), (1,) * 9, name="x")
