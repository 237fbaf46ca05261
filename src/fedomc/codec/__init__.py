"""Converts between dense values and packed codes, for whole variables or stretches that begin at a block boundary.

What is decoded may be written as bfloat16 or float16, rounded to nearest, and gradients may be given as either.

Methods call these functions without knowing which backend runs them. Each function is a ``torch.library`` operator, so
the dispatcher chooses the backend: the C++ kernels for CPU tensors, Triton kernels for floats on CUDA devices, and the
reference, written in PyTorch operations, for all else. All produce the same bits.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from fedomc.codec import native, reference, reference_blocks, reference_rotation, triton_dispatch
from fedomc.codec.deferred import Deferred, Outcome, defers, encode_there, keep_present
from fedomc.codec.elements import BlockElement, FloatElement, IntegerElement, NormalFloat, OCPElement
from fedomc.codec.layout import BLOCK, CHUNK, SUMS, words_of
from fedomc.codec.scaling import bounded_exponent, fitting_exponent
from fedomc.codec.schemas import SCHEMAS

__all__ = [
    "BLOCK",
    "CHUNK",
    "INFINITY_BITS",
    "SUMS",
    "Deferred",
    "Outcome",
    "absmax_bits",
    "add_difference",
    "backend",
    "block_decode",
    "block_decode_sum",
    "block_encode",
    "block_update",
    "bounded_exponent",
    "decode",
    "decode_add",
    "decode_add_difference",
    "decode_sum",
    "defers",
    "encode",
    "encode_there",
    "fitting_exponent",
    "keep_present",
    "numbers_of",
    "pack",
    "rotated_decode",
    "rotated_encode",
    "unpack",
    "update",
    "words_of",
]

INFINITY_BITS = 0x7F800000
"""The bits of a float32 infinity; the magnitude bits of every finite value are smaller."""

_DENSE = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of dense values that the operators take
_STATUS = 2  # elements of a status tensor: the bits of the largest magnitude, and whether any value changed
_REFERENCES = {"block": reference_blocks, "rotated": reference_rotation}

_library = torch.library.Library("fedomc", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in SCHEMAS.items():
    _module = _REFERENCES.get(_name.partition("_")[0], reference)
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, getattr(_module, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    if native.extension is not None and hasattr(native, _name):
        _library.impl(_name, getattr(native, _name), "CPU")  # type: ignore[no-untyped-call]
    if _name in triton_dispatch.MODULES:
        _kernel = triton_dispatch.operator(_name, getattr(_module, _name))
        _library.impl(_name, _kernel, "CUDA")  # type: ignore[no-untyped-call]
    # All results are written to arguments, so there is nothing to allocate for fake tensors.
    torch.library.register_fake(f"fedomc::{_name}", lambda *args: None, lib=_library)

_operators = SimpleNamespace(
    **{name: native.past_dispatcher(name, getattr(torch.ops.fedomc, name).default) for name in SCHEMAS}
)


BlockPart = tuple[Tensor, Tensor, BlockElement, int]
"""The codes of a blockwise method: words, scales, element and block size."""


def backend(device: torch.device | str) -> str:
    """Return the name of the backend that serves a device: ``native``, ``triton`` or ``reference``.

    What has no kernel, such as integers and NF4 on a GPU, is served by the reference in any case.
    """
    there = torch.device(device)
    if there.type == "cpu" and native.extension is not None:
        return "native"
    return "triton" if defers(there) else "reference"


def absmax_bits(values: Tensor) -> int:
    """Return the float32 bits of the largest magnitude in floats ``[n]`` of any dtype; 0 for no values."""
    out = torch.zeros(1, dtype=torch.int64, device=values.device)
    _operators.absmax((values if values.dtype in _DENSE else values.float()).contiguous(), out)
    return int(out)


def decode(words: Tensor, scale_offset: Tensor, element: FloatElement, out: Tensor) -> Tensor:
    """Decode ``scale * Q + offset``, where Q is the value of a code.

    Args:
        words: the packed codes, int32 ``[words_of(n, bits)]``.
        scale_offset: float32 ``[2]``; with (1, 0), the values of the codes are decoded exactly.
        element: the number format.
        out: float32, bfloat16 or float16 ``[n]``, contiguous; it is overwritten.

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
    """Decode the sum of a base and its update in one pass.

    The arguments are those of ``decode``, for the base and for the update.
    """
    base, update = (each.exponent_bits for each in (element, update_element))
    _operators.decode_sum(
        words, scale_offset, base, element.mantissa_bits,
        update_words, update_scale_offset, update, update_element.mantissa_bits, out,
    )  # fmt: skip
    return out


def decode_add(words: Tensor, scale_offset: Tensor, element: FloatElement, weight: float, out: Tensor) -> Tensor:
    """Add ``weight * (scale * Q + offset)`` to float32 ``out``; the other arguments are those of ``decode``."""
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
    """Add ``weight`` times the difference of two decoded variables to float32 ``out``.

    The other arguments are those of ``decode``, for each of the two variables.
    """
    _operators.decode_add_difference(
        words, scale_offset, element.exponent_bits, element.mantissa_bits, subtrahend_words, subtrahend_scale_offset,
        subtrahend_element.exponent_bits, subtrahend_element.mantissa_bits, weight, out,
    )  # fmt: skip
    return out


def add_difference(values: Tensor, subtrahend: Tensor, weight: float, out: Tensor) -> Tensor:
    """Add ``weight * (values - subtrahend)`` to ``out`` in one pass; all tensors are contiguous float32 ``[n]``."""
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
    """Encode the values V as ``Q(2**exponent * V)``, where Q rounds to a code.

    Args:
        values: float32 ``[n]``, contiguous.
        element: the number format.
        exponent: the exponent of the scaling, from ``top_exponent - 127`` to ``120 - bias - mantissa_bits``, or 0.
        words: the packed codes, int32 ``[words_of(n, bits)]``; overwritten.
        start: the index of the first value within its variable, a multiple of ``BLOCK``. It is the counter of the
            random generator.
        seed: the seed of stochastic rounding, up to 63 bits; None rounds to nearest, ties to the even code.
        sums: whether to compute the sums for the least-squares fit.

    Returns:
        The sums of each chunk, float64 ``[chunks, 5]`` (``[0, 5]`` without ``sums``), and the outcome.
    """
    table, status = _sums_table(values, sums), _status(values)
    _operators.encode(values, element.exponent_bits, element.mantissa_bits, exponent, seed, start, words, table, status)
    return table, Deferred(status).outcome()


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
) -> Outcome | Deferred:
    """Add ``alpha * gradient`` to the decoded values and encode the result, without a dense copy of the values.

    The values are rounded in units of the present scale, relative to the present offset, so a value that the gradient
    does not move keeps its code exactly. The scale changes only by powers of two, and only if the largest value
    requires it.

    Args:
        words: the present codes, int32 ``[words_of(n, bits)]``.
        scale_offset: the present scale and offset, float32 ``[2]``.
        element: the number format of both the present and the new codes.
        gradient: float32, bfloat16 or float16 ``[n]``, contiguous.
        alpha: the factor of the gradient.
        out: the new codes, int32 like ``words``; overwritten. It must not be ``words`` itself, which is read again if
            a second pass with another scale is needed.
        out_scale_offset: the new scale and offset, float32 ``[2]``; overwritten. It must not be ``scale_offset``.
        rescale: whether the scale may change; otherwise, values beyond the largest code saturate.
        seed: the seed of stochastic rounding; None rounds to nearest.

    Returns:
        The outcome, with the largest magnitude in units of the codes. It is also infinite if the present scale, such
        as zero, does not allow an update; the caller then has to encode the values anew. It is deferred where
        ``defers`` says so.
    """
    status = _status(gradient)
    _operators.update(
        words, scale_offset, element.exponent_bits, element.mantissa_bits, gradient, alpha, rescale, seed, out,
        out_scale_offset, status,
    )  # fmt: skip
    return _deferred(status)


def block_decode(words: Tensor, scales: Tensor, element: BlockElement, block: int, out: Tensor) -> Tensor:
    """Decode ``scale * Q``, where Q is the value of a code and each block of values has its own scale.

    Args:
        words: the packed codes, int32 ``[words_of(n, bits)]``.
        scales: ``[ceil(n / block)]``, float32, or for float elements uint8 exponents with a bias of 127 (E8M0).
        element: the element format of the codes.
        block: the number of neighbouring values that share a scale: 32, 64, 128 or 256.
        out: float32, bfloat16 or float16 ``[n]``, contiguous; it is overwritten.

    Returns:
        ``out``.
    """
    _operators.block_decode(words, scales, *numbers_of(element), block, out)
    return out


def block_decode_sum(base: BlockPart, update: BlockPart, out: Tensor) -> Tensor:
    """Decode the sum of a base and its update in one pass.

    Args:
        base: the words, scales, element and block size of the base, as in ``block_decode``.
        update: those of the update.
        out: float32, bfloat16 or float16 ``[n]``, contiguous; it is overwritten.

    Returns:
        ``out``.
    """
    (words, scales, element, block), (update_words, update_scales, update_element, update_block) = base, update
    _operators.block_decode_sum(
        words, scales, *numbers_of(element), block,
        update_words, update_scales, *numbers_of(update_element), update_block, out,
    )  # fmt: skip
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
) -> Outcome | Deferred:
    """Encode values as codes with a scale per block; the arguments are those of ``encode`` and ``block_decode``."""
    status = _status(values)
    _operators.block_encode(values, *numbers_of(element), block, seed, start, words, scales, status)
    return _deferred(status)


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
) -> Outcome | Deferred:
    """Add ``alpha * gradient`` to the decoded values and encode the result, without a dense copy of the values.

    The arguments are those of ``update`` and ``block_decode``; ``out`` and ``out_scales`` are overwritten.
    """
    status = _status(gradient)
    _operators.block_update(words, scales, *numbers_of(element), block, gradient, alpha, seed, out, out_scales, status)
    return _deferred(status)


def rotated_decode(words: Tensor, scales: Tensor, bits: int, seed: int, out: Tensor, *, start: int = 0) -> Tensor:
    """Decode randomly rotated blocks; see ``methods.rotated``.

    Args:
        words: int32 ``[words_of(n, bits)]``.
        scales: float32 ``[ceil(n / 1024)]``.
        bits: of a code, 1 or 2.
        seed: of the rotations, a 64-bit integer, signed.
        out: float32, bfloat16 or float16 ``[n]``, contiguous, written.
        start: where the values stand in their variable, a multiple of ``BLOCK``.

    Returns:
        ``out``.
    """
    _operators.rotated_decode(words, scales, bits, seed, start, out)
    return out


def rotated_encode(
    values: Tensor, bits: int, seed: int, words: Tensor, scales: Tensor, *, start: int = 0, unbiased: bool = True
) -> None:
    """Rotate blocks of finite values and write codes and scales; arguments as in ``rotated_decode``.

    ``unbiased`` chooses the scale with which the mean over all rotations is the values themselves; otherwise it is the
    one of the least squared error, which is smaller.
    """
    _operators.rotated_encode(values, bits, seed, start, unbiased, words, scales)


def unpack(words: Tensor, numel: int, bits: int) -> Tensor:
    """Extract codes from packed words.

    Args:
        words: int32 ``[words_of(numel, bits)]``.
        numel: the number of codes.
        bits: the number of bits of a code.

    Returns:
        The codes, int32 ``[numel]``, with all bits above the lowest ``bits`` cleared.
    """
    return reference.unpack(words, -(-numel // BLOCK), bits).view(-1)[:numel]


def pack(codes: Tensor, bits: int, words: Tensor) -> Tensor:
    """Pack codes into words; the inverse of ``unpack``.

    Args:
        codes: int32 ``[n]``, each below ``2**bits``.
        bits: the number of bits of a code.
        words: int32 ``[words_of(n, bits)]``; overwritten.

    Returns:
        ``words``.
    """
    blocks = -(-codes.numel() // BLOCK)
    reference.pack(torch.nn.functional.pad(codes, (0, blocks * BLOCK - codes.numel())), bits, words)
    return words


def numbers_of(element: BlockElement) -> tuple[int, int, int]:
    """Return an element format as the numbers (kind, e, m) that the operators take.

    ``reference_blocks.block_element`` is the inverse.
    """
    if isinstance(element, IntegerElement):
        return reference_blocks.INTEGER, element.bits, 0
    if isinstance(element, NormalFloat):
        return reference_blocks.NORMAL_FLOAT, 0, 0
    kind = reference_blocks.OCP if isinstance(element, OCPElement) else reference_blocks.FLOAT
    return kind, element.exponent_bits, element.mantissa_bits


def _sums_table(values: Tensor, requested: bool) -> Tensor:
    chunks = -(-values.numel() // CHUNK) if requested else 0
    return torch.empty(chunks, SUMS, dtype=torch.float64, device=values.device)


def _status(values: Tensor) -> Tensor:
    return torch.zeros(_STATUS, dtype=torch.int64, device=values.device)


def _deferred(status: Tensor) -> Outcome | Deferred:
    return Deferred(status) if defers(status.device) else Deferred(status).outcome()
