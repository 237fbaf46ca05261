"""The methods with a scale by block against other libraries: torchao, bitsandbytes and ml_dtypes."""

import bitsandbytes.functional as bnb
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise

from fedomc import codec
from fedomc.methods import Packed, encode, parse_method
from tests.conftest import randn

DTYPES = {
    "MXFP8": (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
    "MXFP8E5M2": (ml_dtypes.float8_e5m2, torch.float8_e5m2),
    "MXFP6": (ml_dtypes.float6_e2m3fn, "fp6_e2m3"),
    "MXFP6E3M2": (ml_dtypes.float6_e3m2fn, "fp6_e3m2"),
    "MXFP4": (ml_dtypes.float4_e2m1fn, torch.float4_e2m1fn_x2),
}


def heavy_tailed(n: int) -> Tensor:
    return randn(n) * torch.exp(randn(n, seed=1))


def codes_of(packed: Packed) -> Tensor:
    return codec.unpack(packed.codes, packed.numel, packed.method.code_bits)


def decoded(packed: Packed) -> Tensor:
    return packed.decode(torch.empty(packed.numel))


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_int8_is_that_of_torchao(block: int) -> None:
    values = heavy_tailed(block * 200)
    packed = encode(values, parse_method(f"INT8/{block}"))
    expected, scale = quantize_int8_rowwise(values.view(-1, block))
    torch.testing.assert_close(packed.fields[1], scale, rtol=2.0**-15, atol=0)  # cut off after 16 bits
    codes = (codes_of(packed) << 24) >> 24
    difference = (codes - expected.view(-1).int()).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 2e-3  # where a tie is near
    torch.testing.assert_close(
        decoded(packed).view(-1, block), codes.view(-1, block) * packed.fields[1][:, None], rtol=0, atol=0
    )


def test_int4_is_arithmetic() -> None:
    values = heavy_tailed(64 * 300)
    packed = encode(values, parse_method("INT4"))
    scales = packed.fields[1].double().numpy()
    largest = values.view(-1, 64).abs().amax(1).double().numpy()
    assert (scales <= largest / 7).all() and (scales >= largest / 7 * (1 - 2.0**-15)).all()
    expected = np.rint(values.view(-1, 64).double().numpy() / scales[:, None]).clip(-7, 7)
    codes = ((codes_of(packed) << 28) >> 28).view(-1, 64).numpy()
    assert (np.abs(codes - expected) <= 1).all() and (codes != expected).mean() < 1e-3


@pytest.mark.parametrize("block", [64, 128, 256])
def test_nf4_is_that_of_bitsandbytes(block: int) -> None:
    values = heavy_tailed(block * 200)
    packed = encode(values, parse_method(f"NF4/{block}"))
    quantized, state = bnb.quantize_4bit(values, blocksize=block, quant_type="nf4")
    assert torch.equal(packed.fields[1], state.absmax)
    expected = bnb.dequantize_4bit(quantized, state)
    different = (decoded(packed) - expected).abs() > 1e-6 * expected.abs()
    assert float(different.float().mean()) < 1e-3  # where a tie is near
    nearest = (decoded(packed) - values).abs() <= (expected - values).abs() * (1 + 1e-5)
    assert bool(nearest.all())


@pytest.mark.parametrize("name", DTYPES)
def test_mx_is_that_of_torchao_and_ml_dtypes(name: str) -> None:
    values = heavy_tailed(32 * 400)
    packed = encode(values, parse_method(name))
    dtype, torchao_dtype = DTYPES[name]
    scales, _ = to_mx(values.view(-1, 32), torchao_dtype, 32)
    assert torch.equal(packed.fields[1], scales.view(torch.uint8).view(-1))
    factors = packed.fields[1].numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    scaled = values.view(-1, 32).numpy() / factors[:, None]
    largest = float(ml_dtypes.finfo(dtype).max)
    expected = scaled.clip(-largest, largest).astype(dtype)
    codes = codes_of(packed).numpy().astype(np.uint8)
    assert np.array_equal(codes, expected.view(np.uint8).reshape(-1) & (2**packed.method.code_bits - 1))
    assert np.array_equal(decoded(packed).numpy(), (expected.astype(np.float32) * factors[:, None]).reshape(-1))
