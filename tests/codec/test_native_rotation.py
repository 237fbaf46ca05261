"""The C++ kernels of DRIVE1 and DRIVE2: the same bits as the reference at every instruction set."""

import pytest
import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import native, reference_rotation
from tests.conftest import bits_of, flushed_denormals, randn, threads

pytestmark = pytest.mark.usefixtures("level")
SIZES = (0, 1, 31, 33, 511, 512, 513, 1024, 1025, 5000, codec.CHUNK + 1025)
widths = pytest.mark.parametrize("bits", [1, 2])


def some_values(n: int) -> Tensor:
    """Values of all magnitudes, and blocks of zeros, of subnormals, of tiny and of the largest values."""
    values = randn(n) * torch.exp(4 * randn(n, seed=1))
    values[::5] *= 1e-30
    values[1::9] = 1e-40
    values[3::11] = -0.0
    values[1024:2048] = torch.tensor([0.0, -0.0]).repeat(512)[: len(values[1024:2048])]
    values[2048:3072] = 1e-40
    values[3072:4096] *= 2.0**-95
    values[4096:4608] = 3.4e38
    return values


def room(n: int, bits: int) -> tuple[Tensor, Tensor]:
    return torch.full((codec.words_of(n, bits),), -1, dtype=torch.int32), torch.full((-(-n // 1024),), torch.nan)


def encoded(
    backend: object, values: Tensor, bits: int, seed: int = 5, start: int = 0, unbiased: bool = True
) -> tuple[Tensor, Tensor]:
    words, scales = room(len(values), bits)
    backend.rotated_encode(values, bits, seed, start, unbiased, words, scales)
    return words, scales


@widths
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_the_same_bits(bits: int, seed: int, unbiased: bool) -> None:
    for n in SIZES:
        found = []
        for backend in (native, reference_rotation):
            words, scales = encoded(backend, some_values(n), bits, seed, 2048, unbiased)
            out = torch.empty(n)
            backend.rotated_decode(words, scales, bits, seed, 2048, out)
            assert out.isfinite().all()
            found.append((words, *(torch.from_numpy(bits_of(x)) for x in (scales, out))))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), n


@widths
def test_any_codes_and_scales_decode_alike(bits: int) -> None:
    for n in SIZES:
        words, scales = room(n, bits)
        generator = torch.Generator().manual_seed(n)
        words.random_(-(2**31), 2**31 - 1, generator=generator)
        scales.copy_(torch.randn(scales.shape, generator=generator))
        scales[::3] = -0.0
        scales[1::3] = 1e-42
        found = [torch.empty(n) for _ in range(2)]
        for backend, out in zip((native, reference_rotation), found, strict=True):
            backend.rotated_decode(words, scales, bits, 9, 1024, out)
        assert (bits_of(found[0]) == bits_of(found[1])).all() and found[0].isfinite().all(), n


@widths
def test_stretches_are_those_of_the_whole(bits: int) -> None:
    n, start = 5000, 3072
    values = some_values(n)
    words, scales = encoded(native, values, bits)
    rest_words, rest_scales = encoded(native, values[start:], bits, start=start)
    at = codec.words_of(start, bits)
    assert torch.equal(words[at:], rest_words) and torch.equal(scales[start // 1024 :], rest_scales)


@widths
def test_threads_and_flushing_do_not_count(bits: int) -> None:
    values = some_values(9 * codec.CHUNK + 77)
    plain, results = encoded(native, values, bits), []
    for count in (1, 2):
        with threads(count), flushed_denormals():
            results.append(encoded(native, values, bits))
            results.append(encoded(reference_rotation, values, bits))
    assert all(torch.equal(a, b) for other in results for a, b in zip(plain, other, strict=True))


@widths
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_no_harm(bits: int, bad: float) -> None:
    """Its codes mean nothing: ``Method.encode`` has refused it before."""
    values = randn(2048)
    values[1500] = bad
    words, scales = encoded(native, values, bits)
    expected = encoded(native, randn(2048), bits)
    at = codec.words_of(1024, bits)
    assert torch.equal(words[:at], expected[0][:at]) and scales[0] == expected[1][0]


def test_bad_arguments_are_refused() -> None:
    values, (words, scales) = randn(2048), room(2048, 1)
    for arguments, expected in (
        ((values, 3, 0, 0, True, words, scales), "one or two bits"),
        ((values, 1, 0, 5, True, words, scales), "begins at a block"),
        ((values, 2, 0, 0, True, words, scales), "words do not match"),
        ((values, 1, 0, 0, True, words, scales[:1]), "scales do not match"),
        ((values, 1, 0, 0, True, values[:64].view(torch.int32), scales), "overlap"),
    ):
        with pytest.raises(ValueError, match=expected):
            native.rotated_encode(*arguments)
    with pytest.raises(ValueError, match="overlap"):
        native.rotated_decode(words, values[:2], 1, 0, 0, values)
