import math
import random
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fedomc import CompressedTensor, Encoding, FloatFormat, FormatError, PayloadError
from fedomc.methods import encode, method_from_header, parse_method
from fedomc.serialization import frame
from tests.conftest import allocations, pack_by_design, randn

HEADER = struct.Struct("<4sBBBBIBBBB")
FIELDS = (
    "magic", "version", "kind", "method", "method_header", "checksum", "dimensions", "coding", "difference", "count",
)  # fmt: skip
NAMES = (
    "S1E1M0", "S1E2M3", "S1E3M7", "S1E8M23", "INT8", "INT8/32", "INT4", "INT4/256", "NF4", "NF4/128",
    "MXFP8", "MXFP8E5M2", "MXFP6", "MXFP6E3M2", "MXFP4", "S1E2M3/64", "S1E5M6/256", "S1E1M0/32",
)  # fmt: skip


def a_frame(name: str = "S1E2M3", shape: tuple[int, ...] = (7, 9), kind: int = frame.VARIABLE) -> bytes:
    return frame.to_bytes(encode(randn(*shape), parse_method(name)), shape, kind)


def checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) % 2**32


def sealed(data: bytes) -> bytes:
    """Put the right checksum into a forged frame."""
    return data[:8] + struct.pack("<I", checksum(data[:8] + data[12:])) + data[12:]


def forged(data: bytes, **fields: object) -> bytes:
    values = dict(zip(FIELDS, HEADER.unpack_from(data), strict=True)) | fields
    return sealed(HEADER.pack(*values.values()) + data[HEADER.size :])


def written(
    shape: tuple[int, ...],
    fields: Sequence[bytes] = (bytes(128), struct.pack("<ff", 1.0, 0.0)),
    method: tuple[int, bytes] = (1, bytes([2, 3])),
    lengths: Sequence[int] | None = None,
    **header: object,
) -> bytes:
    """Write a frame of any content: fields, a method by its tag and header, other lengths of the fields if wanted."""
    lengths = [len(field) for field in fields] if lengths is None else lengths
    tag, described = method
    counts = (0, len(shape), 0, 0, len(lengths))
    data = HEADER.pack(b"FOMC", frame.VERSION, 0, tag, len(described), *counts)
    data += struct.pack(f"<{len(shape)}Q{len(lengths)}Q", *shape, *lengths) + padded(described, 8)
    return forged(data + b"".join(padded(field, 4) for field in fields), **header)


def padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


def floats(scale: float, offset: float, codes: bytes = bytes(128)) -> tuple[bytes, bytes]:
    return codes, struct.pack("<ff", scale, offset)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", [frame.VARIABLE, frame.UPDATE])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (1024,), (1025, 2), (0, 3), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_round_trip(shape: tuple[int, ...], name: str, kind: int, copy: bool) -> None:
    method = parse_method(name)
    packed = encode(randn(*shape), method)
    data = frame.to_bytes(packed, shape, kind)
    padding = -packed.fields[1].nbytes % 4
    assert len(data) == 16 + 8 * len(shape) + 16 + 8 + packed.nbytes + padding == frame.size_of(packed, shape)
    found = frame.from_bytes(data, copy=copy)
    assert (found.shape, found.kind, found.packed.method, found.packed.numel) == (shape, kind, method, math.prod(shape))
    for field, one, other in zip(method.fields(packed.numel), found.packed.fields, packed.fields, strict=True):
        assert torch.equal(one, other) and one.dtype == field.dtype and len(one) == field.length
    assert frame.to_bytes(found.packed, shape, kind) == data == frame.to_bytes(packed, shape, kind)


def test_bytes_are_those_of_the_description() -> None:
    values = torch.tensor([[1.0, -0.5, 0.0], [7.5, 0.125, -7.5]])
    data = frame.to_bytes(encode(values, FloatFormat(2, 3), "none"), (2, 3), frame.UPDATE)
    codes = pack_by_design([0b001000, 0b100100, 0, 0b011111, 0b000001, 0b111111], 6)
    head = b"FOMC" + bytes([4, 1, 1, 2])
    tail = bytes([2, 0, 0, 2]) + struct.pack("<QQQQ", 2, 3, 128, 8) + bytes([2, 3, 0, 0, 0, 0, 0, 0])
    tail += codes.astype("<i4").tobytes() + struct.pack("<ff", 1.0, 0.0)
    assert data == head + struct.pack("<I", checksum(head + tail)) + tail


def test_bytes_of_a_method_with_byte_scales_are_those_of_the_description() -> None:
    values = torch.tensor([[1.0, -0.5, 0.0], [6, 4, -3]])
    data = frame.to_bytes(encode(values, parse_method("MXFP4")), (2, 3))
    codes = pack_by_design([0b0010, 0b1001, 0, 0b0111, 0b0110, 0b1101], 4)
    head = b"FOMC" + bytes([4, 0, 5, 2])
    tail = bytes([2, 0, 0, 2]) + struct.pack("<QQQQ", 2, 3, 128, 1) + bytes([2, 1, 0, 0, 0, 0, 0, 0])
    tail += codes.astype("<i4").tobytes() + bytes([127, 0, 0, 0])
    assert data == head + struct.pack("<I", checksum(head + tail)) + tail


def test_zero_copy_shares_the_memory() -> None:
    data = bytearray(a_frame())
    shared, own = frame.from_bytes(data, copy=False).packed, frame.from_bytes(data).packed
    before = own.codes.clone()
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    assert shared.codes.data_ptr() == address + 16 + 32 + 8 and own.codes.data_ptr() != shared.codes.data_ptr()
    data[56] ^= 1
    assert not torch.equal(shared.codes, before) and torch.equal(own.codes, before)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda b: memoryview(b"xyz" + b)[3:]])
@pytest.mark.parametrize("name", ["S1E2M3", "INT8", "MXFP6"])
def test_any_buffer_at_any_address(wrap: type, name: str) -> None:
    data = a_frame(name)
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


@pytest.mark.parametrize("name", ["S1E2M3", "S1E3M7", "INT4", "NF4", "MXFP8"])
def test_every_damaged_byte_is_found(name: str) -> None:
    data = a_frame(name)
    rng = random.Random(0)  # noqa: S311
    for at in range(len(data)):
        for value in {data[at] ^ 1, data[at] ^ 0x80, rng.randrange(256)} - {data[at]}:
            with pytest.raises(PayloadError, match=r"^encoder\.weight: "):
                frame.from_bytes(data[:at] + bytes([value]) + data[at + 1 :], "encoder.weight")


@pytest.mark.parametrize("name", ["S1E2M3", "INT8", "MXFP4"])
def test_every_truncation_and_addition_is_found(name: str) -> None:
    data = a_frame(name)
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
        ({"version": 3}, "version 3"),
        ({"kind": 3}, "kind 3"),
        ({"coding": 3}, "coding 3"),
        ({"difference": 1}, "coding 0, 1"),
        ({"coding": 1, "difference": 2}, "coding 1, 2"),
        ({"coding": 1}, "planes"),
        ({"method": 0}, "method 0 is unknown"),
        ({"method": 255}, "method 255 is unknown"),
        ({"method": 2}, "0203 is not the size of a block"),
        ({"method_header": 0}, "2 bytes, not 0"),
        ({"method_header": 1}, "padding of the method's header"),
        ({"method_header": 3}, "2 bytes, not 3"),
        ({"method_header": 9}, "2 bytes, not 9|padding of the method's header"),
        ({"method_header": 17}, "17 bytes of method"),
        ({"count": 0}, "S1E128M0"),
        ({"count": 9}, "9 fields"),
        ({"count": 255}, "fields"),
        ({"dimensions": 9}, "9 dimensions"),
        ({"dimensions": 255}, "dimensions"),
        ({"dimensions": 1, "count": 3}, "shape"),
    ],
)
def test_a_forged_header_with_the_right_checksum(fields: dict[str, object], message: str) -> None:
    data = a_frame()
    assert forged(data) == data
    with pytest.raises(PayloadError, match=f"^x: .*({message})"):
        frame.from_bytes(forged(data, **fields), "x")


S1E2M3, INT8, NF4, MXFP8 = (1, bytes([2, 3])), (2, b"\6"), (4, b"\6"), (5, bytes([4, 3]))
BLOCK_FLOAT = (7, bytes([6, 2, 3]))
WORDS = bytes(128)  # of 40 values


@pytest.mark.parametrize(
    ("method", "scales", "changes", "message"),
    [
        ((1, bytes([0, 3])), bytes(8), {}, "S1E0M3"),
        ((1, bytes([9, 3])), bytes(8), {}, "S1E9M3"),
        ((1, bytes([2, 24])), bytes(8), {}, "S1E2M24"),
        ((1, bytes([2, 20])), bytes(8), {}, "codes of shape"),
        ((1, b"\2"), bytes(8), {}, "2 bytes, not 1"),
        ((1, bytes([2, 3]) + bytes(14)), bytes(8), {}, "2 bytes, not 16"),
        ((1, b""), bytes(8), {}, "2 bytes, not 0"),
        ((2, b"\4"), bytes(4), {}, "04 is not the size"),
        ((3, b"\t"), bytes(4), {}, "09 is not the size"),
        ((4, b""), bytes(4), {}, "nothing is not the size"),
        ((4, b"\6\0"), bytes(4), {}, "0600 is not the size"),
        ((5, bytes([3, 3])), bytes(2), {}, "E3M3"),
        ((5, b"\4"), bytes(2), {}, "2 bytes, not 1"),
        (S1E2M3, struct.pack("<ff", math.nan, 0), {}, "not finite"),
        (S1E2M3, struct.pack("<ff", -math.inf, 0), {}, "not finite"),
        (S1E2M3, struct.pack("<ff", 1, math.inf), {}, "not finite"),
        (S1E2M3, struct.pack("<ff", 1e38, 0), {}, "range of float32"),
        (S1E2M3, struct.pack("<ff", -4e37, 3e38), {}, "range of float32"),
        (INT8, struct.pack("<f", math.nan), {}, "not finite"),
        (INT8, struct.pack("<f", math.inf), {}, "not finite"),
        (NF4, struct.pack("<f", -math.inf), {}, "not finite"),
        (MXFP8, bytes([255, 127]), {}, "NaN"),
        (MXFP8, bytes([127, 255]), {}, "NaN"),
        (MXFP8, bytes([127, 247]), {}, "range of float32"),
        (BLOCK_FLOAT, bytes([255]), {}, "NaN"),
        (BLOCK_FLOAT, bytes([253]), {}, "range of float32"),
        (S1E2M3, bytes(12), {}, "fields of"),
        (S1E2M3, bytes(4), {}, "fields of"),
        (INT8, bytes(8), {}, "fields of"),
        (MXFP8, bytes(1), {}, "fields of"),
        (MXFP8, bytes(3), {}, "fields of"),
        (INT8, bytes(4), {"lengths": (128,)}, "fields of"),
        (INT8, bytes(4), {"lengths": (128, 4, 0)}, "fields of"),
        (INT8, bytes(4), {"lengths": (128, 2**64 - 1)}, "fields of"),
        (INT8, bytes(4), {"lengths": (124, 8)}, "fields of"),
        (INT8, bytes(4), {"lengths": (0, 132)}, "fields of"),
        (INT8, bytes(4), {"lengths": (0, 4), "coding": 1}, "do not hold"),
        (INT8, bytes(4), {"lengths": (128, 4), "coding": 1}, "in planes"),
        (INT8, bytes(4), {"lengths": (124, 8), "coding": 1}, "in planes"),
        (MXFP8, b"\x7f\x7f\0\1", {"lengths": (128, 2)}, "padding of its scales"),
        (MXFP8, b"\x7f\x7f\1\0", {"lengths": (128, 2)}, "padding of its scales"),
    ],
)
def test_a_forged_method_or_field_with_the_right_checksum(
    method: tuple[int, bytes], scales: bytes, changes: dict[str, Any], message: str
) -> None:
    data = written((40,), (WORDS, scales), method, **changes)
    with pytest.raises(PayloadError, match=f"^x: .*{message}"):
        frame.from_bytes(data, "x")


@pytest.mark.parametrize(
    ("method", "scales"),
    [(INT8, bytes(4)), (NF4, b"\0\0\x80\xbf"), (MXFP8, bytes([246, 0])), (BLOCK_FLOAT, bytes([252]))],
)
def test_what_is_forged_there_is_right_otherwise(method: tuple[int, bytes], scales: bytes) -> None:
    assert frame.from_bytes(written((40,), (WORDS, scales), method)).packed.numel == 40


@pytest.mark.parametrize("name", ["INT8", "NF4", "MXFP8"])
def test_methods_that_no_frame_can_hold_are_not_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = encode(randn(40), parse_method(name))
    monkeypatch.setattr(type(packed.method), "header", lambda self: bytes(17))
    with pytest.raises(FormatError, match="header of 17 bytes"):
        frame.to_bytes(packed, (40,))


@pytest.mark.parametrize("method", [S1E2M3, INT8, NF4, MXFP8, BLOCK_FLOAT])
@pytest.mark.parametrize(
    "shape",
    [
        (2**63,), (2**64 - 1,), (2**32, 2**32), (2**31, 2**31, 4), (2**48,), (2**47, 2), (2**64 - 1, 2**64 - 1, 0),
        (0, 2**49), (2**20, 2**20), (1,) * 7 + (2**40,), (0, 2**48, 2**48),
    ],
)  # fmt: skip
@pytest.mark.parametrize("coding", [0, 1])
def test_huge_shapes_allocate_nothing(shape: tuple[int, ...], method: tuple[int, bytes], coding: int) -> None:
    known = method_from_header(*method).fields(math.prod(shape))
    lying = written(shape, (bytes(128), bytes(8)), method, coding=coding)
    claiming = written(shape, (bytes(128), bytes(8)), method, [field.nbytes % 2**64 for field in known], coding=coding)

    def parse() -> None:
        for data in (lying, claiming):
            with pytest.raises(PayloadError, match=r"^x: "):
                frame.from_bytes(data, "x")

    assert sum(size for size in allocations(parse) if size > 0) == 0


@pytest.mark.parametrize(
    ("method", "scales", "value"),
    [
        ("S1E8M7", struct.pack("<ff", 1, 0), -FloatFormat(8, 7).max_value),
        ("S1E8M23", struct.pack("<ff", 1, 0), -FloatFormat(8, 23).max_value),
        ("S1E2M3", struct.pack("<ff", 1, 0), -7.5),
        ("INT8", struct.pack("<f", 2), -2),
        ("INT4", struct.pack("<f", -2), 2),
        ("NF4", struct.pack("<f", 3), 3),
        ("MXFP8", bytes([127]), -448),
        ("MXFP8E5M2", bytes([128]), -2 * 57344),
        ("MXFP6", bytes([127]), -7.5),
        ("MXFP4", bytes([126]), -3),
        ("S1E4M3/32", bytes([127]), -480),
        ("S1E1M0/32", bytes([127]), -2),
    ],
)
def test_what_is_accepted_can_be_used(method: str, scales: bytes, value: float) -> None:
    """Codes that are never written, and lanes beyond the last value, may be anything; every value is finite."""
    known = parse_method(method)
    data = written((3,), (b"\xff" * known.fields(3)[0].nbytes, scales), (known.tag, known.header()))
    found = frame.from_bytes(data)
    assert found.packed.decode(torch.empty(3)).tolist() == [value] * 3
    p = CompressedTensor.from_packed(found.packed, Encoding(known), found.shape)
    p.mul_(0.5).add_(1)
    assert torch.isfinite(p.dequantize()).all()


def test_what_only_rounding_makes_infinite_is_refused() -> None:
    """Exactly, factor * 7.5 + offset is the largest float32; but the product is rounded up, and then the sum."""
    factor, offset = float.fromhex("0x1.fae15p+124"), float.fromhex("0x1.266618p+124")
    assert factor * 7.5 + offset <= torch.finfo(torch.float32).max
    assert torch.tensor(factor) * 7.5 + offset == math.inf
    with pytest.raises(PayloadError, match=r"^x: .*range of float32"):
        frame.from_bytes(written((1,), floats(factor, offset)), "x")


def test_extreme_factors_can_be_used() -> None:
    for factor in (1e-45, 1e-38, -1e30, 0.0):
        found = frame.from_bytes(written((3,), floats(factor, 0.25)))
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
    assert not parses(b"FOMC\4\0\1\2" + data)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "kind": st.integers(0, 255),
            "method_header": st.integers(0, 17),
            "dimensions": st.integers(0, 255) | st.integers(0, 9),
            "count": st.integers(0, 255) | st.integers(0, 9),
            "coding": st.integers(0, 3),
            "difference": st.integers(0, 2),
        },
    ),
    st.tuples(st.integers(0, 8), st.binary(max_size=16)) | st.sampled_from([S1E2M3, INT8, NF4, MXFP8, BLOCK_FLOAT]),
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 70), max_size=9),
    st.integers(0, 6),
    st.binary(max_size=12) | st.lists(st.floats(width=32), max_size=4).map(lambda x: struct.pack(f"<{len(x)}f", *x)),
)
def test_forged_headers_are_refused_or_harmless(
    fields: dict[str, object], method: tuple[int, bytes], shape: list[int], lanes: int, scales: bytes
) -> None:
    """With the right checksum, so that every other check counts."""
    if parses(written(tuple(shape), (bytes(128 * lanes), scales), method, **fields)):
        assert fields.get("kind", 0) in (0, 1, 2)


@given(st.sampled_from(NAMES), st.data())
def test_mutated_frames(name: str, data: st.DataObject) -> None:
    original = bytearray(a_frame(name))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 56) | st.integers(-8, -1))
        original[at] = data.draw(st.integers(0, 255))
    parses(sealed(bytes(original)))


def test_too_many_dimensions_cannot_be_written() -> None:
    with pytest.raises(PayloadError, match=r"^x has 9 dimensions"):
        frame.to_bytes(encode(torch.ones(1), FloatFormat(2, 3)), (1,) * 9, name="x")
