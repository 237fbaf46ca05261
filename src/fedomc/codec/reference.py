"""The codec in PyTorch operations, for any device: values <-> packed bits, a chunk at a time.

[Note: rounding in integers]
A float32 is a sign and the integer ``u = exponent << 23 | mantissa``, and codes have the same structure with fewer
bits, so rounding to a format is rounding ``u``, moved to the format's bias, to its upper bits; a carry walks from the
mantissa into the exponent by itself. Below the smallest normal value the significand moves right by as many places as
the exponent is short. Nothing here computes with a subnormal float, so results do not depend on flush-to-zero modes,
and nothing is rounded twice.
"""

import functools

import torch
from torch import Tensor

from fedomc.codec.layout import BLOCK, LANES, ROWS
from fedomc.codec.random import random_bits
from fedomc.formats import FloatFormat

CHUNK = 64 * BLOCK
"""Values that are encoded or decoded at a time: their temporaries stay in the cache."""

INFINITY_BITS = 0x7F800000
"""The bits of a float32 infinity; the magnitude bits of every finite value are smaller."""


def magnitude_bits(values: Tensor) -> int:
    """Return the largest magnitude as its float32 bits, ``INFINITY_BITS`` or more if a value is not finite."""
    largest = 0
    flat = values.detach().reshape(-1)
    for at in range(0, flat.numel(), CHUNK):
        largest = max(largest, int((flat[at : at + CHUNK].view(torch.int32) & 0x7FFFFFFF).max()))
    return largest


def encode_chunk(
    values: Tensor, format: FloatFormat, exponent: int, seed: int | None, start: int, words: Tensor, sums: bool
) -> tuple[Tensor | None, int]:
    """Encode ``Q(2**exponent * V)`` of a chunk that starts at a block.

    Args:
        values: float32 ``[n]``, contiguous, n <= CHUNK.
        format: the number format.
        exponent: k of the scaling by 2**k; at most ``120 - bias - mantissa_bits`` unless 0.
        seed: of stochastic rounding; None rounds to nearest, ties to the even code.
        start: index of the first value in its variable: the counter of stochastic rounding.
        words: int32 ``[words_of(n, bits)]``, written.
        sums: whether the least-squares sums are wanted.

    Returns:
        The sums by block, float64 ``[blocks, 5]``: of D, D*D, D*R, R*R and R, where ``R = 2**-k Q`` is what is
        represented and ``D = V - R``; and the bits of the largest magnitude.
    """
    codes, largest = _round(values, format, exponent, seed, start)
    blocks = -(-values.numel() // BLOCK)
    codes = _pad(codes, blocks * BLOCK)
    _pack(codes.view(blocks, ROWS, LANES), format.bits, words)
    if not sums:
        return None, largest
    represented = _values(codes, format, float(2.0**-exponent), 0.0)
    difference = _pad(values, blocks * BLOCK) - represented
    return _block_sums(difference, represented, blocks), largest


def decode_chunk(words: Tensor, format: FloatFormat, scale: float, offset: float, out: Tensor) -> Tensor:
    """Decode ``scale * Q + offset`` into ``out`` (float32 ``[n]``, n <= CHUNK); -0 and every bit stay for (1, 0)."""
    n = out.numel()
    codes = _unpack(words, -(-n // BLOCK), format.bits).view(-1)[:n]
    return out.copy_(_values(codes, format, scale, offset))


def _pad(flat: Tensor, size: int) -> Tensor:
    return flat if flat.numel() == size else torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _round(values: Tensor, format: FloatFormat, exponent: int, seed: int | None, start: int) -> tuple[Tensor, int]:
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    largest = int(magnitude.max())
    field = (magnitude >> 23).clamp_(min=1)  # the exponent field; a subnormal has that of the smallest normal value
    significand = magnitude.sub_((field - 1) << 23)  # [n], below 2**24, hidden bit included
    target = field.add_(exponent + format.bias - 127)  # the exponent field in the format, not positive if subnormal
    normal = target.clamp(min=1)
    shift = normal.sub(target).add_(23 - format.mantissa_bits)  # how many bits the format drops
    integer = significand.add_(normal.sub_(1) << 23)
    if seed is None:
        shift.clamp_(max=25)  # a significand of 24 bits rounds to zero from here on
        one = torch.ones((), dtype=torch.int32, device=values.device)
        half = (one << shift).bitwise_right_shift_(1)
        even = (integer >> shift).bitwise_and_(1)
        integer += half.add_(even).sub_(1).clamp_(min=0)
    else:
        # 30 random bits: what lies lower changes a probability by less than 2**-30.
        integer >>= (shift - 30).clamp_(min=0)
        shift.clamp_(max=30)
        noise = random_bits(seed, start, values.numel(), values.device).bitwise_and_(0x3FFFFFFF)
        integer += noise >> (30 - shift)
    integer >>= shift
    integer.clamp_(max=format.max_code)
    sign = bits.bitwise_and(-(1 << 31)) >> (32 - format.bits)
    if format.bits < 32:
        sign &= 1 << (format.bits - 1)  # the arithmetic shift filled the bits above
    return integer.bitwise_or_(sign), largest


def _values(codes: Tensor, format: FloatFormat, scale: float, offset: float) -> Tensor:
    e, m = format.exponent_bits, format.mantissa_bits
    magnitude = codes & ((1 << (e + m)) - 1)
    if e == 8:  # the unused top exponent can only come from foreign bytes
        magnitude.clamp_(max=format.max_code)
    bits = (magnitude << (23 - m)).add_((127 - format.bias) << 23)
    if e < 8:  # for e = 8 the bits of subnormals are already those of float32
        subnormal = (magnitude.to(torch.float32) * format.step).view(torch.int32)
        bits = torch.where(magnitude < (1 << m), subnormal, bits)
    sign = (codes >> (e + m)) << 31
    values = bits.bitwise_or_(sign).view(torch.float32)
    if scale != 1.0:
        values *= scale
    if offset != 0.0:
        values += offset
    return values


def _block_sums(difference: Tensor, represented: Tensor, blocks: int) -> Tensor:
    d, q = difference.double(), represented.double()
    terms = torch.stack((d, d * d, d * q, q * q, q)).view(5, blocks, BLOCK)
    # Halving has one order of summation on every device and for any number of threads.
    width = BLOCK
    while width > 1:
        width //= 2
        terms = terms[..., :width] + terms[..., width:]
    return terms.squeeze(-1).T


@functools.lru_cache(maxsize=64)
def _shifts(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By row: the word in which its code begins, the one in which it may end, the bit it begins at, a mask."""
    position = torch.arange(ROWS) * bits
    first = position // 32
    second = (first + 1).clamp(max=bits - 1)
    begin = (position % 32).to(torch.int32)
    mask = torch.tensor([(1 << (32 - int(o))) - 1 if o else -1 for o in begin], dtype=torch.int64).to(torch.int32)
    column = (ROWS, 1)
    return first.to(device), second.to(device), begin.view(column).to(device), mask.view(column).to(device)


def _pack(codes: Tensor, bits: int, words: Tensor) -> None:
    blocks = codes.shape[0]  # codes: [blocks, ROWS, LANES]
    first, second, begin, _ = _shifts(bits, codes.device)
    packed = torch.zeros(blocks, bits, LANES, dtype=torch.int32, device=codes.device)
    # The bits of different rows are disjoint, so that adding is joining.
    packed.index_add_(1, first, codes << begin)
    if 32 % bits:
        packed.index_add_(1, second, (codes >> 1) >> (31 - begin))
    words.copy_(packed.view(-1)[: words.numel()])


def _unpack(words: Tensor, blocks: int, bits: int) -> Tensor:
    first, second, begin, mask = _shifts(bits, words.device)
    packed = _pad(words, blocks * bits * LANES).view(blocks, bits, LANES)
    codes = packed.index_select(1, first).bitwise_right_shift_(begin).bitwise_and_(mask)
    if 32 % bits:
        codes |= (packed.index_select(1, second) << (31 - begin)) << 1
    return codes.bitwise_and_((1 << bits) - 1 if bits < 32 else -1)
