"""Chooses the power of two that scales a variable into the range of a float element.

[Note: room]
The largest magnitude is scaled into the element's top binade, so that every bit is used. However, the largest code is
``(2 - 2**-m) * 2**top``, and with few mantissa bits much of the top binade lies above it. A value there would saturate,
and a sum of many steps could never grow past it: S1E3M0 would keep only a fifth of 25 equal steps. Therefore, if
rounding could exceed the largest code, the variable is scaled one binade lower. Rounding to nearest exceeds it from
half a step above the largest code, stochastic rounding from any value above it.

When a whole variable is encoded, the largest code itself is also kept free, so that the variable can grow by one step.
Otherwise the first small change of its largest value would move the whole variable to a coarser scale and round every
value again.
"""

import ctypes

from fedomc.codec.elements import FloatElement


def fitting_exponent(magnitude_bits: int, element: FloatElement, *, stochastic: bool, growing: bool = False) -> int:
    """Choose the exponent that scales the largest magnitude into the element's range, before it is bounded.

    Args:
        magnitude_bits: the float32 bits of the largest magnitude; 0 for a variable of zeros.
        element: the number format; for ``e = 8``, scaling gains nothing and the result is 0.
        stochastic: whether values are rounded stochastically.
        growing: whether to keep the largest code free. This has no effect without mantissa bits, where the largest
            code is the only one in its binade.
    """
    if magnitude_bits == 0 or element.exponent_bits == 8:
        return 0
    field, mantissa = magnitude_bits >> 23, magnitude_bits & 0x7FFFFF
    kept_free = (growing and element.mantissa_bits > 0) << (23 - element.mantissa_bits)
    exceeds = field > 0 and mantissa > largest_mantissa(element, stochastic=stochastic) - kept_free
    return element.top_exponent - (field - 127 if field else -126) - exceeds


def largest_mantissa(element: FloatElement, *, stochastic: bool) -> int:
    """Return the largest mantissa, as float32 bits, that is not rounded beyond the largest code in the top binade."""
    dropped = 23 - element.mantissa_bits
    limit = element.max_code << dropped & 0x7FFFFF
    return limit if stochastic or not dropped else limit + (1 << (dropped - 1)) - 1


def bounded_exponent(exponent: int, element: FloatElement) -> int:
    """Clamp the exponent so that every decoded value is zero or a normal float32."""
    return max(least_exponent(element), min(exponent, most_exponent(element)))


def least_exponent(element: FloatElement) -> int:
    """Return the least exponent of ``bounded_exponent``."""
    return min(0, element.top_exponent - 127)


def most_exponent(element: FloatElement) -> int:
    """Return the largest exponent of ``bounded_exponent``."""
    return max(0, 120 - element.bias - element.mantissa_bits)


def float32(value: float) -> float:
    """Round to float32; a tensor takes twenty times as long."""
    return ctypes.c_float(value).value
