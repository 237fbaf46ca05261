"""Triton kernels that decide on a GPU what the host decides for a CPU, so that the host need not look."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedomc.codec.elements import FloatElement
from fedomc.codec.scaling import largest_mantissa, least_exponent, most_exponent
from fedomc.codec.triton_floats import power_of_two
from fedomc.codec.triton_words import OPTIONS

WORDS = 4096
"""The number of elements that a program copies."""


@triton.jit  # type: ignore[untyped-decorator]
def choose_exponent_kernel(  # type: ignore[no-untyped-def]
    status, exponent, scale_offset,
    SCALED: tl.constexpr, LARGEST_MANTISSA: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Choose the exponent as ``codec.scaling`` does; ``status`` begins with the bits of the largest magnitude."""
    absmax = tl.load(status).to(tl.int32)
    chosen = tl.zeros([], tl.int32)
    if SCALED:
        field = absmax >> 23
        exceeds = ((field > 0) & ((absmax & 0x7FFFFF) > LARGEST_MANTISSA)).to(tl.int32)
        fitting = TOP - (tl.maximum(field, 1) - 127) - exceeds
        chosen = tl.where(absmax == 0, 0, tl.minimum(tl.maximum(fitting, LEAST), MOST))
    tl.store(exponent, chosen)
    tl.store(scale_offset, power_of_two(-chosen))
    tl.store(scale_offset + 1, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def keep_kernel(present, status, out, n, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy the present field to ``out`` if the new one is not finite, or if no value changed."""
    if (tl.load(status) < 0x7F800000) & (tl.load(status + 1) != 0):
        return
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    tl.store(out + at, tl.load(present + at, mask=at < n), mask=at < n)


def choose_exponent(
    status: Tensor, e: int, m: int, stochastic: bool, exponent: Tensor, scale_offset: Tensor
) -> None:  # fmt: skip
    """See ``reference.choose_exponent``."""
    element = FloatElement(e, m)
    kept_free = 1 << (23 - m) if m else 0  # see the note on room in codec.scaling
    with torch.cuda.device_of(status):  # type: ignore[no-untyped-call]
        choose_exponent_kernel[(1,)](
            status, exponent, scale_offset, SCALED=e < 8,
            LARGEST_MANTISSA=largest_mantissa(element, stochastic=stochastic) - kept_free,
            TOP=element.top_exponent, LEAST=least_exponent(element), MOST=most_exponent(element), **OPTIONS,
        )  # fmt: skip


def keep(present: Tensor, status: Tensor, out: Tensor) -> None:
    """See ``reference.keep``."""
    n = out.numel()
    if n:
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
            keep_kernel[(triton.cdiv(n, WORDS),)](present, status, out, n, WORDS=WORDS, **OPTIONS)
