"""Triton kernels that encode floats on a GPU, with the same bits as the reference, and measure what they encode.

[Note: the order of sums]
A float sum depends on its order, and the fit on the sums. So each lane adds the rows of a block, as the reference does,
and writes its sums to scratch memory; a second kernel adds the blocks of a chunk one after the other and then the lanes
by halves. The scratch memory is a sixth of the values' and is only needed for a fit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedomc.codec.elements import FloatElement
from fedomc.codec.layout import BLOCK, LANES, SUMS
from fedomc.codec.reference import begin, working_bias
from fedomc.codec.triton_floats import code_of, power_of_two, unscaled
from fedomc.codec.triton_words import (
    KEYS,
    OPTIONS,
    blocks_of,
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
def absmax_kernel(values, out, n, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Combine the float32 bits of the largest magnitude of the program's values into ``out``."""
    largest = tl.zeros([BLOCKS, 32], tl.int32)
    for row in tl.static_range(32):
        at = row_of(row, BLOCKS)
        largest = tl.maximum(largest, magnitude_of(tl.load(values + at, mask=at < n, other=0.0).to(tl.float32)))
    note_largest(out, largest)


@triton.jit(do_not_specialize=KEYS)  # type: ignore[untyped-decorator]
def encode_kernel(  # type: ignore[no-untyped-def]
    values, exponent, words, row_sums, status, n, total, start, low, high,
    BLOCKS: tl.constexpr, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr, BIAS: tl.constexpr,
    STOCHASTIC: tl.constexpr, SUMMING: tl.constexpr,
):  # fmt: skip
    """Encode ``Q(2**exponent * V)``; if SUMMING, also write for each lane of a block five sums over its rows."""
    scale = power_of_two(tl.load(exponent) + (2 ** (E - 1) - 1 - BIAS)) if E < 8 else 1.0
    lanes = lanes_of(start, low, high, BLOCKS) if STOCHASTIC else tl.zeros([BLOCKS, 32], tl.uint32)
    largest = tl.zeros([BLOCKS, 32], tl.int32)
    zero = tl.zeros([BLOCKS, 32], tl.float64 if E == 8 else tl.float32)
    d, dd, dr, rr, r = zero, zero, zero, zero, zero
    codes = ()
    for row in tl.static_range(32):
        at = row_of(row, BLOCKS)
        value = tl.load(values + at, mask=at < n, other=0.0)
        largest = tl.maximum(largest, magnitude_of(value))
        if E < 8:
            value = flushed(flushed(value) * scale)
        noise = random_bits(lanes, row, low, high) if STOCHASTIC else lanes
        code = code_of(value, noise, E, M, MAX_CODE, BIAS, STOCHASTIC)
        codes = codes + (code,)  # type: ignore[assignment]  # noqa: RUF005
        if SUMMING:
            represented = unscaled(code, E, M, MAX_CODE) * (2.0 ** (2 ** (E - 1) - 1 - BIAS))
            difference = value - represented
            if E == 8:  # squares may overflow float32
                represented, difference = represented.to(tl.float64), difference.to(tl.float64)
            d, r = d + difference, r + represented
            dd, dr, rr = dd + difference * difference, dr + difference * represented, rr + represented * represented
    store_codes(words, codes, total, BLOCKS, 1 + E + M)
    note_largest(status, largest)
    if SUMMING:
        to = row_sums + blocks_of(BLOCKS) * 32 + tl.arange(0, 32)[None, :]
        blocks = tl.cdiv(n, 1024)
        for term in tl.static_range(5):
            tl.store(to + term * blocks * 32, (d, dd, dr, rr, r)[term], mask=blocks_of(BLOCKS) < blocks)


@triton.jit  # type: ignore[untyped-decorator]
def sums_kernel(row_sums, exponent, sums, blocks, E: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write one of the five sums of a chunk; see the note on the order of sums."""
    chunk, term = tl.program_id(0), tl.program_id(1)
    lanes = tl.zeros([32], tl.float64)
    for block in range(chunk * 64, tl.minimum(chunk * 64 + 64, blocks)):
        lanes += tl.load(row_sums + (term * blocks + block) * 32 + tl.arange(0, 32)).to(tl.float64)
    for halving in tl.static_range(5):
        lanes = tl.sum(lanes.reshape(2, 16 >> halving), 0)
    found = tl.sum(lanes, 0)
    if E < 8:
        scale = power_of_two(tl.load(exponent) + (2 ** (E - 1) - 1 - BIAS)).to(tl.float64)
        found /= tl.where((term == 0) | (term == 4), scale, scale * scale)
    tl.store(sums + chunk * 5 + term, found)


def absmax(values: Tensor, out: Tensor) -> None:
    """See ``reference.absmax``."""
    out.zero_()
    launch(absmax_kernel, values.numel(), values, values, out, values.numel())


def encode(
    values: Tensor, e: int, m: int, exponent: int, seed: int | None, start: int,
    words: Tensor, sums: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """See ``reference.encode``."""
    there = torch.full((1,), exponent, dtype=torch.int32, device=values.device)
    encode_scaled(values, e, m, there, seed, start, words, sums, status)


def encode_scaled(
    values: Tensor, e: int, m: int, exponent: Tensor, seed: int | None, start: int,
    words: Tensor, sums: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """Encode as ``encode`` does, with the exponent in an int32 tensor ``[1]`` on the device."""
    begin(status)
    n, element = values.numel(), FloatElement(e, m)
    bias, blocks = working_bias(element), -(-n // BLOCK)
    row_sums = torch.empty(
        SUMS * blocks * LANES if len(sums) else 0,
        dtype=torch.float64 if e == 8 else torch.float32,
        device=values.device,
    )
    low, high = keys(seed)
    launch(
        encode_kernel, n, values,
        values, exponent, words, row_sums, status, n, words.numel(), start, low, high,
        E=e, M=m, MAX_CODE=element.max_code, BIAS=bias, STOCHASTIC=seed is not None, SUMMING=len(sums) > 0,
    )  # fmt: skip
    if len(sums):
        with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
            sums_kernel[len(sums), SUMS](row_sums, exponent, sums, blocks, E=e, BIAS=bias, **OPTIONS)
