"""The reference codec of blockwise methods in PyTorch operations: low-bit codes with one scale per block.

A block of 32, 64, 128 or 256 neighbouring values shares one scale. A row of the bit layout holds 32 values, so each
scale covers whole rows, and each block of the layout holds whole scaling blocks.

[Note: scales]
Re-encoding decoded values must reproduce them exactly, so that a zero step changes nothing. The largest value of a
block determines its scale and must therefore survive a round trip. In NF4 the scale is that value itself. For integers
it is that value divided by the largest code, truncated to 16 significant bits; its product with a code is then exact
in float32, and the largest value loses at most a fraction of ``2**-15``. The scales of floats are powers of two, and
the largest value is scaled into the top binade, or into the one below it if rounding could exceed the largest code (see
``codec.scaling``). Only the elements of the OCP specification, when rounded to nearest, may saturate in the top binade,
as the specification says.

A block whose largest value is below ``2**-90`` is encoded as zeros, so that every decoded value is zero or a normal
float32.
"""

import functools
import math

import torch
from torch import Tensor

from fedomc.codec.elements import BlockElement, FloatElement, IntegerElement, NormalFloat, OCPElement
from fedomc.codec.layout import BLOCK
from fedomc.codec.random import random_bits
from fedomc.codec.reference import begin, chunks_of, flushed, magnitudes, pack, round_to, stretch, unpack, values_of
from fedomc.codec.scaling import largest_mantissa

INTEGER, NORMAL_FLOAT, OCP, FLOAT = 0, 1, 2, 3
"""The kinds of elements in the operators' arguments; two further numbers give the parameters of each kind."""

LEAST = 2.0**-90
"""The smallest magnitude that determines a scale; blocks below it become zeros."""

_MANTISSA_KEPT = -(1 << 8)  # 16 significant bits of a float32


def block_element(kind: int, e: int, m: int) -> BlockElement:
    """Make an element from the operators' arguments.

    Integers are (0, bits, 0), and NF4 is (1, 0, 0). Floats are (2, exponent bits, mantissa bits) if they are elements
    of the OCP specification, and (3, exponent bits, mantissa bits) otherwise.
    """
    if kind == INTEGER:
        return IntegerElement(e)
    if kind == NORMAL_FLOAT:
        return NormalFloat()
    if kind == FLOAT:
        return FloatElement(e, m)
    return OCPElement(e, m, {(4, 3): 1, (5, 2): 4}.get((e, m), 0))


# The functions up to the next line of dashes implement the codec's operators for any device; see codec/__init__.py.


def block_decode(words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int, out: Tensor) -> None:
    """Decode ``scale * Q`` into ``out``."""
    element = block_element(kind, e, m)
    for at, part in chunks_of(out):
        part.copy_(_decoded(words, scales, element, block, at, part))


def block_decode_sum(
    words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int,
    update_words: Tensor, update_scales: Tensor, update_kind: int, update_e: int, update_m: int, update_block: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Decode the sum of a base and its update into ``out``."""
    element, update_element = block_element(kind, e, m), block_element(update_kind, update_e, update_m)
    for at, part in chunks_of(out):
        values = _decoded(words, scales, element, block, at, part)
        part.copy_(values.add_(_decoded(update_words, update_scales, update_element, update_block, at, part)))


def block_encode(
    values: Tensor, kind: int, e: int, m: int, block: int, seed: int | None, start: int,
    words: Tensor, scales: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """Choose the scale of each block and encode ``Q(V / scale)``."""
    element = block_element(kind, e, m)
    begin(status)
    for at, part in chunks_of(values):
        _encode_chunk(flushed(part), element, block, seed, start + at, at, words, scales, status)


def block_update(
    words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int, gradient: Tensor, alpha: float,
    seed: int | None, out: Tensor, out_scales: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """Encode the decoded values plus ``alpha`` times the gradient."""
    element = block_element(kind, e, m)
    status.zero_()
    for at, part in chunks_of(gradient):
        former = _decoded(words, scales, element, block, at, part)
        values = flushed(former.add(flushed(part.float()), alpha=alpha))
        status[1] |= (values != former).any()
        _encode_chunk(values, element, block, seed, at, at, out, out_scales, status)


# --------------------------------------------------------------------------------------------------------------------


def _decoded(words: Tensor, scales: Tensor, element: BlockElement, block: int, at: int, part: Tensor) -> Tensor:
    numel = part.numel()
    codes = unpack(stretch(words, element.bits, at, part), -(-numel // BLOCK), element.bits).view(-1)[:numel]
    factors = scale_values(scales[at // block : -(-(at + numel) // block)])
    return _element_values(codes, element) * factors.repeat_interleave(block)[:numel]


def scale_values(scales: Tensor) -> Tensor:
    """Return scales as float32; the uint8 scales of floats are exponents with a bias of 127."""
    if scales.dtype is torch.float32:
        return scales
    exponents = scales.to(torch.int32)
    return torch.where(exponents > 0, exponents << 23, 1 << 22).view(torch.float32)


def _element_values(codes: Tensor, element: BlockElement) -> Tensor:
    if isinstance(element, FloatElement):
        return values_of(codes, element)
    if isinstance(element, IntegerElement):
        return ((codes << (32 - element.bits)) >> (32 - element.bits)).to(torch.float32)
    return _table(codes.device)[codes.to(torch.int64)]


@functools.lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    return torch.tensor(NormalFloat.values, dtype=torch.float32, device=device)


def _encode_chunk(
    values: Tensor, element: BlockElement, block: int, seed: int | None, start: int, at: int,
    words: Tensor, scales: Tensor, status: Tensor,
) -> None:  # fmt: skip
    numel = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -numel % block)).view(-1, block)  # [B, block]
    largest = magnitudes(blocks).amax(1)
    torch.maximum(status[0], largest.max(), out=status[0])
    nothing = ~(largest.view(torch.float32) >= LEAST)
    stored = _scales(largest.view(torch.float32), nothing, element, seed is not None)
    scales[at // block : at // block + len(stored)] = stored
    divisors = torch.where(nothing, math.inf, scale_values(stored))
    quotients = (blocks / divisors[:, None]).view(-1)[:numel]
    codes = _codes(quotients, element, seed, start) & ((1 << element.bits) - 1)
    whole = -(-numel // BLOCK) * BLOCK
    pack(torch.nn.functional.pad(codes, (0, whole - numel)), element.bits, stretch(words, element.bits, at, values))


def _scales(largest: Tensor, nothing: Tensor, element: BlockElement, stochastic: bool) -> Tensor:
    """Return the scale of each block in its stored form; see the note on scales."""
    if isinstance(element, FloatElement):
        exponent = (largest.view(torch.int32) >> 23) - element.top_exponent
        if stochastic or not isinstance(element, OCPElement):
            mantissa = largest.view(torch.int32) & 0x7FFFFF
            exponent += mantissa > largest_mantissa(element, stochastic=stochastic)
        return torch.where(nothing, 127, exponent).clamp_(1, 254 - element.top_exponent).to(torch.uint8)
    scale = largest / element.max_value
    if isinstance(element, IntegerElement):
        scale = (scale.view(torch.int32) & _MANTISSA_KEPT).view(torch.float32)
    return torch.where(nothing, 0.0, scale)


def _codes(quotients: Tensor, element: BlockElement, seed: int | None, start: int) -> Tensor:
    if isinstance(element, FloatElement):
        return round_to(quotients, element, element.bias, seed, start)
    uniform = None
    if seed is not None:  # 24 random bits, exact in float32
        noise = random_bits(seed, start, quotients.numel(), quotients.device)
        uniform = ((noise >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    if isinstance(element, IntegerElement):
        limit = float(element.max_value)
        if uniform is None:
            return quotients.clamp(-limit, limit).round().to(torch.int32)
        floor = quotients.floor()
        return (floor + (uniform < quotients - floor)).clamp_(-limit, limit).to(torch.int32)
    table = _table(quotients.device)
    if uniform is None:
        return torch.bucketize(quotients, (table[1:] + table[:-1]) * 0.5).to(torch.int32)
    below = torch.bucketize(quotients, table[1:-1], right=True)  # [n], 0..14
    share = (quotients - table[below]) * (1.0 / (table[1:] - table[:-1]))[below]
    return (below + (uniform < share)).to(torch.int32)
