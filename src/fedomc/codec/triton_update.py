"""Triton kernels that update floats in place on a GPU, with the same bits as the reference.

[Note: two passes, and no host]
How far the scale must move is known when all values have been seen. So the first pass rounds to the present scale; a
single program then chooses the new one; and the second pass is launched in any case, but returns at once unless the
scale has moved, which is rare. Nothing is read by the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedomc.codec.elements import FloatElement
from fedomc.codec.reference import working_bias
from fedomc.codec.scaling import largest_mantissa, least_exponent, most_exponent
from fedomc.codec.triton_floats import code_of, power_of_two, unscaled
from fedomc.codec.triton_words import (
    KEYS,
    OPTIONS,
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
)


@triton.jit  # type: ignore[untyped-decorator]
def step_of(alpha, scale, WORKING: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``alpha`` in units of the codes: ``alpha / scale * 2**WORKING``, rounded once to float32."""
    return (tl.full([], alpha, tl.float32).to(tl.float64) / scale.to(tl.float64) * (2.0**WORKING)).to(tl.float32)


@triton.jit(do_not_specialize=KEYS)  # type: ignore[untyped-decorator]
def update_kernel(  # type: ignore[no-untyped-def]
    words, scale_offset, gradient, out, plan, status, n, total, alpha, start, low, high,
    BLOCKS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr, BIAS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Encode the decoded codes plus a multiple of the gradient; ``plan`` holds a shift of the scale, and 1 to skip."""
    if tl.load(plan + 1) != 0:
        return
    working: tl.constexpr = 2 ** (E - 1) - 1 - BIAS
    shift = power_of_two(tl.load(plan))
    ratio = step_of(alpha, tl.load(scale_offset), working)
    former_codes = codes_of(words, total, BLOCKS, 1 + E + M)
    lanes = lanes_of(start, low, high, BLOCKS) if STOCHASTIC else tl.zeros([BLOCKS, 32], tl.uint32)
    largest, changed = tl.zeros([BLOCKS, 32], tl.int32), tl.zeros([BLOCKS, 32], tl.int32)
    codes = ()
    for row in tl.static_range(32):
        at = row_of(row, BLOCKS)
        step = tl.load(gradient + at, mask=at < n, other=0.0).to(tl.float32)
        former = unscaled(former_codes[row], E, M, MAX_CODE)
        if E < 8:
            former, step = flushed(former * (2.0**working)), flushed(step)
        value = tl.fma(tl.broadcast_to(ratio, [BLOCKS, 32]), step, former)
        if E < 8:
            value = flushed(value)
        value = tl.where(at < n, value, 0.0)  # codes that lie behind the last one belong to nobody
        changed |= ((value != former) & (at < n)).to(tl.int32)
        largest = tl.maximum(largest, magnitude_of(value))
        if E < 8:
            value = flushed(value * shift)
        noise = random_bits(lanes, row, low, high) if STOCHASTIC else lanes
        codes = codes + (code_of(value, noise, E, M, MAX_CODE, BIAS, STOCHASTIC),)  # type: ignore[assignment]  # noqa: RUF005
    store_codes(out, codes, total, BLOCKS, 1 + E + M)
    note_largest(status, largest)
    note_largest(status + 1, changed)


@triton.jit  # type: ignore[untyped-decorator]
def settle_kernel(  # type: ignore[no-untyped-def]
    scale_offset, alpha, out_scale_offset, plan, status,
    E: tl.constexpr, BIAS: tl.constexpr, RESCALE: tl.constexpr, LARGEST_MANTISSA: tl.constexpr, TOP: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, MAX_VALUE: tl.constexpr,
):  # fmt: skip
    """Choose the new scale as ``reference.update`` does, plan the second pass, and report what cannot be updated."""
    scale, offset, absmax = tl.load(scale_offset), tl.load(scale_offset + 1), tl.load(status).to(tl.int32)
    working: tl.constexpr = 2 ** (E - 1) - 1 - BIAS
    bits = magnitude_of(scale)
    possible = (bits >= 0x800000) & (bits < 0x7F800000)
    possible = possible & (magnitude_of(step_of(alpha, scale, working)) < 0x7F800000)
    shift = tl.zeros([], tl.int32)
    if RESCALE and E < 8:
        field = tl.maximum(absmax >> 23, 1)
        exceeds = ((absmax >> 23 > 0) & ((absmax & 0x7FFFFF) > LARGEST_MANTISSA)).to(tl.int32)
        present = 127 - (bits >> 23)
        target = present + (TOP - (field - 127) - exceeds) + working
        shift = tl.where(absmax == 0, 0, tl.minimum(tl.maximum(target, LEAST), MOST) - present)
    possible = possible & (tl.abs(shift) <= 120)
    shift = tl.where(possible, shift, 0)
    moved = scale.to(tl.float64) * power_of_two(-shift).to(tl.float64)
    bound = (tl.abs(moved) * MAX_VALUE).to(tl.float32) + tl.abs(offset)
    possible = possible & (magnitude_of(bound) < 0x7F800000)
    if absmax < 0x7F800000 and not possible:
        tl.store(status, tl.full([], 0x7F800000, tl.int64))
        tl.store(status + 1, tl.full([], 1, tl.int64))
    tl.store(out_scale_offset, moved.to(tl.float32))
    tl.store(out_scale_offset + 1, offset)
    tl.store(plan, shift)
    tl.store(plan + 1, (shift == 0).to(tl.int32))


def update(
    words: Tensor, scale_offset: Tensor, e: int, m: int, gradient: Tensor, alpha: float, rescale: bool,
    seed: int | None, out: Tensor, out_scale_offset: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """See ``reference.update``; where that writes no scale, this writes the present one."""
    status.zero_()
    element, n = FloatElement(e, m), gradient.numel()
    bias, stochastic = working_bias(element), seed is not None
    plan = torch.zeros(2, dtype=torch.int32, device=gradient.device)
    low, high = keys(seed)

    def a_pass() -> None:
        launch(
            update_kernel, n, gradient,
            words, scale_offset, gradient, out, plan, status, n, words.numel(), alpha, 0, low, high,
            E=e, M=m, MAX_CODE=element.max_code, BIAS=bias, STOCHASTIC=stochastic,
        )  # fmt: skip

    a_pass()
    with torch.cuda.device_of(gradient):  # type: ignore[no-untyped-call]
        settle_kernel[(1,)](
            scale_offset, alpha, out_scale_offset, plan, status,
            E=e, BIAS=bias, RESCALE=rescale, LARGEST_MANTISSA=largest_mantissa(element, stochastic=stochastic),
            TOP=element.top_exponent, LEAST=least_exponent(element), MOST=most_exponent(element),
            MAX_VALUE=element.max_value, **OPTIONS,
        )  # fmt: skip
    if rescale and e < 8:
        a_pass()
