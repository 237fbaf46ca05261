"""The reference codec in PyTorch operations, for any device: converts values to and from packed bits.

[Note: rounding in integers]
A float32 is a sign and the integer ``u = exponent << 23 | mantissa``. Codes have the same structure with fewer bits, so
rounding to a format means rebasing ``u`` to the format's bias and rounding it to its upper bits; a carry propagates
from the mantissa into the exponent by itself. Below the format's smallest normal value, the significand is first
shifted right by the deficit of the exponent. Nothing is rounded twice.

[Note: subnormals are zero]
In formats with fewer than the eight exponent bits of float32, a value that is subnormal in float32 is far below half a
step of the format, both before and after scaling to the format's units. Such values count as zero, so that results do
not depend on flush-to-zero modes.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedomc.codec.elements import FloatElement
from fedomc.codec.layout import BLOCK, CHUNK, LANES, ROWS, SUMS, words_of
from fedomc.codec.random import random_bits
from fedomc.codec.scaling import bounded_exponent, fitting_exponent, float32

_INFINITY_BITS = 0x7F800000

# The functions up to the next line of dashes implement the codec's operators for any device; see codec/__init__.py.


def absmax(values: Tensor, out: Tensor) -> None:
    """Write the float32 bits of the largest magnitude to ``out``, an int64 tensor of shape ``[1]``."""
    out.zero_()
    for _, part in chunks_of(values):
        torch.maximum(out, magnitudes(part.float()).max(), out=out)


def decode(words: Tensor, scale_offset: Tensor, e: int, m: int, out: Tensor) -> None:
    """Decode ``scale * Q + offset`` into ``out``; scale 1 and offset 0 preserve every bit of Q."""
    element = FloatElement(e, m)
    for at, part in chunks_of(out):
        part.copy_(_decoded(stretch(words, element.bits, at, part), element, scale_offset, part.numel()))


def decode_sum(
    words: Tensor, scale_offset: Tensor, e: int, m: int,
    update_words: Tensor, update_scale_offset: Tensor, update_e: int, update_m: int, out: Tensor,
) -> None:  # fmt: skip
    """Decode the sum of a base and its update into ``out``."""
    element, other = FloatElement(e, m), FloatElement(update_e, update_m)
    for at, part in chunks_of(out):
        values = _decoded(stretch(words, element.bits, at, part), element, scale_offset, part.numel())
        change = stretch(update_words, other.bits, at, part)
        part.copy_(values.add_(_decoded(change, other, update_scale_offset, part.numel())))


def decode_add(words: Tensor, scale_offset: Tensor, e: int, m: int, weight: float, out: Tensor) -> None:
    """Add ``weight`` times the decoded values to ``out``."""
    element = FloatElement(e, m)
    for at, part in chunks_of(out):
        values = _decoded(stretch(words, element.bits, at, part), element, scale_offset, part.numel())
        part += values.mul_(weight)


def decode_add_difference(
    words: Tensor, scale_offset: Tensor, e: int, m: int,
    subtrahend_words: Tensor, subtrahend_scale_offset: Tensor, subtrahend_e: int, subtrahend_m: int,
    weight: float, out: Tensor,
) -> None:  # fmt: skip
    """Add ``weight`` times the difference of two decoded variables to ``out``."""
    element, other = FloatElement(e, m), FloatElement(subtrahend_e, subtrahend_m)
    for at, part in chunks_of(out):
        change = _decoded(stretch(words, element.bits, at, part), element, scale_offset, part.numel())
        others = stretch(subtrahend_words, other.bits, at, part)
        change -= _decoded(others, other, subtrahend_scale_offset, part.numel())
        part += change.mul_(weight)


def add_difference(values: Tensor, subtrahend: Tensor, weight: float, out: Tensor) -> None:
    """Add ``weight * (values - subtrahend)`` to ``out``."""
    for at, part in chunks_of(out):
        stop = at + part.numel()
        part += values[at:stop].sub(subtrahend[at:stop]).mul_(weight)


def encode(
    values: Tensor, e: int, m: int, exponent: int, seed: int | None, start: int,
    words: Tensor, sums: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """Encode ``Q(2**exponent * V)`` into ``words``, with sums for the fit if ``sums`` is not empty."""
    element = FloatElement(e, m)
    begin(status)
    for at, part in chunks_of(values, CHUNK if len(sums) else None):
        row = sums[at // CHUNK] if len(sums) else None
        _encode_chunk(part, element, exponent, seed, start + at, stretch(words, element.bits, at, part), row, status)


def choose_exponent(
    status: Tensor, e: int, m: int, stochastic: bool, exponent: Tensor, scale_offset: Tensor
) -> None:  # fmt: skip
    """Write the exponent that scales the largest magnitude into the range, with its scale and an offset of zero."""
    element = FloatElement(e, m)
    fitting = fitting_exponent(int(status[0]), element, stochastic=stochastic, growing=True)
    exponent.fill_(bounded_exponent(fitting, element))
    scale_offset[:1].fill_(2.0 ** -int(exponent))
    scale_offset[1:].zero_()


def encode_scaled(
    values: Tensor, e: int, m: int, exponent: Tensor, seed: int | None, start: int,
    words: Tensor, sums: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """Encode as ``encode`` does, with the exponent in an int32 tensor ``[1]``."""
    encode(values, e, m, int(exponent), seed, start, words, sums, status)


def keep(present: Tensor, status: Tensor, out: Tensor) -> None:
    """Write the present field to ``out`` if the new one is not finite, or if no value changed."""
    if int(status[0]) >= _INFINITY_BITS or not int(status[1]):
        out.copy_(present)


def update(
    words: Tensor, scale_offset: Tensor, e: int, m: int, gradient: Tensor, alpha: float, rescale: bool,
    seed: int | None, out: Tensor, out_scale_offset: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """Encode the decoded codes plus ``alpha / scale`` times the gradient, in units of the current scale."""
    element = FloatElement(e, m)
    bias = working_bias(element)
    working = element.bias - bias
    scale, offset = scale_offset.tolist()
    ratio = float32(math.ldexp(float32(alpha) / scale, working)) if _is_normal(scale) else math.inf
    shift = 0 if math.isfinite(ratio) else None
    while shift is not None:
        status.zero_()
        for at, part in chunks_of(gradient):
            codes = unpack(stretch(words, element.bits, at, part), -(-part.numel() // BLOCK), element.bits)
            former = values_of(codes.view(-1)[: part.numel()], element)
            if element.exponent_bits < 8:
                former = flushed(former * 2.0**working)
                values = flushed(former.add(flushed(part.float()), alpha=ratio))
            else:
                values = former.add(part.float(), alpha=ratio)
            status[1] |= (values != former).any()
            torch.maximum(status[0], magnitudes(values).max(), out=status[0])
            if element.exponent_bits < 8:
                values = flushed(values * 2.0**shift)
            rounded = _pad(round_to(values, element, bias, seed, at), -(-part.numel() // BLOCK) * BLOCK)
            pack(rounded, element.bits, stretch(out, element.bits, at, part))
        absmax = int(status[0])
        if absmax >= _INFINITY_BITS:
            return
        fitting = 0
        if rescale and e < 8 and absmax:
            present = 1 - math.frexp(scale)[1]
            target = present + fitting_exponent(absmax, element, stochastic=seed is not None) + working
            fitting = bounded_exponent(target, element) - present
        if fitting == shift:
            break
        shift = fitting if abs(fitting) <= 120 else None
    if shift is not None:
        scale = math.ldexp(scale, -shift)
        if math.isfinite(float32(float32(abs(scale) * element.max_value) + abs(offset))):
            out_scale_offset.copy_(torch.tensor([scale, offset], dtype=torch.float32, device="cpu"))
            return
    status.copy_(torch.tensor([_INFINITY_BITS, 1], dtype=torch.int64, device="cpu"))


# --------------------------------------------------------------------------------------------------------------------


def begin(status: Tensor) -> None:
    """Set the status of what is encoded: no magnitude yet, but a change; without a copy from the host."""
    status[:1].zero_()
    status[1:].fill_(1)


def together(device: torch.device) -> int:
    """Return how many values are processed at a time: on a device far more, as each operation has to be launched."""
    return CHUNK if device.type == "cpu" else 64 * CHUNK


def chunks_of(flat: Tensor, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield flat values in parts of ``size``, by default ``together``: the index of the first value and a view."""
    size = size or together(flat.device)
    for at in range(0, flat.numel(), size):
        yield at, flat[at : at + size]


def stretch(words: Tensor, bits: int, at: int, part: Tensor) -> Tensor:
    """View the words that hold the codes of a part, which begins at value ``at``, a multiple of the block size."""
    begin = words_of(at, bits)
    return words[begin : begin + words_of(part.numel(), bits)]


def magnitudes(values: Tensor) -> Tensor:
    """Return the float32 bits of the magnitudes as int32, which sort in the same order as the magnitudes."""
    return values.view(torch.int32) & 0x7FFFFFFF


def _encode_chunk(
    values: Tensor, element: FloatElement, exponent: int, seed: int | None, start: int,
    words: Tensor, sums: Tensor | None, status: Tensor,
) -> None:  # fmt: skip
    """Encode a chunk: write its words, its five sums if requested, and the running maximum in the status."""
    torch.maximum(status[0], magnitudes(values).max(), out=status[0])
    bias, scale = working_bias(element), 1.0
    if element.exponent_bits < 8:
        scale = 2.0 ** (exponent + element.bias - bias)
        values = flushed(flushed(values) * scale)
    codes = round_to(values, element, bias, seed, start)
    blocks = -(-values.numel() // BLOCK)
    codes = _pad(codes, blocks * BLOCK)
    pack(codes, element.bits, words)
    if sums is not None:
        represented = values_of(codes, element).mul_(2.0 ** (element.bias - bias))
        difference = _pad(values, blocks * BLOCK) - represented
        if element.exponent_bits == 8:  # squares may overflow float32
            difference, represented = difference.double(), represented.double()
        found = _sums(difference, represented, blocks)
        sums.copy_(found / found.new_tensor([1, scale, scale, scale, 1]) / scale)


def _is_normal(value: float) -> bool:
    return math.isfinite(value) and abs(value) >= 2.0**-126


def working_bias(element: FloatElement) -> int:
    """Return the bias of the units for rounding and summing, in which a block's sum of squares is finite."""
    return element.bias + 4 if element.exponent_bits == 7 else element.bias


def flushed(values: Tensor) -> Tensor:
    """Replace subnormal values by zeros of the same sign."""
    bits = values.view(torch.int32)
    return torch.where((bits & 0x7FFFFFFF) < 1 << 23, bits & -(1 << 31), bits).view(torch.float32)


def _decoded(words: Tensor, element: FloatElement, scale_offset: Tensor, numel: int) -> Tensor:
    codes = unpack(words, -(-numel // BLOCK), element.bits).view(-1)[:numel]
    scale, offset = scale_offset[0], scale_offset[1]
    # Adding -0.0 instead of 0.0 preserves the sign of zeros.
    return values_of(codes, element).mul_(scale).add_(torch.where(offset == 0, -0.0, offset))


def _pad(flat: Tensor, size: int) -> Tensor:
    return flat if flat.numel() == size else torch.nn.functional.pad(flat, (0, size - flat.numel()))


def round_to(values: Tensor, element: FloatElement, bias: int, seed: int | None, start: int) -> Tensor:
    """Round values, given in the units of ``bias``, to codes; stochastically if ``seed`` is not None."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    field = (magnitude >> 23).clamp_(min=1)  # exponent field; subnormals share that of the smallest normal
    significand = magnitude.sub_((field - 1) << 23)  # [n], below 2**24, including the hidden bit
    target = field.add_(bias - 127)  # exponent field in the format; zero or negative if subnormal
    normal = target.clamp(min=1)
    shift = normal.sub(target).add_(23 - element.mantissa_bits)  # number of bits that the format drops
    integer = significand.add_(normal.sub_(1) << 23)
    if seed is None:
        shift.clamp_(max=25)  # a 24-bit significand rounds to zero from this shift on
        one = torch.ones((), dtype=torch.int32, device=values.device)
        half = (one << shift).bitwise_right_shift_(1)
        even = (integer >> shift).bitwise_and_(1)
        integer += half.add_(even).sub_(1).clamp_(min=0)
    else:
        # 30 random bits: dropping lower bits changes a probability by less than 2**-30.
        integer >>= (shift - 30).clamp_(min=0)
        shift.clamp_(max=30)
        noise = random_bits(seed, start, values.numel(), values.device).bitwise_right_shift_(2).bitwise_and_(0x3FFFFFFF)
        integer += noise >> (30 - shift)
    integer >>= shift
    integer.clamp_(max=element.max_code)
    sign = bits.bitwise_and(-(1 << 31)) >> (32 - element.bits)
    if element.bits < 32:
        sign &= 1 << (element.bits - 1)  # the arithmetic shift also set the higher bits
    return integer.bitwise_or_(sign)


def values_of(codes: Tensor, element: FloatElement) -> Tensor:
    """Return the float32 values of codes."""
    e, m = element.exponent_bits, element.mantissa_bits
    magnitude = (codes & ((1 << (e + m)) - 1)).clamp_(max=element.max_code)  # larger codes occur only in foreign data
    bits = (magnitude << (23 - m)).add_((127 - element.bias) << 23)
    if e < 8:  # for e = 8, subnormals already have their float32 bits
        subnormal = (magnitude.to(torch.float32) * element.step).view(torch.int32)
        bits = torch.where(magnitude < (1 << m), subnormal, bits)
    sign = (codes >> (e + m)) << 31
    return bits.bitwise_or_(sign).view(torch.float32)


def _sums(difference: Tensor, represented: Tensor, blocks: int) -> Tensor:
    """Sum D, D*D, D*R, R*R and R over a chunk, in the same order on every device and for any number of threads.

    Each lane first sums the rows of a block in the given dtype. The blocks are then summed in float64, and finally the
    lanes by pairwise halving.
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
    """Return for each row the word where its code begins, the word where it may end, the first bit and a mask."""
    position = torch.arange(ROWS, dtype=torch.int64, device="cpu") * bits
    first = position // 32
    second = (first + 1).clamp(max=bits - 1)
    begin = (position % 32).to(torch.int32)
    masks = [(1 << (32 - int(o))) - 1 if o else -1 for o in begin]
    mask = torch.tensor(masks, dtype=torch.int64, device="cpu").to(torch.int32)
    column = (ROWS, 1)
    return first.to(device), second.to(device), begin.view(column).to(device), mask.view(column).to(device)


def pack(codes: Tensor, bits: int, words: Tensor) -> None:
    """Pack the codes of whole blocks, ``[blocks * BLOCK]``, into words."""
    codes = codes.view(-1, ROWS, LANES)
    blocks = len(codes)
    first, second, begin, _ = _shifts(bits, codes.device)
    packed = torch.zeros(blocks, bits, LANES, dtype=torch.int32, device=codes.device)
    # The rows occupy disjoint bits, so addition acts as bitwise or.
    packed.index_add_(1, first, codes << begin)
    if 32 % bits:
        packed.index_add_(1, second, (codes >> 1) >> (31 - begin))
    words.copy_(packed.view(-1)[: words.numel()])


def unpack(words: Tensor, blocks: int, bits: int) -> Tensor:
    """Unpack the codes of whole blocks, ``[blocks, ROWS, LANES]``, from words."""
    first, second, begin, mask = _shifts(bits, words.device)
    packed = _pad(words, blocks * bits * LANES).view(blocks, bits, LANES)
    codes = packed.index_select(1, first).bitwise_right_shift_(begin).bitwise_and_(mask)
    if 32 % bits:
        codes |= (packed.index_select(1, second) << (31 - begin)) << 1
    return codes.bitwise_and_((1 << bits) - 1 if bits < 32 else -1)
