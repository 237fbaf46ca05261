"""``INT8`` and ``INT4``: symmetric integers with one scale per block."""

from dataclasses import dataclass
from typing import ClassVar

from fedomc.codec.elements import IntegerElement
from fedomc.methods.blockwise import WithBlocks

_INT8, _INT4 = IntegerElement(8), IntegerElement(4)


class Integers(WithBlocks):
    """Integers in two's complement; the most negative one is never written."""

    code_order: ClassVar[str] = "twos-complement"

    @property
    def largest_magnitude(self) -> float:
        """The magnitude of the most negative integer, which foreign data may contain."""
        return 2.0 ** (self.code_bits - 1)


@dataclass(frozen=True)
class Int8(Integers):
    """Integers from -127 to 127 times the scale of their block: 8.5 bits per value with blocks of 64.

    Example:
        >>> str(Int8(64)), str(Int8(128))
        ('INT8', 'INT8/128')
    """

    tag: ClassVar[int] = 2
    name: ClassVar[str] = "INT8"

    block: int = 64

    @property
    def element(self) -> IntegerElement:
        """A signed 8-bit integer."""
        return _INT8


@dataclass(frozen=True)
class Int4(Integers):
    """Integers from -7 to 7 times the scale of their block: 4.5 bits per value with blocks of 64."""

    tag: ClassVar[int] = 3
    name: ClassVar[str] = "INT4"

    block: int = 64

    @property
    def element(self) -> IntegerElement:
        """A signed 4-bit integer."""
        return _INT4
