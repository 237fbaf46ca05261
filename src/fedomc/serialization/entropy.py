"""Codes in fewer bytes, and back: zstd over planes of their bits, or of the bits of differences to codes sent before.

[Note: planes]
What can be saved lies in the upper bits of a code: weights crowd around zero, so that few exponents are frequent, while
signs and mantissas are nearly noise. A byte of the 8 upper bits is a symbol that zstd's Huffman coding takes as it is;
the bits below are planes that stay as they are. Updates and differences are mostly zero, and zeros come together; there
a byte with the same bit of 8 neighbours says more. Neither is always better, so a sample of the variable chooses.

[Note: differences]
A client's codes differ little from those that it was sent. They are numbered in the order of their values first, so
that a small step is a small difference, whatever its sign and binade. Two's complement and ascending tables are in that
order; codes of sign and magnitude become so as one integer, with -0 just below 0.
"""

import itertools
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from fedomc import codec
from fedomc.errors import PayloadError, PolicyError

try:
    import zstandard
except ImportError:  # an extra
    zstandard = None  # type: ignore[assignment]

PLAIN, BYTES, BITS = 0, 1, 2
"""How codes lie in a frame: packed; the 8 highest bits as bytes and the others in planes; all bits in planes."""

SEGMENT = 2**17
"""Values that are worked on at a time; a plane of them is at most one block of zstd."""

SAMPLE = 2**14
"""Values by which the way is chosen."""

LEVEL = 1

_LENGTH = struct.Struct("<I")
_Plane = np.ndarray[Any, Any]  # of uint8


def require() -> None:
    """Check that zstd is there.

    Raises:
        PolicyError: it is not.
    """
    if zstandard is None:
        raise PolicyError(
            "entropy coding needs zstandard: pip install 'fedomc[lossless]', or set entropy_coding='none'"
        )


def compress(
    words: Tensor, numel: int, bits: int, sent: Tensor | None = None, order: str = "sign-magnitude"
) -> tuple[int, bool, bytes] | None:
    """Write packed codes in fewer bytes.

    Args:
        words: int32 ``[words_of(numel, bits)]`` on the CPU, as ``codec.layout`` says.
        numel: how many codes.
        bits: of a code.
        sent: words of as many codes of the same method, which the reader has too.
        order: how codes are ordered, as ``Method.code_order`` says.

    Returns:
        ``BYTES`` or ``BITS``, whether it is the differences to ``sent``, and the bytes; None if they were not fewer.

    Raises:
        PolicyError: zstd is not installed.
    """
    require()
    if not numel:
        return None
    zstd = zstandard.ZstdCompressor(level=LEVEL)
    begin = max(0, numel - SAMPLE) // 2 // codec.BLOCK * codec.BLOCK
    count = min(SAMPLE, numel - begin)
    samples = {False: _symbols(words, begin, count, bits, None, order)}
    if sent is not None:
        samples[True] = _symbols(words, begin, count, bits, sent, order)
    ways = [(way, difference) for difference in samples for way in (BYTES, BITS)]
    way, difference = min(ways, key=lambda pair: len(_segment(samples[pair[1]], bits, pair[0], zstd)))
    if not difference:
        sent = None
    pieces = [] if sent is None else [_LENGTH.pack(checksum(sent))]
    left = words.nbytes - sum(map(len, pieces))
    for start in range(0, numel, SEGMENT):
        symbols = _symbols(words, start, min(SEGMENT, numel - start), bits, sent, order)
        piece = _segment(symbols, bits, way, zstd)
        left -= len(piece)
        if left <= 0:
            return None
        pieces.append(piece)
    return way, difference, b"".join(pieces)


def decompress(
    data: memoryview,
    way: int,
    difference: bool,
    numel: int,
    bits: int,
    sent: Tensor | None,
    name: str,
    order: str = "sign-magnitude",
) -> Tensor:
    """Read what ``compress`` wrote; the lengths of all pieces are checked before anything is allocated.

    Args:
        data: the bytes and nothing else.
        way: ``BYTES`` or ``BITS``.
        difference: whether they are differences to ``sent``.
        numel: how many codes; what is allocated follows from it, so the caller must have reason to expect as many.
        bits: of a code.
        sent: words of as many codes of the same format, or None if there are none.
        name: of the variable, for errors.
        order: how codes are ordered, as ``Method.code_order`` says.

    Returns:
        The words, int32 ``[words_of(numel, bits)]``; bits that belong to no value are zero.

    Raises:
        PayloadError: the bytes are not what ``compress`` writes, they are differences to other codes than ``sent``, or
            zstd is not installed.
    """
    if zstandard is None:
        raise PayloadError(f"{name} is entropy-coded: pip install 'fedomc[lossless]' to read it")
    if difference:
        if sent is None:
            raise PayloadError(f"{name} is a difference to the codes that were sent, but no codes were sent for it")
        if len(data) < _LENGTH.size or _LENGTH.unpack_from(data)[0] != checksum(sent):
            raise PayloadError(f"{name} is a difference to other codes than the ones that were sent")
        data = data[_LENGTH.size :]
    pieces = _cut(data, numel, bits, way, name)
    words = torch.empty(codec.words_of(numel, bits), dtype=torch.int32, device="cpu")
    for start, planes in zip(range(0, numel, SEGMENT), pieces, strict=True):
        count = min(SEGMENT, numel - start)
        symbols = _joined([_unzipped(piece, size, name) for piece, size in planes], count, bits, way, name)
        if difference:
            assert sent is not None
            symbols = _added(symbols, _codes(sent, start, count, bits), bits, order)
        codec.pack(symbols, bits, _stretch(words, start, count, bits))
    return words


def checksum(words: Tensor) -> int:
    """Return the low half of the XXH3 of packed codes, by which both sides know that they mean the same."""
    return xxhash.xxh3_64_intdigest(words.contiguous().numpy().astype("<i4", copy=False).data) & 0xFFFFFFFF


# ---- values <-> symbols ---------------------------------------------------------------------------------------------


def _stretch(words: Tensor, start: int, count: int, bits: int) -> Tensor:
    begin = codec.words_of(start, bits)
    return words[begin : begin + codec.words_of(count, bits)]


def _codes(words: Tensor, start: int, count: int, bits: int) -> Tensor:
    return codec.unpack(_stretch(words, start, count, bits), count, bits)


def _symbols(words: Tensor, start: int, count: int, bits: int, sent: Tensor | None, order: str) -> Tensor:
    """Return ``count`` codes, or their differences to those sent as 0, -1, 1, -2, ...: int32 ``[count]``."""
    codes = _codes(words, start, count, bits)
    if sent is None:
        return codes
    step = _numbered(codes, bits, order).sub_(_numbered(_codes(sent, start, count, bits), bits, order))
    step = _signed(step, bits)
    return (step << 1).bitwise_xor_(step >> 31).bitwise_and_(_mask(bits))


def _added(symbols: Tensor, sent: Tensor, bits: int, order: str) -> Tensor:
    step = ((symbols >> 1) & 0x7FFFFFFF).bitwise_xor_((symbols & 1).neg_())
    numbers = _signed(step.add_(_numbered(sent, bits, order)), bits)
    if order == "sign-magnitude":
        numbers.bitwise_xor_((numbers >> 31) & _mask(bits - 1))
    return numbers.bitwise_and_(_mask(bits))


def _numbered(codes: Tensor, bits: int, order: str) -> Tensor:
    """Number codes in the order of their values, modulo ``2**bits``; magnitude m is m, or -1 - m if negative."""
    signed = _signed(codes, bits)
    return signed.bitwise_xor_((signed >> 31) & _mask(bits - 1)) if order == "sign-magnitude" else signed


def _signed(values: Tensor, bits: int) -> Tensor:
    return (values << (32 - bits)) >> (32 - bits)


def _mask(bits: int) -> int:
    return (1 << bits) - 1 if bits < 32 else -1


# ---- symbols <-> planes <-> bytes -----------------------------------------------------------------------------------


def _first(bits: int, way: int) -> int:
    """Return how many bits of each value the plane of bytes holds; all others are planes of bits."""
    return min(8, bits) if way == BYTES else 0


def _sizes(count: int, bits: int, way: int) -> list[int]:
    """Return the bytes of each plane of so many values, from the highest bits on."""
    first = _first(bits, way)
    return [count] * (first > 0) + [-(-count // 8)] * (bits - first)


def _planes(symbols: Tensor, bits: int, way: int) -> Iterator[_Plane]:
    low = bits - _first(bits, way)
    if low < bits:
        yield _byte(symbols >> low)
    while low:
        width = low % 8 or 8
        low -= width
        byte = _byte(symbols >> low)
        for bit in reversed(range(width)):
            yield np.packbits(byte & np.uint8(1 << bit), bitorder="little")


def _byte(symbols: Tensor) -> _Plane:
    return symbols.bitwise_and_(255).to(torch.uint8).numpy()


def _joined(planes: list[_Plane], count: int, bits: int, way: int, name: str) -> Tensor:
    symbols = torch.zeros(count, dtype=torch.int32, device="cpu")
    rest, low = iter(planes), bits - _first(bits, way)
    if low < bits:
        highest = next(rest)
        if bits < 8 and (highest >> bits).any():
            raise PayloadError(f"{name}: a plane of {bits} bits has larger values")
        symbols |= torch.from_numpy(highest.astype(np.int32))
    while low:
        width = low % 8 or 8
        low -= width
        byte = np.zeros(count, dtype=np.uint8)
        for plane in itertools.islice(rest, width):
            byte += byte
            byte |= np.unpackbits(plane, count=count, bitorder="little")
        symbols = (symbols << width).bitwise_or_(torch.from_numpy(byte))
    return symbols


def _segment(symbols: Tensor, bits: int, way: int, zstd: "zstandard.ZstdCompressor") -> bytes:
    pieces = []
    for plane in _planes(symbols, bits, way):
        zipped = zstd.compress(plane.data)
        piece = zipped if len(zipped) < plane.nbytes else plane.tobytes()
        pieces += [_LENGTH.pack(len(piece)), piece]
    return b"".join(pieces)


def _cut(data: memoryview, numel: int, bits: int, way: int, name: str) -> list[list[tuple[memoryview, int]]]:
    """Find the piece of each plane of each segment, and the size that it must make."""
    fewest = len(_sizes(1, bits, way)) * (_LENGTH.size + 1)
    if len(data) // fewest < -(-numel // SEGMENT):
        raise PayloadError(f"{name}: {len(data)} bytes are not enough for {numel} values")
    segments, at = [], 0
    for start in range(0, numel, SEGMENT):
        planes = []
        for size in _sizes(min(SEGMENT, numel - start), bits, way):
            length = _LENGTH.unpack_from(data, at)[0] if len(data) - at > _LENGTH.size else 0
            at += _LENGTH.size
            if not 0 < length <= min(size, len(data) - at):
                raise PayloadError(f"{name}: a plane of {length} bytes, {size} at most and {len(data) - at} left")
            planes.append((data[at : at + length], size))
            at += length
        segments.append(planes)
    if at != len(data):
        raise PayloadError(f"{name}: {len(data) - at} bytes follow the last plane")
    return segments


def _unzipped(piece: memoryview, size: int, name: str) -> _Plane:
    if len(piece) == size:
        return np.frombuffer(piece, dtype=np.uint8)
    assert zstandard is not None
    try:
        found = zstandard.get_frame_parameters(piece)
        if found.content_size != size or found.dict_id or found.window_size > max(size, 1024):
            raise PayloadError(f"{name}: a plane declares {found.content_size} bytes, but {size} are expected")
        data = zstandard.ZstdDecompressor().decompress(piece, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"{name}: a plane is damaged: {error}") from None
    if len(data) != size:
        raise PayloadError(f"{name}: a plane has {len(data)} bytes, but {size} are expected")
    return np.frombuffer(data, dtype=np.uint8)
