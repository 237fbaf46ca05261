"""What the Triton kernels do with a single float: a code to a value, and a value to a code."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def value_of(code, scale, offset, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``scale * Q + offset``: a code is a float32 with another bias, which one exact product corrects."""
    return unscaled(code, E, M, MAX_CODE) * scale + offset


@triton.jit  # type: ignore[untyped-decorator]
def unscaled(code, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return Q, the value of a code."""
    magnitude = tl.minimum((code & ((1 << (E + M)) - 1)).to(tl.int32, bitcast=True), MAX_CODE)
    value = (magnitude << (23 - M)).to(tl.float32, bitcast=True)
    if E < 8:
        value *= 2.0 ** (128 - 2 ** (E - 1))
    sign = (code >> (E + M)) << 31
    return (value.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def offset_of(scale_offset):  # type: ignore[no-untyped-def]
    """Load the offset; adding -0 instead of 0 preserves the sign of zeros."""
    offset = tl.load(scale_offset + 1)
    return tl.where(offset == 0.0, -0.0, offset)


@triton.jit
def power_of_two(exponent):  # type: ignore[no-untyped-def]
    """Return ``2**exponent`` for int32 exponents from -126 to 127."""
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def code_of(  # type: ignore[no-untyped-def]
    value, noise, E: tl.constexpr, M: tl.constexpr, MAX_CODE: tl.constexpr, BIAS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Round values, given in the units of ``BIAS``, to codes, uint32; see ``reference.round_to`` and its notes.

    ``noise`` holds 32 random bits for each value and is not read when rounding to nearest.
    """
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    field = tl.maximum(magnitude >> 23, 1)
    significand = magnitude - ((field - 1) << 23)
    target = field + (BIAS - 127)
    normal = tl.maximum(target, 1)
    shift = normal - target + (23 - M)
    integer = significand + ((normal - 1) << 23)
    if STOCHASTIC:
        # 30 random bits, as in the reference; from a shift of 61 on, all bits of the integer are dropped.
        dropped = tl.minimum(shift, 30)
        integer >>= tl.minimum(shift - dropped, 31)
        integer += (noise >> 2).to(tl.int32, bitcast=True) >> (30 - dropped)
    else:
        dropped = tl.minimum(shift, 25)
        integer += tl.maximum(((1 << dropped) >> 1) + ((integer >> dropped) & 1) - 1, 0)
    code = tl.minimum(integer >> dropped, MAX_CODE).to(tl.uint32, bitcast=True)
    return code | ((value.to(tl.uint32, bitcast=True) >> 31) << (E + M))
