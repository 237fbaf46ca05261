import math
import pickle
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fedomc import Encoding, FloatFormat, NonFiniteError, PolicyError, codec
from fedomc.methods import Packed, encode
from fedomc.methods.floats import scaling_exponent
from tests.conftest import bits_of, flushed_denormals, randn, same_bits, scaling, threads

TRANSFORMS = FloatFormat.transforms
FORMATS = ("S1E1M2", "S1E2M0", "S1E2M1", "S1E2M3", "S1E3M2", "S1E3M7", "S1E5M10", "S1E7M4", "S1E8M7", "S1E8M15")
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def decoded(packed: Packed) -> Tensor:
    return packed.decode(torch.empty(packed.numel))


def quantized(values: Tensor, name: str, k: int) -> np.ndarray:
    """Return ``2**-k * Q(2**k * V)``, in float64."""
    fmt = FloatFormat.parse(name)
    words = torch.empty(codec.words_of(len(values), fmt.bits), dtype=torch.int32)
    codec.encode(values, fmt, k, words)
    return codec.decode(words, scaling(1.0, 0.0), fmt, torch.empty(len(values))).double().numpy() * 2.0**-k


def exponent_of(values: Tensor, name: str) -> int:
    return scaling_exponent(codec.absmax_bits(values), FloatFormat.parse(name))


def squared_error(values: Tensor, approximation: Tensor | np.ndarray) -> float:
    difference = values.double().numpy() - np.asarray(approximation, dtype=np.float64)
    return math.fsum(difference * difference)


@given(finite, st.sampled_from(FORMATS), st.booleans())
def test_scaling_puts_the_largest_magnitude_below_the_largest_code(value: float, name: str, stochastic: bool) -> None:
    fmt = FloatFormat.parse(name)
    bits = codec.absmax_bits(torch.tensor([value, -value / 2, 0.0]))
    k = scaling_exponent(bits, fmt, stochastic=stochastic)
    least, most = min(0, fmt.top_exponent - 127), max(0, 120 - fmt.bias - fmt.mantissa_bits)
    scaled = abs(value) * 2.0**k
    step = 2.0 ** (fmt.top_exponent - fmt.mantissa_bits)  # of the top binade
    largest = fmt.max_value - (step if fmt.mantissa_bits else 0)  # the largest code stays free
    reach = largest + (0 if stochastic else step / 2)
    if value == 0 or fmt.exponent_bits == 8:
        assert k == 0
    elif least < k < most:
        assert scaled <= reach
        assert 2 * scaled > largest  # a binade more would be too much
    else:
        assert k in (least, most)
    assert fmt.step * 2.0**-k >= 2.0**-126 or fmt.exponent_bits == 8  # nothing decodes to a subnormal float32


@pytest.mark.parametrize("transform", ["affine", "scaled-affine"])
@pytest.mark.parametrize("name", ["S1E1M2", "S1E2M0", "S1E2M1", "S1E2M3", "S1E3M2", "S1E3M4", "S1E8M2"])
@pytest.mark.parametrize(("scale", "mean"), [(0.05, 0.0), (1.0, 3.0), (100.0, -20.0)])
def test_fit_is_that_of_numpy(transform: str, name: str, scale: float, mean: float) -> None:
    values = randn(10_000, scale=scale) + mean
    packed = encode(values, FloatFormat.parse(name), transform)
    k = exponent_of(values, name) if transform == "scaled-affine" else 0
    r = quantized(values, name, k)
    (s, b), *_ = np.linalg.lstsq(np.stack((r, np.ones_like(r)), 1), values.double().numpy(), rcond=None)
    if r.std() == 0:
        s, b = 1.0, float((values.double().numpy() - r).mean())
    found_s, found_b = float(packed.fields[1][0]) * 2.0**k, float(packed.fields[1][1])
    best = squared_error(values, s * r + b)
    assert squared_error(values, found_s * r + found_b) <= best * (1 + 1e-6)
    assert found_s == pytest.approx(s, rel=1e-5) and found_b == pytest.approx(b, abs=1e-5 * (abs(mean) + scale))


degenerate = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 40), elements=finite),
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1, 1, width=32)),
    st.builds(lambda n, c: np.full(n, c, np.float32), st.integers(1, 2000), finite),
    st.builds(  # one outlier
        lambda n, c, o, i: np.where(np.arange(n) == i % n, o, c).astype(np.float32), st.integers(1, 50), finite, finite,
        st.integers(0, 49),
    ),
    st.builds(lambda seed, s: randn(1500, seed=seed, scale=s).numpy(), st.integers(0, 99), st.floats(1e-30, 1e30)),
)  # fmt: skip


@example(randn(1500, seed=96, scale=1.823788700216234e20).numpy(), "S1E8M15", "affine")
@given(degenerate, st.sampled_from(FORMATS), st.sampled_from(["affine", "scaled-affine"]))
def test_fit_never_makes_the_error_larger(array: np.ndarray, name: str, transform: str) -> None:
    values = torch.from_numpy(array)
    packed = encode(values, FloatFormat.parse(name), transform)
    k = exponent_of(values, name) if transform == "scaled-affine" else 0
    result = decoded(packed)
    assert torch.isfinite(result).all() and torch.isfinite(packed.fields[1]).all()
    assert squared_error(values, result) <= squared_error(values, quantized(values, name, k))


@example(1.8410715276690588e19, 1, "S1E8M7", "affine")  # whose square is beyond float32
@example(1e-30, 1, "S1E8M7", "affine")
@given(finite, st.integers(1, 1500), st.sampled_from(FORMATS), st.sampled_from(["affine", "scaled-affine"]))
def test_a_constant_keeps_its_value(value: float, numel: int, name: str, transform: str) -> None:
    fmt = FloatFormat.parse(name)
    k = exponent_of(torch.tensor([value]), name) if transform == "scaled-affine" else 0
    result = decoded(encode(torch.full((numel,), value), fmt, transform))
    assert (result == result[0]).all()
    in_range = fmt.step * 2.0**-k <= abs(value) <= fmt.max_value * 2.0**-k
    assume(in_range and abs(value) > 1e-30)
    assert float(result[0]) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("transform", ["affine", "scaled-affine"])
def test_constant_codes_get_the_mean_error(transform: str) -> None:
    values = torch.tensor([1.0, 1.01, 1.02, 1.03])  # all are 1 in S1E2M1
    packed = encode(values, FloatFormat(2, 1), transform)
    k = exponent_of(values, "S1E2M1") if transform == "scaled-affine" else 0
    assert packed.fields[1][0] * 2.0**k == 1
    assert float(packed.fields[1][1]) == pytest.approx(0.015, rel=1e-5)
    assert decoded(packed).tolist() == pytest.approx([1.015] * 4)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_and_keep_their_signs(transform: str, name: str) -> None:
    zeros = torch.tensor([0.0, -0.0, 0.0])
    assert same_bits(decoded(encode(zeros, FloatFormat.parse(name), transform)), zeros)


def test_no_values_at_all() -> None:
    packed = encode(torch.empty(0, 3), FloatFormat(3, 7))
    assert packed.numel == 0 and decoded(packed).shape == (0,)


@pytest.mark.parametrize(
    ("name", "transform", "expected"),
    [
        ("S1E3M7", "none", 0.0113),
        ("S1E3M7", "affine", 0.0113),
        ("S1E3M7", "scaled", 0.0017),
        ("S1E3M7", "scaled-affine", 0.0017),
        ("S1E2M3", "none", 0.70),
        ("S1E2M3", "affine", 0.61),
        ("S1E2M3", "scaled-affine", 0.046),
    ],
)
def test_errors_are_those_of_the_design(name: str, transform: str, expected: float) -> None:
    values = randn(200_000, scale=0.05)
    error = decoded(encode(values, FloatFormat.parse(name), transform)) - values
    assert float(error.norm() / values.norm()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(transform: str, bad: float) -> None:
    values = randn(70_000)
    packed = encode(values, FloatFormat(3, 7), transform)
    before = packed.codes.clone(), packed.fields[1].clone(), packed.draws
    values[69_999] = bad
    with pytest.raises(NonFiniteError, match=r"encoder\.weight"):
        packed.rewrite(lambda start, stop: values[start:stop], transform, name="encoder.weight")
    with pytest.raises(NonFiniteError, match=r"encoder\.weight"):
        encode(values, FloatFormat(3, 7), transform, name="encoder.weight")
    assert torch.equal(packed.codes, before[0]) and torch.equal(packed.fields[1], before[1])
    assert packed.draws == before[2]


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed.multiply_(64.0),
        lambda packed: packed.rewrite(lambda start, stop: randn(1000, scale=64.0)[start:stop], "scaled"),
        lambda packed: packed.add_(randn(1000, scale=64.0), 1.0, "scaled"),
        lambda packed: packed.take(encode(randn(1000, scale=64.0), FloatFormat(3, 4))),
    ],
    ids=["multiply_", "rewrite", "add_", "take"],
)
@pytest.mark.parametrize("shared", [False, True])
def test_the_bound_is_that_of_the_present_values(change: Callable[[Packed], object], shared: bool) -> None:
    packed = encode(randn(1000), FloatFormat(3, 4), "scaled")
    if shared:
        for field in packed.fields:
            field.share_memory_()
    before = packed.bound
    assert packed.bound == before
    change(packed)
    assert packed.bound == packed.method.bound(packed.fields, packed.numel) > 8 * before


def test_the_bound_of_shared_memory_is_found_again() -> None:
    packed = encode(randn(1000), FloatFormat(3, 4), "scaled")
    for field in packed.fields:
        field.share_memory_()
    before = packed.bound
    packed.fields[1].mul_(2)  # as another process does
    assert packed.bound == 2 * before


def test_a_pickled_variable_is_equal() -> None:
    packed = encode(randn(1000), FloatFormat(3, 4), "scaled")
    before = pickle.dumps(packed)
    assert packed.bound > 0 and pickle.dumps(packed) == before
    copy = pickle.loads(before)  # noqa: S301
    assert torch.equal(decoded(copy), decoded(packed)) and copy.bound == packed.bound


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_rewrite_is_an_encoding(transform: str, rounding: str, scale: float) -> None:
    """Whatever power of two the former values had."""
    values = randn(70_001, scale=scale)
    packed = encode(randn(70_001, seed=1), FloatFormat(3, 4), transform, rounding)
    packed.state = packed.state._replace(draws=0)
    packed.rewrite(lambda start, stop: values[start:stop], transform, rounding)
    fresh = encode(values, FloatFormat(3, 4), transform, rounding)
    assert torch.equal(packed.codes, fresh.codes) and torch.equal(packed.fields[1], fresh.fields[1])


def test_scaling_alone_keeps_stochastic_rounding_unbiased() -> None:
    values = 0.05 + torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert 2.0 ** -exponent_of(values, "S1E2M1") * 6 > float(values.max())  # nothing saturates

    def mean_error(transform: str) -> float:
        draws = [decoded(encode(values, FloatFormat(2, 1), transform, "stochastic", seed)) for seed in range(400)]
        return float((torch.stack(draws).mean(0) - values).abs().mean())

    packed = encode(values, FloatFormat(2, 1), "scaled", "stochastic")
    assert math.frexp(float(packed.fields[1][0]))[0] == 0.5 and packed.fields[1][1] == 0
    assert mean_error("scaled") < 0.01 < 0.015 < mean_error("scaled-affine")


def test_stochastic_rounding_draws_afresh_and_repeatably() -> None:
    values = randn(5000)

    def run(seed: int, name: str) -> list[Tensor]:
        packed = encode(values, FloatFormat(2, 3), "none", "stochastic", seed, name)
        result = [packed.codes.clone()]
        for _ in range(3):
            packed.rewrite(lambda start, stop: values[start:stop], "none", "stochastic", seed, name)
            result.append(packed.codes.clone())
        return result

    first = run(1, "a")
    assert all(torch.equal(x, y) for x, y in zip(first, run(1, "a"), strict=True))
    draws = [*first, run(2, "a")[0], run(1, "b")[0], run(1 + 2**40, "a")[0]]
    assert all(not torch.equal(x, y) for i, x in enumerate(draws) for y in draws[:i])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_threads_and_flushing_do_not_matter(rounding: str) -> None:
    values = randn(70_001, scale=0.05)
    values[::7] *= 1e-38
    fmt = FloatFormat(3, 4)
    plain = encode(values, fmt, rounding=rounding)
    results = [plain]
    with threads(2):
        results.append(encode(values, fmt, rounding=rounding))
    with flushed_denormals():
        results.append(encode(values, fmt, rounding=rounding))
        assert same_bits(decoded(plain), decoded(results[-1]))
    for other in results[1:]:
        assert torch.equal(plain.codes, other.codes)
        assert np.array_equal(bits_of(plain.fields[1]), bits_of(other.fields[1]))


@pytest.mark.parametrize("scale", [1e-39, 1e-37])
def test_flushing_does_not_matter_for_tiny_variables(scale: float) -> None:
    values = randn(2000, scale=scale)
    plain = encode(values, FloatFormat(2, 3))
    values_plain = decoded(plain)
    with flushed_denormals():
        flushed = encode(values, FloatFormat(2, 3))
        values_flushed = decoded(flushed)
    assert torch.equal(plain.codes, flushed.codes)
    assert np.array_equal(bits_of(values_plain), bits_of(values_flushed))


def test_encoding_checks_and_prints() -> None:
    fmt = FloatFormat(2, 3)
    assert str(Encoding(fmt)) == "S1E2M3" and str(Encoding(fmt, FloatFormat(2, 1))) == "S1E2M3+S1E2M1"
    with pytest.raises(PolicyError, match="transform='log'"):
        Encoding(fmt, transform="log")
    with pytest.raises(PolicyError, match="rounding='up'"):
        Encoding(fmt, rounding="up")


def alternating() -> tuple[Packed, list[Tensor], list[Tensor]]:
    """Make a variable, two sets of values on different scales, and what each decodes to."""
    values = [randn(20_000), randn(20_000, seed=1, scale=100.0)]
    known = [decoded(encode(each, FloatFormat(3, 7), "scaled")) for each in values]
    return encode(values[0], FloatFormat(3, 7), "scaled"), values, known


def test_a_reader_beside_a_writer_sees_one_state_or_the_other() -> None:
    packed, values, known = alternating()
    wrong, reads, done = [], [0], threading.Event()

    def read() -> None:
        while not done.is_set():
            found = decoded(packed)
            reads[0] += 1
            if not any(torch.equal(found, each) for each in known):
                wrong.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(400):
            new = values[number % 2]
            packed.rewrite(lambda start, stop, new=new: new[start:stop], "scaled")
    finally:
        done.set()
        reader.join()
    assert reads[0] > 20 and not wrong


def test_an_interrupt_leaves_all_of_a_change_or_nothing() -> None:
    packed, values, known = alternating()
    interrupted = 0

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(300):
            new = values[number % 2]
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + number % 15))
                packed.rewrite(lambda start, stop, new=new: new[start:stop], "scaled")
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            found = decoded(packed)
            assert any(torch.equal(found, each) for each in known)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10
