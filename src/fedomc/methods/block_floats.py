"""``BlockFloat``: floats SxEyMz with a power of two for each block of neighbouring values, written ``S1E2M3/64``.

One scale for a variable is set by its largest value. The largest weight of a pretrained matrix is often far above all
others, which are then left with the format's lowest codes. A scale for each block confines it to its block, for a byte.
"""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar, Self

from fedomc.codec.elements import FloatElement
from fedomc.errors import FormatError
from fedomc.methods.blockwise import SharedExponent
from fedomc.methods.interchange import Interchange
from fedomc.methods.microscaling import BLOCK, ELEMENTS, NAMES, Microscaling

MAX_EXPONENT_BITS, MAX_MANTISSA_BITS = 5, 6
"""The largest element, which keeps every decoded value zero or a normal float32 down to ``reference_blocks.LEAST``."""

_NAME = re.compile(r"S1E(\d)M(0|[1-9]\d?)/(\d{1,6})")


@dataclass(frozen=True)
class BlockFloat(SharedExponent):
    """The method ``S1EyMz/block``: the elements of ``S1EyMz`` with a power of two for each block of values.

    With blocks of 64, a value takes an eighth of a bit more than an element. Unlike the OCP formats, the elements have
    no codes that are never used, and the largest value of a block does not saturate.

    Attributes:
        exponent_bits: the number of exponent bits of an element, 1 to 5.
        mantissa_bits: the number of mantissa bits of an element, 0 to 6.

    Raises:
        FormatError: the element or the block size is not supported.

    Example:
        >>> BlockFloat(64, 2, 3).nbytes(1024) * 8 / 1024
        6.125
    """

    tag: ClassVar[int] = 7

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        super().__post_init__()
        e, m = self.exponent_bits, self.mantissa_bits
        if not (1 <= e <= MAX_EXPONENT_BITS and 0 <= m <= MAX_MANTISSA_BITS):
            raise FormatError(
                f"{self} does not exist: with a scale for each block, use 1 to {MAX_EXPONENT_BITS} exponent bits and 0 "
                f"to {MAX_MANTISSA_BITS} mantissa bits, as in S1E2M3/64, or one scale for the variable, S1E{e}M{m}"
            )

    @property
    def element(self) -> FloatElement:
        """The float format of the elements."""
        return _element(self.exponent_bits, self.mantissa_bits)

    @classmethod
    def from_name(cls, text: str) -> Self | None:
        """Parse a name such as ``S1E2M3/64``; return None if the text does not have that form.

        Raises:
            FormatError: the element or the block size is not supported.
        """
        match = _NAME.fullmatch(text)
        return None if match is None else cls(int(match[3]), int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"S1E{self.exponent_bits}M{self.mantissa_bits}/{self.block}"

    def header(self) -> bytes:
        """Return the base-2 logarithm of the block size and the numbers of exponent and mantissa bits, a byte each."""
        return super().header() + bytes((self.exponent_bits, self.mantissa_bits))

    @classmethod
    def from_header(cls, data: bytes) -> Self:
        """Read the block size and the numbers of exponent and mantissa bits from a header.

        Raises:
            FormatError: the method does not exist.
        """
        if len(data) != 3 or not 5 <= data[0] <= 8:
            raise FormatError(f"{data.hex() or 'nothing'} is not a block and an element")
        return cls(2 ** data[0], data[1], data[2])

    @property
    def interchange(self) -> Interchange | None:
        """The export of the OCP format with these blocks and all of these codes, such as MXFP6; None without one."""
        name = NAMES.get((self.exponent_bits, self.mantissa_bits))
        if name is None or self.block != BLOCK or ELEMENTS[name].reserved:
            return None
        return Microscaling(BLOCK, self.exponent_bits, self.mantissa_bits).interchange


_element = functools.cache(FloatElement)  # an element caches what is derived from it, and each step asks for it
