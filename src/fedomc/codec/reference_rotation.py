"""The reference codec of random rotations in PyTorch operations: one or two bits per value, and a scale per block.

``methods.rotated`` says what the rotations are for. A block is padded with zeros to ``d`` values: to 1024 or, if its
words hold no more codes, to 512.

[Note: the same bits everywhere]
The transforms and sums are in float32, and the order of their additions is fixed: butterflies from the farthest values
to the nearest, and sums by repeated halving. To be encoded, a block is first multiplied by the power of two that brings
its largest magnitude into [2, 4). Values that are then below ``2**-40`` are far beyond the precision of any sum and
count as zero, and a block whose largest value is below ``2**-90`` is encoded as zeros. No intermediate result can then
overflow or be subnormal, so results do not depend on flush-to-zero modes. In decoding, all sums are exact integers.
"""

import torch
from torch import Tensor

from fedomc.codec.layout import BLOCK, words_of
from fedomc.codec.random import random_bits
from fedomc.codec.reference import chunks_of, flushed, magnitudes, pack, stretch, unpack
from fedomc.codec.reference_blocks import LEAST

LEVELS = {1: (-1, 1), 2: (-10, -3, 3, 10)}
"""The integer level of each code; 10 : 3 is within 0.1% of the optimal ratio of four levels for normal values."""

_FAR = 2010 / 2048  # between the two magnitudes of the optimal four levels, in standard deviations; exact in float32
_NEGLIGIBLE = 2.0**-40
_LARGEST_SCALE = {bits: torch.finfo(torch.float32).max * 2.0**-shift for bits, shift in ((1, 15), (2, 19))}


# The functions up to the next line of dashes implement the codec's operators for any device; see codec/__init__.py.


def rotated_decode(words: Tensor, scales: Tensor, bits: int, seed: int, start: int, out: Tensor) -> None:
    """Decode ``scale * D1 H D2 H c`` into ``out``, with exact integer sums and a single rounding."""
    levels = torch.tensor(LEVELS[bits], dtype=torch.float32, device=out.device)
    for at, part in _parts(out):
        count = _rotated_together(len(part), bits)
        packed, factors = stretch(words, bits, at, part), scales[at // BLOCK : -(-(at + len(part)) // BLOCK)]
        codes = unpack(packed, -(-count // BLOCK), bits).view(-1)[:count]
        signs, others = _signs(seed, start + at, count, out.device)
        values = hadamard(hadamard(_by_block(levels[codes.long()])).mul_(others)).mul_(signs)
        flat = values.mul_(factors).t().reshape(-1)[: len(part)]
        torch.add(flat, 0.0, out=part)  # turns -0 into 0 where the scale is zero


def rotated_encode(
    values: Tensor, bits: int, seed: int, start: int, unbiased: bool, words: Tensor, scales: Tensor
) -> None:  # fmt: skip
    """Encode finite values, with the unbiased scale or the one of the least squared error; see ``methods.rotated``."""
    for at, part in _parts(values):
        count = _rotated_together(len(part), bits)
        x = _by_block(flushed(torch.nn.functional.pad(part, (0, count - len(part)))))  # [d, blocks]
        largest = magnitudes(x).amax(0)
        something = largest.view(torch.float32) >= LEAST
        binade = torch.where(something, largest & 0x7F800000, 0x3F800000)  # the bits of a power of two
        x = x * (0x7F800000 - binade).view(torch.float32)  # 2 over that power; torch would divide by way of 1 over it
        x = torch.where(something & (x.abs() >= _NEGLIGIBLE), x, 0.0)
        signs, others = _signs(seed, start + at, count, values.device)
        power = _sum_by_halves(x * x)
        y = hadamard(hadamard(x.mul_(signs)).mul_(others))
        codes, terms = (y >= 0).int(), y.abs()
        squares = torch.full_like(power, len(y))  # |c|**2
        if bits == 2:
            far = terms > (power * len(y)).sqrt() * _FAR
            codes = 1 + codes + far * (2 * codes - 1)
            terms *= torch.where(far, 10.0, 3.0)
            outer = far.sum(0)
            squares = (9 * (len(y) - outer) + 100 * outer).float()
        product = _sum_by_halves(terms)  # <y, c>
        quotient = power / product if unbiased else product / (squares * float(len(y) ** 2))
        scale = (quotient * (binade.view(torch.float32) * 0.5)).clamp_(max=_LARGEST_SCALE[bits])
        scales[at // BLOCK : at // BLOCK + len(scale)] = torch.where(something, scale, 0.0)
        flat = torch.nn.functional.pad(codes.t().reshape(-1), (0, -count % BLOCK))
        pack(flat, bits, stretch(words, bits, at, part))


# --------------------------------------------------------------------------------------------------------------------


def hadamard(x: Tensor) -> Tensor:
    """Multiply each column by Sylvester's Hadamard matrix, which is symmetric and not normalized.

    Args:
        x: a contiguous tensor ``[d, n]``, where d is a power of two; it is overwritten.

    Returns:
        The product, ``[d, n]``; exact for integers as long as the dtype can represent the sums of their magnitudes.
    """
    other, half = torch.empty_like(x), len(x) // 2
    while half:
        (a, b), out = x.view(-1, 2, half * x.shape[1]).unbind(1), other.view(-1, 2, half * x.shape[1])
        torch.add(a, b, out=out[:, 0])
        torch.sub(a, b, out=out[:, 1])
        x, other = other, x
        half //= 2
    return x


def _sum_by_halves(x: Tensor) -> Tensor:
    """Sum each column of ``[d, n]``, where d is a power of two; returns ``[n]``."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def _parts(values: Tensor) -> list[tuple[int, Tensor]]:
    """Split values into runs of whole blocks, and the last block if it is not whole."""
    full = len(values) // BLOCK * BLOCK
    parts = list(chunks_of(values[:full]))
    return parts if full == len(values) else [*parts, (full, values[full:])]


def _rotated_together(count: int, bits: int) -> int:
    """Return the number of codes for the values of one block, or of several whole ones: the capacity of their words."""
    return words_of(count, bits) * 32 // bits


def _by_block(values: Tensor) -> Tensor:
    """Put each block, a single one of 512 values or any number of 1024 values, into a column."""
    return values.view(-1, min(len(values), BLOCK)).t().contiguous()


def _signs(seed: int, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the diagonals D1 and D2 of each block, int32 ``[d, blocks]``, from the two highest random bits."""
    bits = _by_block(random_bits(seed, start, count, device))
    return (bits >> 31).mul_(2).add_(1), (bits << 1 >> 31).mul_(2).add_(1)
