"""The codec: values <-> packed bits, for whole variables or any stretch of them that starts at a block.

This is the seam between what a code means and how fast it is made. Today one backend serves every device, the
reference in PyTorch operations; a faster one for some device is chosen here and nowhere else.
"""

import torch
from torch import Tensor

from fedomc.codec.layout import BLOCK, words_of
from fedomc.codec.reference import CHUNK, INFINITY_BITS, decode_chunk, encode_chunk, magnitude_bits
from fedomc.formats import FloatFormat

__all__ = ["BLOCK", "CHUNK", "INFINITY_BITS", "decode", "encode", "magnitude_bits", "words_of"]


def encode(
    values: Tensor,
    format: FloatFormat,
    exponent: int,
    words: Tensor,
    *,
    start: int = 0,
    seed: int | None = None,
    sums: bool = True,
) -> tuple[Tensor, int]:
    """Encode ``Q(2**exponent * V)`` into ``words``.

    Args:
        values: float32 ``[n]``, contiguous.
        format: the number format.
        exponent: the k of the scaling.
        words: int32 ``[words_of(n, bits)]``, written.
        start: where the values stand in their variable, a multiple of ``BLOCK``.
        seed: of stochastic rounding; None rounds to nearest, ties to the even code.
        sums: whether the sums for the least-squares fit are wanted.

    Returns:
        The sums by block, float64 ``[blocks, 5]`` on the CPU (see ``encode_chunk``; empty if not wanted), and the
        float32 bits of the largest magnitude: ``INFINITY_BITS`` or more if a value is not finite, and then the words
        mean nothing.
    """
    found, largest = [], 0
    for at in range(0, values.numel(), CHUNK):
        part = values[at : at + CHUNK]
        chunk_sums, chunk_largest = encode_chunk(
            part, format, exponent, seed, start + at, _stretch(words, format, at, part.numel()), sums
        )
        largest = max(largest, chunk_largest)
        if chunk_sums is not None:
            found.append(chunk_sums.cpu())
    return torch.cat(found) if found else torch.empty(0, 5, dtype=torch.float64), largest


def decode(words: Tensor, format: FloatFormat, scale: float, offset: float, out: Tensor, *, start: int = 0) -> Tensor:
    """Decode ``scale * Q + offset`` into ``out``.

    Args:
        words: int32, the codes of the whole variable.
        format: the number format.
        scale: factor of every value; 1 with offset 0 keeps every bit.
        offset: added to every value.
        out: float32 ``[n]``, contiguous, written.
        start: the first value to decode, a multiple of ``BLOCK``.

    Returns:
        ``out``.
    """
    for at in range(0, out.numel(), CHUNK):
        part = out[at : at + CHUNK]
        decode_chunk(_stretch(words, format, start + at, part.numel()), format, scale, offset, part)
    return out


def _stretch(words: Tensor, format: FloatFormat, at: int, numel: int) -> Tensor:
    begin = words_of(at, format.bits)
    return words[begin : begin + words_of(numel, format.bits)]
