"""Ways to damage bytes and messages: blindly, or knowing what they mean so that the deeper checks are reached."""

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import zstandard
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedomc.flower.arrays import STYPE
from fedomc.flower.config import CONFIG
from fedomc.serialization import entropy
from tests.serialization.test_frame import FIELDS, HEADER, sealed

NUMBERS = (0, 1, 2, 3, 4, 7, 8, 9, 23, 24, 31, 32, 127, 128, 255)
LARGE = (2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**48, 2**49, 2**62, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 1e38, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
WORDS = ("", "float32", "float64", "int64", "S1E2M3", "S1E3M7", "S9E9M9", "none", "nearest", "nan", "\0", "é" * 40)
FORMATS = (
    "S1E1M0", "S1E2M1", "S1E2M3", "S1E3M7", "S1E5M10", "S1E8M23", "INT8", "INT4/32", "NF4", "NF4/256",
    "MXFP8", "MXFP8E5M2", "MXFP6", "MXFP4", "S1E2M3/64", "S1E3M0/32", "DRIVE1", "DRIVE2",
)  # fmt: skip
METHODS = (
    (1, b"\2\3"), (1, b"\1\0"), (1, b"\3\7"), (1, b"\x08\x17"), (1, b"\0\3"), (2, b"\5"), (2, b"\6"), (3, b"\6"),
    (3, b"\x08"), (4, b"\6"), (4, b"\x04"), (5, b"\4\3"), (5, b"\5\2"), (5, b"\2\3"), (5, b"\2\1"), (5, b"\3\3"),
    (6, b"\1"), (6, b"\2"), (6, b"\3"), (0, b""), (77, b"\1"),
)  # fmt: skip
"""Tags and headers of methods, of which some do not exist."""

BOMBS = (2**20, 2**24, 2**30)
"""Bytes that bombs make: the largest more than the fuzzer may allocate, the others small enough to lie in a plane."""


def damaged(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Damage bytes whatever they mean."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        length = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(out) - at)
        match rng.randrange(8):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + length] = rng.randbytes(length)
            case 3:
                del out[at : at + length]
            case 4:
                del out[at:]
            case 5:
                out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 128)))
            case 6:
                number = struct.pack("<Q", rng.choice(NUMBERS + LARGE))[: rng.choice((1, 2, 4, 8))]
                out[at : at + len(number)] = number
            case 7:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                out[at : at + rng.choice((0, length))] = other[begin : begin + rng.choice((4, 64, len(other)))]
    return bytes(out)


# ---- frames ---------------------------------------------------------------------------------------------------------


@dataclass
class Pieces:
    """What a frame consists of, as far as it can be told; ``join`` writes what is here, whether or not it agrees."""

    fixed: dict[str, Any]
    dimensions: list[int]
    lengths: list[int]
    header: bytes
    fields: list[bytes]

    @classmethod
    def of(cls, data: bytes) -> "Pieces":
        fixed = dict(zip(FIELDS, HEADER.unpack_from(data), strict=True))
        room = (len(data) - HEADER.size) // 8
        ndim = min(fixed["dimensions"], room)
        count = min(fixed["count"], room - ndim)
        sizes = struct.unpack_from(f"<{ndim + count}Q", data, HEADER.size)
        at = HEADER.size + 8 * (ndim + count)
        header = data[at : at + fixed["method_header"]]
        at += -(-len(header) // 8) * 8
        fields = []
        for length in sizes[ndim:]:
            fields.append(data[at : at + length])
            at += -(-length // 4) * 4
        return cls(fixed, list(sizes[:ndim]), list(sizes[ndim:]), header, fields)

    def join(self, rng: Random) -> bytes:
        """Write the frame; once in a while with padding that is not zero."""
        fill = rng.randbytes(1) if rng.random() < 0.02 else b"\0"
        counts = {"dimensions": len(self.dimensions), "count": len(self.lengths), "method_header": len(self.header)}
        if max(counts.values()) > 255:
            counts = {}
        sizes = [size % 2**64 for size in (*self.dimensions, *self.lengths)]
        data = HEADER.pack(*(self.fixed | counts).values()) + struct.pack(f"<{len(sizes)}Q", *sizes)
        data += self.header + fill * (-len(self.header) % 8)
        return data + b"".join(field + fill * (-len(field) % 4) for field in self.fields)

    def set_field(self, number: int, data: bytes) -> None:
        """Replace the bytes of a field, and its length."""
        self.fields[number], self.lengths[number] = data, len(data)


def forged_frame(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Damage a frame; mostly with a checksum that fits."""
    if len(data) < HEADER.size:
        return damaged(rng, data, others)
    changes = (_fixed, _fixed, _dimension, _length, _method, _field, _field, _scale, _scale, _plane, _plane, damaged)
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(changes)(rng, data, others)
        if len(data) < HEADER.size:
            return data
    return data if rng.random() < 0.1 else sealed(data)


def _fixed(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    values = dict(zip(FIELDS, HEADER.unpack_from(data), strict=True))
    name = rng.choice([name for name in FIELDS if name != "checksum"])
    old = values[name]
    if isinstance(old, int):
        values[name] = rng.choice((*NUMBERS, rng.randrange(256), (old + rng.choice((-1, 1))) % 256))
    else:
        values[name] = rng.choice((b"FOMC", b"PK\3\4", rng.randbytes(4)))
    return HEADER.pack(*values.values()) + data[HEADER.size :]


def _dimension(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change, add, take away or reorder dimensions."""
    pieces = Pieces.of(data)
    sizes, count = pieces.dimensions, len(pieces.dimensions)
    match rng.randrange(5):
        case 0 if sizes:
            sizes[rng.randrange(count)] = rng.choice((*NUMBERS, *LARGE, rng.randrange(5000)))
        case 1:
            sizes.insert(rng.randrange(count + 1), rng.choice((0, 1, 1, 2, *LARGE)))
        case 2 if sizes:
            del sizes[rng.randrange(count)]
        case 3 if sizes:
            at = rng.randrange(count)
            sizes[at] = (sizes[at] + rng.choice((-1, 1, 1024, 2**17))) % 2**64
        case _:
            rng.shuffle(sizes)
    return pieces.join(rng)


def _length(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change, add, take away or reorder lengths, of fields that stay; or fields."""
    pieces = Pieces.of(data)
    lengths, count = pieces.lengths, len(pieces.lengths)
    match rng.randrange(5):
        case 0 if count:
            lengths[rng.randrange(count)] = rng.choice((*NUMBERS, *LARGE, rng.randrange(5000)))
        case 1:
            lengths.insert(rng.randrange(count + 1), rng.choice((0, 0, 4, 8, *LARGE)))
        case 2 if count:
            del lengths[rng.randrange(count)]
        case 3 if count > 1:
            moved = rng.choice((-4, -1, 1, 4))
            lengths[0], lengths[1] = lengths[0] + moved, lengths[1] - moved
        case _:
            rng.shuffle(lengths)
            rng.shuffle(pieces.fields)
    return pieces.join(rng)


def _method(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Say that the fields are of another method, or describe the method wrongly."""
    pieces = Pieces.of(data)
    match rng.randrange(3):
        case 0:
            pieces.header = damaged(rng, pieces.header, others)[:40]
        case _:
            pieces.fixed["method"], pieces.header = rng.choice(METHODS)
    return pieces.join(rng)


def _field(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    pieces = Pieces.of(data)
    if not pieces.fields:
        return damaged(rng, data, others)
    number = rng.randrange(len(pieces.fields))
    changed = damaged(rng, pieces.fields[number], others)
    if rng.random() < 0.5:
        pieces.set_field(number, changed)
    else:
        pieces.fields[number] = changed[: len(pieces.fields[number])].ljust(len(pieces.fields[number]), b"\0")
    return pieces.join(rng)


def _scale(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change a scale or offset; of the length that it has."""
    pieces = Pieces.of(data)
    if not pieces.fields or not pieces.fields[-1]:
        return damaged(rng, data, others)
    scales = bytearray(pieces.fields[-1])
    if pieces.fixed["method"] == 5:
        scales[rng.randrange(len(scales))] = rng.choice((*NUMBERS, *range(238, 256)))
    elif len(scales) >= 4:
        at = rng.randrange(len(scales) // 4) * 4
        value = struct.pack("<f", rng.choice((*FLOATS, 2.66e36, 2.6e36, 4.25e37, 4.8e37)))
        scales[at : at + 4] = rng.randbytes(4) if rng.random() < 0.3 else value
    pieces.fields[-1] = bytes(scales)
    return pieces.join(rng)


def _plane(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Replace an entropy-coded plane."""
    pieces = Pieces.of(data)
    if not pieces.fields:
        return damaged(rng, data, others)
    pieces.set_field(0, forged_planes(rng, pieces.fields[0], others))
    return pieces.join(rng)


def forged_planes(rng: Random, body: bytes, others: Sequence[bytes]) -> bytes:
    """Replace one of the pieces that entropy coding wrote, or its length."""
    pieces, at = [], rng.choice((0, 0, 4))  # differences begin with a checksum
    begin = body[:at]
    while len(body) - at > 4:
        (length,) = struct.unpack_from("<I", body, at)
        if length > len(body) - at - 4:
            break
        pieces.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    if not pieces:
        return damaged(rng, body, others)
    chosen = rng.randrange(len(pieces))
    piece = pieces[chosen]
    match rng.randrange(6):
        case 0 | 1:
            size = rng.choice((1, 7, 128, 1024, 2**14, entropy.SEGMENT, _content_size(piece)))
            pieces[chosen] = bomb(rng, size)
        case 2:
            pieces[chosen] = damaged(rng, piece, others)
        case 3:
            pieces[chosen] = rng.choice(pieces)
        case 4:
            pieces.insert(chosen, piece) if rng.random() < 0.5 else pieces.pop(chosen)
        case 5:
            zipped = zstandard.ZstdCompressor(level=rng.choice((1, 3, 19)), write_checksum=rng.random() < 0.5)
            pieces[chosen] = zipped.compress(rng.randbytes(64) * (_content_size(piece) // 64 + 1))
    written = [struct.pack("<I", len(piece)) + piece for piece in pieces]
    if chosen < len(pieces) and rng.random() < 0.1:
        written[chosen] = struct.pack("<I", rng.choice((*NUMBERS, 2**31, 2**32 - 1))) + pieces[chosen]
    return begin + b"".join(written) + body[at:]


def bomb(rng: Random, size: int) -> bytes:
    """Make a small zstd frame that says ``size``, something else or nothing of what it becomes; or another oddity."""
    known, unknown = _bombs(rng.choice(BOMBS))
    match rng.randrange(6):
        case 0:
            return known
        case 1:
            return unknown
        case 2:  # the content size follows the descriptor, and the window unless there is a single segment
            at = 5 + (not known[4] & 0x20)
            return known[:at] + struct.pack("<I", rng.choice((size, size, 2**31))) + known[at + 4 :]
        case 3:
            return struct.pack("<II", 0x184D2A50, 8) + rng.randbytes(8)  # to be skipped
        case 4:
            zeros = zstandard.ZstdCompressor().compress(bytes(size))
            return zeros + rng.choice((zeros, b"\0", b""))
        case _:
            dictionary = zstandard.ZstdCompressionDict(b"words " * 99, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            return zstandard.ZstdCompressor(dict_data=dictionary).compress(bytes(size))


@functools.cache
def _bombs(becomes: int) -> tuple[bytes, bytes]:
    def made(size: int) -> bytes:
        zipped = zstandard.ZstdCompressor(level=1).compressobj(size=size)
        chunk = bytes(2**20)
        return b"".join(zipped.compress(chunk) for _ in range(becomes // len(chunk))) + zipped.flush()

    return made(becomes), made(-1)


def _content_size(piece: bytes) -> int:
    try:
        found = zstandard.get_frame_parameters(piece).content_size
    except zstandard.ZstdError:
        return len(piece)
    return min(found, entropy.SEGMENT)


# ---- messages -------------------------------------------------------------------------------------------------------


def forged_content(rng: Random, content: RecordDict, others: Sequence[bytes]) -> RecordDict:
    """Damage what a message says; what was given stays as it is."""
    forged = RecordDict(dict(content.items()))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        key = rng.choice(list(forged) or ["arrays"])
        record = forged.get(key)
        match rng.randrange(20):
            case 0:
                forged.pop(key, None)
            case 1:
                forged[rng.choice(("arrays", "metrics", "more", CONFIG))] = _any_record(rng, record)
            case _:
                forged.update({key: _forged_record(rng, record, others)} if record is not None else {})
    return forged


def _any_record(rng: Random, record: Any) -> Any:
    made = ArrayRecord(), MetricRecord({"num-examples": 3}), ConfigRecord({"format": "S1E2M3"}), record
    return rng.choice([one for one in made if one is not None])


def _forged_record(rng: Random, record: Any, others: Sequence[bytes]) -> Any:
    made = type(record)()
    for name, value in record.items():
        made[name] = value
    names = list(made)
    if not names:
        return made
    name = rng.choice(names)
    match rng.randrange(16):
        case 0:
            del made[name]
        case 1:
            made[rng.choice((*WORDS, name + ".update", name.upper()))] = made[name]
        case 2:
            made[name] = made[rng.choice(names)]
        case _ if isinstance(made, ArrayRecord):
            made[name] = forged_array(rng, made[name], others)
        case _:
            made[name] = _forged_value(rng, made[name], isinstance(made, MetricRecord))
    return made


def _forged_value(rng: Random, value: Any, metric: bool) -> Any:
    numbers: tuple[Any, ...] = (*NUMBERS, *FLOATS, -1, 2**63, -(2**63), 2**70, [1.0], [], [float("nan")])
    return rng.choice(numbers if metric else (*numbers, *WORDS, *FORMATS, True, False, b"bytes", [True], ["a"]))


def forged_array(rng: Random, array: Array, others: Sequence[bytes]) -> Array:
    """Damage an array: its data, or what it says of them."""
    dtype, shape, stype, data = array.dtype, tuple(array.shape), array.stype, array.data
    match rng.randrange(8):
        case 0:
            dtype = rng.choice((*WORDS, "float16", "complex64", "object", ">f4"))
        case 1:
            sizes: tuple[int, ...] = (*NUMBERS, *LARGE, -1, -(2**63))
            shape = rng.choice(((), shape[::-1], (*shape, 1), (rng.choice(sizes), *shape[1:]), shape * 40))
        case 2:
            stype = rng.choice((STYPE, "numpy.ndarray", "fedomc.lazy", *WORDS))
        case 3 if stype != STYPE:
            return _other_values(rng, array)
        case 4:
            data = rng.choice(others)
            stype = STYPE
            if len(data) >= HEADER.size and rng.random() < 0.5:
                shape = tuple(Pieces.of(data).dimensions)
        case _:
            data = (forged_frame if stype == STYPE else damaged)(rng, data, others)
            if rng.random() < 0.3 and stype == STYPE and len(data) >= HEADER.size:  # let the array agree
                shape = tuple(Pieces.of(data).dimensions)
    return Array(dtype, shape, stype, data)


def _other_values(rng: Random, array: Array) -> Array:
    """Change values, their dtype or their order, rightly written."""
    try:
        values = array.numpy().copy()
    except Exception:  # it was damaged before
        return array
    with np.errstate(all="ignore"):
        match rng.randrange(3):
            case 0 if values.size and values.dtype.kind == "f":
                values.reshape(-1)[rng.randrange(values.size)] = rng.choice(FLOATS)
            case 1:
                values = values.astype(rng.choice(("float16", "float64", "int8", "bool", "complex64", ">f4", "U3")))
            case _:
                values = np.asfortranarray(values)
        return Array(values)
