"""Triton kernels that decode float codes on a GPU, with the same bits as the reference.

A thread handles one lane of a block of the layout and walks through its 32 rows, so that a warp reads each word once
and writes whole lines. Scale and offset are read on the device. Products and sums must not be fused, so every launch
turns that off; scaling by a power of two needs subnormals, which Triton keeps.

This module imports Triton; ``codec.triton_dispatch`` imports this module when the first CUDA tensor arrives.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedomc.codec.elements import FloatElement

BLOCKS = 4
"""The number of layout blocks that a program handles: a lane for each thread of four warps."""

OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""The compiler's options for all kernels."""


@triton.jit  # type: ignore[untyped-decorator]
def codes_of(words, total, BLOCKS: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unpack the program's blocks: for each row the codes, int32 ``[BLOCKS, 32]``, above which bits are undefined."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    at = block * (32 * W) + tl.arange(0, 32)[None, :]
    word = tl.load(words + at, mask=at < total, other=0).to(tl.uint32, bitcast=True)
    codes = ()
    for row in tl.static_range(32):
        begin = row * W % 32
        code = word >> begin
        if begin + W >= 32 and row < 31:
            following = at + 32 * (row * W // 32 + 1)
            word = tl.load(words + following, mask=following < total, other=0).to(tl.uint32, bitcast=True)
            if begin + W > 32:
                code |= word << (32 - begin)
        codes = codes + (code,)  # type: ignore[assignment]  # noqa: RUF005
    return codes


@triton.jit  # type: ignore[untyped-decorator]
def value_of(code, scale, offset, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``scale * Q + offset``: a code is a float32 with another bias, which one exact product corrects."""
    magnitude = tl.minimum((code & ((1 << (E + M)) - 1)).to(tl.int32, bitcast=True), MAX_CODE)
    value = (magnitude << (23 - M)).to(tl.float32, bitcast=True)
    if E < 8:
        value *= 2.0 ** (128 - 2 ** (E - 1))
    sign = (code >> (E + M)) << 31
    signed = value.to(tl.uint32, bitcast=True) | sign
    return signed.to(tl.float32, bitcast=True) * scale + offset


@triton.jit
def offset_of(scale_offset):  # type: ignore[no-untyped-def]
    """Load the offset; adding -0 instead of 0 preserves the sign of zeros."""
    offset = tl.load(scale_offset + 1)
    return tl.where(offset == 0.0, -0.0, offset)


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
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    for row in tl.static_range(32):
        at = block * 1024 + 32 * row + tl.arange(0, 32)[None, :]
        value = value_of(codes[row], scale, offset, E, M, MAX_CODE)
        if OTHER != 0:
            other = value_of(others[row], other_scale, other_offset, OTHER_E, OTHER_M, OTHER_MAX_CODE)
            value = value + other if OTHER == 1 else value - other
        if ADDING:
            value = tl.load(out + at, mask=at < n, other=0.0) + value * weight
        tl.store(out + at, value, mask=at < n)


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
    n = out.numel()
    if n == 0:
        return
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        decode_kernel[(triton.cdiv(n, 1024 * BLOCKS),)](
            words, scale_offset, other_words, other_scale_offset, out, n, words.numel(), other_words.numel(), weight,
            BLOCKS=BLOCKS, E=e, M=m, MAX_CODE=FloatElement(e, m).max_code,
            OTHER_E=other_e, OTHER_M=other_m, OTHER_MAX_CODE=FloatElement(other_e, other_m).max_code,
            OTHER=other, ADDING=adding, **OPTIONS,
        )  # fmt: skip
