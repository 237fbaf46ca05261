"""Element formats: the value that the bits of a single code represent, before any scale is applied."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from fedomc.errors import FormatError

MAX_EXPONENT_BITS, MAX_MANTISSA_BITS = 8, 23


@dataclass(frozen=True)
class FloatElement:
    """A low-precision float: one sign bit, then exponent bits, then mantissa bits.

    This generalizes the element formats of the OCP Microscaling specification: the bias is ``2**(e-1) - 1``, there are
    subnormals and both zeros, and every code is finite. For ``e = 8`` the top exponent is unused, so that every code is
    a finite float32.

    Attributes:
        exponent_bits: the number of exponent bits e, 1 to 8.
        mantissa_bits: the number of mantissa bits m, 0 to 23.

    Raises:
        FormatError: the number of exponent or mantissa bits is out of range.
    """

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        e, m = self.exponent_bits, self.mantissa_bits
        integers = type(e) is int and type(m) is int
        if not (integers and 1 <= e <= MAX_EXPONENT_BITS and 0 <= m <= MAX_MANTISSA_BITS):
            raise FormatError(
                f"format S1E{e}M{m} does not exist: use 1 to {MAX_EXPONENT_BITS} exponent bits "
                f"and 0 to {MAX_MANTISSA_BITS} mantissa bits, as in S1E3M7"
            )

    @functools.cached_property
    def bits(self) -> int:
        """The number of bits of a code, including the sign: 2 to 32."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """The exponent bias, ``2**(e-1) - 1``."""
        return int(2 ** (self.exponent_bits - 1)) - 1

    @functools.cached_property
    def max_code(self) -> int:
        """The code of the largest value."""
        top_field = min(2**self.exponent_bits - 1, 254)
        return int(((top_field + 1) << self.mantissa_bits) - 1)

    @functools.cached_property
    def top_exponent(self) -> int:
        """The exponent of the top binade: the largest value lies in ``[2**top, 2**(top+1))``."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @functools.cached_property
    def max_value(self) -> float:
        """The largest magnitude, at which values saturate."""
        step = 2.0 ** (self.top_exponent - self.mantissa_bits)
        return float(((1 << self.mantissa_bits) + (self.max_code & ((1 << self.mantissa_bits) - 1))) * step)

    @property
    def step(self) -> float:
        """The distance between neighbouring subnormals, which is the smallest positive value."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))


@dataclass(frozen=True)
class OCPElement(FloatElement):
    """A float of the OCP specification, which reserves some of the largest codes for infinity and NaN.

    Attributes:
        reserved: the number of positive codes above the largest finite one: 1 in E4M3 (NaN), 4 in E5M2 (infinity and
            NaN), 0 in the others.
    """

    reserved: int = 0

    @functools.cached_property
    def max_code(self) -> int:
        """The code of the largest finite value."""
        return int((1 << (self.exponent_bits + self.mantissa_bits)) - 1 - self.reserved)


@dataclass(frozen=True)
class IntegerElement:
    """A signed integer in two's complement, restricted to the symmetric range ``-max_value`` to ``max_value``.

    Attributes:
        bits: the number of bits of a code, 2 to 8.
    """

    bits: int

    @property
    def max_value(self) -> int:
        """The largest magnitude."""
        return int(2 ** (self.bits - 1)) - 1


@dataclass(frozen=True)
class NormalFloat:
    """The 16 values of NF4: quantiles of a normal distribution, scaled to the range -1 to 1, including zero.

    They are the values of QLoRA (Dettmers et al., arXiv 2305.14314, appendix E), in ascending order of the codes.
    """

    bits: ClassVar[int] = 4
    max_value: ClassVar[float] = 1.0
    values: ClassVar[tuple[float, ...]] = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )


BlockElement = FloatElement | IntegerElement | NormalFloat
"""The element format of a blockwise method."""
