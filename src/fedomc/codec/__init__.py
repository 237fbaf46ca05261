"""The codec: values <-> packed bits, for whole variables or any stretch of them that starts at a block.

This is the seam between what a code means and how fast it is made. Each operation is a ``torch.library`` operator, so
that the dispatcher chooses the backend: the C++ kernels for CPU tensors, the reference in PyTorch operations for all
others. Both give the same bits, for any number of threads.
"""

import torch
from torch import Tensor

from fedomc.codec import native, reference
from fedomc.codec.elements import FloatFormat
from fedomc.codec.layout import BLOCK, CHUNK, SUMS, words_of

__all__ = [
    "BLOCK",
    "CHUNK",
    "INFINITY_BITS",
    "SUMS",
    "backend",
    "add_difference",
    "decode",
    "decode_add",
    "decode_add_difference",
    "decode_sum",
    "encode",
    "magnitude_bits",
    "pack",
    "unpack",
    "update",
    "words_of",
]

INFINITY_BITS = 0x7F800000
"""The bits of a float32 infinity; the magnitude bits of every finite value are smaller."""

_SCHEMAS = {
    "largest": "(Tensor values, Tensor(a!) out) -> ()",
    "decode": "(Tensor words, int e, int m, float scale, float offset, Tensor(a!) out) -> ()",
    "decode_sum": "(Tensor words, int e, int m, float scale, float offset, Tensor update_words, int update_e, "
    "int update_m, float update_scale, float update_offset, Tensor(a!) out) -> ()",
    "decode_add": "(Tensor words, int e, int m, float scale, float offset, float weight, Tensor(a!) out) -> ()",
    "decode_add_difference": "(Tensor words, int e, int m, float scale, float offset, Tensor less_words, int less_e, "
    "int less_m, float less_scale, float less_offset, float weight, Tensor(a!) out) -> ()",
    "add_difference": "(Tensor values, Tensor less, float weight, Tensor(a!) out) -> ()",
    "encode": "(Tensor values, int e, int m, int exponent, int? seed, int start, Tensor(a!) words, Tensor(b!) sums, "
    "Tensor(c!) largest) -> ()",
    "update": "(Tensor words, int e, int m, float scale, float offset, Tensor gradient, float alpha, int exponent, "
    "int? seed, Tensor(a!) out, Tensor(b!) sums, Tensor(c!) largest) -> ()",
}

_library = torch.library.Library("fedomc", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    if native.extension is not None:
        _library.impl(_name, getattr(native, _name), "CPU")  # type: ignore[no-untyped-call]
    # All results are written to arguments: there is nothing to make for tensors without values.
    torch.library.register_fake(f"fedomc::{_name}", lambda *args: None, lib=_library)

_operators = torch.ops.fedomc


def backend(device: torch.device | str) -> str:
    """Name what serves a device: ``native`` or ``reference``."""
    return "native" if torch.device(device).type == "cpu" and native.extension is not None else "reference"


def magnitude_bits(values: Tensor) -> int:
    """Return the largest magnitude of float32 ``[n]`` as its bits; 0 for no values."""
    out = torch.zeros(1, dtype=torch.int64, device=values.device)
    _operators.largest(values, out)
    return int(out)


def decode(words: Tensor, format: FloatFormat, scale: float, offset: float, out: Tensor) -> Tensor:
    """Decode ``scale * Q + offset``.

    Args:
        words: int32 ``[words_of(n, bits)]``.
        format: the number format.
        scale: factor of every value; 1 with offset 0 keeps every bit.
        offset: added to every value.
        out: float32 ``[n]``, contiguous, written.

    Returns:
        ``out``.
    """
    _operators.decode(words, format.exponent_bits, format.mantissa_bits, scale, offset, out)
    return out


def decode_sum(
    words: Tensor,
    format: FloatFormat,
    scale: float,
    offset: float,
    update_words: Tensor,
    update_format: FloatFormat,
    update_scale: float,
    update_offset: float,
    out: Tensor,
) -> Tensor:
    """Decode a base and add its update in one pass; arguments as in ``decode``, for each of the two."""
    e, m, update_e, update_m = (
        bits for fmt in (format, update_format) for bits in (fmt.exponent_bits, fmt.mantissa_bits)
    )
    _operators.decode_sum(
        words, e, m, scale, offset, update_words, update_e, update_m, update_scale, update_offset, out
    )
    return out


def decode_add(words: Tensor, format: FloatFormat, scale: float, offset: float, weight: float, out: Tensor) -> Tensor:
    """Add ``weight * (scale * Q + offset)`` to ``out``; arguments as in ``decode``."""
    _operators.decode_add(words, format.exponent_bits, format.mantissa_bits, scale, offset, weight, out)
    return out


def decode_add_difference(
    words: Tensor,
    format: FloatFormat,
    scale: float,
    offset: float,
    less_words: Tensor,
    less_format: FloatFormat,
    less_scale: float,
    less_offset: float,
    weight: float,
    out: Tensor,
) -> Tensor:
    """Add ``weight`` times the difference of two decoded variables to ``out``; arguments as in ``decode``."""
    e, m, less_e, less_m = (bits for fmt in (format, less_format) for bits in (fmt.exponent_bits, fmt.mantissa_bits))
    _operators.decode_add_difference(
        words, e, m, scale, offset, less_words, less_e, less_m, less_scale, less_offset, weight, out
    )
    return out


def add_difference(values: Tensor, less: Tensor, weight: float, out: Tensor) -> Tensor:
    """Add ``weight * (values - less)`` to ``out`` in one pass; all are float32 ``[n]``, contiguous."""
    _operators.add_difference(values, less, weight, out)
    return out


def encode(
    values: Tensor,
    format: FloatFormat,
    exponent: int,
    words: Tensor,
    *,
    start: int = 0,
    seed: int | None = None,
    sums: bool = True,
) -> tuple[Tensor, int]:
    """Encode ``Q(2**exponent * V)`` into ``words``.

    Args:
        values: float32 ``[n]``, contiguous.
        format: the number format.
        exponent: the k of the scaling: from ``top_exponent - 127`` to ``120 - bias - mantissa_bits``, or 0.
        words: int32 ``[words_of(n, bits)]``, written.
        start: where the values stand in their variable, a multiple of ``BLOCK``: the counter of stochastic rounding.
        seed: of stochastic rounding, 63 bits; None rounds to nearest, ties to the even code.
        sums: whether the sums for the least-squares fit are wanted.

    Returns:
        The sums of each chunk, float64 ``[chunks, 5]`` (``[0, 5]`` if not wanted), and the float32 bits of the largest
        magnitude: ``INFINITY_BITS`` or more if a value is not finite, and then the words mean nothing.
    """
    found, largest = _found(values, sums)
    _operators.encode(values, format.exponent_bits, format.mantissa_bits, exponent, seed, start, words, found, largest)
    return found, int(largest)


def update(
    words: Tensor,
    format: FloatFormat,
    scale: float,
    offset: float,
    gradient: Tensor,
    alpha: float,
    exponent: int,
    out: Tensor,
    *,
    seed: int | None = None,
    sums: bool = True,
) -> tuple[Tensor, int]:
    """Encode the decoded values plus ``alpha * gradient`` into ``out``, with no dense copy of them.

    Args:
        words: int32 ``[words_of(n, bits)]``, with format, scale and offset as in ``decode``.
        format: the number format, of the result too.
        scale: of the present values.
        offset: of the present values.
        gradient: float32 ``[n]``, contiguous.
        alpha: its factor.
        exponent: the k of the scaling of the result.
        out: int32 like ``words``, written; not ``words`` itself, which a wrong exponent would destroy.
        seed: of stochastic rounding; None rounds to nearest.
        sums: whether the sums are wanted.

    Returns:
        As ``encode`` does.
    """
    found, largest = _found(gradient, sums)
    _operators.update(
        words, format.exponent_bits, format.mantissa_bits, scale, offset, gradient, alpha, exponent, seed, out, found,
        largest,
    )  # fmt: skip
    return found, int(largest)


def unpack(words: Tensor, numel: int, bits: int) -> Tensor:
    """Take the codes out of their words.

    Args:
        words: int32 ``[words_of(numel, bits)]``.
        numel: how many codes.
        bits: of a code.

    Returns:
        int32 ``[numel]``: the bits of each code, none above them.
    """
    return reference.unpack(words, -(-numel // BLOCK), bits).view(-1)[:numel]


def pack(codes: Tensor, bits: int, words: Tensor) -> Tensor:
    """Put codes into words; arguments as ``unpack`` has them.

    Returns:
        ``words``, written.
    """
    blocks = -(-codes.numel() // BLOCK)
    reference.pack(torch.nn.functional.pad(codes, (0, blocks * BLOCK - codes.numel())), bits, words)
    return words


def _found(values: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    chunks = -(-values.numel() // CHUNK) if sums else 0
    found = torch.empty(chunks, SUMS, dtype=torch.float64, device=values.device)
    return found, torch.zeros(1, dtype=torch.int64, device=values.device)
