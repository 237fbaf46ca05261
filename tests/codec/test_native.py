"""The C++ kernels: the same bits as the reference at every instruction set; bad input is an exception."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedomc import FloatFormat, codec
from fedomc.codec import native, reference
from tests.conftest import bits_of, flushed_denormals, randn, scaling, threads

FORMATS = (
    "S1E1M0 S1E1M2 S1E2M0 S1E2M1 S1E2M3 S1E3M2 S1E3M4 S1E3M7 S1E4M3 S1E4M8 S1E4M14 S1E5M2 S1E5M10 S1E6M9 S1E7M23 "
    "S1E8M7 S1E8M15 S1E8M23"
).split()
pytestmark = pytest.mark.usefixtures("level")


def some_values(n: int, seed: int = 0) -> Tensor:
    """Values of all magnitudes: normal ones, any bits, subnormals, both zeros, ties of narrow formats."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(n).astype(np.float32)
    any_bits = generator.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    x[::3] = np.where(np.isfinite(any_bits), any_bits, 1.0)[::3]
    x[1::7] = np.round(x[1::7].clip(-100, 100) * 16) / 16
    x[2::11] = generator.integers(0, 2**23, n, dtype=np.uint32).view(np.float32)[2::11]
    x[5::13] = -0.0
    return torch.from_numpy(x)


def both(operation: Callable[[object], tuple[Tensor, ...]]) -> None:
    """Compare what the two backends write, bit for bit."""
    ours, expected = operation(native), operation(reference)
    for a, b in zip(ours, expected, strict=True):
        if a.dtype == torch.float32:
            np.testing.assert_array_equal(bits_of(a), bits_of(b))
        else:
            assert torch.equal(a, b)


def words_for(n: int, fmt: FloatFormat) -> Tensor:
    return torch.full((codec.words_of(n, fmt.bits),), -1, dtype=torch.int32)


def sums_for(n: int) -> Tensor:
    return torch.full((-(-n // codec.CHUNK), 5), float("nan"), dtype=torch.float64)


def random_words(n: int, fmt: FloatFormat, seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(-(2**31), 2**31, codec.words_of(n, fmt.bits), dtype=np.int64)).int()


@pytest.mark.parametrize("seed", [None, 0, 2**63 - 1])
@pytest.mark.parametrize("name", FORMATS)
def test_encode(name: str, seed: int | None) -> None:
    fmt = FloatFormat.parse(name)
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    for n in (1, 31, 33, 1024, 5000, codec.CHUNK + 1025):
        values = some_values(n)
        for exponent in (0,) if e == 8 else (0, -7, min(6, max(0, 120 - fmt.bias - m))):

            def encode(backend: object, values: Tensor = values, exponent: int = exponent) -> tuple[Tensor, ...]:
                words, sums = words_for(len(values), fmt), sums_for(len(values))
                status = torch.zeros(2, dtype=torch.int64)
                backend.encode(values, e, m, exponent, seed, 2048, words, sums, status)
                return words, sums.nan_to_num(7.0), status

            both(encode)


@pytest.mark.parametrize("name", FORMATS)
def test_decode(name: str) -> None:
    fmt = FloatFormat.parse(name)
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    other = FloatFormat(2, 1)
    for n in (1, 31, 33, 1024, 5000, codec.CHUNK + 1025):
        words, update_words = random_words(n, fmt), random_words(n, other, 1)
        for scale, offset in ((1.0, 0.0), (0.37, 0.0), (-0.01, 0.3)):

            def decode(backend: object, n: int = n, words: Tensor = words, s: float = scale, b: float = offset,
                       update_words: Tensor = update_words) -> tuple[Tensor, ...]:  # fmt: skip
                alone, added, total = torch.empty(n), torch.ones(n), torch.empty(n)
                backend.decode(words, scaling(s, b), e, m, alone)
                backend.decode_add(words, scaling(s, b), e, m, 0.3, added)
                backend.decode_sum(words, scaling(s, b), e, m, update_words, scaling(0.001, 0.0), 2, 1, total)
                changed = torch.ones(n)
                backend.decode_add_difference(
                    words, scaling(s, b), e, m, update_words, scaling(0.1, 0.01), 2, 1, 0.3, changed
                )
                return alone, added, total, changed

            both(decode)


def test_add_difference() -> None:
    for n in (0, 1, 31, 1024, codec.CHUNK + 1025):
        values, subtrahend = some_values(n), some_values(n, 1)

        def add(backend: object, values: Tensor = values, subtrahend: Tensor = subtrahend) -> tuple[Tensor, ...]:
            out = torch.ones(len(values))
            backend.add_difference(values, subtrahend, -0.3, out)
            return (out,)

        both(add)


UPDATES = {  # scale, offset and alpha
    "ordinary": (0.05, 0.0, -0.1),
    "fitted": (-0.0517, 0.003, -0.1),
    "grows": (2.0**-20, 0.0, 3.0),
    "first step": (1.0, 0.0, 1e-12),
    "nothing": (0.05, 0.1, 0.0),
    "far": (2.0**-100, 0.0, 1e10),
    "too far": (2.0**-100, 0.0, 1e38),
    "no scale": (0.0, 0.5, 1.0),
    "subnormal scale": (2.0**-130, 0.0, 1.0),
    "largest": (1e38, 0.0, 1e30),
}


@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_update(name: str, seed: int | None, case: str) -> None:
    fmt = FloatFormat.parse(name)
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    scale, offset, alpha = UPDATES[case]
    for n in (1, 31, 1024, codec.CHUNK + 1025):
        words, gradient = random_words(n, fmt), randn(n, seed=4)
        if case == "first step":
            words.zero_()

        def update(
            backend: object, rescale: bool, n: int = n, words: Tensor = words, gradient: Tensor = gradient
        ) -> tuple[Tensor, ...]:
            out, status = words_for(n, fmt).zero_(), torch.zeros(2, dtype=torch.int64)
            changed = torch.full((2,), -7.0)
            present = scaling(scale, offset)
            backend.update(words, present, e, m, gradient, alpha, rescale, seed, out, changed, status)
            if status[0] >= codec.INFINITY_BITS:  # what was written means nothing then
                return (status.clamp(max=codec.INFINITY_BITS),)
            return out, changed, status

        for rescale in (True, False):
            both(lambda backend, rescale=rescale: update(backend, rescale))


def test_absmax_sees_what_is_not_finite() -> None:
    for n in (1, 15, 17, 100_000):
        values = randn(n)
        out = torch.zeros(1, dtype=torch.int64)
        native.absmax(values, out)
        assert int(out) == int(values.abs().max().view(torch.int32))
        values[n // 2] = float("nan")
        native.absmax(values, out)
        assert int(out) > codec.INFINITY_BITS
    native.absmax(torch.empty(0), out)
    assert int(out) == 0


@pytest.mark.parametrize("seed", [None, 3])
def test_threads_and_flushing_do_not_count(seed: int | None) -> None:
    n, fmt = 20 * codec.CHUNK + 77, FloatFormat(3, 7)
    values, gradient = some_values(n).clamp(-1e20, 1e20), randn(n, seed=1)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            words, again = words_for(n, fmt), words_for(n, fmt)
            sums, out, status = sums_for(n), torch.empty(n), torch.zeros(2, dtype=torch.int64)
            native.encode(values, 3, 7, 0, seed, 0, words, sums, status)
            native.decode(words, scaling(0.5, 0.1), 3, 7, out)
            native.update(words, scaling(0.5, 0.1), 3, 7, gradient, 0.1, True, seed, again, scaling(0.0, 0.0), status)
            with flushed_denormals():
                flushed = words_for(n, fmt)
                native.encode(values, 3, 7, 0, seed, 0, flushed, sums.clone(), status.clone())
            assert torch.equal(flushed, words)
            results.append((words, sums, out, again, status))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def bad_calls() -> dict[str, Callable[[], object]]:
    x = native.extension
    words, values, sums = torch.zeros(352, dtype=torch.int32), torch.zeros(1024), torch.zeros(1, 5).double()
    out = torch.zeros(352, dtype=torch.int32)
    status = torch.zeros(2, dtype=torch.int64)
    scales, bytes_of_scales = torch.zeros(16), torch.zeros(32, dtype=torch.uint8)
    packed8 = torch.zeros(256, dtype=torch.int32)
    memory = torch.zeros(2048, dtype=torch.int32)
    frozen = np.zeros(1024, np.float32)
    frozen.flags.writeable = False
    return {
        "too few words": lambda: x.decode(words[:-1], scaling(1.0, 0.0), 3, 7, values, 1),
        "too many words": lambda: x.decode(torch.zeros(353, dtype=torch.int32), scaling(1.0, 0.0), 3, 7, values, 1),
        "no exponent bits": lambda: x.decode(words, scaling(1.0, 0.0), 0, 7, values, 1),
        "nine exponent bits": lambda: x.decode(words, scaling(1.0, 0.0), 9, 7, values, 1),
        "24 mantissa bits": lambda: x.decode(words, scaling(1.0, 0.0), 3, 24, values, 1),
        "negative bits": lambda: x.decode(words, scaling(1.0, 0.0), 3, -1, values, 1),
        "wrong dtype of words": lambda: x.decode(words.long(), scaling(1.0, 0.0), 3, 7, values, 1),
        "wrong dtype of values": lambda: x.decode(words, scaling(1.0, 0.0), 3, 7, values.double(), 1),
        "two dimensions": lambda: x.decode(words, scaling(1.0, 0.0), 3, 7, values.view(32, 32), 1),
        "not contiguous": lambda: x.decode(words, scaling(1.0, 0.0), 3, 7, torch.zeros(2048)[::2], 1),
        "read-only": lambda: x.decode(words.numpy(), scaling(1.0, 0.0), 3, 7, frozen, 1),
        "overlap": lambda: x.decode(memory[:352], scaling(1.0, 0.0), 3, 7, memory[100:1124].view(torch.float32), 1),
        "not a tensor": lambda: x.decode([1, 2], 3, 7, 1.0, 0.0, values, 1),
        "meta": lambda: x.decode(words.to("meta"), scaling(1.0, 0.0), 3, 7, values, 1),
        "exponent too large": lambda: x.encode(values, 3, 7, 200, False, 0, 0, words, sums, status, 1),
        "exponent too small": lambda: x.encode(values, 3, 7, -300, False, 0, 0, words, sums, status, 1),
        "exponent of wide": lambda: x.encode(values, 8, 2, 1, False, 0, 0, words, sums, status, 1),
        "shape of sums": lambda: x.encode(values, 3, 7, 0, False, 0, 0, words, torch.zeros(2, 5).double(), status, 1),
        "columns of sums": lambda: x.encode(values, 3, 7, 0, False, 0, 0, words, torch.zeros(1, 4).double(), status, 1),
        "update onto itself": lambda: x.update(
            words, scaling(1.0, 0.0), 3, 7, values, 0.1, True, False, 0, words, scaling(0.0, 0.0), status, 1
        ),
        "gradient too long": lambda: x.update(
            words, scaling(1.0, 0.0), 3, 7, torch.zeros(1025), 0.1, True, False, 0, out, scaling(0.0, 0.0), status, 1
        ),
        "words of the update": lambda: x.decode_sum(
            words, scaling(1.0, 0.0), 3, 7, words, scaling(1.0, 0.0), 2, 1, values, 1
        ),
        "words that are subtracted": lambda: x.decode_add_difference(
            words, scaling(1.0, 0.0), 3, 7, words, scaling(1.0, 0.0), 2, 1, 0.5, values, 1
        ),
        "values that are subtracted": lambda: x.add_difference(values, torch.zeros(1023), 0.5, torch.zeros(1024), 1),
        "values onto themselves": lambda: x.add_difference(
            memory[:1000].view(torch.float32), torch.zeros(1000), 0.5, memory[100:1100].view(torch.float32), 1
        ),
        "one value of scale and offset": lambda: x.decode(words, torch.zeros(1), 3, 7, values, 1),
        "short status": lambda: x.encode(values, 3, 7, 0, False, 0, 0, words, sums, status[:1], 1),
        "kind of element": lambda: x.block_decode(packed8, scales, 3, 8, 0, 64, values, 1),
        "integers of five bits": lambda: x.block_decode(packed8, scales, 0, 5, 0, 64, values, 1),
        "element of no specification": lambda: x.block_decode(packed8, bytes_of_scales, 2, 3, 4, 32, values, 1),
        "size of blocks": lambda: x.block_decode(packed8, scales, 0, 8, 0, 48, values, 1),
        "number of scales": lambda: x.block_decode(packed8, scales[:-1], 0, 8, 0, 64, values, 1),
        "dtype of scales": lambda: x.block_decode(packed8, bytes_of_scales[:16], 0, 8, 0, 64, values, 1),
        "scales of an update": lambda: x.block_decode_sum(
            packed8, scales, 0, 8, 0, 64, packed8, scales[:-1], 0, 8, 0, 64, values, 1
        ),
        "words of blocks": lambda: x.block_decode(packed8[:-1], scales, 0, 8, 0, 64, values, 1),
        "blocks onto themselves": lambda: x.block_update(
            packed8, scales, 0, 8, 0, 64, values, 0.1, False, 0, packed8, torch.zeros(16), status, 1
        ),
        "scales onto themselves": lambda: x.block_update(
            packed8, scales, 0, 8, 0, 64, values, 0.1, False, 0, torch.zeros(256, dtype=torch.int32), scales, status, 1
        ),
        "unknown level": lambda: x.set_level("mmx"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_an_exception(name: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        bad_calls()[name]()


def test_nothing_is_nothing() -> None:
    empty = torch.empty(0, dtype=torch.int32)
    native.decode(empty, scaling(1.0, 0.0), 3, 7, torch.empty(0))
    status = torch.ones(2, dtype=torch.int64)
    native.encode(torch.empty(0), 3, 7, 0, None, 0, empty, torch.empty(0, 5, dtype=torch.float64), status)
    assert status.tolist() == [0, 0]


@settings(max_examples=300)
@given(
    st.binary(max_size=3000), st.integers(-1, 10), st.integers(-1, 25), st.integers(0, 2000),
    st.floats(width=32, allow_nan=True), st.floats(width=32, allow_nan=True),
)  # fmt: skip
def test_decode_of_any_bytes_is_values_or_an_exception(
    data: bytes, e: int, m: int, n: int, scale: float, offset: float
) -> None:
    words = torch.from_numpy(np.frombuffer(data[: len(data) // 4 * 4], dtype=np.int32).copy())
    out = torch.full((n + 16,), 42.0)
    try:
        native.extension.decode(words, scaling(scale, offset), e, m, out[:n], 1)
    except (TypeError, ValueError):
        assert (out == 42).all()
    assert (out[n:] == 42).all()


def operator_arguments() -> dict[str, tuple[object, ...]]:
    n = 2000
    words, out = torch.zeros(codec.words_of(n, 11), dtype=torch.int32), torch.zeros(n)
    again, update_words = torch.zeros_like(words), torch.zeros(codec.words_of(n, 4), dtype=torch.int32)
    sums, status = torch.zeros(1, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    packed8, scales = torch.zeros(codec.words_of(n, 8), dtype=torch.int32), torch.zeros(-(-n // 64))
    return {
        "absmax": (randn(n), torch.zeros(1, dtype=torch.int64)),
        "decode": (words, scaling(0.5, 0.1), 3, 7, out),
        "decode_sum": (words, scaling(0.5, 0.1), 3, 7, update_words, scaling(0.1, 0.0), 2, 1, out),
        "decode_add": (words, scaling(0.5, 0.1), 3, 7, 0.3, out),
        "decode_add_difference": (words, scaling(0.5, 0.1), 3, 7, update_words, scaling(0.1, 0.0), 2, 1, 0.3, out),
        "add_difference": (randn(n), randn(n, seed=1), 0.3, out),
        "encode": (randn(n), 3, 7, 0, None, 0, words, sums, status),
        "block_decode": (packed8, scales, 0, 8, 0, 64, out),
        "block_decode_sum": (packed8, scales, 0, 8, 0, 64, packed8, scales, 0, 8, 0, 64, out),
        "block_encode": (randn(n), 0, 8, 0, 64, None, 0, packed8, scales, status),
        "block_update": (packed8, scales, 0, 8, 0, 64, randn(n), 0.1, 3, packed8.clone(), scales.clone(), status),
        "update": (words, scaling(0.5, 0.1), 3, 7, randn(n), 0.1, True, 3, again, scaling(0.0, 0.0), status),
    }


@pytest.mark.parametrize("name", operator_arguments())
def test_operators_are_registered_rightly(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fedomc, name).default, operator_arguments()[name])
