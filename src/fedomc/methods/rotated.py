"""``DRIVE1`` and ``DRIVE2``: one or two bits per value after a random rotation, for the uplink of clients.

[Note: the rotation]
A block x of ``d`` values is rotated to ``y = H D2 H D1 x``, where H is the unnormalized Hadamard matrix with entries 1
and -1, and D1 and D2 are diagonal matrices of random signs. For any x, the entries of y are approximately normal with
mean zero and a common standard deviation, so that a sign, or one of four levels, carries equally much information about
each entry. Let c be the vector of integers that the codes represent. ``H D2 H D1`` is orthogonal up to a factor of d,
so ``D1 H D2 H c`` times a scale is an estimate of x. With the scale ``|x|**2 / <y, c>``, the component of the estimate
along x is exactly x, and the other components have mean zero over random rotations, so the estimate is unbiased. This
is DRIVE (arXiv 2105.08339) with one bit and EDEN (arXiv 2108.08842) with two. The squared error is |x|**2 times
``pi / 2 - 1 = 0.571`` with one bit and 0.133 with two. With the scale ``<y, c> / (d**2 |c|**2)``, the transformation
``least-squares``, it is 0.363 and 0.118, the least that is possible, but the estimate is shorter than x: a sender needs
error feedback to make up for that.

The papers rotate only once, with ``H D1``. A few large values then dominate every entry of y, and the signs carry no
information about the other values: for ``(1, 0.1, 0, ...)``, the second value is lost in every draw. The second
rotation avoids this.

Each client uses its own rotations, so that errors cancel in the mean over clients. With a common rotation, the server
could sum the rotated vectors and rotate back only once, but the errors would not cancel; it therefore decodes each
reply separately.
"""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import BLOCK, Deferred, Outcome
from fedomc.codec.reference_rotation import LEVELS
from fedomc.errors import FormatError
from fedomc.methods.method import Field, Fields, Method, Source, Writing

_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Rotated(Method):
    """Randomly rotated blocks of 1024 values with one or two bits per value and a float32 scale per block.

    The last block is padded with zeros to 1024 values, or, with two bits, to 512 if it has at most 512 values; this is
    the capacity of the words that hold its codes. Rounding to nearest always uses the rotation of seed 0, a fixed
    rotation whose error does not average out. Only stochastic rounding is unbiased.

    Attributes:
        bits: the number of bits of a code, 1 or 2.

    Raises:
        FormatError: the number of bits is neither 1 nor 2.

    Example:
        >>> Rotated.from_name("DRIVE1")
        Rotated(bits=1)
    """

    tag: ClassVar[int] = 6
    transforms: ClassVar[tuple[str, ...]] = ("unbiased", "least-squares")
    least_error: ClassVar[tuple[str, str]] = ("least-squares", "stochastic")
    holds: ClassVar[bool] = False

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in LEVELS or type(self.bits) is not int:
            raise FormatError(f"DRIVE{self.bits} does not exist: use DRIVE1 or DRIVE2")

    @classmethod
    def from_name(cls, text: str) -> "Rotated | None":
        """Parse ``DRIVE1`` or ``DRIVE2``; return None for the name of another method.

        Raises:
            FormatError: the number of bits is neither 1 nor 2.
        """
        match = re.fullmatch(r"DRIVE(\d{1,2})", text)
        return None if match is None else cls(int(match[1]))

    def __str__(self) -> str:
        return f"DRIVE{self.bits}"

    def header(self) -> bytes:
        """Return the number of bits, as one byte."""
        return bytes((self.bits,))

    @classmethod
    def from_header(cls, data: bytes) -> "Rotated":
        """Read the number of bits from a header.

        Raises:
            FormatError: the number of bits is neither 1 nor 2.
        """
        if len(data) != 1:
            raise FormatError(f"the bits of a rotated variable are described by 1 byte, not {len(data)}")
        return cls(data[0])

    @property
    def code_bits(self) -> int:
        """The number of bits of a code."""
        return self.bits

    def code_count(self, numel: int) -> int:
        """Return the number of codes, including those of the zeros that pad the last block."""
        return codec.words_of(numel, self.bits) * 32 // self.bits

    def fields(self, numel: int) -> tuple[Field, ...]:
        """Describe the fields: the codes, a scale for each block, and the seed of the rotations."""
        codes = Field("codes", torch.int32, codec.words_of(numel, self.bits))
        scales = Field("scales", torch.float32, -(-numel // BLOCK))
        return codes, scales, Field("seed", torch.int64, 1, by_values=False)

    def stretch(self, fields: Fields, numel: int, start: int, count: int) -> Fields:
        """View the fields of a stretch; its seed field also contains the index of the first value."""
        codes, scales, seed = super().stretch(fields, numel, start, count)
        return codes, scales, torch.stack((seed[0], torch.full_like(seed[0], _first(seed) + start)))

    def validate(self, fields: Fields, numel: int) -> str | None:
        """Check that every scale is finite, and small enough that no code decodes to infinity."""
        scales = fields[1]
        if not bool(torch.isfinite(scales).all()):
            return "a scale is not finite"
        if len(scales) and float(scales.abs().max()) > self._largest_scale:
            return "values are beyond the range of float32"
        return None

    @property
    def _largest_sum(self) -> float:
        """An upper bound on the entries of ``D1 H D2 H c``: its norm, which is d times the norm of c."""
        return float(LEVELS[self.bits][-1] * BLOCK * math.isqrt(BLOCK))

    @property
    def _largest_scale(self) -> float:
        return _FLOAT32_MAX / self._largest_sum  # the divisor is 2**15, or 10 times that, so rounding stays in bounds

    def bound(self, fields: Fields, numel: int) -> float:
        """Return an upper bound on the magnitude of the values."""
        return float(fields[1].abs().max()) * self._largest_sum if numel else 0.0

    def decode(self, fields: Fields, out: Tensor) -> Tensor:
        """Decode a stretch of values into ``out``."""
        words, scales, seed = fields
        return codec.rotated_decode(words, scales, self.bits, int(seed[0]), out, start=_first(seed))

    def encode(
        self, source: Source, fields: Fields, writing: Writing, present: Fields | None = None
    ) -> Outcome | Deferred:
        """Encode a whole variable with the rotations of one seed."""
        fields[2].fill_(0 if writing.seed is None else writing.seed)
        return super().encode(source, fields, writing, present)

    def encode_stretch(self, values: Tensor, fields: Fields, start: int, writing: Writing) -> None:
        """Encode a stretch of finite float32 values with the seed stored in its fields."""
        words, scales, seed = fields
        unbiased = writing.transform == "unbiased"
        codec.rotated_encode(values, self.bits, int(seed[0]), words, scales, start=start, unbiased=unbiased)


def _first(seed: Tensor) -> int:
    """Return the index of the first value that the fields describe; see ``stretch``."""
    return int(seed[1]) if len(seed) == 2 else 0
