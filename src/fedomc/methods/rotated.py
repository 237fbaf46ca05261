"""``DRIVE1`` and ``DRIVE2``: one or two bits a value after a random rotation, for what a client sends.

[Note: the rotation]
A block of ``d`` values x is rotated to ``y = H D2 H D1 x``. H is the Hadamard matrix of ones and minus ones, D1 and D2
are diagonals of random signs. Whatever x is, the entries of y are close to normal, with mean zero and one standard
deviation, so that a sign, or one of four levels, says the same of each. Let c be the integers that the codes stand for.
As ``H D2 H D1`` is orthogonal but for a factor of d, ``D1 H D2 H c`` times a scale is an estimate of x. With the scale
``|x|**2 / <y, c>`` its component along x is exactly x, and the other components have a mean of zero over random
rotations: the estimate is unbiased. This is DRIVE (arXiv 2105.08339) with one bit and EDEN (arXiv 2108.08842) with two.
The squared error is |x|**2 times ``pi / 2 - 1 = 0.571`` with one bit and 0.133 with two.

The papers rotate once, with ``H D1``. There a few large values dominate all of y, whose signs then say nothing of the
other values: of ``(1, 0.1, 0, ...)`` the second one is lost in every draw. A second rotation avoids that.

Each client has rotations of its own, whose errors cancel in the mean over clients. With one rotation for all, the
server could sum the rotated vectors and rotate back once, but the errors would not cancel: so it decodes each reply.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import BLOCK, CHUNK, Outcome
from fedomc.codec.random import random_bits
from fedomc.errors import FormatError
from fedomc.methods.method import Field, Fields, Method, Source, Writing

_LEVELS = {1: (-1, 1), 2: (-10, -3, 3, 10)}
"""The integer of each code; 10 : 3 is within 0.1% of the ratio of the four best levels for normal values."""

_THRESHOLD = 0.9816  # between the two magnitudes of the four best levels, in standard deviations
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Rotated(Method):
    """Randomly rotated blocks of 1024 values in one or two bits a value, with a float32 scale for each block.

    The last block is filled up with zeros: to 1024 values, or with two bits to 512 if it has no more than these. That
    is what the words of its codes have room for. Rounding to nearest takes the rotation of seed 0 every time: a fixed
    rotation, whose error does not average out. Only stochastic rounding is unbiased.

    Attributes:
        bits: of a code, 1 or 2.

    Raises:
        FormatError: another number of bits.

    Example:
        >>> Rotated.from_name("DRIVE1")
        Rotated(bits=1)
    """

    tag: ClassVar[int] = 6
    holds: ClassVar[bool] = False

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in _LEVELS or type(self.bits) is not int:
            raise FormatError(f"DRIVE{self.bits} does not exist: use DRIVE1 or DRIVE2")

    @classmethod
    def from_name(cls, text: str) -> "Rotated | None":
        """Read ``DRIVE1`` or ``DRIVE2``.

        Raises:
            FormatError: another number of bits.
        """
        match = re.fullmatch(r"DRIVE(\d{1,2})", text)
        return None if match is None else cls(int(match[1]))

    def __str__(self) -> str:
        return f"DRIVE{self.bits}"

    def header(self) -> bytes:
        """Return the number of bits, in a byte."""
        return bytes((self.bits,))

    @classmethod
    def from_header(cls, data: bytes) -> "Rotated":
        """Read the number of bits.

        Raises:
            FormatError: it is neither 1 nor 2.
        """
        if len(data) != 1:
            raise FormatError(f"the bits of a rotated variable are described by 1 byte, not {len(data)}")
        return cls(data[0])

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.bits

    def code_count(self, numel: int) -> int:
        """Count the codes: those of the values, and of the zeros that fill up the last block."""
        return codec.words_of(numel, self.bits) * 32 // self.bits

    def fields(self, numel: int) -> tuple[Field, ...]:
        """Name the fields: the codes, a scale for each block, and the seed of the rotations."""
        codes = Field("codes", torch.int32, codec.words_of(numel, self.bits))
        scales = Field("scales", torch.float32, -(-numel // BLOCK))
        return codes, scales, Field("seed", torch.int64, 1, by_values=False)

    def stretch(self, fields: Fields, numel: int, start: int, count: int) -> Fields:
        """View the fields of a stretch; beside the seed of a stretch stands the index of its first value."""
        codes, scales, seed = super().stretch(fields, numel, start, count)
        return codes, scales, torch.stack((seed[0], torch.full_like(seed[0], _first(seed) + start)))

    def validate(self, fields: Fields, numel: int) -> str | None:
        """Check that every scale is finite, and so small that no code decodes to an infinity."""
        scales = fields[1]
        if not bool(torch.isfinite(scales).all()):
            return "a scale is not finite"
        if len(scales) and float(scales.abs().max()) > self._largest_scale:
            return "values are beyond the range of float32"
        return None

    @property
    def _largest_sum(self) -> float:
        """No entry of ``D1 H D2 H c`` exceeds its norm, which is d times that of c."""
        return float(_LEVELS[self.bits][-1] * BLOCK * math.isqrt(BLOCK))

    @property
    def _largest_scale(self) -> float:
        return _FLOAT32_MAX / self._largest_sum  # the divisor is 2**15, or 10 times that: rounding exceeds no bound

    def bound(self, fields: Fields, numel: int) -> float:
        """Return a magnitude that no value exceeds."""
        return float(fields[1].abs().max()) * self._largest_sum if numel else 0.0

    def decode(self, fields: Fields, out: Tensor) -> Tensor:
        """Decode a stretch of values into float32 ``out``: exact sums of integers, and one rounding."""
        levels = torch.tensor(_LEVELS[self.bits], dtype=torch.float32, device=out.device)
        for start, part, (words, scales, seed) in self._parts(fields, out):
            codes = codec.unpack(words, self.code_count(len(part)), self.bits)
            signs, others = _signs(int(seed[0]), start, len(codes), out.device)
            rotated = _by_block(levels[codes.long()]).t().contiguous()
            values = hadamard(hadamard(rotated).mul_(others)).mul_(signs)
            flat = values.mul_(scales).t().reshape(-1)[: len(part)]
            torch.add(flat, 0.0, out=part)  # no -0 where the scale is zero
        return out

    def encode(self, source: Source, fields: Fields, writing: Writing, present: Fields | None = None) -> Outcome:
        """Encode a whole variable with the rotation of one seed."""
        fields[2].fill_(0 if writing.seed is None else writing.seed)
        return super().encode(source, fields, writing, present)

    def encode_stretch(self, values: Tensor, fields: Fields, start: int, writing: Writing) -> None:
        """Encode a stretch of finite float32 values, with the seed that is among its fields."""
        for first, part, (words, scales, seed) in self._parts(fields, values):
            count = self.code_count(len(part))
            padded = torch.nn.functional.pad(part.double(), (0, count - len(part)))  # in which no sum overflows
            x = _by_block(padded).t().contiguous()
            signs, others = _signs(int(seed[0]), first, count, values.device)
            power = x.square().sum(0)
            y = hadamard(hadamard(x.mul_(signs)).mul_(others))
            codes = (y >= 0).int()
            if self.bits == 2:
                far = y.abs() > _THRESHOLD * (power * len(y)).sqrt()
                codes = 1 + codes + far * (2 * codes - 1)
            levels = torch.tensor(_LEVELS[self.bits], dtype=torch.float64, device=values.device)
            scale = power / (y * levels[codes.long()]).sum(0)
            scales.copy_(torch.where(power > 0, scale, 0.0).clamp_(max=self._largest_scale))
            codec.pack(codes.t().reshape(-1), self.bits, words)

    def _parts(self, fields: Fields, values: Tensor) -> Iterator[tuple[int, Tensor, Fields]]:
        """Cut a stretch into parts: whole blocks, of one chunk at most, and then the block that is not full.

        Yields:
            The index of the first value, the values and their fields.
        """
        begin = at = _first(fields[2])
        end = begin + len(values)
        full = end // BLOCK * BLOCK
        while at < end:
            stop = min(full, (at // CHUNK + 1) * CHUNK) if at < full else end
            yield at, values[at - begin : stop - begin], self.stretch(fields, len(values), at - begin, stop - at)
            at = stop


def hadamard(x: Tensor) -> Tensor:
    """Multiply each column by the Hadamard matrix of Sylvester, which is symmetric and not normalized.

    Args:
        x: ``[d, n]``, contiguous, d a power of two; overwritten.

    Returns:
        ``[d, n]``. Of integers it is exact as long as no sum of their magnitudes leaves those of the dtype.
    """
    other, half = torch.empty_like(x), len(x) // 2
    while half:
        (a, b), out = x.view(-1, 2, half * x.shape[1]).unbind(1), other.view(-1, 2, half * x.shape[1])
        torch.add(a, b, out=out[:, 0])
        torch.sub(a, b, out=out[:, 1])
        x, other = other, x
        half //= 2
    return x


def _by_block(values: Tensor) -> Tensor:
    """View values as blocks: one of 512, or some of 1024."""
    return values.view(-1, min(len(values), BLOCK))


def _first(seed: Tensor) -> int:
    """Return the index of the first value that the fields are of, see ``stretch``."""
    return int(seed[1]) if len(seed) == 2 else 0


def _signs(seed: int, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the diagonals D1 and D2 of each block, int32 ``[d, blocks]``: the two highest random bits of a value."""
    bits = _by_block(random_bits(seed, start, count, device)).t().contiguous()
    return (bits >> 31).mul_(2).add_(1), (bits << 1 >> 31).mul_(2).add_(1)
