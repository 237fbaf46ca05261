"""Triton kernels of floats with a power of two for each block of values, with the same bits as the reference.

They serve the kinds ``FLOAT`` and ``OCP``; integers and NF4 are left to the reference.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fedomc.codec import reference_blocks
from fedomc.codec.elements import FloatElement
from fedomc.codec.reference import begin
from fedomc.codec.reference_blocks import FLOAT, OCP, block_element
from fedomc.codec.scaling import float32, largest_mantissa
from fedomc.codec.triton_floats import code_of, unscaled
from fedomc.codec.triton_words import (
    KEYS,
    blocks_of,
    codes_of,
    flushed,
    keys,
    lanes_of,
    launch,
    magnitude_of,
    note_largest,
    random_bits,
    row_of,
    store_codes,
    store_rounded,
)


@triton.jit  # type: ignore[untyped-decorator]
def scale_of(scales, row: tl.constexpr, count, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the scales of a row of the program's blocks, float32 ``[BLOCKS, 1]``."""
    at = blocks_of(BLOCKS) * (1024 // BLOCK) + 32 * row // BLOCK
    exponent = tl.load(scales + at, mask=at < count, other=127).to(tl.int32)
    return tl.where(exponent > 0, exponent << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count", "other_count"])  # type: ignore[untyped-decorator]
def block_decode_kernel(  # type: ignore[no-untyped-def]
    words, scales, other_words, other_scales, out, n, total, count, other_total, other_count,
    BLOCKS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr, BLOCK: tl.constexpr,
    OTHER_E: tl.constexpr, OTHER_M: tl.constexpr, OTHER_MAX_CODE: tl.constexpr, OTHER_BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Decode one variable, or the sum of two."""
    codes = codes_of(words, total, BLOCKS, 1 + E + M)
    if SUM:
        others = codes_of(other_words, other_total, BLOCKS, 1 + OTHER_E + OTHER_M)
    for row in tl.static_range(32):
        at = row_of(row, BLOCKS)
        value = unscaled(codes[row], E, M, MAX_CODE) * scale_of(scales, row, count, BLOCKS, BLOCK)
        if SUM:
            other = unscaled(others[row], OTHER_E, OTHER_M, OTHER_MAX_CODE)
            value += other * scale_of(other_scales, row, other_count, BLOCKS, OTHER_BLOCK)
        store_rounded(out + at, value, at < n)


@triton.jit  # type: ignore[untyped-decorator]
def encode_rows(  # type: ignore[no-untyped-def]
    values, words, scales, status, total, count, start, low, high,
    BLOCKS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr, BLOCK: tl.constexpr,
    TOP: tl.constexpr, LARGEST_MANTISSA: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Choose the scales of the program's values, a tuple of 32 rows, and encode them; zeros behind the last value."""
    bias: tl.constexpr = 2 ** (E - 1) - 1
    lanes = lanes_of(start, low, high, BLOCKS) if STOCHASTIC else tl.zeros([BLOCKS, 32], tl.uint32)
    all_largest, inverse = tl.zeros([BLOCKS, 1], tl.int32), tl.zeros([BLOCKS, 1], tl.float32)
    codes = ()
    for row in tl.static_range(32):
        if row % (BLOCK // 32) == 0:
            magnitude = magnitude_of(values[row])
            for following in tl.static_range(1, BLOCK // 32):
                magnitude = tl.maximum(magnitude, magnitude_of(values[row + following]))
            largest = tl.max(magnitude, 1)[:, None]
            all_largest = tl.maximum(all_largest, largest)
            nothing = (largest < 0x12800000) | (largest > 0x7F800000)  # below 2**-90: reference_blocks.LEAST
            exponent = (largest >> 23) - TOP + ((largest & 0x7FFFFF) > LARGEST_MANTISSA).to(tl.int32)
            exponent = tl.minimum(tl.maximum(tl.where(nothing, 127, exponent), 1), 254 - TOP)
            at = blocks_of(BLOCKS) * (1024 // BLOCK) + 32 * row // BLOCK
            tl.store(scales + at, exponent.to(tl.uint8), mask=at < count)
            # The inverse of a power of two is exact; that of infinity makes zeros of the same signs.
            inverse = tl.where(nothing, 0, (254 - exponent) << 23).to(tl.float32, bitcast=True)
        noise = random_bits(lanes, row, low, high) if STOCHASTIC else lanes
        code = code_of(values[row] * inverse, noise, E, M, MAX_CODE, bias, STOCHASTIC)
        codes = codes + (code,)  # type: ignore[assignment]  # noqa: RUF005
    store_codes(words, codes, total, BLOCKS, 1 + E + M)
    note_largest(status, all_largest)


@triton.jit(do_not_specialize=[*KEYS, "count"])  # type: ignore[untyped-decorator]
def block_encode_kernel(  # type: ignore[no-untyped-def]
    values, words, scales, status, n, total, count, start, low, high,
    BLOCKS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr, BLOCK: tl.constexpr,
    TOP: tl.constexpr, LARGEST_MANTISSA: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Choose the scale of each block and encode ``Q(V / scale)``."""
    rows = ()
    for row in tl.static_range(32):
        at = row_of(row, BLOCKS)
        rows = rows + (flushed(tl.load(values + at, mask=at < n, other=0.0)),)  # type: ignore[assignment]  # noqa: RUF005
    encode_rows(
        rows, words, scales, status, total, count, start, low, high,
        BLOCKS, E, M, MAX_CODE, BLOCK, TOP, LARGEST_MANTISSA, STOCHASTIC,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*KEYS, "count"])  # type: ignore[untyped-decorator]
def block_update_kernel(  # type: ignore[no-untyped-def]
    words, scales, gradient, out, out_scales, status, n, total, count, alpha, start, low, high,
    BLOCKS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr, BLOCK: tl.constexpr,
    TOP: tl.constexpr, LARGEST_MANTISSA: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Encode the decoded values plus ``alpha`` times the gradient."""
    codes = codes_of(words, total, BLOCKS, 1 + E + M)
    factor = tl.full([BLOCKS, 32], alpha, tl.float32)
    changed = tl.zeros([BLOCKS, 32], tl.int32)
    rows = ()
    for row in tl.static_range(32):
        at = row_of(row, BLOCKS)
        former = unscaled(codes[row], E, M, MAX_CODE) * scale_of(scales, row, count, BLOCKS, BLOCK)
        step = flushed(tl.load(gradient + at, mask=at < n, other=0.0).to(tl.float32))
        value = flushed(tl.fma(factor, step, former))
        changed |= ((value != former) & (at < n)).to(tl.int32)
        rows = rows + (tl.where(at < n, value, 0.0),)  # type: ignore[assignment]  # noqa: RUF005
    encode_rows(
        rows, out, out_scales, status, total, count, start, low, high,
        BLOCKS, E, M, MAX_CODE, BLOCK, TOP, LARGEST_MANTISSA, STOCHASTIC,
    )  # fmt: skip
    note_largest(status + 1, changed)


def block_decode(words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int, out: Tensor) -> None:
    """See ``reference_blocks.block_decode``."""
    if kind not in (FLOAT, OCP):
        return reference_blocks.block_decode(words, scales, kind, e, m, block, out)
    return _decode(words, scales, kind, e, m, block, words, scales, kind, e, m, block, out, summing=False)


def block_decode_sum(
    words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int,
    update_words: Tensor, update_scales: Tensor, update_kind: int, update_e: int, update_m: int, update_block: int,
    out: Tensor,
) -> None:  # fmt: skip
    """See ``reference_blocks.block_decode_sum``."""
    parts = (
        words, scales, kind, e, m, block,
        update_words, update_scales, update_kind, update_e, update_m, update_block, out,
    )  # fmt: skip
    if not {kind, update_kind} <= {FLOAT, OCP}:
        return reference_blocks.block_decode_sum(*parts)
    return _decode(*parts, summing=True)


def _decode(
    words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int,
    other_words: Tensor, other_scales: Tensor, other_kind: int, other_e: int, other_m: int, other_block: int,
    out: Tensor, *, summing: bool,
) -> None:  # fmt: skip
    launch(
        block_decode_kernel, out.numel(), out,
        words, scales, other_words, other_scales, out, out.numel(), words.numel(), len(scales),
        other_words.numel(), len(other_scales),
        E=e, M=m, MAX_CODE=_element(kind, e, m).max_code, BLOCK=block,
        OTHER_E=other_e, OTHER_M=other_m, OTHER_MAX_CODE=_element(other_kind, other_e, other_m).max_code,
        OTHER_BLOCK=other_block, SUM=summing,
    )  # fmt: skip


def block_encode(
    values: Tensor, kind: int, e: int, m: int, block: int, seed: int | None, start: int,
    words: Tensor, scales: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """See ``reference_blocks.block_encode``."""
    if kind not in (FLOAT, OCP):
        return reference_blocks.block_encode(values, kind, e, m, block, seed, start, words, scales, status)
    begin(status)
    n = values.numel()
    return launch(
        block_encode_kernel, n, values,
        values, words, scales, status, n, words.numel(), len(scales), start, *keys(seed),
        **_constants(kind, e, m, block, stochastic=seed is not None),
    )  # fmt: skip


def block_update(
    words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int, gradient: Tensor, alpha: float,
    seed: int | None, out: Tensor, out_scales: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """See ``reference_blocks.block_update``."""
    if kind not in (FLOAT, OCP):
        return reference_blocks.block_update(
            words, scales, kind, e, m, block, gradient, alpha, seed, out, out_scales, status
        )
    status.zero_()
    n = gradient.numel()
    return launch(
        block_update_kernel, n, gradient,
        words, scales, gradient, out, out_scales, status, n, words.numel(), len(scales), float32(alpha), 0, *keys(seed),
        **_constants(kind, e, m, block, stochastic=seed is not None),
    )  # fmt: skip


def _element(kind: int, e: int, m: int) -> FloatElement:
    element = block_element(kind, e, m)
    assert isinstance(element, FloatElement)
    return element


def _constants(kind: int, e: int, m: int, block: int, *, stochastic: bool) -> dict[str, Any]:
    element = _element(kind, e, m)
    # The OCP specification lets the largest value saturate if it is rounded to nearest.
    saturating = kind == OCP and not stochastic
    return {
        "E": e, "M": m, "MAX_CODE": element.max_code, "BLOCK": block, "TOP": element.top_exponent,
        "LARGEST_MANTISSA": 0x7FFFFF if saturating else largest_mantissa(element, stochastic=stochastic),
        "STOCHASTIC": stochastic,
    }  # fmt: skip
