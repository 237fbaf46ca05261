"""The C++ kernels with bfloat16 and float16: what is decoded is rounded to nearest, gradients are taken as they are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedomc import FloatFormat, codec
from fedomc.codec import native, reference, reference_blocks, reference_rotation
from fedomc.methods import parse_method
from fedomc.methods.blockwise import Blockwise
from tests.conftest import flushed_denormals, randn, scaling

pytestmark = pytest.mark.usefixtures("level")

NARROW = (torch.bfloat16, torch.float16)
SIZES = (1, 31, 33, 1024, 5000, codec.CHUNK + 1025)
FLOATS = "S1E1M0 S1E2M3 S1E3M7 S1E5M2 S1E5M10 S1E6M9 S1E7M23 S1E8M7 S1E8M15 S1E8M23".split()
BLOCKWISE = "INT8 INT4 NF4 MXFP8 MXFP8E5M2 MXFP6 MXFP4 S1E2M3/64 S1E5M6/256".split()

Decode = Callable[[Tensor], None]


def random_words(n: int, bits: int, seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(-(2**31), 2**31, codec.words_of(n, bits), dtype=np.int64)).int()


def same(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit, as -0 is equal to 0."""
    return a.dtype is b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


def rounds_to_nearest(decode: Decode, n: int) -> None:
    """Compare with torch's own rounding of the decoded float32 values, and look behind the last value."""
    wide = torch.empty(n)
    decode(wide)
    assert not wide.isnan().any()
    for dtype in NARROW:
        room = torch.full((n + 7,), 42.0, dtype=dtype)
        decode(room[:n])
        assert same(room[:n], wide.to(dtype))
        assert bool((room[n:] == 42).all())


@pytest.mark.parametrize("backend", [native, reference])
@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str, backend: object) -> None:
    fmt = FloatFormat.parse(name)
    for n in SIZES:
        words, others = random_words(n, fmt.bits), random_words(n, 4, 1)
        # Factors for ordinary values, for float16's subnormals and for what is beyond float16.
        for scale, offset in ((1.0, 0.0), (-0.01, 0.3), (2.0**-18, 0.0), (2.0**14, 0.0)):
            if fmt.exponent_bits == 8 and scale > 1:
                continue
            part = (words, scaling(scale, offset), fmt.exponent_bits, fmt.mantissa_bits)
            update = (others, scaling(0.001, 0.0), 2, 1)
            rounds_to_nearest(lambda out, part=part: backend.decode(*part, out), n)
            rounds_to_nearest(lambda out, part=part, update=update: backend.decode_sum(*part, *update, out), n)


@pytest.mark.parametrize("backend", [native, reference_blocks])
@pytest.mark.parametrize("name", BLOCKWISE)
def test_blockwise(name: str, backend: object) -> None:
    method = parse_method(name)
    assert isinstance(method, Blockwise)
    how = (*codec.numbers_of(method.element), method.block)
    for n in SIZES:
        words, scales = method.zeros(n, "cpu")
        words = random_words(n, method.code_bits)
        scales = torch.arange(len(scales)).remainder(60).add(90).to(torch.uint8) if scales.dtype is torch.uint8 else (
            randn(len(scales), seed=2) * 300
        )  # fmt: skip
        others = torch.zeros(codec.words_of(n, 4), dtype=torch.int32), torch.ones(-(-n // 64)), 1, 0, 0, 64
        rounds_to_nearest(lambda out, p=(words, scales, *how): backend.block_decode(*p, out), n)
        rounds_to_nearest(lambda out, p=(words, scales, *how, *others): backend.block_decode_sum(*p, out), n)


@pytest.mark.parametrize("backend", [native, reference_rotation])
@pytest.mark.parametrize("bits", [1, 2])
def test_rotations(bits: int, backend: object) -> None:
    for n in SIZES:
        words, scales = random_words(n, bits), randn(-(-n // 1024), seed=3) * 1e-3
        rounds_to_nearest(lambda out, p=(words, scales, bits, 5, 2048): backend.rotated_decode(*p, out), n)


def test_past_the_caches() -> None:
    """Large tensors are written with non-temporal stores."""
    n = 2**23 + 1025
    words = random_words(n, 4)
    wide, narrow = torch.empty(n), torch.empty(n, dtype=torch.bfloat16)
    for out in (wide, narrow):
        native.decode(words, scaling(0.3, 0.0), 2, 1, out)
    assert same(narrow, wide.bfloat16())


def test_flush_to_zero_changes_nothing() -> None:
    words, out = random_words(5000, 16), torch.empty(5000, dtype=torch.float16)
    expected = torch.empty_like(out)
    native.decode(words, scaling(2.0**-18, 0.0), 5, 10, expected)
    with flushed_denormals():
        native.decode(words, scaling(2.0**-18, 0.0), 5, 10, out)
    assert same(out, expected)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("name", ["S1E2M3", "S1E3M7", "S1E7M23", "S1E8M15", "INT8", "NF4", "S1E2M3/64"])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_step_by_a_narrow_gradient_is_that_of_its_float32_values(
    dtype: torch.dtype, name: str, seed: int | None
) -> None:
    method = parse_method(name)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = torch.where(every.isfinite(), every, 0.5)[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for gradient in (every[:33], every[:1024], torch.cat((every, every[:1025]))):
        present = method.zeros(len(gradient), "cpu")
        results = []
        for backend in ("native", "reference"):
            for step in (gradient, gradient.float()):
                out = [torch.zeros_like(field) for field in present]
                status = torch.zeros(2, dtype=torch.int64)
                if isinstance(method, Blockwise):
                    how = (*codec.numbers_of(method.element), method.block)
                    at = native if backend == "native" else reference_blocks
                    at.block_update(*present, *how, step, -0.1, seed, *out, status)
                else:
                    at = native if backend == "native" else reference
                    how = method.exponent_bits, method.mantissa_bits
                    at.update(*present, *how, step, -0.1, True, seed, *out, status)
                results.append([*out, status])
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", NARROW)
def test_the_largest_magnitude(dtype: torch.dtype) -> None:
    for n in (0, *SIZES):
        values = randn(n, seed=5).to(dtype)
        expected = float(values.abs().max()) if n else 0.0
        for form in (values, values.double(), values.repeat_interleave(2)[::2]):
            assert torch.tensor(codec.absmax_bits(form), dtype=torch.int32).view(torch.float32) == expected
    values[-1] = float("nan")
    assert codec.absmax_bits(values) > codec.INFINITY_BITS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_gradient_that_is_not_finite_is_reported(dtype: torch.dtype, value: float) -> None:
    gradient = torch.zeros(100, dtype=dtype)
    gradient[77] = value
    words = torch.zeros(codec.words_of(100, 11), dtype=torch.int32)
    status, scale = torch.zeros(2, dtype=torch.int64), torch.empty(2)
    native.update(words, scaling(1.0, 0.0), 3, 7, gradient, 1.0, True, None, torch.empty_like(words), scale, status)
    assert int(status[0]) >= codec.INFINITY_BITS


def test_other_dtypes_are_refused() -> None:
    words = torch.zeros(codec.words_of(8, 4), dtype=torch.int32)
    for dtype in (torch.float64, torch.int32, torch.int16):
        with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
            native.decode(words, scaling(1.0, 0.0), 2, 1, torch.empty(8, dtype=dtype))
