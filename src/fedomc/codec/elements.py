"""Number formats: what the values of an SxEyMz format are."""

import functools
import re
from dataclasses import dataclass

from fedomc.errors import FormatError

MAX_EXPONENT_BITS, MAX_MANTISSA_BITS = 8, 23

_NAME = re.compile(r"S1E([0-9])M(0|[1-9][0-9]?)")


@dataclass(frozen=True)
class FloatFormat:
    """A low-precision float: one sign bit, then exponent bits, then mantissa bits.

    The element format of the OCP Microscaling specification, generalised: bias ``2**(e-1) - 1``, subnormals, both
    zeros, and every code is finite. For ``e = 8`` the top exponent is unused, so that every code is a finite float32.

    Attributes:
        exponent_bits: 1 to 8.
        mantissa_bits: 0 to 23.

    Raises:
        FormatError: a size out of range.
    """

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        e, m = self.exponent_bits, self.mantissa_bits
        whole = type(e) is int and type(m) is int
        if not (whole and 1 <= e <= MAX_EXPONENT_BITS and 0 <= m <= MAX_MANTISSA_BITS):
            raise FormatError(
                f"format S1E{e}M{m} does not exist: use 1 to {MAX_EXPONENT_BITS} exponent bits "
                f"and 0 to {MAX_MANTISSA_BITS} mantissa bits, as in S1E3M7"
            )

    @classmethod
    def parse(cls, text: "str | FloatFormat") -> "FloatFormat":
        """Read a name such as ``S1E3M7``; a format passes through.

        Raises:
            FormatError: the text names no format.
        """
        if isinstance(text, FloatFormat):
            return text
        return _parse(text if isinstance(text, str) else repr(text))

    def __str__(self) -> str:
        return f"S1E{self.exponent_bits}M{self.mantissa_bits}"

    @functools.cached_property
    def bits(self) -> int:
        """Bits of a code, sign included: 2 to 32."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """The exponent bias, ``2**(e-1) - 1``."""
        return int(2 ** (self.exponent_bits - 1)) - 1

    @functools.cached_property
    def max_code(self) -> int:
        """The largest code of a positive value."""
        top_field = min(2**self.exponent_bits - 1, 254)
        return int(((top_field + 1) << self.mantissa_bits) - 1)

    @functools.cached_property
    def top_exponent(self) -> int:
        """The exponent of the top binade: the largest value lies in ``[2**top, 2**(top+1))``."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @functools.cached_property
    def max_value(self) -> float:
        """The largest magnitude; values beyond it saturate to it."""
        return float((2.0 - 2.0**-self.mantissa_bits) * 2.0**self.top_exponent)

    @property
    def step(self) -> float:
        """The distance between neighbouring subnormals, which is the smallest positive value."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))


@functools.cache
def _parse(text: str) -> FloatFormat:
    match = _NAME.fullmatch(text)
    if match is None:
        raise FormatError(f"{text!r} is not a number format: write S1E<exponent bits>M<mantissa bits>, as in S1E3M7")
    return FloatFormat(int(match[1]), int(match[2]))
