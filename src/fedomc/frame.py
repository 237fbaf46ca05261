"""One compressed variable as bytes: a fixed header, the dimensions, the codes; little-endian.

    offset  size
    0       4     magic "FOMC"
    4       1     version, 1
    5       1     kind: 0 a variable (or base), 1 the update part of a variable
    6       1     exponent bits
    7       1     mantissa bits
    8       4     factor, float32
    12      4     offset, float32
    16      4     CRC-32 of all other bytes of the frame
    20      4     number of dimensions
    24      8*d   dimensions
    ...           codes: 32-bit words as ``codec.layout`` says, on a multiple of 4 bytes

The same codes are in memory: a base may be used where the message lies.
"""

import math
import struct
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedomc.codec import words_of
from fedomc.errors import FormatError, OMCError, PayloadError
from fedomc.formats import FloatFormat
from fedomc.transform import Encoding, Packed, stays_finite

MAGIC = b"FOMC"
VERSION = 1
VARIABLE, UPDATE = 0, 1
MAX_DIMENSIONS = 8

_HEADER = struct.Struct("<4sBBBBffII")
_CHECKSUM = slice(16, 20)
_MAX_NUMEL = 2**48


@dataclass(frozen=True)
class Frame:
    """A parsed frame.

    Attributes:
        packed: the variable; its codes may lie in the frame's own memory and must not be written then.
        shape: of the variable.
        kind: ``VARIABLE`` or ``UPDATE``.
    """

    packed: Packed
    shape: tuple[int, ...]
    kind: int


def to_bytes(packed: Packed, shape: Sequence[int], kind: int = VARIABLE, name: str = "variable") -> bytes:
    """Write a variable as a frame; the same variable always gives the same bytes.

    Args:
        packed: the variable.
        shape: its shape.
        kind: ``VARIABLE`` or ``UPDATE``.
        name: of the variable, for errors.

    Raises:
        PayloadError: more than 8 dimensions.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise PayloadError(f"{name} has {len(shape)} dimensions and cannot become a frame: {MAX_DIMENSIONS} at most")
    scale, offset = packed.affine.tolist()
    fmt = packed.format
    fixed = (MAGIC, VERSION, kind, fmt.exponent_bits, fmt.mantissa_bits, scale, offset)
    dimensions = struct.pack(f"<{len(shape)}Q", *shape)
    codes = packed.codes.detach().cpu().contiguous().numpy().astype("<i4", copy=False)
    header = _HEADER.pack(*fixed, 0, len(shape)) + dimensions
    header = _HEADER.pack(*fixed, _checksum(header, codes.data), len(shape)) + dimensions
    return b"".join((header, codes.data))


def size_of(packed: Packed, shape: Sequence[int]) -> int:
    """Count the bytes of a variable's frame."""
    return _HEADER.size + 8 * len(shape) + packed.codes.nbytes


def from_bytes(data: bytes | bytearray | memoryview, name: str = "variable", *, copy: bool = True) -> Frame:
    """Parse a frame; everything is checked before anything is allocated.

    Args:
        data: the whole frame and nothing else.
        name: of the variable, for errors.
        copy: whether the codes get memory of their own; otherwise they lie in ``data`` and must not be written.

    Raises:
        PayloadError: the bytes are not a frame.
    """
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise PayloadError(f"{name}: {len(view)} bytes are too few for a frame, whose header takes {_HEADER.size}")
    magic, version, kind, e, m, scale, offset, checksum, ndim = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError(f"{name}: not a compressed variable: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise PayloadError(f"{name}: frame version {version} is unknown, {VERSION} expected: update fedomc")
    if kind not in (VARIABLE, UPDATE):
        raise PayloadError(f"{name}: kind {kind} is unknown")
    try:
        fmt = FloatFormat(e, m)
    except FormatError as error:
        raise PayloadError(f"{name}: {error}") from None
    if ndim > MAX_DIMENSIONS:
        raise PayloadError(f"{name}: {ndim} dimensions, {MAX_DIMENSIONS} at most")
    begin = _HEADER.size + 8 * ndim
    if len(view) < begin:
        raise PayloadError(f"{name}: cut off within its {ndim} dimensions")
    shape = struct.unpack_from(f"<{ndim}Q", view, _HEADER.size)
    numel = math.prod(shape)
    if math.prod(max(size, 1) for size in shape) > _MAX_NUMEL:
        raise PayloadError(f"{name}: shape {shape} is too large")
    expected = begin + 4 * words_of(numel, fmt.bits)
    if len(view) != expected:
        raise PayloadError(f"{name}: {len(view)} bytes, but {fmt} codes of shape {shape} make {expected}")
    if not (math.isfinite(scale) and math.isfinite(offset)):
        raise PayloadError(f"{name}: factor {scale} or offset {offset} is not finite")
    if not stays_finite(fmt, scale, offset):
        raise PayloadError(f"{name}: factor {scale} and offset {offset} leave the range of float32")
    if checksum != _checksum(view[:begin], view[begin:]):
        raise PayloadError(f"{name}: checksum does not match: the bytes were damaged on the way")
    packed = Packed(_codes(view[begin:], copy), torch.tensor([scale, offset]), fmt, numel)
    return Frame(packed, shape, kind)


def encoding_fields(encoding: Encoding) -> dict[str, str | int]:
    """Write an encoding as plain fields, for the record or file that goes with a frame."""
    update = {} if encoding.update_format is None else {"update_format": str(encoding.update_format)}
    return {
        "format": str(encoding.format),
        **update,
        "transform": encoding.transform,
        "rounding": encoding.rounding,
        "seed": encoding.seed,
    }


def read_encoding(fields: Mapping[str, Any]) -> Encoding:
    """Read an encoding.

    Raises:
        PayloadError: a field is missing or wrong.
    """
    try:
        update, seed = fields.get("update_format"), fields["seed"]
        if type(seed) is not int:
            raise PayloadError(f"seed={seed!r} is not a whole number")
        return Encoding(
            FloatFormat.parse(fields["format"]),
            None if update is None else FloatFormat.parse(update),
            fields["transform"],
            fields["rounding"],
            seed,
        )
    except KeyError as error:
        raise PayloadError(f"the encoding has no {error}") from None
    except (OMCError, TypeError) as error:
        raise PayloadError(f"the encoding is wrong: {error}") from None


def _codes(view: memoryview, copy: bool) -> Tensor:
    if not len(view):
        return torch.empty(0, dtype=torch.int32)
    if sys.byteorder == "big" or copy:
        codes = torch.empty(len(view) // 4, dtype=torch.int32)
        codes.numpy().data.cast("B")[:] = view
        if sys.byteorder == "big":
            codes.numpy().byteswap(inplace=True)
        return codes
    with warnings.catch_warnings():
        # The memory of a message is read-only, and so is a base by construction.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view, dtype=torch.int32)


def _checksum(header: Any, codes: Any) -> int:
    crc = zlib.crc32(header[: _CHECKSUM.start])
    crc = zlib.crc32(header[_CHECKSUM.stop :], crc)
    return zlib.crc32(codes, crc)
