"""The lossless stage: every bit comes back, nothing grows, and bytes from outside do no harm."""

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
from fedomc.methods import Packed, encode
from fedomc.serialization import entropy as lossless
from fedomc.serialization import frame
from tests import independent_reader
from tests.conftest import allocations, pack_by_design, randn
from tests.serialization.test_frame import sealed

FORMATS = st.builds(FloatFormat, st.integers(1, 8), st.integers(0, 23))
BITS = [2, 4, 6, 8, 9, 11, 16, 17, 19, 24, 25, 32]
SIZES = [1, 33, 1025, lossless.SEGMENT - 1, lossless.SEGMENT + 1]


def packed_from(codes: "list[int] | np.ndarray", fmt: FloatFormat) -> Packed:
    words = torch.empty(codec.words_of(len(codes), fmt.bits), dtype=torch.int32)
    codec.pack(torch.from_numpy(np.array(codes, dtype=np.uint32).view(np.int32)), fmt.bits, words)
    return Packed(fmt, len(codes), (words, torch.tensor([1.0, 0.0])))


def weights(fmt: str = "S1E3M7", size: int = 5000, seed: int = 0) -> Packed:
    return encode(randn(size, seed=seed), FloatFormat.parse(fmt))


def stepped(fmt: str = "S1E3M7", size: int = 5000) -> Packed:
    """Give the codes of the same weights after a small step, mostly of zeros."""
    step = randn(size, seed=1) * (torch.arange(size) // 64 % 2) * 0.01
    return encode(randn(size) + step, FloatFormat.parse(fmt))


def test_packing_is_that_of_the_layout() -> None:
    for bits in range(2, 33):
        for count in (0, 1, 32, 33, 1024, 2049):
            codes = [int(x) for x in np.random.default_rng(bits).integers(0, 2**bits, count)]
            words = torch.empty(codec.words_of(count, bits), dtype=torch.int32)
            signed = torch.from_numpy(np.array(codes, dtype=np.uint32).view(np.int32))
            assert np.array_equal(codec.pack(signed, bits, words).numpy(), pack_by_design(codes, bits))
            assert torch.equal(codec.unpack(words, count, bits), signed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("way", [lossless.BYTES, lossless.BITS])
@pytest.mark.parametrize("difference", [False, True])
def test_every_bit_comes_back(bits: int, way: int, difference: bool) -> None:
    """Each way, also where it is not chosen: any codes, both zeros and the extremes next to each other."""
    draw = np.random.default_rng(bits)
    top = 1 << (bits - 1)
    special = [0, top, 1, top + 1, top - 1, 2 * top - 1]
    for size in SIZES[:4] if bits != 11 else SIZES:
        sent, codes = (np.append(special, draw.integers(0, 2 * top, size))[:size] for _ in range(2))
        codes[: len(special)] = codes[: len(special)][::-1].copy()
        fmt = FloatFormat(min(bits - 1, 8), max(0, bits - 9))
        words, old = packed_from(codes, fmt).codes, packed_from(sent, fmt).codes if difference else None
        body = b"" if old is None else struct.pack("<I", lossless.checksum(old))
        for start in range(0, size, lossless.SEGMENT):
            symbols = lossless._symbols(words, start, min(lossless.SEGMENT, size - start), bits, old)
            body += lossless._segment(symbols, bits, way, zstandard.ZstdCompressor())
        assert torch.equal(lossless.decompress(memoryview(body), way, difference, size, bits, old, "x"), words)


@given(FORMATS, st.integers(0, 3000), st.integers(0, 99), st.floats(0, 1), st.sampled_from([0, 1, 2]))
def test_a_frame_comes_back_and_is_never_larger(
    fmt: FloatFormat, size: int, seed: int, spread: float, kind: int
) -> None:
    values = randn(size, seed=seed) * (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < spread)
    packed, sent = encode(values, fmt), encode(values + randn(size, seed=seed + 1) * 1e-3, fmt)
    plain = frame.to_bytes(packed, (size,), kind)
    for old in (None, sent):
        data = frame.to_bytes(packed, (size,), kind, lossless=True, sent=old)
        assert len(data) <= len(plain) == frame.size_of(packed, (size,))
        assert data == frame.to_bytes(packed, (size,), kind, lossless=True, sent=old)
        found = frame.from_bytes(data, shape=(size,), sent=old)
        assert (found.shape, found.kind, found.packed.method) == ((size,), kind, fmt)
        assert torch.equal(found.packed.codes, packed.codes) and torch.equal(found.packed.fields[1], packed.fields[1])


@given(FORMATS, st.integers(1, 700), st.integers(0, 99))
def test_the_independent_reader_reads_it(fmt: FloatFormat, size: int, seed: int) -> None:
    values = randn(size, seed=seed) * (torch.arange(size) // 100 % 2)
    packed, sent = encode(values, fmt), encode(values * 1.01, fmt)
    old = codec.unpack(sent.codes, size, fmt.bits).tolist()
    data = frame.to_bytes(packed, (size,), lossless=True, sent=sent)
    if size > 600:
        assert data[21] and len(data) < frame.size_of(packed, (size,))
    read = independent_reader.read_frame(data, [code & (2**fmt.bits - 1) for code in old])
    assert np.array_equal(read.values, packed.decode(torch.empty(size)).numpy())


def test_several_segments() -> None:
    size = 2 * lossless.SEGMENT + 1500
    packed, sent = stepped("S1E2M3", size), weights("S1E2M3", size)
    for old in (None, sent):
        data = frame.to_bytes(packed, (size,), lossless=True, sent=old)
        assert data[21] and torch.equal(frame.from_bytes(data, sent=old).packed.codes, packed.codes)
        codes = codec.unpack(sent.codes, size, 6).tolist()
        read = independent_reader.read_frame(data, codes)
        assert np.array_equal(read.values, packed.decode(torch.empty(size)).numpy())


def test_the_ways_are_chosen_by_what_they_gain() -> None:
    def how(packed: Packed, sent: Packed | None = None) -> tuple[int, int]:
        data = frame.to_bytes(packed, (packed.numel,), lossless=True, sent=sent)
        return data[21], data[22]

    assert how(weights()) == (lossless.BYTES, 0)
    update = encode(randn(5000) * (torch.arange(5000) // 512 % 4 == 0), FloatFormat(2, 1))
    assert how(update) == (lossless.BITS, 0)
    assert how(stepped(), weights()) == (lossless.BYTES, 1)
    assert how(stepped(), weights(seed=5)) == (lossless.BYTES, 0)  # another variable: the difference is worse
    noise = packed_from(np.random.default_rng(0).integers(0, 2**11, 4096), FloatFormat(3, 7))
    assert how(noise) == (lossless.PLAIN, 0)


def test_a_step_costs_the_same_on_both_sides_of_zero() -> None:
    """Differences follow the values: from -0 to 0, and from one subnormal to its neighbour, is one step."""
    fmt = FloatFormat(2, 3)
    ordered = [*(32 + x for x in range(31, -1, -1)), *range(32)]
    values = packed_from(ordered, fmt).decode(torch.empty(64))
    assert torch.equal(values.sort().values, values)
    sent, new = packed_from(ordered[:-1], fmt), packed_from(ordered[1:], fmt)
    assert lossless._symbols(new.codes, 0, 63, 6, sent.codes).tolist() == [2] * 63
    assert lossless._symbols(sent.codes, 0, 63, 6, new.codes).tolist() == [1] * 63


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
    sent = weights(size=700)
    small = encode(randn(700), FloatFormat.parse("S1E3M7"))
    return [
        (frame.to_bytes(small, (700,), lossless=True), None),
        (frame.to_bytes(stepped(size=700), (700,), lossless=True, sent=sent), sent),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_every_damaged_byte_and_every_truncation_is_found(number: int) -> None:
    data, sent = examples()[number]
    assert data[21] and parses(data, sent=sent)
    draw = random.Random(0)  # noqa: S311
    for at in range(len(data)):
        for value in {data[at] ^ 1, data[at] ^ 0x80, draw.randrange(256)} - {data[at]}:
            assert not parses(data[:at] + bytes([value]) + data[at + 1 :], sent=sent)
        assert not parses(data[:at], sent=sent)
    assert not parses(data + b"\0", sent=sent) and not parses(sealed(data + b"\0"), sent=sent)


@given(st.data())
def test_planes_that_were_forged_are_refused_or_harmless(data: st.DataObject) -> None:
    """With the right checksum, so that every other check counts."""
    original, sent = examples()[data.draw(st.integers(0, 1))]
    forged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        forged[data.draw(st.integers(20, len(forged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(forged)) | st.integers(32, len(forged)))
    parses(sealed(bytes(forged[:cut])), sent=sent)


@given(st.binary(max_size=200), st.integers(1, 2), st.integers(0, 1), st.integers(0, 2**20))
def test_random_planes(body: bytes, way: int, difference: int, size: int) -> None:
    sent = Packed.zeros(FloatFormat(2, 3), size, "cpu")
    prefix = struct.pack("<I", lossless.checksum(sent.codes)) if difference else b""
    for shape in (None, (size,)):
        parses(framed(size, prefix + body, way, difference), shape=shape, sent=sent)


def framed(size: int, body: bytes, way: int, difference: int = 0) -> bytes:
    head = (
        b"FOMC" + bytes([frame.VERSION, 0, 2, 3]) + struct.pack("<ffIBBBBQ", 1.0, 0.0, 0, 1, way, difference, 0, size)
    )
    return sealed(head + body)


def planes(size: int, piece: bytes) -> bytes:
    return (struct.pack("<I", len(piece)) + piece) * -(-size // lossless.SEGMENT)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    """Zeros without end, claimed by the frame or hidden in zstd."""
    zeros = zstandard.ZstdCompressor().compress(bytes(lossless.SEGMENT))
    huge = zstandard.ZstdCompressor().compress(bytes(2**30))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**30))
    window = b"\x28\xb5\x2f\xfd\x80\xa0" + struct.pack("<I", lossless.SEGMENT) + zeros[-8:]  # 2**30 bytes of history
    attacks = [
        framed(2**46, planes(lossless.SEGMENT, zeros), lossless.BYTES),
        framed(2**31, planes(2**31, zeros[:8]), lossless.BYTES),
        framed(2**31, planes(2**31, zeros), lossless.BYTES),
        framed(lossless.SEGMENT, planes(1, huge), lossless.BYTES),
        framed(lossless.SEGMENT, planes(1, unknown), lossless.BYTES),
        framed(lossless.SEGMENT, planes(1, window), lossless.BYTES),
        framed(lossless.SEGMENT, planes(1, zeros + zeros), lossless.BYTES),
        framed(lossless.SEGMENT, planes(1, zeros + b"\0"), lossless.BYTES),
        framed(lossless.SEGMENT, planes(1, zeros[:-1]), lossless.BYTES),
        framed(lossless.SEGMENT, planes(1, b"\x50\x2a\x4d\x18\0\0\0\0"), lossless.BYTES),
    ]
    for number, data in enumerate(attacks):
        for shape in (None, (7, 7)):
            allocated = allocations(lambda data=data, shape=shape: parses(data, shape=shape))
            assert sum(size for size in allocated if size > 0) <= lossless.SEGMENT, number
    tracemalloc.start()
    assert not any(parses(data, shape=shape) for data in attacks for shape in (None, (7, 7)))
    assert not any(parses(data, shape=(lossless.SEGMENT,)) for data in attacks[3:])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    # What is that large and expected is read: a variable of zeros is no attack.
    size = 40 * lossless.SEGMENT
    zero = Packed.zeros(FloatFormat(2, 3), size, "cpu")
    data = frame.to_bytes(zero, (size,), lossless=True)
    assert len(data) < zero.codes.nbytes / frame.MAX_EXPANSION
    assert not parses(data) and parses(data, shape=(size,))


def test_a_plane_with_larger_values_than_its_bits_is_refused() -> None:
    data = framed(100, planes(1, bytes([64]) * 99 + b"\0"), lossless.BYTES)
    assert len(data) < 24 + 8 + 4 * codec.words_of(100, 6)
    assert not parses(data)
    assert parses(framed(100, planes(1, bytes([63]) * 100), lossless.BYTES))


def test_another_shape_is_refused() -> None:
    for data in (frame.to_bytes(weights(), (5000,), lossless=True), frame.to_bytes(weights(), (5000,))):
        with pytest.raises(PayloadError, match=r"^x: .*\(5000,\), \(50, 100\) expected"):
            frame.from_bytes(data, "x", shape=(50, 100))


def test_without_zstd_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data, plain = frame.to_bytes(weights(), (5000,), lossless=True), frame.to_bytes(weights(), (5000,))
    monkeypatch.setattr(lossless, "zstandard", None)
    assert frame.to_bytes(frame.from_bytes(plain).packed, (5000,)) == plain
    with pytest.raises(PayloadError, match=r"^x .*pip install 'fedomc\[lossless\]'"):
        frame.from_bytes(data, "x")
    with pytest.raises(PolicyError, match=r"pip install 'fedomc\[lossless\]'"):
        frame.to_bytes(weights(), (5000,), lossless=True)


def test_the_library_imports_without_zstd() -> None:
    script = (
        "import sys; sys.modules['zstandard'] = None; import fedomc.serialization.frame as f; print(f.planes.zstandard)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "None"
