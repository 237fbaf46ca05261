"""``Interchange``: exports a variable as two tensors with standard dtypes, the elements and their scales."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import CHUNK
from fedomc.errors import PayloadError

SCALE_SUFFIX = "_scale"
"""The suffix for the name of the scales, such as ``weight_scale`` for ``weight``, as in compressed-tensors and vLLM."""


class InterchangeTensor(NamedTuple):
    """The description of an exported tensor.

    Attributes:
        suffix: the suffix that is appended to the variable's name.
        dtype: the dtype's name in safetensors.
        shape: the dimensions, in elements even if several elements share a byte.
        nbytes: the size in bytes.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Interchange:
    """How a variable of floats with one scale per block is written for other programs.

    Elements are stored in row-major order without gaps, with the first element in the lowest bits of the first byte.
    They have the variable's shape if each row takes whole bytes; otherwise they are flat, and zeros pad the last block.
    Scales have the variable's shape with the last dimension divided by the block size if it is a multiple of that;
    otherwise they are flat. In both cases, with everything flattened, scale i belongs to the elements that start at
    ``i * block``.

    Attributes:
        element_dtype: the dtype of the elements, by its name in safetensors.
        scale_dtype: the dtype of the scales, which take one byte each.
        bits: the number of bits of an element, a sign and a magnitude: 4, 6 or 8.
        block: the number of neighbouring values that share a scale.
        max_code: the largest finite magnitude. It replaces larger codes, which decode to the same value here but which
            other programs would read as NaN or infinity.
    """

    element_dtype: str
    scale_dtype: str
    bits: int
    block: int
    max_code: int

    def tensors(self, shape: Sequence[int]) -> tuple[InterchangeTensor, InterchangeTensor]:
        """Describe the element and scale tensors of a variable of the given shape."""
        shape = tuple(shape)
        last = shape[-1] if shape else 1
        blocks = -(-math.prod(shape) // self.block)
        elements = shape if last * self.bits % 8 == 0 else (blocks * self.block,)
        scales = (*shape[:-1], last // self.block) if last % self.block == 0 else (blocks,)
        return (
            InterchangeTensor("", self.element_dtype, elements, math.prod(elements) * self.bits // 8),
            InterchangeTensor(SCALE_SUFFIX, self.scale_dtype, scales, math.prod(scales)),
        )

    def writers(
        self, fields: Sequence[Tensor], shape: Sequence[int]
    ) -> Iterator[tuple[InterchangeTensor, Callable[[], Tensor]]]:
        """Yield each tensor's description and a function that produces its bytes, uint8 ``[nbytes]`` on the CPU.

        Args:
            fields: the codes as int32 words, and the scales as uint8.
            shape: the shape of the variable.
        """
        codes, scales = fields
        elements, of_scales = self.tensors(shape)
        yield elements, functools.partial(self._elements, codes, math.prod(shape), elements.nbytes)
        yield of_scales, scales.cpu

    def read(self, data: Sequence[Tensor], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Build the fields of a variable from the bytes of its exported tensors.

        Args:
            data: uint8 ``[nbytes]`` for each of ``tensors(shape)``.
            shape: the shape of the variable.

        Raises:
            PayloadError: an element is NaN or infinite, or the padding of the last block is not zero.
        """
        elements, scales = data
        numel, total = math.prod(shape), len(elements) * 8 // self.bits
        words = torch.empty(codec.words_of(numel, self.bits), dtype=torch.int32, device="cpu")
        for start in range(0, numel, CHUNK):
            stop = min(start + CHUNK, total)  # includes the padding of the last block
            codes = _unpacked(elements[self._bytes(start) : self._bytes(stop)], self.bits)
            codes, filling = codes[: numel - start], codes[numel - start :]
            if bool(filling.any()):
                raise PayloadError("the padding of its last block is not zero")
            if not torch.equal(codes, self._finite(codes)):
                raise PayloadError("an element is NaN or infinite")
            codec.pack(codes, self.bits, self._words(words, start, len(codes)))
        return words, scales

    def _elements(self, words: Tensor, numel: int, nbytes: int) -> Tensor:
        """Convert the codes of a variable to bytes, one chunk at a time."""
        out = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
        for start in range(0, numel, CHUNK):
            count = min(CHUNK, numel - start)
            codes = self._finite(codec.unpack(self._words(words, start, count), count, self.bits))
            data = _packed(codes, self.bits)
            out[self._bytes(start) :][: len(data)] = data
        return out

    def _words(self, words: Tensor, start: int, count: int) -> Tensor:
        """View the words of ``count`` codes; ``start`` must be the beginning of a chunk."""
        begin = codec.words_of(start, self.bits)
        return words[begin : begin + codec.words_of(count, self.bits)]

    def _bytes(self, count: int) -> int:
        return count * self.bits // 8

    def _finite(self, codes: Tensor) -> Tensor:
        sign = codes & (1 << (self.bits - 1))
        return (codes ^ sign).clamp_(max=self.max_code).bitwise_or_(sign)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Pack int32 codes into bytes, the first in the lowest bits; zeros pad the last group of whole bytes."""
    group = math.lcm(bits, 8) // bits
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % group)).view(-1, group)
    joined = (codes << _steps(group, bits, codes)).sum(1, dtype=torch.int32)  # at most 24 bits
    return (joined[:, None] >> _steps(group * bits // 8, 8, codes)).bitwise_and_(0xFF).to(torch.uint8).view(-1)


def _unpacked(data: Tensor, bits: int) -> Tensor:
    """Unpack int32 codes from whole groups of bytes; the inverse of ``_packed``."""
    group = math.lcm(bits, 8) // bits
    size = group * bits // 8
    joined = (data.to(torch.int32).view(-1, size) << _steps(size, 8, data)).sum(1, dtype=torch.int32)
    return (joined[:, None] >> _steps(group, bits, data)).bitwise_and_((1 << bits) - 1).view(-1)


def _steps(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=torch.int32, device=like.device)
