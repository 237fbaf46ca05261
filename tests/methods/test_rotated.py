"""DRIVE1 and DRIVE2: the rotation against a dense matrix, and what the papers say of the estimate."""

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

import fedomc
from fedomc import codec
from fedomc.codec.reference_rotation import hadamard
from fedomc.methods import Packed, encode, parse_method
from fedomc.methods.rotated import Rotated
from fedomc.serialization import frame
from tests.conftest import randn

ERRORS = {
    "DRIVE1": math.pi / 2 - 1,
    "DRIVE2": 0.1175 / (1 - 0.1175),
}  # of the Lloyd-Max quantizer with 4 levels: 0.1175
LEVELS = {"DRIVE1": (-1, 1), "DRIVE2": (-10, -3, 3, 10)}
names = pytest.mark.parametrize("name", ERRORS)


def heavy_tailed(numel: int) -> Tensor:
    return randn(numel) * torch.exp(2 * randn(numel, seed=1))


VECTORS = {
    "normal": randn(1024),
    "heavy-tailed": heavy_tailed(1024),
    "one outlier": torch.cat((torch.tensor([100.0]), randn(1023))),
    "two values": torch.tensor([1.0, 0.1] + [0.0] * 1022),
    "constant": torch.ones(1024),
    "a tail": randn(300),
}


def draw(values: Tensor, name: str, seed: int) -> Packed:
    return encode(values, parse_method(name), "", "stochastic", seed)


def decoded(packed: Packed) -> Tensor:
    return packed.decode(torch.empty(packed.numel))


@pytest.mark.parametrize("size", [1, 2, 64, 1024])
@pytest.mark.parametrize("columns", [1, 3])
def test_the_transform_is_the_product_with_the_matrix(size: int, columns: int) -> None:
    x = torch.randint(-9, 9, (size, columns)).double()
    expected = torch.from_numpy(scipy.linalg.hadamard(size)).double() @ x
    assert torch.equal(hadamard(x.clone()), expected)
    assert torch.equal(hadamard(x.float()), expected.float())


@names
@pytest.mark.parametrize("numel", [1024, 300, 5 * 1024 + 300, codec.CHUNK + 1024 + 600])
def test_values_are_those_of_the_formula(name: str, numel: int) -> None:
    """``scale * D1 H D2 H c`` with dense matrices, by block, from the fields and the stream of random bits alone."""
    packed = draw(heavy_tailed(numel), name, 12)
    words, scales, seed = packed.fields
    levels, out = torch.tensor(LEVELS[name]).double(), []
    codes = codec.unpack(words, parse_method(name).code_count(numel), parse_method(name).code_bits)
    for i, scale in enumerate(scales):
        block = codes[1024 * i : 1024 * (i + 1)]
        bits = codec.random.random_bits(int(seed), 1024 * i, len(block), torch.device("cpu"))
        d1, d2 = (1 - 2 * (bits.long() >> place & 1) for place in (31, 30))
        matrix = torch.from_numpy(scipy.linalg.hadamard(len(block))).double()
        u = d1 * (matrix @ (d2 * (matrix @ levels[block.long()])))
        assert torch.equal(u, u.float().double())
        out.append(scale * u.float())
    assert torch.equal(decoded(packed), torch.cat(out)[:numel])


@names
@pytest.mark.parametrize("vector", VECTORS)
def test_the_estimate_is_unbiased_with_the_error_of_the_papers(name: str, vector: str) -> None:
    """The squared error of a mean of n independent estimates without bias is an n-th of that of one.

    Over 1000 directions the quotient has a standard deviation of a few per cent: a bias of 1% of the vector would
    raise it by 0.35 with one bit, and by 1.5 with two. Draws are of several seeds, and of the blocks of a variable.
    """
    x = VECTORS[vector]
    repeated = x.repeat(100 if len(x) == 1024 else 1)
    count = 2000 if len(x) == 1024 else 500
    seeds = range(count * len(x) // len(repeated))
    estimates = torch.cat([decoded(draw(repeated, name, seed)).view(-1, len(x)) for seed in seeds]).double()
    errors, power = estimates - x, float(x.double().square().sum())
    error = float(errors.square().sum()) / count
    kept = len(x) / parse_method(name).code_count(len(x))  # the rest of the error is in the padding
    assert error / power == pytest.approx(kept * ERRORS[name], rel=0.03)
    assert 0.75 < float(errors.mean(0).square().sum()) * count / error < 1.25


@names
def test_along_the_vector_there_is_no_error(name: str) -> None:
    x = heavy_tailed(8192).view(-1, 1024)
    estimate = decoded(draw(x, name, 3)).view(-1, 1024)
    torch.testing.assert_close((estimate * x).sum(1), x.square().sum(1), rtol=1e-5, atol=0)


@names
def test_blocks_have_rotations_of_their_own(name: str) -> None:
    x = randn(1024)
    errors = (decoded(draw(x.repeat(70), name, 1)) - x.repeat(70)).view(70, 1024)
    correlation = torch.corrcoef(errors) - torch.eye(70)
    assert float(correlation.abs().max()) < 6 / 32  # six standard errors


@names
def test_the_seed_is_in_the_fields_and_the_rotation_depends_on_it_and_the_name(name: str) -> None:
    x = randn(2048)
    packed = draw(x, name, 1)
    again = frame.from_bytes(frame.to_bytes(packed, (2048,))).packed
    assert int(again.fields[2]) == int(packed.fields[2]) and torch.equal(decoded(again), decoded(packed))
    other = encode(x, parse_method(name), "", "stochastic", 1, "other")
    assert int(other.fields[2]) != int(packed.fields[2]) != int(draw(x, name, 2).fields[2])
    assert int(encode(x, parse_method(name)).fields[2]) == 0  # to nearest: one fixed rotation


@names
@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e36, -1e36])
def test_scales_that_lead_to_no_finite_values_are_refused(name: str, scale: float) -> None:
    packed = encode(randn(2048), parse_method(name))
    packed.fields[1][1] = scale
    with pytest.raises(fedomc.PayloadError, match="not finite" if not math.isfinite(scale) else "range of float32"):
        frame.from_bytes(frame.to_bytes(packed, (2048,)))


@names
@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_seed_and_the_largest_scale_decode_to_finite_values(name: str, seed: int) -> None:
    method = Rotated(int(name[-1]))
    codes, scales, _ = method.zeros(2048, "cpu")
    fields = codes, scales.fill_(method._largest_scale), torch.tensor([seed])
    assert method.validate(fields, 2048) is None
    assert decoded(Packed(method, 2048, fields)).isfinite().all()


def test_names_and_headers_of_other_sizes_are_refused() -> None:
    for text in ("DRIVE0", "DRIVE3", "DRIVE16"):
        with pytest.raises(fedomc.FormatError, match=f"{text} does not exist: use DRIVE1 or DRIVE2"):
            parse_method(text)
    for header in (b"", b"\0", b"\3", b"\1\0"):
        with pytest.raises(fedomc.FormatError):
            fedomc.methods.method_from_header(Rotated.tag, header)
