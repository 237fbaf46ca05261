"""Entropy coding: every bit comes back, nothing grows, and bytes from outside do no harm."""

import random
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fedomc import FloatFormat, PayloadError, PolicyError, codec
from fedomc.methods import Method, Packed, encode, parse_method
from fedomc.serialization import entropy, frame
from tests import independent_reader
from tests.conftest import allocations, pack_by_design, randn
from tests.serialization.test_frame import NAMES, sealed, written

FORMATS = st.builds(FloatFormat, st.integers(1, 8), st.integers(0, 23))
METHODS = FORMATS | st.sampled_from([parse_method(name) for name in NAMES])
ORDERS = ("sign-magnitude", "twos-complement", "unsigned")
CODING, DIFFERENCE = 13, 14
"""Where a frame says how its codes are written."""

BITS = [2, 4, 6, 8, 9, 11, 16, 17, 19, 24, 25, 32]
SIZES = [1, 33, 1025, entropy.SEGMENT - 1, entropy.SEGMENT + 1]


def packed_from(codes: "list[int] | np.ndarray", method: Method) -> Packed:
    packed = Packed.zeros(method, len(codes), "cpu")
    signed = torch.from_numpy(np.array(codes, dtype=np.uint32).view(np.int32))
    codec.pack(signed, method.code_bits, packed.codes)
    return packed


def weights(fmt: str = "S1E3M7", size: int = 5000, seed: int = 0) -> Packed:
    return encode(randn(size, seed=seed), parse_method(fmt))


def stepped(fmt: str = "S1E3M7", size: int = 5000) -> Packed:
    """Give the codes of the same weights after a small step, mostly of zeros."""
    step = randn(size, seed=1) * (torch.arange(size) // 64 % 2) * 0.01
    return encode(randn(size) + step, parse_method(fmt))


def test_packing_is_that_of_the_layout() -> None:
    for bits in range(2, 33):
        for count in (0, 1, 32, 33, 1024, 2049):
            codes = [int(x) for x in np.random.default_rng(bits).integers(0, 2**bits, count)]
            words = torch.empty(codec.words_of(count, bits), dtype=torch.int32)
            signed = torch.from_numpy(np.array(codes, dtype=np.uint32).view(np.int32))
            assert np.array_equal(codec.pack(signed, bits, words).numpy(), pack_by_design(codes, bits))
            assert torch.equal(codec.unpack(words, count, bits), signed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("way", [entropy.BYTES, entropy.BITS])
@pytest.mark.parametrize("order", [None, *ORDERS])
def test_every_bit_comes_back(bits: int, way: int, order: str | None) -> None:
    """Each way, also where it is not chosen: any codes, both zeros and the extremes next to each other."""
    draw = np.random.default_rng(bits)
    top = 1 << (bits - 1)
    special = [0, top, 1, top + 1, top - 1, 2 * top - 1]
    for size in SIZES[:4] if bits != 11 else SIZES:
        sent, codes = (np.append(special, draw.integers(0, 2 * top, size))[:size] for _ in range(2))
        codes[: len(special)] = codes[: len(special)][::-1].copy()
        fmt = FloatFormat(min(bits - 1, 8), max(0, bits - 9))
        words, old = packed_from(codes, fmt).codes, packed_from(sent, fmt).codes if order else None
        body = b"" if old is None else struct.pack("<I", entropy.checksum(old))
        for start in range(0, size, entropy.SEGMENT):
            symbols = entropy._symbols(words, start, min(entropy.SEGMENT, size - start), bits, old, order or ORDERS[0])
            body += entropy._segment(symbols, bits, way, zstandard.ZstdCompressor())
        found = entropy.decompress(memoryview(body), way, order is not None, size, bits, old, "x", order or ORDERS[0])
        assert torch.equal(found, words)


@given(METHODS, st.integers(0, 3000), st.integers(0, 99), st.floats(0, 1), st.sampled_from([0, 1, 2]))
def test_a_frame_comes_back_and_is_never_larger(method: Method, size: int, seed: int, spread: float, kind: int) -> None:
    values = randn(size, seed=seed) * (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < spread)
    packed, sent = encode(values, method), encode(values + randn(size, seed=seed + 1) * 1e-3, method)
    plain = frame.to_bytes(packed, (size,), kind)
    for old in (None, sent):
        data = frame.to_bytes(packed, (size,), kind, lossless=True, sent=old)
        assert len(data) <= len(plain) == frame.size_of(packed, (size,))
        assert data == frame.to_bytes(packed, (size,), kind, lossless=True, sent=old)
        found = frame.from_bytes(data, shape=(size,), sent=old)
        assert (found.shape, found.kind, found.packed.method) == ((size,), kind, method)
        assert all(map(torch.equal, found.packed.fields, packed.fields))


@given(METHODS, st.integers(1, 700), st.integers(0, 99))
def test_the_independent_reader_reads_it(method: Method, size: int, seed: int) -> None:
    values, bits = randn(size, seed=seed) * (torch.arange(size) // 100 % 2), method.code_bits
    packed, sent = encode(values, method), encode(values * 1.01, method)
    old = codec.unpack(sent.codes, size, bits).tolist()
    data = frame.to_bytes(packed, (size,), lossless=True, sent=sent)
    if size > 600:
        assert data[CODING] and len(data) < frame.size_of(packed, (size,))
    read = independent_reader.read_frame(data, [code & (2**bits - 1) for code in old])
    assert np.array_equal(read.values, packed.decode(torch.empty(size)).numpy())


def test_several_segments() -> None:
    size = 2 * entropy.SEGMENT + 1500
    packed, sent = stepped("S1E2M3", size), weights("S1E2M3", size)
    for old in (None, sent):
        data = frame.to_bytes(packed, (size,), lossless=True, sent=old)
        assert data[CODING] and torch.equal(frame.from_bytes(data, sent=old).packed.codes, packed.codes)
        codes = codec.unpack(sent.codes, size, 6).tolist()
        read = independent_reader.read_frame(data, codes)
        assert np.array_equal(read.values, packed.decode(torch.empty(size)).numpy())


def test_the_ways_are_chosen_by_what_they_gain() -> None:
    def how(packed: Packed, sent: Packed | None = None) -> tuple[int, int]:
        data = frame.to_bytes(packed, (packed.numel,), lossless=True, sent=sent)
        return data[CODING], data[DIFFERENCE]

    assert how(weights()) == (entropy.BYTES, 0)
    update = encode(randn(5000) * (torch.arange(5000) // 512 % 4 == 0), FloatFormat(2, 1))
    assert how(update) == (entropy.BITS, 0)
    assert how(stepped(), weights()) == (entropy.BYTES, 1)
    assert how(stepped(), weights(seed=5)) == (entropy.BYTES, 0)  # another variable: the difference is worse
    noise = packed_from(np.random.default_rng(0).integers(0, 2**11, 4096), FloatFormat(3, 7))
    assert how(noise) == (entropy.PLAIN, 0)


def test_a_step_costs_the_same_on_both_sides_of_zero() -> None:
    """Differences follow the values: from -0 to 0, and from one subnormal to its neighbour, is one step."""
    fmt = FloatFormat(2, 3)
    ordered = [*(32 + x for x in range(31, -1, -1)), *range(32)]
    values = packed_from(ordered, fmt).decode(torch.empty(64))
    assert torch.equal(values.sort().values, values)
    steps_of_one(ordered, fmt)


@pytest.mark.parametrize(
    ("name", "ordered"),
    [
        ("INT8", [*range(128, 256), *range(128)]),
        ("INT4", [*range(8, 16), *range(8)]),
        ("NF4", list(range(16))),
        ("MXFP6", [*range(63, 31, -1), *range(32)]),
    ],
)
def test_a_step_costs_the_same_in_every_order_of_codes(name: str, ordered: list[int]) -> None:
    method = parse_method(name)
    packed = packed_from(ordered, method)
    packed.fields[1].fill_(1 if packed.fields[1].dtype is torch.float32 else 127)
    values = packed.decode(torch.empty(len(ordered)))
    assert torch.equal(values.sort().values, values)
    steps_of_one(ordered, method)


def steps_of_one(ordered: list[int], method: Method) -> None:
    count, bits, order = len(ordered) - 1, method.code_bits, method.code_order
    sent, new = packed_from(ordered[:-1], method), packed_from(ordered[1:], method)
    assert entropy._symbols(new.codes, 0, count, bits, sent.codes, order).tolist() == [2] * count
    assert entropy._symbols(sent.codes, 0, count, bits, new.codes, order).tolist() == [1] * count


def test_a_difference_needs_the_codes_that_were_sent() -> None:
    sent = weights()
    data = frame.to_bytes(stepped(), (5000,), lossless=True, sent=sent)
    for other in (None, weights("S1E3M6"), weights(size=4999), weights(seed=7)):
        with pytest.raises(PayloadError, match=r"^x is a difference"):
            frame.from_bytes(data, "x", sent=other)
    sent.fields[1][0] = 3.0  # only codes count
    assert torch.equal(frame.from_bytes(data, "x", sent=sent).packed.codes, stepped().codes)


# ---- bytes from outside ---------------------------------------------------------------------------------------------


def parses(data: bytes, **kwargs: object) -> bool:
    try:
        found = frame.from_bytes(data, "encoder.weight", **kwargs)  # type: ignore[arg-type]
    except PayloadError as error:
        assert str(error).startswith("encoder.weight")
        return False
    return bool(torch.isfinite(found.packed.decode(torch.empty(found.packed.numel))).all())


def examples() -> list[tuple[bytes, Packed | None]]:
    sent, integers = weights(size=700), weights("INT8", 700)
    small = encode(randn(700), FloatFormat.parse("S1E3M7"))
    return [
        (frame.to_bytes(small, (700,), lossless=True), None),
        (frame.to_bytes(stepped(size=700), (700,), lossless=True, sent=sent), sent),
        (frame.to_bytes(stepped("MXFP6", 700), (700,), lossless=True), None),
        (frame.to_bytes(stepped("INT8", 700), (700,), lossless=True, sent=integers), integers),
    ]


@pytest.mark.parametrize("number", range(4))
def test_every_damaged_byte_and_every_truncation_is_found(number: int) -> None:
    data, sent = examples()[number]
    assert data[CODING] and parses(data, sent=sent)
    draw = random.Random(0)  # noqa: S311
    for at in range(len(data)):
        for value in {data[at] ^ 1, data[at] ^ 0x80, draw.randrange(256)} - {data[at]}:
            assert not parses(data[:at] + bytes([value]) + data[at + 1 :], sent=sent)
        assert not parses(data[:at], sent=sent)
    assert not parses(data + b"\0", sent=sent) and not parses(sealed(data + b"\0"), sent=sent)


@given(st.data())
def test_planes_that_were_forged_are_refused_or_harmless(data: st.DataObject) -> None:
    """With the right checksum, so that every other check counts."""
    original, sent = examples()[data.draw(st.integers(0, 3))]
    forged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        forged[data.draw(st.integers(12, len(forged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(forged)) | st.integers(24, len(forged)))
    parses(sealed(bytes(forged[:cut])), sent=sent)


@given(st.binary(max_size=200), st.integers(1, 2), st.integers(0, 1), st.integers(0, 2**20))
def test_random_planes(body: bytes, way: int, difference: int, size: int) -> None:
    sent = Packed.zeros(FloatFormat(2, 3), size, "cpu")
    prefix = struct.pack("<I", entropy.checksum(sent.codes)) if difference else b""
    for shape in (None, (size,)):
        parses(framed(size, prefix + body, way, difference), shape=shape, sent=sent)


def framed(size: int, body: bytes, way: int, difference: int = 0) -> bytes:
    return written((size,), (body, struct.pack("<ff", 1.0, 0.0)), coding=way, difference=difference)


def planes(size: int, piece: bytes) -> bytes:
    return (struct.pack("<I", len(piece)) + piece) * -(-size // entropy.SEGMENT)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    """Zeros without end, claimed by the frame or hidden in zstd."""
    zeros = zstandard.ZstdCompressor().compress(bytes(entropy.SEGMENT))
    huge = zstandard.ZstdCompressor().compress(bytes(2**30))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**30))
    window = b"\x28\xb5\x2f\xfd\x80\xa0" + struct.pack("<I", entropy.SEGMENT) + zeros[-8:]  # 2**30 bytes of history
    attacks = [
        framed(2**46, planes(entropy.SEGMENT, zeros), entropy.BYTES),
        framed(2**31, planes(2**31, zeros[:8]), entropy.BYTES),
        framed(2**31, planes(2**31, zeros), entropy.BYTES),
        framed(entropy.SEGMENT, planes(1, huge), entropy.BYTES),
        framed(entropy.SEGMENT, planes(1, unknown), entropy.BYTES),
        framed(entropy.SEGMENT, planes(1, window), entropy.BYTES),
        framed(entropy.SEGMENT, planes(1, zeros + zeros), entropy.BYTES),
        framed(entropy.SEGMENT, planes(1, zeros + b"\0"), entropy.BYTES),
        framed(entropy.SEGMENT, planes(1, zeros[:-1]), entropy.BYTES),
        framed(entropy.SEGMENT, planes(1, b"\x50\x2a\x4d\x18\0\0\0\0"), entropy.BYTES),
    ]
    for number, data in enumerate(attacks):
        for shape in (None, (7, 7)):
            allocated = allocations(lambda data=data, shape=shape: parses(data, shape=shape))
            assert sum(size for size in allocated if size > 0) <= entropy.SEGMENT, number
    tracemalloc.start()
    assert not any(parses(data, shape=shape) for data in attacks for shape in (None, (7, 7)))
    assert not any(parses(data, shape=(entropy.SEGMENT,)) for data in attacks[3:])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    # What is that large and expected is read: a variable of zeros is no attack.
    size = 40 * entropy.SEGMENT
    zero = Packed.zeros(FloatFormat(2, 3), size, "cpu")
    data = frame.to_bytes(zero, (size,), lossless=True)
    assert len(data) < zero.codes.nbytes / frame.MAX_EXPANSION
    assert not parses(data) and parses(data, shape=(size,))


def test_a_plane_with_larger_values_than_its_bits_is_refused() -> None:
    data = framed(100, planes(1, bytes([64]) * 99 + b"\0"), entropy.BYTES)
    assert len(data) < len(frame.to_bytes(Packed.zeros(FloatFormat(2, 3), 100, "cpu"), (100,)))
    assert not parses(data)
    assert parses(framed(100, planes(1, bytes([63]) * 100), entropy.BYTES))


def test_another_shape_is_refused() -> None:
    for data in (frame.to_bytes(weights(), (5000,), lossless=True), frame.to_bytes(weights(), (5000,))):
        with pytest.raises(PayloadError, match=r"^x: .*\(5000,\), but \(50, 100\) is expected"):
            frame.from_bytes(data, "x", shape=(50, 100))


def test_without_zstd_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data, plain = frame.to_bytes(weights(), (5000,), lossless=True), frame.to_bytes(weights(), (5000,))
    monkeypatch.setattr(entropy, "zstandard", None)
    assert frame.to_bytes(frame.from_bytes(plain).packed, (5000,)) == plain
    with pytest.raises(PayloadError, match=r"^x .*pip install 'fedomc\[lossless\]'"):
        frame.from_bytes(data, "x")
    with pytest.raises(PolicyError, match=r"pip install 'fedomc\[lossless\]'"):
        frame.to_bytes(weights(), (5000,), lossless=True)


def test_the_library_imports_without_zstd() -> None:
    script = "import sys; sys.modules['zstandard'] = None; from fedomc.serialization import frame; "
    script += "print(frame.entropy.zstandard)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "None"
