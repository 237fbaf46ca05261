"""The Triton kernels that decide what the host decides elsewhere: the same as the reference, under the interpreter."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fedomc import FloatFormat
from fedomc.codec import INFINITY_BITS, reference
from tests.codec.test_triton_encode import FORMATS, assert_same

triton_settle = pytest.importorskip("fedomc.codec.triton_settle", reason="Triton is not installed")

pytestmark = pytest.mark.usefixtures("interpreter")

MAGNITUDES = [0.0, 1e-45, 1e-38, 1e-3, 0.97, 1.0, 1.75, 1.9375, 1.99, 31.0, 1e30, 3.4e38]


def chosen(backend: object, fmt: FloatFormat, magnitude: float, stochastic: bool, device: str = "cpu") -> list[Tensor]:
    status = torch.tensor([int(np.float32(magnitude).view(np.int32)), 1], device=device)
    exponent = torch.full((1,), 99, dtype=torch.int32, device=device)
    scale_offset = torch.full((2,), 7.0, device=device)
    backend.choose_exponent(status, fmt.exponent_bits, fmt.mantissa_bits, stochastic, exponent, scale_offset)
    return [exponent.cpu(), scale_offset.cpu()]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_the_exponent(name: str, stochastic: bool) -> None:
    fmt = FloatFormat.parse(name)
    for magnitude in MAGNITUDES:
        expected = chosen(reference, fmt, magnitude, stochastic)
        assert_same(chosen(triton_settle, fmt, magnitude, stochastic), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.uint8])
@pytest.mark.parametrize(("bits", "changed", "kept"), [(5, 1, False), (5, 0, True), (INFINITY_BITS, 1, True)])
def test_what_is_kept(bits: int, changed: int, kept: bool, dtype: torch.dtype) -> None:
    present, new = torch.arange(5000).to(dtype), torch.full((5000,), 3, dtype=dtype)
    for backend in (reference, triton_settle):
        out = new.clone()
        backend.keep(present, torch.tensor([bits, changed]), out)
        assert torch.equal(out, present if kept else new)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_a_device_chooses_what_the_reference_does(name: str) -> None:
    fmt = FloatFormat.parse(name)
    for magnitude in MAGNITUDES:
        expected = chosen(reference, fmt, magnitude, True)
        assert_same(chosen(torch.ops.fedomc, fmt, magnitude, True, "cuda"), expected)
