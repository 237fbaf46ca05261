import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedomc import FloatFormat, codec
from fedomc.codec.layout import words_of
from tests.conftest import pack_by_design, scaling

# By width, a format whose codes are all values: encoding a decoded code packs that code.
FORMATS = {
    2: "S1E1M0", 3: "S1E2M0", 4: "S1E2M1", 5: "S1E3M1", 6: "S1E2M3", 7: "S1E4M2", 8: "S1E5M2", 11: "S1E3M7",
    13: "S1E4M8", 16: "S1E5M10", 17: "S1E7M9", 19: "S1E4M14", 23: "S1E6M16", 27: "S1E4M22", 31: "S1E7M23",
    32: "S1E8M23",
}  # fmt: skip
SIZES = (1, 31, 32, 33, 1023, 1024, 1025, 5000)


def random_codes(fmt: FloatFormat, size: int) -> np.ndarray:
    rng = np.random.default_rng(size * 100 + fmt.bits)
    sign = rng.integers(0, 2, size) << (fmt.bits - 1)
    return sign | rng.integers(0, fmt.max_code, size, endpoint=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", FORMATS)
def test_words_are_those_of_the_design(width: int, size: int) -> None:
    fmt = FloatFormat.parse(FORMATS[width])
    assert fmt.bits == width
    codes = random_codes(fmt, size)
    expected = torch.from_numpy(pack_by_design(codes.tolist(), width))
    assert words_of(size, width) == len(expected)
    values = codec.decode(expected, scaling(1.0, 0.0), fmt, torch.empty(size))
    words = torch.full_like(expected, -1)
    codec.encode(values, fmt, 0, words)
    assert torch.equal(words, expected)
    # Neighbouring codes differ, so that a decoder that reads the wrong bits is seen.
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    field = (codes >> m) & (2**e - 1)
    significand = np.where(field > 0, 2**m, 0) + (codes & (2**m - 1))
    oracle = np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - fmt.bias - m)
    oracle = np.copysign(oracle, np.where(codes >> (width - 1), -1.0, 1.0)).astype(np.float32)
    assert np.array_equal(values.numpy().view(np.int32), oracle.view(np.int32))


@given(st.integers(0, 100_000), st.integers(2, 32))
def test_sizes(numel: int, bits: int) -> None:
    words = words_of(numel, bits)
    assert words % 32 == 0 and 32 * words >= numel * bits
    whole, rest = numel // 1024 * 1024, numel % 1024
    assert words == words_of(whole, bits) + words_of(rest, bits)
    assert words_of(whole, bits) * 32 == whole * bits  # whole blocks waste nothing
    rows = -(-rest // 32)
    assert words_of(rest, bits) * 32 < (rows * bits + 32) * 32


def test_missing_lanes_are_zero() -> None:
    words = torch.full((words_of(1, 11),), -1, dtype=torch.int32)
    codec.encode(torch.tensor([-1.0]), FloatFormat(3, 7), 0, words)
    assert words[0] == 0b1_011_0000000 and not words[1:].any()
