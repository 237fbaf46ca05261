"""What all Triton kernels share: how a program unpacks and packs the blocks of the layout, and draws random bits.

A program handles ``BLOCKS`` blocks. A thread handles one lane of a block and walks through its 32 rows, so that a warp
reads and writes whole lines. What a program holds of its blocks is a tuple of 32 rows, each ``[BLOCKS, 32]``.

Products and sums must not be fused where the reference does not fuse them, so every launch turns that off. Subnormals
are kept, which is Triton's default.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedomc.codec.random import keys_of

BLOCKS = 4
"""The number of layout blocks that a program handles: a lane for each thread of four warps."""

OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""The compiler's options for all kernels."""

KEYS = ["start", "low", "high"]
"""The arguments of the random generator, of which a kernel must not be compiled anew for some numbers."""


def launch(kernel: Any, n: int, device: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the blocks of n values on the device of a tensor."""
    if n:
        with torch.cuda.device_of(device):  # type: ignore[no-untyped-call]
            kernel[(triton.cdiv(n, 1024 * BLOCKS),)](*arguments, BLOCKS=BLOCKS, **constants, **OPTIONS)


def keys(seed: int | None) -> tuple[int, int]:
    """Return the two keys of a seed as signed 32-bit numbers; zeros where nothing is drawn."""
    return (0, 0) if seed is None else keys_of(seed)


@triton.jit  # type: ignore[untyped-decorator]
def blocks_of(BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the numbers of the program's blocks, int64 ``[BLOCKS, 1]``."""
    return tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def row_of(row: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the indices of the values in a row of the program's blocks, int64 ``[BLOCKS, 32]``."""
    return blocks_of(BLOCKS) * 1024 + 32 * row + tl.arange(0, 32)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def codes_of(words, total, BLOCKS: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unpack the program's blocks: for each row the codes, uint32, above which bits are undefined."""
    at = blocks_of(BLOCKS) * (32 * W) + tl.arange(0, 32)[None, :]
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
def store_codes(words, codes, total, BLOCKS: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pack the program's blocks; the codes are uint32 below ``2**W``, and zero where there are no values."""
    at = blocks_of(BLOCKS) * (32 * W) + tl.arange(0, 32)[None, :]
    word = tl.zeros([BLOCKS, 32], tl.uint32)
    for row in tl.static_range(32):
        begin = row * W % 32
        word |= codes[row] << begin
        if begin + W >= 32:
            to = at + 32 * (row * W // 32)
            tl.store(words + to, word.to(tl.int32, bitcast=True), mask=to < total)
            word = codes[row] >> (32 - begin) if begin + W > 32 else tl.zeros([BLOCKS, 32], tl.uint32)


@triton.jit
def mixed(x):  # type: ignore[no-untyped-def]
    """Apply the 32-bit finaliser of MurmurHash3 (Appleby, public domain) to uint32; see ``codec.random``."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def lanes_of(start, low, high, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what the random bits of the program's lanes have in common, uint32 ``[BLOCKS, 32]``."""
    first = start.to(tl.int64) + blocks_of(BLOCKS) * 1024
    lane = first.to(tl.uint32) + tl.arange(0, 32)[None, :].to(tl.uint32)
    period = mixed((first >> 32).to(tl.uint32) + high.to(tl.uint32, bitcast=True))
    return mixed(mixed(lane ^ low.to(tl.uint32, bitcast=True)) + period)


@triton.jit  # type: ignore[untyped-decorator]
def random_bits(lanes, row: tl.constexpr, low, high):  # type: ignore[no-untyped-def]
    """Draw 32 bits for each value of a row; ``lanes`` is from ``lanes_of``."""
    index = tl.full([1, 1], 32 + row, tl.uint32)
    shared = mixed(mixed(index ^ high.to(tl.uint32, bitcast=True)) + low.to(tl.uint32, bitcast=True))
    x = (lanes ^ shared) * 0x9E3779B1
    return (x ^ (x >> 15)) * 0x85EBCA77


@triton.jit
def magnitude_of(value):  # type: ignore[no-untyped-def]
    """Return the float32 bits of the magnitudes as int32, which sort in the same order as the magnitudes."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def flushed(value):  # type: ignore[no-untyped-def]
    """Replace subnormal values by zeros of the same sign."""
    bits = value.to(tl.int32, bitcast=True)
    zero = (bits >> 31) << 31
    return tl.where((bits & 0x7FFFFFFF) < 0x800000, zero, bits).to(tl.float32, bitcast=True)


@triton.jit
def store_rounded(to, value, mask):  # type: ignore[no-untyped-def]
    """Store float32 values, rounded to nearest, ties to even, to the dtype of the memory.

    To bfloat16 the bits are rounded here, because Triton's interpreter would cut them off.
    """
    if to.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(to, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(to, value, mask=mask)


@triton.jit
def note_largest(status, largest):  # type: ignore[no-untyped-def]
    """Combine int32 ``[BLOCKS, 32]`` into the largest magnitude of all programs."""
    tl.atomic_max(status, tl.max(tl.max(largest, 1), 0).to(tl.int64))
