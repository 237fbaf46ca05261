"""The Triton kernels that decode floats: the same bits as the reference, under Triton's interpreter."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fedomc import FloatFormat, codec
from fedomc.codec import reference
from tests.conftest import bits_of, randn, scaling

triton_decode = pytest.importorskip("fedomc.codec.triton_decode", reason="Triton is not installed")

pytestmark = pytest.mark.usefixtures("interpreter")

FORMATS = "S1E1M0 S1E1M2 S1E2M3 S1E3M4 S1E3M7 S1E4M14 S1E5M10 S1E7M23 S1E8M7 S1E8M23".split()
OPERATORS = ("decode", "decode_add", "decode_sum", "decode_add_difference")


def random_words(n: int, fmt: FloatFormat, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(-(2**31), 2**31, codec.words_of(n, fmt.bits), dtype=np.int64)).int()


def results(
    backend: object, fmt: FloatFormat, n: int, scale: float, offset: float, device: str = "cpu"
) -> dict[str, Tensor]:
    other = FloatFormat(2, 1)
    first = random_words(n, fmt, 0).to(device), scaling(scale, offset).to(device), fmt.exponent_bits, fmt.mantissa_bits
    second = random_words(n, other, 1).to(device), scaling(0.1, 0.01).to(device), 2, 1
    room = {name: torch.ones(n + 7, device=device) for name in OPERATORS}
    backend.decode(*first, room["decode"][:n])
    backend.decode_add(*first, 0.3, room["decode_add"][:n])
    backend.decode_sum(*first, *second, room["decode_sum"][:n])
    backend.decode_add_difference(*first, *second, 0.3, room["decode_add_difference"][:n])
    return {name: out.cpu() for name, out in room.items()}


@pytest.mark.parametrize(("scale", "offset", "n"), [(1.0, 0.0, 33), (-0.01, 0.3, 5000)])
@pytest.mark.parametrize("name", FORMATS)
def test_decoding_has_the_bits_of_the_reference(name: str, scale: float, offset: float, n: int) -> None:
    fmt = FloatFormat.parse(name)
    expected = results(reference, fmt, n, scale, offset)
    for operator, out in results(triton_decode, fmt, n, scale, offset).items():
        np.testing.assert_array_equal(bits_of(out), bits_of(expected[operator]), err_msg=operator)


def test_adding_a_difference_has_the_bits_of_the_reference() -> None:
    for n in (0, 33, 5000):
        values, subtrahend = randn(n), randn(n, seed=1)
        out, expected = torch.ones(2, n)
        triton_decode.add_difference(values, subtrahend, -0.3, out)
        reference.add_difference(values, subtrahend, -0.3, expected)
        np.testing.assert_array_equal(bits_of(out), bits_of(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "scale"), [("S1E2M3", 2.0**-18), ("S1E3M7", -0.01), ("S1E5M10", 7.0), ("S1E8M23", 1)])
def test_narrow_values_are_rounded_to_nearest(name: str, scale: float, dtype: torch.dtype) -> None:
    fmt, n = FloatFormat.parse(name), 1057
    part = random_words(n, fmt, 0), scaling(scale, 0.0), fmt.exponent_bits, fmt.mantissa_bits
    update = random_words(n, FloatFormat(2, 1), 1), scaling(0.1, 0.01), 2, 1
    for operator, parts in (("decode", part), ("decode_sum", (*part, *update))):
        out, expected = torch.ones(2, n, dtype=dtype)
        getattr(triton_decode, operator)(*parts, out)
        getattr(reference, operator)(*parts, expected)
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), operator


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_a_device_decodes_the_bits_of_the_reference(name: str) -> None:
    fmt = FloatFormat.parse(name)
    expected = results(reference, fmt, 5000, -0.01, 0.3)
    for operator, out in results(torch.ops.fedomc, fmt, 5000, -0.01, 0.3, "cuda").items():
        np.testing.assert_array_equal(bits_of(out), bits_of(expected[operator]), err_msg=operator)
