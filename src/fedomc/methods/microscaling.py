"""``MXFP8``, ``MXFP6`` and ``MXFP4``: the formats of the OCP Microscaling specification (v1.0, section 5).

Each block of 32 values shares a power of two in E8M0, an 8-bit exponent with a bias of 127. Its elements are floats of
8, 6 or 4 bits. The specification allows NaN as a scale and as an element of MXFP8. NaN is never written here, and is
rejected in foreign data.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from fedomc.codec.elements import OCPElement
from fedomc.errors import FormatError
from fedomc.methods.blockwise import SharedExponent
from fedomc.methods.interchange import Interchange

BLOCK = 32

ELEMENTS = {
    "MXFP8": OCPElement(4, 3, 1),
    "MXFP8E5M2": OCPElement(5, 2, 4),
    "MXFP6": OCPElement(2, 3),
    "MXFP6E3M2": OCPElement(3, 2),
    "MXFP4": OCPElement(2, 1),
}
"""The element of each format; where two formats have the same size, the more precise one has the short name."""

_DTYPES = {
    "MXFP8": "F8_E4M3",
    "MXFP8E5M2": "F8_E5M2",
    "MXFP6": "F6_E2M3",
    "MXFP6E3M2": "F6_E3M2",
    "MXFP4": "F4",
}
"""The dtype of each format's elements, by its name in safetensors."""

NAMES = {(element.exponent_bits, element.mantissa_bits): name for name, element in ELEMENTS.items()}
"""The name of the format with elements of so many exponent and mantissa bits."""


@dataclass(frozen=True)
class Microscaling(SharedExponent):
    """Floats of 8, 6 or 4 bits with one power of two for every 32 of them: 8.25, 6.25 or 4.25 bits per value.

    Attributes:
        exponent_bits: the number of exponent bits of an element.
        mantissa_bits: the number of mantissa bits of an element.

    Raises:
        FormatError: the specification has no such element.

    Example:
        >>> Microscaling.from_name("MXFP4")
        Microscaling(block=32, exponent_bits=2, mantissa_bits=1)
    """

    tag: ClassVar[int] = 5
    block: int = BLOCK
    exponent_bits: int = 4
    mantissa_bits: int = 3

    def __post_init__(self) -> None:
        if self.block != BLOCK or (self.exponent_bits, self.mantissa_bits) not in NAMES:
            raise FormatError(
                f"E{self.exponent_bits}M{self.mantissa_bits} in blocks of {self.block} is no format of the OCP "
                f"specification: use one of {', '.join(ELEMENTS)}"
            )

    @property
    def element(self) -> OCPElement:
        """The float format of the elements."""
        return ELEMENTS[str(self)]

    @classmethod
    def from_name(cls, text: str) -> Self | None:
        """Parse a name such as ``MXFP8`` or ``MXFP8E5M2``; return None for other names."""
        element = ELEMENTS.get(text)
        return None if element is None else cls(BLOCK, element.exponent_bits, element.mantissa_bits)

    def __str__(self) -> str:
        return NAMES[self.exponent_bits, self.mantissa_bits]

    def header(self) -> bytes:
        """Return the numbers of exponent and mantissa bits, one byte each."""
        return bytes((self.exponent_bits, self.mantissa_bits))

    @classmethod
    def from_header(cls, data: bytes) -> Self:
        """Read the numbers of exponent and mantissa bits from a header.

        Raises:
            FormatError: the format does not exist.
        """
        if len(data) != 2:
            raise FormatError(f"an element is described by 2 bytes, not {len(data)}")
        return cls(BLOCK, *data)

    @property
    def interchange(self) -> Interchange:
        """The export as elements of an OCP dtype with E8M0 scales."""
        return Interchange(_DTYPES[str(self)], "F8_E8M0", self.code_bits, self.block, self.element.max_code)
