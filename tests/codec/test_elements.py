import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedomc import FloatFormat, FormatError, OMCError
from tests.conftest import gfloat_format

ALL = [(e, m) for e in range(1, 9) for m in range(24)]


@pytest.mark.parametrize(("e", "m"), ALL)
def test_numbers_of_a_format(e: int, m: int) -> None:
    fmt = FloatFormat(e, m)
    oracle = gfloat_format(fmt)
    assert (fmt.bits, fmt.bias) == (oracle.k, oracle.bias)
    assert fmt.step == oracle.smallest
    # With 8 exponent bits the top exponent is left out, so that every value is a finite float32.
    assert fmt.max_value == (oracle.max if e < 8 else (2 - 2.0**-m) * 2.0**127)
    assert fmt.max_code == (2 ** (e + m) - 1 if e < 8 else 255 * 2**m - 1)
    assert 2.0**fmt.top_exponent <= fmt.max_value < 2.0 ** (fmt.top_exponent + 1) and math.isfinite(fmt.max_value)


@given(st.sampled_from(ALL))
def test_name_round_trip(size: tuple[int, int]) -> None:
    fmt = FloatFormat(*size)
    assert str(fmt) == "S1E{}M{}".format(*size)
    assert FloatFormat.parse(str(fmt)) == fmt and hash(FloatFormat.parse(str(fmt))) == hash(fmt)
    assert FloatFormat.parse(fmt) is fmt


@pytest.mark.parametrize(
    "text",
    ["", "S1E0M3", "S1E9M3", "S1E3M24", "S1E3M-1", "S0E3M7", "s1e3m7", "S1E3M7 ", "S1E3M7\n", "S1E٣M7", "E3M7", "fp16"],
)
def test_no_such_name(text: str) -> None:
    with pytest.raises(FormatError, match="S1E"):
        FloatFormat.parse(text)


@pytest.mark.parametrize("thing", [None, 7, b"S1E3M7", ["S1E3M7"]])
def test_not_a_name(thing: object) -> None:
    with pytest.raises(OMCError, match="not a number format"):
        FloatFormat.parse(thing)


@pytest.mark.parametrize("size", [(0, 7), (9, 7), (3, -1), (3, 24)])
def test_sizes_out_of_range(size: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        FloatFormat(*size)
