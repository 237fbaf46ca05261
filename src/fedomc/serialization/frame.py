"""One compressed variable as bytes: a fixed header, the dimensions, the codes; little-endian.

    offset  size
    0       4     magic "FOMC"
    4       1     version, 3
    5       1     kind: 0 a variable (or base), 1 the update part of a variable, 2 a variable that is FP32 elsewhere
    6       1     exponent bits
    7       1     mantissa bits
    8       4     factor, float32
    12      4     offset, float32
    16      4     checksum of all other bytes of the frame: the low half of their XXH3, 64 bits
    20      1     number of dimensions
    21      1     coding: 0 the codes themselves, 1 planes of bytes and bits, 2 planes of bits
    22      1     whether the planes are of differences to codes that were sent
    23      1     0
    24      8*d   dimensions
    ...           codes: 32-bit words as ``codec.layout`` says, on a multiple of 4 bytes; or planes, see ``entropy``

The codes themselves are what is in memory: a base may be used where the message lies.
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

from fedomc.codec import words_of
from fedomc.codec.elements import FloatFormat
from fedomc.errors import FormatError, OMCError, PayloadError
from fedomc.methods.packed import Encoding, Packed, stays_finite
from fedomc.serialization import entropy as planes

MAGIC = b"FOMC"
VERSION = 3
VARIABLE, UPDATE, DENSE = 0, 1, 2
MAX_DIMENSIONS = 8

MOST_EXPANSION = 256
"""Who does not know the shape expects at most as many bytes of codes for each byte of a frame."""

_HEADER = struct.Struct("<4sBBBBffIBBBB")
_CHECKSUM = slice(16, 20)
_MAX_NUMEL = 2**48
_format = functools.cache(FloatFormat)  # there are few, and a reply has hundreds of frames


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
        lossless: whether the codes go through the lossless stage, if that makes them smaller.
        sent: what the receiver has of the variable; the lossless stage may write the difference to its codes.

    Raises:
        PayloadError: more than 8 dimensions.
        PolicyError: the lossless stage is wanted, but zstd is not installed.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise PayloadError(f"{name} has {len(shape)} dimensions and cannot become a frame: {MAX_DIMENSIONS} at most")
    scale, offset = packed.affine.tolist()
    fmt = packed.format
    words = packed.codes.detach().cpu().contiguous()
    plain: tuple[int, bool, Any] = planes.PLAIN, False, words.numpy().astype("<i4", copy=False).data
    smaller = lossless and planes.compress(words, packed.numel, fmt.bits, _reference(sent, fmt, packed.numel))
    coding, difference, body = smaller or plain
    fixed = (MAGIC, VERSION, kind, fmt.exponent_bits, fmt.mantissa_bits, scale, offset)
    described = (len(shape), coding, difference, 0)
    dimensions = struct.pack(f"<{len(shape)}Q", *shape)
    header = _HEADER.pack(*fixed, 0, *described) + dimensions
    header = _HEADER.pack(*fixed, _checksum(header, body), *described) + dimensions
    return b"".join((header, body))


def size_of(packed: Packed, shape: Sequence[int]) -> int:
    """Count the bytes of a variable's frame without the lossless stage, which never makes it larger."""
    return _HEADER.size + 8 * len(shape) + packed.codes.nbytes


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
        copy: whether the codes get memory of their own; otherwise they lie in ``data`` and must not be written, if
            they did not go through the lossless stage.
        shape: what the variable's must be; None takes any, but no small frame that becomes huge.
        sent: what was sent of the variable, to which its codes may be a difference.

    Raises:
        PayloadError: the bytes are not a frame, or not of that shape.
    """
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise PayloadError(f"{name}: {len(view)} bytes are too few for a frame, whose header takes {_HEADER.size}")
    magic, version, kind, e, m, scale, offset, checksum, ndim, coding, difference, zero = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError(f"{name}: not a compressed variable: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise PayloadError(
            f"{name}: frame version {version}, {VERSION} expected: use the version of fedomc that wrote it"
        )
    if kind not in (VARIABLE, UPDATE, DENSE):
        raise PayloadError(f"{name}: kind {kind} is unknown")
    if coding not in (planes.PLAIN, planes.BYTES, planes.BITS) or difference > (coding != planes.PLAIN) or zero:
        raise PayloadError(f"{name}: coding {coding}, {difference}, {zero} is unknown")
    try:
        fmt = _format(e, m)
    except FormatError as error:
        raise PayloadError(f"{name}: {error}") from None
    if ndim > MAX_DIMENSIONS:
        raise PayloadError(f"{name}: {ndim} dimensions, {MAX_DIMENSIONS} at most")
    begin = _HEADER.size + 8 * ndim
    if len(view) < begin:
        raise PayloadError(f"{name}: cut off within its {ndim} dimensions")
    found = struct.unpack_from(f"<{ndim}Q", view, _HEADER.size)
    numel = math.prod(found)
    if (numel or math.prod(size or 1 for size in found)) > _MAX_NUMEL:
        raise PayloadError(f"{name}: shape {found} is too large")
    if shape is not None and found != tuple(shape):
        raise PayloadError(f"{name}: the frame has shape {found}, {tuple(shape)} expected")
    expected = begin + 4 * words_of(numel, fmt.bits)
    if coding == planes.PLAIN and len(view) != expected:
        raise PayloadError(f"{name}: {len(view)} bytes, but {fmt} codes of shape {found} make {expected}")
    if coding != planes.PLAIN and len(view) >= expected:
        raise PayloadError(f"{name}: {len(view)} bytes of planes, but {fmt} codes of shape {found} make {expected}")
    if shape is None and expected > MOST_EXPANSION * len(view):
        raise PayloadError(f"{name}: {len(view)} bytes would become {expected}: say which shape is expected")
    if not (math.isfinite(scale) and math.isfinite(offset)):
        raise PayloadError(f"{name}: factor {scale} or offset {offset} is not finite")
    if not stays_finite(fmt, scale, offset):
        raise PayloadError(f"{name}: factor {scale} and offset {offset} leave the range of float32")
    body = view[begin:]
    if checksum != _checksum(view[:begin], body):
        raise PayloadError(f"{name}: checksum does not match: the bytes were damaged on the way")
    if coding == planes.PLAIN:
        codes = _codes(data, begin, copy)
    else:
        reference = _reference(sent, fmt, numel)
        codes = planes.decompress(body, coding, bool(difference), numel, fmt.bits, reference, name)
    return Frame(Packed(codes, torch.tensor([scale, offset], dtype=torch.float32), fmt, numel), found, kind)


def _reference(sent: Packed | None, format: FloatFormat, numel: int) -> Tensor | None:
    """Return the codes that others may differ from: only of the same format are they near each other."""
    if sent is None or sent.format != format or sent.numel != numel:
        return None
    return sent.codes.detach().cpu()


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


def _codes(data: bytes | bytearray | memoryview, begin: int, copy: bool) -> Tensor:
    if len(data) == begin:
        return torch.empty(0, dtype=torch.int32)
    # The memory of a message is read-only, and so is a base by construction: torch does not mind if it comes so.
    codes = from_dlpack(np.frombuffer(data, np.int32, offset=begin))
    if sys.byteorder == "big":
        return torch.from_numpy(codes.numpy().byteswap())
    return codes.clone() if copy else codes


def _checksum(header: Any, codes: Any) -> int:
    found = xxhash.xxh3_64(header[: _CHECKSUM.start])
    found.update(header[_CHECKSUM.stop :])
    found.update(codes)
    return found.intdigest() & 0xFFFFFFFF
