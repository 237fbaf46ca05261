import functools
import itertools
from collections.abc import Callable
from functools import partial

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedomc import FloatFormat, codec
from fedomc.codec import reference, reference_blocks, reference_rotation
from tests.conftest import bits_of, flushed_denormals, gfloat_format, pack_by_design, randn, same_bits, scaling, threads

NAMES = (
    "S1E1M2", "S1E2M0", "S1E2M1", "S1E2M3", "S1E3M2", "S1E3M4", "S1E3M7", "S1E4M3", "S1E4M8", "S1E4M14", "S1E5M2",
    "S1E5M10", "S1E6M9", "S1E7M23", "S1E8M7", "S1E8M15",
)  # fmt: skip
formats = pytest.mark.parametrize("name", NAMES)


@functools.cache
def oracle(name: str) -> gfloat.FormatInfo:
    return gfloat_format(FloatFormat.parse(name))


@functools.cache
def some_codes(name: str) -> np.ndarray:
    """All codes of positive values, or of a wide format those of every exponent with telling mantissas."""
    fmt = FloatFormat.parse(name)
    m = fmt.mantissa_bits
    if fmt.bits <= 16:
        return np.arange(fmt.max_code + 1)
    rng = np.random.default_rng(0)
    mantissas = np.concatenate(([0, 1, 2, 2**m - 2, 2**m - 1], rng.integers(0, 2**m, 40)))
    return np.unique((np.arange((fmt.max_code >> m) + 1)[:, None] << m) + mantissas)


@functools.cache
def some_values(name: str) -> np.ndarray:
    """Values that are codes, ties, next to a tie, random, too large, too small; both signs."""
    fmt = FloatFormat.parse(name)
    codes = some_codes(name)
    low = gfloat.decode_ndarray(oracle(name), codes)
    high = gfloat.decode_ndarray(oracle(name), np.minimum(codes + 1, fmt.max_code))
    ties = ((low + high) / 2).astype(np.float32)
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 0x7F800000, 20_000).astype(np.int32).view(np.float32)
    scaled = (rng.standard_normal(20_000) * min(fmt.max_value / 2, 1e30)).astype(np.float32)
    top = np.float32(fmt.max_value)
    tiny = np.array([0, 1, 2, 3, 2**22, 2**23 - 1, 2**23, 2**23 + 1], np.int32).view(np.float32)
    with np.errstate(over="ignore"):
        edges = np.array([top * f for f in (1, 1.0000001, 1.01, 1.5, 2, 1000)] + [3.4028235e38, fmt.step / 2], "f4")
        around = [np.nextafter(ties, np.float32(np.inf * sign)) for sign in (1, -1)]
    values = np.concatenate((low.astype(np.float32), ties, *around, bits, scaled, tiny, edges))
    values = np.abs(values[np.isfinite(values)])
    return np.concatenate((values, -values))


def quantize(values: np.ndarray | Tensor, name: str, **kwargs: object) -> Tensor:
    fmt = FloatFormat.parse(name)
    flat = torch.as_tensor(values, dtype=torch.float32)
    words = torch.empty(codec.words_of(len(flat), fmt.bits), dtype=torch.int32)
    codec.encode(flat, fmt, 0, words, **kwargs)
    return codec.decode(words, scaling(1.0, 0.0), fmt, torch.empty(len(flat)))


@formats
def test_every_code_decodes_as_gfloat_says(name: str) -> None:
    fmt = FloatFormat.parse(name)
    codes = some_codes(name)
    codes = np.concatenate((codes, codes | 1 << (fmt.bits - 1)))
    expected = gfloat.decode_ndarray(oracle(name), codes).astype(np.float32)
    words = torch.from_numpy(pack_by_design(codes.tolist(), fmt.bits))
    values = codec.decode(words, scaling(1.0, 0.0), fmt, torch.empty(len(codes)))
    assert np.array_equal(bits_of(values), expected.view(np.int32))
    again = torch.empty_like(words)
    codec.encode(values, fmt, 0, again)
    assert torch.equal(again, words)


@formats
def test_nearest_rounds_as_gfloat_does(name: str) -> None:
    top = FloatFormat.parse(name).max_value
    values = some_values(name)
    expected = gfloat.round_ndarray(oracle(name), values.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True)
    expected = expected.clip(-top, top).astype(np.float32)  # with 8 exponent bits gfloat has one binade more
    wrong = np.flatnonzero(bits_of(quantize(values, name)) != expected.view(np.int32))
    assert not len(wrong), (values[wrong[:5]], expected[wrong[:5]])


@pytest.mark.parametrize(
    ("name", "other", "largest"),
    [
        ("S1E2M1", ml_dtypes.float4_e2m1fn, 6),
        ("S1E2M3", ml_dtypes.float6_e2m3fn, 7.5),
        ("S1E3M2", ml_dtypes.float6_e3m2fn, 28),
        ("S1E4M3", ml_dtypes.float8_e4m3fn, 448),
        ("S1E5M2", ml_dtypes.float8_e5m2, 57344),
        ("S1E5M10", torch.float16, 65504),
        ("S1E8M7", torch.bfloat16, 3.3895e38),
        ("S1E4M3", torch.float8_e4m3fn, 448),
        ("S1E5M2", torch.float8_e5m2, 57344),
    ],
)
def test_nearest_rounds_as_other_libraries_do(name: str, other: object, largest: float) -> None:
    values = some_values(name)
    values = values[np.abs(values) <= largest]
    if isinstance(other, torch.dtype):
        expected = torch.from_numpy(values).to(other).to(torch.float32).numpy()
    else:
        expected = values.astype(other).astype(np.float32)
    assert len(values) > 100 and np.array_equal(bits_of(quantize(values, name)), expected.view(np.int32))


def test_widest_format_keeps_every_bit() -> None:
    values = torch.from_numpy(some_values("S1E8M15"))
    assert same_bits(quantize(values, "S1E8M23"), values)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2), st.sampled_from(NAMES))
def test_rounding_is_monotonic_idempotent_and_odd(values: list[float], name: str) -> None:
    x = torch.tensor(sorted(values))
    q = quantize(x, name)
    assert (q.diff() >= 0).all()
    assert same_bits(quantize(q, name), q)
    assert same_bits(quantize(-x, name), -q)


@formats
def test_a_power_of_two_is_applied_before_rounding(name: str) -> None:
    fmt = FloatFormat.parse(name)
    bound = max(0, 120 - fmt.bias - fmt.mantissa_bits)
    x = randn(3000, scale=min(fmt.max_value / 2.0**7, 1e30))
    for exponent in (-3, min(5, bound), min(10, bound)) if fmt.exponent_bits < 8 else (0,):
        words = torch.empty(codec.words_of(len(x), fmt.bits), dtype=torch.int32)
        codec.encode(x, fmt, exponent, words)
        scaled = codec.decode(words, scaling(1.0, 0.0), fmt, torch.empty(len(x)))
        assert same_bits(scaled, quantize(x * 2.0**exponent, name))


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    x = randn(70_000)
    words = torch.empty(codec.words_of(len(x), 11), dtype=torch.int32)
    assert codec.encode(x, FloatFormat(3, 7), 0, words)[1].absmax_bits < codec.INFINITY_BITS
    for at in (0, 1024, 69_999):
        y = x.clone()
        y[at] = bad
        assert codec.encode(y, FloatFormat(3, 7), 0, words)[1].absmax_bits >= codec.INFINITY_BITS


def encoded(x: Tensor, name: str, seed: int | None) -> tuple[Tensor, Tensor]:
    fmt = FloatFormat.parse(name)
    words = torch.empty(codec.words_of(len(x), fmt.bits), dtype=torch.int32)
    sums, _ = codec.encode(x, fmt, 0, words, seed=seed)
    return words, sums


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("name", ["S1E2M1", "S1E3M7", "S1E5M10", "S1E8M7", "S1E7M23"])
class TestNothingElseCounts:
    def test_flushing_of_subnormal_floats(self, name: str, seed: int | None) -> None:
        values = torch.from_numpy(some_values(name))
        words, _ = encoded(values, name, seed)
        plain = quantize(values, name, seed=seed)
        with flushed_denormals():
            flushed, _ = encoded(values, name, seed)
            assert torch.equal(words, flushed)
            assert same_bits(plain, quantize(values, name, seed=seed))

    def test_pieces(self, name: str, seed: int | None) -> None:
        x = randn(150_001)
        fmt = FloatFormat.parse(name)
        words, _ = encoded(x, name, seed)
        values = codec.decode(words, scaling(0.75, 0.5), fmt, torch.empty(len(x)))
        cuts = [0, 1024, 5 * 1024, 64 * 1024, 100 * 1024, len(x)]
        parts = []
        for begin, end in itertools.pairwise(cuts):
            part = torch.empty(codec.words_of(end - begin, fmt.bits), dtype=torch.int32)
            codec.encode(x[begin:end], fmt, 0, part, start=begin, seed=seed)
            parts.append(part)
            piece = codec.decode(part, scaling(0.75, 0.5), fmt, torch.empty(end - begin))
            assert same_bits(piece, values[begin:end])
        assert torch.equal(torch.cat(parts), words)


@pytest.mark.parametrize("seed", [None, 7])
def test_the_number_of_threads_does_not_count(seed: int | None) -> None:
    x = randn(70_001)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append((*encoded(x, "S1E3M7", seed), quantize(x, "S1E3M7", seed=seed)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sums_are_those_of_numpy() -> None:
    x = randn(150_000)
    _, sums = encoded(x, "S1E2M3", None)
    r = quantize(x, "S1E2M3").double().numpy()
    d = (x - quantize(x, "S1E2M3")).double().numpy()
    terms = (d, d * d, d * r, r * r, r)
    expected = [[term[i : i + codec.CHUNK].sum() for term in terms] for i in range(0, len(x), codec.CHUNK)]
    magnitudes = [[abs(term[i : i + codec.CHUNK]).sum() for term in terms] for i in range(0, len(x), codec.CHUNK)]
    # 32 terms are added in float32, the rest in float64.
    assert (np.abs(sums.numpy() - expected) <= 2.0**-19 * np.array(magnitudes)).all()


class TestStochastic:
    DRAWS = 100_000

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("S1E2M3", 1.01), ("S1E2M3", -3.3), ("S1E2M3", 0.001), ("S1E2M1", 0.7), ("S1E3M2", -1e-3),
            ("S1E2M0", 1.9), ("S1E8M7", 1.001), ("S1E8M7", 1e-39), ("S1E5M10", 3e-8), ("S1E5M10", 1.0004),
        ],
    )  # fmt: skip
    def test_unbiased_between_the_two_neighbours(self, name: str, value: float) -> None:
        x = torch.full((self.DRAWS,), value)
        exact = float(x[0])
        drawn = quantize(x, name, seed=3).double()
        grid = gfloat.decode_ndarray(oracle(name), np.arange(FloatFormat.parse(name).max_code + 1))
        grid = np.unique(np.concatenate((grid, -grid)))
        above = int(np.searchsorted(grid, exact))
        low, high = grid[above - 1], grid[above]
        assert sorted(set(drawn.tolist())) == [low, high]
        probability = (exact - low) / (high - low)
        sigma = (high - low) * (probability * (1 - probability) / self.DRAWS) ** 0.5
        assert abs(float(drawn.mean()) - exact) < 5 * sigma

    @formats
    def test_exact_values_never_move(self, name: str) -> None:
        values = gfloat.decode_ndarray(oracle(name), some_codes(name)).astype(np.float32)
        values = torch.from_numpy(np.concatenate((values, -values)))
        for seed in (0, 1, 2**63 - 1):
            assert same_bits(quantize(values, name, seed=seed), values)

    @formats
    def test_stays_next_to_the_value(self, name: str) -> None:
        top = FloatFormat.parse(name).max_value
        values = some_values(name)
        x = values.astype(np.float64)
        drawn = quantize(values, name, seed=11).double().numpy()
        ends = [
            gfloat.round_ndarray(oracle(name), x, mode, sat=True).clip(-top, top)
            for mode in (gfloat.RoundMode.TowardNegative, gfloat.RoundMode.TowardPositive)
        ]
        assert ((drawn == ends[0]) | (drawn == ends[1])).all()

    def test_seeds(self) -> None:
        x = randn(10_000)
        first = quantize(x, "S1E2M3", seed=5)
        assert same_bits(first, quantize(x, "S1E2M3", seed=5))
        for seed in (6, 5 + 2**32):
            assert not same_bits(first, quantize(x, "S1E2M3", seed=seed))

    def test_neighbouring_values_are_drawn_independently(self) -> None:
        up = quantize(torch.full((self.DRAWS,), 1.0625), "S1E2M3", seed=1) > 1.0625  # halfway between 1 and 1.125
        agree = float((up[1:] == up[:-1]).double().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / self.DRAWS**0.5


@pytest.mark.parametrize("seed", [None, 7])
def test_it_runs_under_torch_compile(seed: int | None) -> None:
    n = codec.CHUNK + 1500
    x, gradient = randn(n), randn(n)

    def run(at: Callable[[Callable[..., None]], Callable[..., None]]) -> list[Tensor]:
        words, sums = torch.zeros(codec.words_of(n, 11), dtype=torch.int32), torch.empty(2, codec.SUMS).double()
        again, status, out = words.clone(), torch.zeros(2, dtype=torch.int64), torch.empty(n)
        at(reference.encode)(x, 3, 7, 3, seed, 0, words, sums, status)
        at(reference.update)(
            words, scaling(0.5, 0.1), 3, 7, gradient, -0.1, True, seed, again, scaling(0.0, 0.0), status.clone()
        )
        at(reference.decode_sum)(words, scaling(0.5, 0.1), 3, 7, again, scaling(0.5, 0.1), 3, 7, out)
        at(reference.decode_add)(words, scaling(0.5, 0.1), 3, 7, 0.25, out)
        at(reference.decode_add_difference)(words, scaling(0.5, 0.1), 3, 7, again, scaling(0.5, 0.1), 3, 7, 0.25, out)
        at(reference.add_difference)(x, gradient, 0.25, out)
        return [words, sums, again, status, out]

    compiled = run(partial(torch.compile, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(run(lambda function: function), compiled, strict=True))


def test_where_new_tensors_are_made_on_the_meta_device_the_layout_is_real() -> None:
    reference._shifts.cache_clear()  # it would remember the device
    codes = torch.arange(2048, dtype=torch.int32) & 0x7FF
    with torch.device("meta"):
        words = torch.zeros(2 * 32 * 11, dtype=torch.int32, device="cpu")
        reference.pack(codes, 11, words)
        unpacked = reference.unpack(words, 2, 11)
    assert torch.equal(unpacked.view(-1), codes)


@pytest.mark.parametrize("seed", [None, 7])
def test_how_many_values_are_processed_at_a_time_does_not_count(
    seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 2 * codec.CHUNK + 1500
    values, gradient = randn(n), randn(n, seed=1)

    def results() -> list[Tensor]:
        words, status = torch.zeros(codec.words_of(n, 11), dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        sums, out, scale = torch.empty(3, 5, dtype=torch.float64), torch.empty(n), torch.empty(2)
        reference.encode(values, 3, 7, 2, seed, 0, words, sums, status)
        reference.decode(words, scaling(0.25, 0.0), 3, 7, out)
        again = torch.zeros_like(words)
        reference.update(words, scaling(0.25, 0.0), 3, 7, gradient, -0.1, True, seed, again, scale, status)
        found = [words, sums, out.clone(), again, scale, status]
        words, scales = torch.zeros(codec.words_of(n, 4), dtype=torch.int32), torch.empty(-(-n // 64))
        reference_blocks.block_encode(values, 1, 0, 0, 64, seed, 0, words, scales, status)
        reference_blocks.block_decode(words, scales, 1, 0, 0, 64, out)
        found += [words, scales, out.clone()]
        words, scales = torch.zeros(codec.words_of(n, 1), dtype=torch.int32), torch.empty(-(-n // 1024))
        reference_rotation.rotated_encode(values, 1, 5, 0, True, words, scales)
        reference_rotation.rotated_decode(words, scales, 1, 5, 0, out)
        return [*found, words, scales, out]

    assert reference.together(torch.device("cpu")) == codec.CHUNK < n < reference.together(torch.device("mps"))
    expected = results()
    monkeypatch.setattr(reference, "together", lambda device: 64 * codec.CHUNK)
    assert all(torch.equal(mine, other) for mine, other in zip(results(), expected, strict=True))
