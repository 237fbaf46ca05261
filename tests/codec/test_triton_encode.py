"""The Triton kernels that encode floats: the same bits as the reference, under Triton's interpreter."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedomc import FloatFormat, codec
from fedomc.codec import reference
from tests.codec.test_native import some_values, sums_for, words_for

triton_encode = pytest.importorskip("fedomc.codec.triton_encode", reason="Triton is not installed")

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's, of infinities
]

FORMATS = "S1E1M0 S1E1M2 S1E2M3 S1E3M4 S1E3M7 S1E4M14 S1E5M10 S1E7M23 S1E8M7 S1E8M23".split()
SEEDS = [None, 2**63 - 1]


def encoded(
    backend: object, values: Tensor, fmt: FloatFormat, exponent: int, seed: int | None, start: int = 2048
) -> tuple[Tensor, ...]:
    words, sums = words_for(len(values), fmt).to(values.device), sums_for(len(values)).to(values.device)
    status = torch.zeros(2, dtype=torch.int64, device=values.device)
    backend.encode(values, fmt.exponent_bits, fmt.mantissa_bits, exponent, seed, start, words, sums, status)
    return words.cpu(), sums.cpu(), status.cpu()


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def exponents(fmt: FloatFormat) -> tuple[int, ...]:
    most = min(6, max(0, 120 - fmt.bias - fmt.mantissa_bits))
    return (0,) if fmt.exponent_bits == 8 else (-7, most)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FORMATS)
def test_encoding_has_the_bits_of_the_reference(name: str, seed: int | None) -> None:
    fmt, values = FloatFormat.parse(name), some_values(5000)
    exponent = exponents(fmt)[-1 if seed is None else 0]
    assert_same(encoded(triton_encode, values, fmt, exponent, seed), encoded(reference, values, fmt, exponent, seed))


@pytest.mark.parametrize("n", [0, 1, 4097])
def test_several_programs(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.codec.triton_words.BLOCKS", 4)
    fmt, values = FloatFormat(3, 7), some_values(n)
    assert_same(encoded(triton_encode, values, fmt, 3, 5), encoded(reference, values, fmt, 3, 5))


@pytest.mark.parametrize("name", ["S1E3M7", "S1E8M7"])
def test_sums_are_those_of_each_chunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.codec.triton_words.BLOCKS", 128)
    fmt, values = FloatFormat.parse(name), some_values(codec.CHUNK + 1025)
    found = encoded(triton_encode, values, fmt, 0, None)
    assert len(found[1]) == 2
    assert_same(found, encoded(reference, values, fmt, 0, None))


@given(
    e=st.integers(1, 8),
    m=st.integers(0, 23),
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70),
    seed=st.none() | st.integers(0, 2**63 - 1),
    start=st.sampled_from([0, 1024, 2**32 - 1024, 2**40]),
)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bits_and_any_format(e: int, m: int, bits: list[int], seed: int | None, start: int) -> None:
    fmt = FloatFormat(e, m)
    values = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())
    values = torch.where(values.isfinite(), values, 1.0)
    assert_same(encoded(triton_encode, values, fmt, 0, seed, start), encoded(reference, values, fmt, 0, seed, start))


def largest(absmax: Callable[[Tensor, Tensor], None], values: Tensor) -> int:
    out = torch.full((1,), 7, dtype=torch.int64, device=values.device)
    absmax(values, out)
    return int(out)


@pytest.mark.parametrize("special", [None, -float("inf"), float("nan")])
@pytest.mark.parametrize("n", [1, 33, 9000])
def test_absmax(n: int, special: float | None) -> None:
    values = some_values(n)
    if special is not None:
        values[n // 2] = special
    assert largest(triton_encode.absmax, values) == largest(reference.absmax, values)
    assert largest(triton_encode.absmax, values[:0]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_device_encodes_the_bits_of_the_reference(name: str, seed: int | None) -> None:
    fmt, values = FloatFormat.parse(name), some_values(codec.CHUNK + 1025)
    for exponent in exponents(fmt):
        found = encoded(torch.ops.fedomc, values.cuda(), fmt, exponent, seed)
        assert_same(found, encoded(reference, values, fmt, exponent, seed))
    assert largest(torch.ops.fedomc.absmax, values.cuda()) == largest(reference.absmax, values)
