"""The codec: values <-> packed bits, for whole variables or any stretch of them that starts at a block.

This is the seam between what a code means and how fast it is made. Each operation is a ``torch.library`` operator, so
that the dispatcher chooses the backend: the C++ kernels for CPU tensors, the reference in PyTorch operations for all
others. Both give the same bits, for any number of threads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedomc.codec import native, reference, reference_blocks
from fedomc.codec.elements import BlockElement, FloatElement, IntegerElement, NormalFloat, OCPElement
from fedomc.codec.layout import BLOCK, CHUNK, SUMS, words_of
from fedomc.codec.scaling import bounded_exponent, fitting_exponent

__all__ = [
    "BLOCK",
    "CHUNK",
    "INFINITY_BITS",
    "SUMS",
    "Outcome",
    "absmax_bits",
    "add_difference",
    "backend",
    "block_decode",
    "block_encode",
    "block_update",
    "bounded_exponent",
    "decode",
    "decode_add",
    "decode_add_difference",
    "decode_sum",
    "encode",
    "fitting_exponent",
    "numbers_of",
    "pack",
    "unpack",
    "update",
    "words_of",
]

INFINITY_BITS = 0x7F800000
"""The bits of a float32 infinity; the magnitude bits of every finite value are smaller."""

_STATUS = 2  # the bits of the largest magnitude, and whether any value changed

_SCHEMAS = {
    "absmax": "(Tensor values, Tensor(a!) out) -> ()",
    "decode": "(Tensor words, Tensor scale_offset, int e, int m, Tensor(a!) out) -> ()",
    "decode_sum": "(Tensor words, Tensor scale_offset, int e, int m, Tensor update_words, Tensor update_scale_offset, "
    "int update_e, int update_m, Tensor(a!) out) -> ()",
    "decode_add": "(Tensor words, Tensor scale_offset, int e, int m, float weight, Tensor(a!) out) -> ()",
    "decode_add_difference": "(Tensor words, Tensor scale_offset, int e, int m, Tensor subtrahend_words, "
    "Tensor subtrahend_scale_offset, int subtrahend_e, int subtrahend_m, float weight, Tensor(a!) out) -> ()",
    "add_difference": "(Tensor values, Tensor subtrahend, float weight, Tensor(a!) out) -> ()",
    "encode": "(Tensor values, int e, int m, int exponent, int? seed, int start, Tensor(a!) words, Tensor(b!) sums, "
    "Tensor(c!) status) -> ()",
    "update": "(Tensor words, Tensor scale_offset, int e, int m, Tensor gradient, float alpha, bool rescale, "
    "int? seed, Tensor(a!) out, Tensor(b!) out_scale_offset, Tensor(c!) status) -> ()",
    "block_decode": "(Tensor words, Tensor scales, int kind, int e, int m, int block, Tensor(a!) out) -> ()",
    "block_encode": "(Tensor values, int kind, int e, int m, int block, int? seed, int start, Tensor(a!) words, "
    "Tensor(b!) scales, Tensor(c!) status) -> ()",
    "block_update": "(Tensor words, Tensor scales, int kind, int e, int m, int block, Tensor gradient, float alpha, "
    "int? seed, Tensor(a!) out, Tensor(b!) out_scales, Tensor(c!) status) -> ()",
}

_library = torch.library.Library("fedomc", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _module = reference_blocks if _name.startswith("block_") else reference
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, getattr(_module, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    if native.extension is not None:
        _library.impl(_name, getattr(native, _name), "CPU")  # type: ignore[no-untyped-call]
    # All results are written to arguments: there is nothing to make for tensors without values.
    torch.library.register_fake(f"fedomc::{_name}", lambda *args: None, lib=_library)

_operators = torch.ops.fedomc


class Outcome(NamedTuple):
    """What a pass over values found.

    Attributes:
        absmax_bits: the float32 bits of the largest magnitude: ``INFINITY_BITS`` or more if a value is not finite, and
            then what was written means nothing.
        changed: whether any value differs from what was decoded; always true where nothing was decoded.
    """

    absmax_bits: int
    changed: bool


def backend(device: torch.device | str) -> str:
    """Name what serves a device: ``native`` or ``reference``."""
    return "native" if torch.device(device).type == "cpu" and native.extension is not None else "reference"


def absmax_bits(values: Tensor) -> int:
    """Return the float32 bits of the largest magnitude of float32 ``[n]``; 0 for no values."""
    out = torch.zeros(1, dtype=torch.int64, device=values.device)
    _operators.absmax(values, out)
    return int(out)


def decode(words: Tensor, scale_offset: Tensor, element: FloatElement, out: Tensor) -> Tensor:
    """Decode ``scale * Q + offset``.

    Args:
        words: int32 ``[words_of(n, bits)]``.
        scale_offset: float32 ``[2]``; (1, 0) keeps every bit.
        element: the number format.
        out: float32 ``[n]``, contiguous, written.

    Returns:
        ``out``.
    """
    _operators.decode(words, scale_offset, element.exponent_bits, element.mantissa_bits, out)
    return out


def decode_sum(
    words: Tensor,
    scale_offset: Tensor,
    element: FloatElement,
    update_words: Tensor,
    update_scale_offset: Tensor,
    update_element: FloatElement,
    out: Tensor,
) -> Tensor:
    """Decode a base and add its update in one pass; arguments as in ``decode``, for each of the two."""
    base, update = (each.exponent_bits for each in (element, update_element))
    _operators.decode_sum(
        words, scale_offset, base, element.mantissa_bits,
        update_words, update_scale_offset, update, update_element.mantissa_bits, out,
    )  # fmt: skip
    return out


def decode_add(words: Tensor, scale_offset: Tensor, element: FloatElement, weight: float, out: Tensor) -> Tensor:
    """Add ``weight * (scale * Q + offset)`` to ``out``; arguments as in ``decode``."""
    _operators.decode_add(words, scale_offset, element.exponent_bits, element.mantissa_bits, weight, out)
    return out


def decode_add_difference(
    words: Tensor,
    scale_offset: Tensor,
    element: FloatElement,
    subtrahend_words: Tensor,
    subtrahend_scale_offset: Tensor,
    subtrahend_element: FloatElement,
    weight: float,
    out: Tensor,
) -> Tensor:
    """Add ``weight`` times the difference of two decoded variables to ``out``; arguments as in ``decode``."""
    _operators.decode_add_difference(
        words, scale_offset, element.exponent_bits, element.mantissa_bits, subtrahend_words, subtrahend_scale_offset,
        subtrahend_element.exponent_bits, subtrahend_element.mantissa_bits, weight, out,
    )  # fmt: skip
    return out


def add_difference(values: Tensor, subtrahend: Tensor, weight: float, out: Tensor) -> Tensor:
    """Add ``weight * (values - subtrahend)`` to ``out`` in one pass; all are float32 ``[n]``, contiguous."""
    _operators.add_difference(values, subtrahend, weight, out)
    return out


def encode(
    values: Tensor,
    element: FloatElement,
    exponent: int,
    words: Tensor,
    *,
    start: int = 0,
    seed: int | None = None,
    sums: bool = True,
) -> tuple[Tensor, Outcome]:
    """Encode ``Q(2**exponent * V)`` into ``words``.

    Args:
        values: float32 ``[n]``, contiguous.
        element: the number format.
        exponent: the k of the scaling: from ``top_exponent - 127`` to ``120 - bias - mantissa_bits``, or 0.
        words: int32 ``[words_of(n, bits)]``, written.
        start: where the values stand in their variable, a multiple of ``BLOCK``: the counter of stochastic rounding.
        seed: of stochastic rounding, 63 bits; None rounds to nearest, ties to the even code.
        sums: whether the sums for the least-squares fit are wanted.

    Returns:
        The sums of each chunk, float64 ``[chunks, 5]`` (``[0, 5]`` if not wanted), and what was found.
    """
    table, status = _sums_table(values, sums), _status(values)
    _operators.encode(values, element.exponent_bits, element.mantissa_bits, exponent, seed, start, words, table, status)
    return table, _outcome(status)


def update(
    words: Tensor,
    scale_offset: Tensor,
    element: FloatElement,
    gradient: Tensor,
    alpha: float,
    out: Tensor,
    out_scale_offset: Tensor,
    *,
    rescale: bool = True,
    seed: int | None = None,
) -> Outcome:
    """Encode the decoded values plus ``alpha * gradient`` into ``out``, with no dense copy of them.

    The values are rounded in units of the present scale, on top of the present offset, so that what the gradient does
    not move keeps its code exactly. The scale changes by powers of two alone, where the largest value asks for it.

    Args:
        words: int32 ``[words_of(n, bits)]``.
        scale_offset: float32 ``[2]``, of the present values.
        element: the number format, of the result too.
        gradient: float32 ``[n]``, contiguous.
        alpha: its factor.
        out: int32 like ``words``, written; not ``words`` itself, which a second pass on another scale reads again.
        out_scale_offset: float32 ``[2]``, written; not ``scale_offset`` itself.
        rescale: whether the scale may change; otherwise values beyond the largest code saturate.
        seed: of stochastic rounding; None rounds to nearest.

    Returns:
        What was found; the largest magnitude is in units of the codes. It is infinite, too, where the scale does not
        allow an update, such as zero: the values are to be encoded afresh then.
    """
    status = _status(gradient)
    _operators.update(
        words, scale_offset, element.exponent_bits, element.mantissa_bits, gradient, alpha, rescale, seed, out,
        out_scale_offset, status,
    )  # fmt: skip
    return _outcome(status)


def block_decode(words: Tensor, scales: Tensor, element: BlockElement, block: int, out: Tensor) -> Tensor:
    """Decode ``scale * Q``, with a scale for each block of values.

    Args:
        words: int32 ``[words_of(n, bits)]``.
        scales: ``[ceil(n / block)]``: float32, or uint8 for floats, exponents with a bias of 127 (E8M0).
        element: what a code is.
        block: how many neighbouring values have one scale: 32, 64, 128 or 256.
        out: float32 ``[n]``, contiguous, written.

    Returns:
        ``out``.
    """
    _operators.block_decode(words, scales, *numbers_of(element), block, out)
    return out


def block_encode(
    values: Tensor,
    element: BlockElement,
    block: int,
    words: Tensor,
    scales: Tensor,
    *,
    start: int = 0,
    seed: int | None = None,
) -> Outcome:
    """Encode values and write codes and scales; arguments as in ``encode`` and ``block_decode``."""
    status = _status(values)
    _operators.block_encode(values, *numbers_of(element), block, seed, start, words, scales, status)
    return _outcome(status)


def block_update(
    words: Tensor,
    scales: Tensor,
    element: BlockElement,
    block: int,
    gradient: Tensor,
    alpha: float,
    out: Tensor,
    out_scales: Tensor,
    *,
    seed: int | None = None,
) -> Outcome:
    """Encode the decoded values plus ``alpha * gradient`` into ``out`` and ``out_scales``, with no dense copy."""
    status = _status(gradient)
    _operators.block_update(words, scales, *numbers_of(element), block, gradient, alpha, seed, out, out_scales, status)
    return _outcome(status)


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


def numbers_of(element: BlockElement) -> tuple[int, int, int]:
    """Write an element as the operators take it; ``reference_blocks.block_element`` is the inverse."""
    if isinstance(element, IntegerElement):
        return reference_blocks.INTEGER, element.bits, 0
    if isinstance(element, NormalFloat):
        return reference_blocks.NORMAL_FLOAT, 0, 0
    kind = reference_blocks.OCP if isinstance(element, OCPElement) else reference_blocks.FLOAT
    return kind, element.exponent_bits, element.mantissa_bits


def _sums_table(values: Tensor, wanted: bool) -> Tensor:
    chunks = -(-values.numel() // CHUNK) if wanted else 0
    return torch.empty(chunks, SUMS, dtype=torch.float64, device=values.device)


def _status(values: Tensor) -> Tensor:
    return torch.zeros(_STATUS, dtype=torch.int64, device=values.device)


def _outcome(status: Tensor) -> Outcome:
    bits, changed = status.tolist()
    return Outcome(bits, bool(changed))
