"""One compressed variable as bytes, little-endian.

    offset  size
    0       4     magic "FOMC"
    4       1     version, 4
    5       1     kind: 0 a variable (or base), 1 the update part of a variable, 2 a variable that is FP32 elsewhere
    6       1     method, by its tag
    7       1     h, the length of the method's header, at most 16
    8       4     checksum of all other bytes of the frame: the low half of their XXH3, 64 bits
    12      1     d, the number of dimensions, at most 8
    13      1     coding of the first field: 0 as it is, 1 planes of bytes and bits, 2 planes of bits
    14      1     whether the planes are of differences to codes that were sent
    15      1     f, the number of fields, at most 8
    16      8*d   dimensions
            8*f   bytes of each field as it lies here
            h     the method's header, padded with zeros to a multiple of 8
            ...   the fields, each padded with zeros to a multiple of 4: 32-bit words of codes as ``codec.layout``
                  says, or planes, see ``entropy``; then what gives the codes their values, such as scales

Codes lie in a frame as they do in memory, so that a received base can be used where it lies.
"""

import functools
import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedomc.errors import FormatError, OMCError, PayloadError
from fedomc.methods import Encoding, Field, Method, Packed, method_from_header, parse_method
from fedomc.serialization import entropy

MAGIC = b"FOMC"
VERSION = 4
VARIABLE, UPDATE, DENSE = 0, 1, 2
MAX_DIMENSIONS = 8
MAX_FIELDS = 8
MAX_METHOD_HEADER = 16

MAX_EXPANSION = 256
"""How many bytes of fields a byte of a frame may become, if the reader does not know which shape to expect."""

_HEADER = struct.Struct("<4sBBBBIBBBB")
_LEAD = struct.Struct("<4sBBBB")  # what stands before the checksum
_CHECKSUM = struct.Struct("<I")
_SIZES = tuple(struct.Struct(f"<{count}Q") for count in range(MAX_DIMENSIONS + MAX_FIELDS + 1))
_COUNTS = struct.Struct("<BBBB")
_MAX_NUMEL = 2**48


@dataclass(frozen=True)
class Frame:
    """A parsed frame.

    Attributes:
        packed: the variable; its codes may lie in the frame's own memory and must not be written then.
        shape: of the variable.
        kind: ``VARIABLE``, ``UPDATE`` or ``DENSE``.
    """

    packed: Packed
    shape: tuple[int, ...]
    kind: int


def to_bytes(
    packed: Packed,
    shape: Sequence[int],
    kind: int = VARIABLE,
    name: str = "variable",
    *,
    lossless: bool = False,
    sent: Packed | None = None,
) -> bytes:
    """Write a variable as a frame; the same variable always gives the same bytes.

    Args:
        packed: the variable.
        shape: its shape.
        kind: ``VARIABLE``, ``UPDATE`` or ``DENSE``, which the receiver decodes as it arrives.
        name: of the variable, for errors.
        lossless: whether the codes are entropy-coded, if that makes them smaller.
        sent: what the receiver has of the variable; entropy coding may write the difference to its codes.

    Raises:
        PayloadError: more than 8 dimensions.
        FormatError: a method with more than 8 fields or 16 bytes of header.
        PolicyError: entropy coding is requested, but zstandard is not installed.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise PayloadError(f"{name} has {len(shape)} dimensions, but a frame can have at most {MAX_DIMENSIONS}")
    method, numel = packed.method, packed.numel
    header, (fields, lengths) = method.header(), _fields(method, numel)
    if len(header) > MAX_METHOD_HEADER or len(fields) > MAX_FIELDS:
        raise FormatError(
            f"{method} has a header of {len(header)} bytes and {len(fields)} fields, but a frame can hold at most "
            f"{MAX_METHOD_HEADER} and {MAX_FIELDS}"
        )
    packed.check()
    tensors = [tensor.cpu().contiguous() for tensor in packed.fields]
    bodies: list[bytes | memoryview] = [_raw(tensor) for tensor in tensors]
    coding, difference = entropy.PLAIN, False
    if lossless:
        reference = _reference(sent, method, numel)
        smaller = entropy.compress(tensors[0], method.code_count(numel), method.code_bits, reference, method.code_order)
        if smaller is not None:
            coding, difference, bodies[0] = smaller
            lengths = (len(bodies[0]), *lengths[1:])
    sizes = (*shape, *lengths)
    counts = _COUNTS.pack(len(shape), coding, difference, len(lengths))
    parts: list[bytes | memoryview] = [counts + _SIZES[len(sizes)].pack(*sizes) + header + bytes(-len(header) % 8)]
    for body, length in zip(bodies, lengths, strict=True):
        parts.append(body)
        if length % 4:
            parts.append(bytes(-length % 4))
    lead = _LEAD.pack(MAGIC, VERSION, kind, method.tag, len(header))
    return b"".join((lead, _CHECKSUM.pack(_checksum(lead, *parts)), *parts))


def size_of(packed: Packed, shape: Sequence[int]) -> int:
    """Count the bytes of a variable's frame without entropy coding, which never makes it larger."""
    lengths = _fields(packed.method, packed.numel)[1]
    return _begin(len(shape), len(lengths), len(packed.method.header())) + sum(_padded(length, 4) for length in lengths)


def from_bytes(
    data: bytes | bytearray | memoryview,
    name: str = "variable",
    *,
    copy: bool = True,
    shape: Sequence[int] | None = None,
    sent: Packed | None = None,
) -> Frame:
    """Parse a frame; everything is checked before anything is allocated.

    Args:
        data: the whole frame and nothing else.
        name: of the variable, for errors.
        copy: whether the fields get memory of their own; otherwise they lie in ``data`` and must not be written, if
            they were not entropy-coded.
        shape: the shape that the variable must have; None takes any, but no small frame that becomes huge.
        sent: what was sent of the variable, to which its codes may be a difference.

    Raises:
        PayloadError: the bytes are not a frame, or not of that shape.
    """
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise PayloadError(f"{name}: {len(view)} bytes are not enough for a frame, whose header has {_HEADER.size}")
    magic, version, kind, tag, header_size, checksum, ndim, coding, difference, count = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError(f"{name}: not a compressed variable: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise PayloadError(
            f"{name}: frame version {version}, {VERSION} expected: use the version of fedomc that wrote it"
        )
    if kind not in (VARIABLE, UPDATE, DENSE):
        raise PayloadError(f"{name}: kind {kind} is unknown")
    if coding not in (entropy.PLAIN, entropy.BYTES, entropy.BITS) or difference > (coding != entropy.PLAIN):
        raise PayloadError(f"{name}: coding {coding}, {difference} is unknown")
    if ndim > MAX_DIMENSIONS or count > MAX_FIELDS or header_size > MAX_METHOD_HEADER:
        raise PayloadError(
            f"{name}: {ndim} dimensions, {count} fields, {header_size} bytes of method: "
            f"{MAX_DIMENSIONS}, {MAX_FIELDS} and {MAX_METHOD_HEADER} at most"
        )
    begin = _begin(ndim, count, header_size)
    if len(view) < begin:
        raise PayloadError(f"{name}: the frame is cut off within its header of {begin} bytes")
    sizes = _SIZES[ndim + count].unpack_from(view, _HEADER.size)
    dimensions, lengths = sizes[:ndim], sizes[ndim:]
    method = _method(view, tag, _HEADER.size + 8 * (ndim + count), header_size, begin, name)
    numel = math.prod(dimensions)
    if is_too_large(dimensions):
        raise PayloadError(f"{name}: shape {dimensions} is too large")
    if shape is not None and dimensions != tuple(shape):
        raise PayloadError(f"{name}: the frame has shape {dimensions}, but {tuple(shape)} is expected")
    fields, expected = _fields(method, numel)
    coded = coding != entropy.PLAIN
    fits = lengths == expected
    if coded:
        fits = len(lengths) == len(expected) and lengths[0] < expected[0] and lengths[1:] == expected[1:]
    if not fits:
        raise PayloadError(
            f"{name}: fields of {lengths} bytes{' in planes' * coded}, "
            f"but {method} codes of shape {dimensions} need {expected}"
        )
    end = begin
    for length in lengths:
        end += _padded(length, 4)
    if len(view) != end:
        raise PayloadError(f"{name}: {len(view)} bytes do not hold fields of {lengths} bytes after {begin}")
    if shape is None and sum(expected) > MAX_EXPANSION * len(view):
        raise PayloadError(f"{name}: {len(view)} bytes would expand to {sum(expected)}: pass the expected shape")
    if checksum != _checksum(view[: _LEAD.size], view[_LEAD.size + _CHECKSUM.size :]):
        raise PayloadError(f"{name}: the checksum does not match, because the bytes were damaged in transit")
    tensors: list[Tensor] = []
    for field, length in zip(fields, lengths, strict=True):
        if coded and not tensors:
            codes = entropy.decompress(
                view[begin : begin + length], coding, bool(difference), method.code_count(numel), method.code_bits,
                _reference(sent, method, numel), name, method.code_order,
            )  # fmt: skip
            tensors.append(codes)
        else:
            tensors.append(_tensor(data, field, begin, copy))
        if length % 4:
            if any(view[begin + length : begin + _padded(length, 4)]):
                raise PayloadError(f"{name}: the padding of its {field.name} is not zero")
            length = _padded(length, 4)
        begin += length
    packed_fields = tuple(tensors)
    wrong = method.validate(packed_fields, numel)
    if wrong is not None:
        raise PayloadError(f"{name}: {wrong}")
    return Frame(Packed(method, numel, packed_fields), dimensions, kind)


def is_too_large(shape: Sequence[int]) -> bool:
    """Return whether a shape is beyond 2**48 values, or would be if its dimensions of zero were one."""
    return math.prod(size or 1 for size in shape) > _MAX_NUMEL


@functools.lru_cache(maxsize=4096)  # a model has few sizes, and a round many frames
def _fields(method: Method, numel: int) -> tuple[tuple[Field, ...], tuple[int, ...]]:
    """Return the fields of a variable, and the bytes of each."""
    fields = method.fields(numel)
    return fields, tuple(field.nbytes for field in fields)


def _begin(dimensions: int, fields: int, method_header: int) -> int:
    """Return where the fields begin."""
    return _HEADER.size + 8 * (dimensions + fields) + _padded(method_header, 8)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _method(view: memoryview, tag: int, begin: int, size: int, end: int, name: str) -> Method:
    try:
        if any(view[begin + size : end]):
            raise PayloadError(f"{name}: the padding of the method's header is not zero")
        return method_from_header(tag, bytes(view[begin : begin + size]))
    except FormatError as error:
        raise PayloadError(f"{name}: {error}") from None


def _reference(sent: Packed | None, method: Method, numel: int) -> Tensor | None:
    """Return the codes that others may differ from: only of the same method are they near each other."""
    if sent is None or sent.method != method or sent.numel != numel:
        return None
    return sent.codes.detach().cpu()


def encoding_fields(encoding: Encoding) -> dict[str, str | int]:
    """Write an encoding as plain fields, for the record or file that goes with a frame."""
    update = {} if encoding.update_format is None else {"update_format": str(encoding.update_format)}
    uplink = {} if encoding.uplink is None else {"uplink": str(encoding.uplink)}
    downlink = {} if encoding.downlink is None else {"downlink": str(encoding.downlink)}
    return {
        "format": str(encoding.format),
        **update,
        "transform": encoding.transform,
        "rounding": encoding.rounding,
        "seed": encoding.seed,
        **uplink,
        **downlink,
    }


def read_encoding(fields: Mapping[str, Any]) -> Encoding:
    """Read an encoding.

    Raises:
        PayloadError: a field is missing or wrong.
    """
    try:
        update, seed = fields.get("update_format"), fields["seed"]
        uplink, downlink = fields.get("uplink"), fields.get("downlink")
        if not (fields["transform"] and fields["rounding"]):
            raise PayloadError(f"transform={fields['transform']!r} or rounding={fields['rounding']!r} is missing")
        if type(seed) is not int:
            raise PayloadError(f"seed={seed!r} is not a whole number")
        for key in ("transform", "rounding"):  # left empty, an encoding would choose them
            if not fields[key] or not isinstance(fields[key], str):
                raise PayloadError(f"{key}={fields[key]!r} is not a name")
        return Encoding(
            parse_method(fields["format"]),
            None if update is None else parse_method(update),
            fields["transform"],
            fields["rounding"],
            seed,
            None if uplink is None else parse_method(uplink),
            None if downlink is None else parse_method(downlink),
        )
    except KeyError as error:
        raise PayloadError(f"the encoding has no {error}") from None
    except (OMCError, TypeError) as error:
        raise PayloadError(f"the encoding is wrong: {error}") from None


def _tensor(data: bytes | bytearray | memoryview, field: Field, begin: int, copy: bool) -> Tensor:
    if not field.length:
        return torch.empty(0, dtype=field.dtype, device="cpu")
    array = np.frombuffer(data, _numpy_dtype(field.dtype), field.length, begin)
    if sys.byteorder == "big":
        return torch.from_numpy(array.byteswap())
    # The memory of a message is read-only, and so is a base by construction: torch does not mind if it comes so.
    values: Tensor = from_dlpack(array)
    return values.clone() if copy or values.data_ptr() % field.dtype.itemsize else values


def _raw(tensor: Tensor) -> memoryview:
    array = tensor.numpy()
    return (array.byteswap() if sys.byteorder == "big" else array).data


@functools.cache
def _numpy_dtype(dtype: torch.dtype) -> "np.dtype[Any]":
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype


def _checksum(lead: bytes | memoryview, *parts: bytes | memoryview) -> int:
    found = xxhash.xxh3_64(lead)
    for part in parts:
        found.update(part)
    return found.intdigest() & 0xFFFFFFFF
