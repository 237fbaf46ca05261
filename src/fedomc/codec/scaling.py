"""The power of two that moves a variable into the range of a float element.

[Note: room]
The largest magnitude comes into the element's top binade, so that every bit is used. But codes end below the end of
that binade, at ``(2 - 2**-m) * 2**top``, and with few mantissa bits most of the binade lies above them. A value there
would saturate, and a sum of many steps could never grow past it: of 25 equal steps, S1E3M0 would keep a fifth. So where
rounding could reach beyond the largest code, the variable is moved one binade lower. Rounding to nearest reaches beyond
it from half a step above it on, rounding at random from anywhere above it.

A variable that is encoded afresh also keeps the largest code itself free, so that it can grow by a step: otherwise the
first small change of a largest value would move the whole variable to a coarser scale, and round all of it again.
"""

from fedomc.codec.elements import FloatElement


def fitting_exponent(magnitude_bits: int, element: FloatElement, *, stochastic: bool, growing: bool = False) -> int:
    """Choose the power of two for the largest magnitude, given as its float32 bits, without regard to bounds.

    Args:
        magnitude_bits: of float32; 0 for a variable of zeros.
        element: the number format; for ``e = 8``, where nothing is gained, the result is 0.
        stochastic: whether values are rounded at random.
        growing: whether the largest code is to stay free; without mantissa bits there is no other in its binade.
    """
    if magnitude_bits == 0 or element.exponent_bits == 8:
        return 0
    field, mantissa = magnitude_bits >> 23, magnitude_bits & 0x7FFFFF
    dropped = 23 - element.mantissa_bits
    limit = (0x7FFFFF >> dropped << dropped) - (growing and element.mantissa_bits > 0) * (1 << dropped)
    if not stochastic:
        limit += (1 << dropped >> 1) - 1 if dropped else 0
    exceeds = field > 0 and mantissa > limit
    return element.top_exponent - (field - 127 if field else -126) - exceeds


def bounded_exponent(exponent: int, element: FloatElement) -> int:
    """Bound a power of two so that every decoded value is zero or a normal float32."""
    least = min(0, element.top_exponent - 127)
    most = max(0, 120 - element.bias - element.mantissa_bits)
    return max(least, min(exponent, most))
