"""Triton kernels that decode float codes on a GPU, with the same bits as the reference.

Scale and offset are read on the device. Values are rounded to nearest if they are decoded to bfloat16 or float16.

This module imports Triton; ``codec.triton_dispatch`` imports it when the first CUDA tensor arrives.
"""

import triton
import triton.language as tl
from torch import Tensor

from fedomc.codec.elements import FloatElement
from fedomc.codec.triton_floats import offset_of, value_of
from fedomc.codec.triton_words import codes_of, launch, row_of, store_rounded


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    words, scale_offset, other_words, other_scale_offset, out, n, total, other_total, weight,
    BLOCKS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr,
    OTHER_E: tl.constexpr, OTHER_M: tl.constexpr, OTHER_MAX_CODE: tl.constexpr,
    OTHER: tl.constexpr, ADDING: tl.constexpr,
):  # fmt: skip
    """Decode one or two variables; OTHER is 0, 1 for their sum or -1 for their difference; ADDING adds to ``out``."""
    codes = codes_of(words, total, BLOCKS, 1 + E + M)
    scale, offset = tl.load(scale_offset), offset_of(scale_offset)
    if OTHER != 0:
        others = codes_of(other_words, other_total, BLOCKS, 1 + OTHER_E + OTHER_M)
        other_scale, other_offset = tl.load(other_scale_offset), offset_of(other_scale_offset)
    for row in tl.static_range(32):
        at = row_of(row, BLOCKS)
        value = value_of(codes[row], scale, offset, E, M, MAX_CODE)
        if OTHER != 0:
            other = value_of(others[row], other_scale, other_offset, OTHER_E, OTHER_M, OTHER_MAX_CODE)
            value = value + other if OTHER == 1 else value - other
        if ADDING:
            value = tl.load(out + at, mask=at < n, other=0.0) + value * weight
        store_rounded(out + at, value, at < n)


@triton.jit  # type: ignore[untyped-decorator]
def add_difference_kernel(values, subtrahend, out, n, weight, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add ``weight * (values - subtrahend)`` to ``out``."""
    for row in tl.static_range(32):
        at = row_of(row, BLOCKS)
        change = tl.load(values + at, mask=at < n, other=0.0) - tl.load(subtrahend + at, mask=at < n, other=0.0)
        tl.store(out + at, tl.load(out + at, mask=at < n, other=0.0) + change * weight, mask=at < n)


def add_difference(values: Tensor, subtrahend: Tensor, weight: float, out: Tensor) -> None:
    """See ``reference.add_difference``."""
    n = out.numel()
    launch(add_difference_kernel, n, out, values, subtrahend, out, n, weight)


def decode(words: Tensor, scale_offset: Tensor, e: int, m: int, out: Tensor) -> None:
    """See ``reference.decode``."""
    _launch(words, scale_offset, e, m, words, scale_offset, e, m, 1.0, out, other=0, adding=False)


def decode_sum(
    words: Tensor, scale_offset: Tensor, e: int, m: int,
    update_words: Tensor, update_scale_offset: Tensor, update_e: int, update_m: int, out: Tensor,
) -> None:  # fmt: skip
    """See ``reference.decode_sum``."""
    _launch(
        words, scale_offset, e, m, update_words, update_scale_offset, update_e, update_m, 1.0, out,
        other=1, adding=False,
    )  # fmt: skip


def decode_add(words: Tensor, scale_offset: Tensor, e: int, m: int, weight: float, out: Tensor) -> None:
    """See ``reference.decode_add``."""
    _launch(words, scale_offset, e, m, words, scale_offset, e, m, weight, out, other=0, adding=True)


def decode_add_difference(
    words: Tensor, scale_offset: Tensor, e: int, m: int,
    subtrahend_words: Tensor, subtrahend_scale_offset: Tensor, subtrahend_e: int, subtrahend_m: int,
    weight: float, out: Tensor,
) -> None:  # fmt: skip
    """See ``reference.decode_add_difference``."""
    _launch(
        words, scale_offset, e, m, subtrahend_words, subtrahend_scale_offset, subtrahend_e, subtrahend_m, weight, out,
        other=-1, adding=True,
    )  # fmt: skip


def _launch(
    words: Tensor, scale_offset: Tensor, e: int, m: int,
    other_words: Tensor, other_scale_offset: Tensor, other_e: int, other_m: int,
    weight: float, out: Tensor, *, other: int, adding: bool,
) -> None:  # fmt: skip
    launch(
        decode_kernel, out.numel(), out,
        words, scale_offset, other_words, other_scale_offset, out, out.numel(), words.numel(), other_words.numel(),
        weight, E=e, M=m, MAX_CODE=FloatElement(e, m).max_code,
        OTHER_E=other_e, OTHER_M=other_m, OTHER_MAX_CODE=FloatElement(other_e, other_m).max_code,
        OTHER=other, ADDING=adding,
    )  # fmt: skip
