"""The C++ kernels of blockwise methods: the same bits as the reference at every instruction set."""

import pytest
import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import native, reference_blocks
from tests.conftest import bits_of, flushed_denormals, randn, threads

ELEMENTS = {
    "int8": (0, 8, 0),
    "int4": (0, 4, 0),
    "nf4": (1, 0, 0),
    "e4m3": (2, 4, 3),
    "e5m2": (2, 5, 2),
    "e3m2": (2, 3, 2),
    "e2m3": (2, 2, 3),
    "e2m1": (2, 2, 1),
    "s1e2m3": (3, 2, 3),
    "s1e1m0": (3, 1, 0),
    "s1e4m3": (3, 4, 3),
    "s1e5m6": (3, 5, 6),
}
pytestmark = pytest.mark.usefixtures("level")


def some_values(n: int) -> Tensor:
    """Values of all magnitudes: heavy tails, blocks of zeros, of tiny values and of subnormals, both zeros, ties."""
    values = randn(n) * torch.exp(3 * randn(n, seed=1))
    values[::5] *= 1e-30
    values[1::9] = 1e-40
    values[2::7] = torch.round(values[2::7] * 4) / 4
    values[3::11] = -0.0
    values[64:320] = 0.0
    values[320:384] = 1e-35
    return values


def room(n: int, element: tuple[int, int, int], block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make words, scales and status."""
    bits = reference_blocks.block_element(*element).bits
    dtype = torch.uint8 if element[0] in (reference_blocks.OCP, reference_blocks.FLOAT) else torch.float32
    words = torch.full((codec.words_of(n, bits),), -1, dtype=torch.int32)
    return words, torch.ones(-(-n // block), dtype=dtype), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("seed", [None, 7, 2**63 - 1])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_the_same_bits(element: tuple[int, int, int], block: int, seed: int | None) -> None:
    for n in (1, 31, 33, 1024, 5000, codec.CHUNK + 1025):
        values, gradient, found = some_values(n), randn(n, seed=2), []
        for backend in (native, reference_blocks):
            packed, updated, kept = (room(n, element, block) for _ in range(3))
            backend.block_encode(values, *element, block, seed, 2048, *packed)
            out = torch.empty(n)
            backend.block_decode(*packed[:2], *element, block, out)
            backend.block_update(*packed[:2], *element, block, gradient, -0.1, seed, *updated)
            backend.block_update(*packed[:2], *element, block, torch.zeros(n), -0.1, seed, *kept)
            assert updated[2][1] == 1 and kept[2][1] == 0  # a gradient of zeros changes nothing
            found.append((*packed, torch.from_numpy(bits_of(out)), *updated, *kept))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), n


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_any_codes_and_scales_decode_alike(element: tuple[int, int, int]) -> None:
    n, (words, scales, _) = 3000, room(3000, element, 32)
    generator = torch.Generator().manual_seed(0)
    words.random_(-(2**31), 2**31 - 1, generator=generator)
    if scales.dtype is torch.uint8:
        scales.copy_(torch.randint(0, 240, scales.shape, generator=generator))
    else:
        scales.copy_(torch.randn(scales.shape, generator=generator))
        scales[::7] = -0.0
    found = [torch.empty(n) for _ in range(2)]
    for backend, out in zip((native, reference_blocks), found, strict=True):
        backend.block_decode(words, scales, *element, 32, out)
    assert (bits_of(found[0]) == bits_of(found[1])).all() and found[0].isfinite().all()


@pytest.mark.parametrize("update", ["s1e2m3", "e2m1", "int4", "nf4"])
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_a_sum_decodes_as_its_two_parts_do(element: tuple[int, int, int], update: str) -> None:
    change, blocks = ELEMENTS[update], (64, 32)
    for n in (1, 33, 1024, codec.CHUNK + 1025):
        base, other = room(n, element, blocks[0]), room(n, change, blocks[1])
        native.block_encode(some_values(n), *element, blocks[0], None, 0, *base)
        native.block_encode(randn(n, seed=3), *change, blocks[1], None, 0, *other)
        parts = (*base[:2], *element, blocks[0], *other[:2], *change, blocks[1])
        values, changes, ours, theirs = (torch.full((n,), float("nan")) for _ in range(4))
        native.block_decode(*base[:2], *element, blocks[0], values)
        native.block_decode(*other[:2], *change, blocks[1], changes)
        native.block_decode_sum(*parts, ours)
        reference_blocks.block_decode_sum(*parts, theirs)
        assert (bits_of(ours) == bits_of(values + changes)).all(), n
        assert (bits_of(theirs) == bits_of(values + changes)).all(), n


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_what_is_not_finite_is_seen(element: tuple[int, int, int], bad: float) -> None:
    values = randn(2000)
    values[1500] = bad
    packed = room(2000, element, 64)
    native.block_encode(values, *element, 64, None, 0, *packed)
    assert packed[2][0] >= codec.INFINITY_BITS


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_threads_and_flushing_do_not_count(element: tuple[int, int, int], seed: int | None) -> None:
    n = 20 * codec.CHUNK + 77
    values, results = some_values(n), []
    for count in (1, 2):
        with threads(count), flushed_denormals():
            packed = room(n, element, 64)
            native.block_encode(values, *element, 64, seed, 0, *packed)
            results.append(packed)
    plain = room(n, element, 64)
    native.block_encode(values, *element, 64, seed, 0, *plain)
    assert all(torch.equal(a, b) for other in results for a, b in zip(plain, other, strict=True))
