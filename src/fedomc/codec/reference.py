"""The codec in PyTorch operations, for any device: values <-> packed bits, a chunk at a time.

[Note: rounding in integers]
A float32 is a sign and the integer ``u = exponent << 23 | mantissa``, and codes have the same structure with fewer
bits, so rounding to a format is rounding ``u``, moved to the format's bias, to its upper bits; a carry walks from the
mantissa into the exponent by itself. Below the smallest normal value the significand moves right by as many places as
the exponent is short. Nothing is rounded twice.

[Note: subnormals are zero]
Except with eight exponent bits, which are those of float32, what is subnormal in float32 is far below half a step of
the format, in the values as they are and in the format's units. It counts as zero, so that nothing depends on
flush-to-zero modes.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fedomc.codec.elements import FloatFormat
from fedomc.codec.layout import BLOCK, CHUNK, LANES, ROWS, SUMS, words_of
from fedomc.codec.random import random_bits

# The functions from here to the next line of dashes are the codec's operators on any device; see codec/__init__.py.


def largest(values: Tensor, out: Tensor) -> None:
    """Write the float32 bits of the largest magnitude to ``out``, int64 ``[1]``."""
    out.zero_()
    for _, part in _chunks(values):
        torch.maximum(out, (part.view(torch.int32) & 0x7FFFFFFF).max(), out=out)


def decode(words: Tensor, e: int, m: int, scale: float, offset: float, out: Tensor) -> None:
    """Decode ``scale * Q + offset`` into ``out``; with (1, 0) every bit stays."""
    format = FloatFormat(e, m)
    for at, part in _chunks(out):
        part.copy_(_decoded(_stretch(words, format, at, part), format, scale, offset, part.numel()))


def decode_sum(
    words: Tensor, e: int, m: int, scale: float, offset: float,
    update_words: Tensor, update_e: int, update_m: int, update_scale: float, update_offset: float, out: Tensor,
) -> None:  # fmt: skip
    """Decode a base and add its update."""
    decode(words, e, m, scale, offset, out)
    format = FloatFormat(update_e, update_m)
    for at, part in _chunks(out):
        part += _decoded(_stretch(update_words, format, at, part), format, update_scale, update_offset, part.numel())


def decode_add(words: Tensor, e: int, m: int, scale: float, offset: float, weight: float, out: Tensor) -> None:
    """Add ``weight`` times the decoded values to ``out``."""
    format = FloatFormat(e, m)
    for at, part in _chunks(out):
        part += _decoded(_stretch(words, format, at, part), format, scale, offset, part.numel()).mul_(weight)


def decode_add_difference(
    words: Tensor, e: int, m: int, scale: float, offset: float,
    less_words: Tensor, less_e: int, less_m: int, less_scale: float, less_offset: float, weight: float, out: Tensor,
) -> None:  # fmt: skip
    """Add ``weight`` times what one's decoded values are more than another's."""
    format, less_format = FloatFormat(e, m), FloatFormat(less_e, less_m)
    for at, part in _chunks(out):
        change = _decoded(_stretch(words, format, at, part), format, scale, offset, part.numel())
        less = _stretch(less_words, less_format, at, part)
        change -= _decoded(less, less_format, less_scale, less_offset, part.numel())
        part += change.mul_(weight)


def add_difference(values: Tensor, less: Tensor, weight: float, out: Tensor) -> None:
    """Add ``weight`` times what values are more than others."""
    for at, part in _chunks(out):
        stop = at + part.numel()
        part += values[at:stop].sub(less[at:stop]).mul_(weight)


def encode(
    values: Tensor, e: int, m: int, exponent: int, seed: int | None, start: int,
    words: Tensor, sums: Tensor, largest: Tensor,
) -> None:  # fmt: skip
    """Encode ``Q(2**exponent * V)``."""
    format = FloatFormat(e, m)
    largest.zero_()
    for at, part in _chunks(values):
        row = sums[at // CHUNK] if len(sums) else None
        _encode_chunk(part, format, exponent, seed, start + at, _stretch(words, format, at, part), row, largest)


def update(
    words: Tensor, e: int, m: int, scale: float, offset: float, gradient: Tensor, alpha: float, exponent: int,
    seed: int | None, out: Tensor, sums: Tensor, largest: Tensor,
) -> None:  # fmt: skip
    """Encode the decoded values plus ``alpha`` times the gradient."""
    format = FloatFormat(e, m)
    largest.zero_()
    for at, part in _chunks(gradient):
        values = _decoded(_stretch(words, format, at, part), format, scale, offset, part.numel())
        if format.exponent_bits < 8:
            values = _flushed(_flushed(values).add_(_flushed(part), alpha=alpha))
        else:
            values.add_(part, alpha=alpha)
        row = sums[at // CHUNK] if len(sums) else None
        _encode_chunk(values, format, exponent, seed, at, _stretch(out, format, at, part), row, largest)


# --------------------------------------------------------------------------------------------------------------------


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    for at in range(0, flat.numel(), CHUNK):
        yield at, flat[at : at + CHUNK]


def _stretch(words: Tensor, format: FloatFormat, at: int, part: Tensor) -> Tensor:
    begin = words_of(at, format.bits)
    return words[begin : begin + words_of(part.numel(), format.bits)]


def _encode_chunk(
    values: Tensor, format: FloatFormat, exponent: int, seed: int | None, start: int,
    words: Tensor, sums: Tensor | None, largest: Tensor,
) -> None:  # fmt: skip
    """Encode a chunk; write its words and, if wanted, its five sums; raise ``largest`` to its largest magnitude."""
    torch.maximum(largest, (values.view(torch.int32) & 0x7FFFFFFF).max(), out=largest)
    bias, scale = _working_bias(format), 1.0
    if format.exponent_bits < 8:
        scale = 2.0 ** (exponent + format.bias - bias)
        values = _flushed(_flushed(values) * scale)
    codes = _round(values, format, bias, seed, start)
    blocks = -(-values.numel() // BLOCK)
    codes = _pad(codes, blocks * BLOCK)
    pack(codes, format.bits, words)
    if sums is not None:
        represented = _values(codes, format, 2.0 ** (format.bias - bias), 0.0)
        difference = _pad(values, blocks * BLOCK) - represented
        if format.exponent_bits == 8:  # squares may leave the range of float32
            difference, represented = difference.double(), represented.double()
        found = _sums(difference, represented, blocks)
        sums.copy_(found / torch.tensor([1, scale, scale, scale, 1], dtype=torch.float64) / scale)


def _working_bias(format: FloatFormat) -> int:
    """The bias of the units in which values are rounded and summed: a block's sum of squares must stay finite."""
    return format.bias + 4 if format.exponent_bits == 7 else format.bias


def _flushed(values: Tensor) -> Tensor:
    bits = values.view(torch.int32)
    return torch.where((bits & 0x7FFFFFFF) < 1 << 23, bits & -(1 << 31), bits).view(torch.float32)


def _decoded(words: Tensor, format: FloatFormat, scale: float, offset: float, numel: int) -> Tensor:
    codes = unpack(words, -(-numel // BLOCK), format.bits).view(-1)[:numel]
    return _values(codes, format, scale, offset)


def _pad(flat: Tensor, size: int) -> Tensor:
    return flat if flat.numel() == size else torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _round(values: Tensor, format: FloatFormat, bias: int, seed: int | None, start: int) -> Tensor:
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    field = (magnitude >> 23).clamp_(min=1)  # the exponent field; a subnormal has that of the smallest normal value
    significand = magnitude.sub_((field - 1) << 23)  # [n], below 2**24, hidden bit included
    target = field.add_(bias - 127)  # the exponent field in the format, not positive if subnormal
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
    return integer.bitwise_or_(sign)


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


def _sums(difference: Tensor, represented: Tensor, blocks: int) -> Tensor:
    """Sum D, D*D, D*R, R*R and R over a chunk, in one order on every device and for any number of threads.

    In each lane the rows of a block, in the dtype given; then, in float64, the blocks, then the lanes by halves.
    """
    d, r = difference, represented
    terms = torch.stack((d, d * d, d * r, r * r, r)).view(SUMS, blocks, ROWS, LANES)
    rows = torch.zeros(SUMS, blocks, LANES, dtype=d.dtype, device=d.device)
    for row in range(ROWS):
        rows += terms[:, :, row]
    lanes = torch.zeros(SUMS, LANES, dtype=torch.float64, device=d.device)
    for block in range(blocks):
        lanes += rows[:, block]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[:, :width] + lanes[:, width:]
    return lanes[:, 0]


@functools.lru_cache(maxsize=64)
def _shifts(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By row: the word in which its code begins, the one in which it may end, the bit it begins at, a mask."""
    position = torch.arange(ROWS, dtype=torch.int64) * bits
    first = position // 32
    second = (first + 1).clamp(max=bits - 1)
    begin = (position % 32).to(torch.int32)
    mask = torch.tensor([(1 << (32 - int(o))) - 1 if o else -1 for o in begin], dtype=torch.int64).to(torch.int32)
    column = (ROWS, 1)
    return first.to(device), second.to(device), begin.view(column).to(device), mask.view(column).to(device)


def pack(codes: Tensor, bits: int, words: Tensor) -> None:
    """Put the codes of whole blocks, ``[blocks * BLOCK]``, into words."""
    codes = codes.view(-1, ROWS, LANES)
    blocks = len(codes)
    first, second, begin, _ = _shifts(bits, codes.device)
    packed = torch.zeros(blocks, bits, LANES, dtype=torch.int32, device=codes.device)
    # The bits of different rows are disjoint, so that adding is joining.
    packed.index_add_(1, first, codes << begin)
    if 32 % bits:
        packed.index_add_(1, second, (codes >> 1) >> (31 - begin))
    words.copy_(packed.view(-1)[: words.numel()])


def unpack(words: Tensor, blocks: int, bits: int) -> Tensor:
    """Take the codes of whole blocks out of words, ``[blocks, ROWS, LANES]``."""
    first, second, begin, mask = _shifts(bits, words.device)
    packed = _pad(words, blocks * bits * LANES).view(blocks, bits, LANES)
    codes = packed.index_select(1, first).bitwise_right_shift_(begin).bitwise_and_(mask)
    if 32 % bits:
        codes |= (packed.index_select(1, second) << (31 - begin)) << 1
    return codes.bitwise_and_((1 << bits) - 1 if bits < 32 else -1)
