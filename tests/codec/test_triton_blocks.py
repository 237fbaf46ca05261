"""The Triton kernels of floats with scales by block: the same bits as the reference, under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from fedomc.codec import reference_blocks
from tests.codec.test_native_blocks import ELEMENTS, room, some_values
from tests.codec.test_triton_encode import assert_same
from tests.conftest import randn

triton_blocks = pytest.importorskip("fedomc.codec.triton_blocks", reason="Triton is not installed")

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

Element = tuple[int, int, int]
CASES = {
    "s1e2m3": (32, None), "s1e1m0": (64, 7), "s1e4m3": (256, 2**63 - 1), "s1e5m6": (128, None), "e4m3": (32, None),
    "nf4": (64, 7),
}  # fmt: skip
"""A block size and a seed for each element; NF4 has no kernel and is handed on."""


def results(
    backend: object, element: Element, block: int, seed: int | None, n: int, device: str = "cpu"
) -> tuple[Tensor, ...]:
    values, gradient, change = some_values(n).to(device), randn(n, seed=2).to(device), ELEMENTS["s1e2m3"]
    packed, updated, kept = ([each.to(device) for each in room(n, element, block)] for _ in range(3))
    other = [each.to(device) for each in room(n, change, 128)]
    backend.block_encode(values, *element, block, seed, 2048, *packed)
    backend.block_encode(gradient, *change, 128, None, 0, *other)
    out, total = torch.empty(2, n, device=device)
    backend.block_decode(*packed[:2], *element, block, out)
    backend.block_decode_sum(*packed[:2], *element, block, *other[:2], *change, 128, total)
    backend.block_update(*packed[:2], *element, block, gradient, -0.1, seed, *updated)
    backend.block_update(*packed[:2], *element, block, torch.zeros(n, device=device), -0.1, seed, *kept)
    assert updated[2][1] == 1 and kept[2][1] == 0  # a gradient of zeros changes nothing
    return tuple(each.cpu() for each in (*packed, *other, out, total, *updated, *kept))


@pytest.fixture(autouse=True)
def one_program(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.codec.triton_words.BLOCKS", 2)


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_reference(name: str) -> None:
    found = results(triton_blocks, ELEMENTS[name], *CASES[name], n=1100)
    assert_same(found, results(reference_blocks, ELEMENTS[name], *CASES[name], n=1100))


def test_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.codec.triton_words.BLOCKS", 1)
    found = results(triton_blocks, (3, 2, 3), 64, 7, 1057)
    assert_same(found, results(reference_blocks, (3, 2, 3), 64, 7, 1057))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_and_gradients(dtype: torch.dtype) -> None:
    n, element = 1057, ELEMENTS["s1e2m3"]
    words, scales, status = room(n, element, 64)
    reference_blocks.block_encode(some_values(n), *element, 64, None, 0, words, scales, status)
    out, total, expected, expected_total = torch.ones(4, n, dtype=dtype)
    part = words, scales, *element, 64
    for backend, alone, both in ((triton_blocks, out, total), (reference_blocks, expected, expected_total)):
        backend.block_decode(*part, alone)
        backend.block_decode_sum(*part, *part, both)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(total.view(torch.int16), expected_total.view(torch.int16))
    gradient = randn(n, seed=2).to(dtype)
    steps = [room(n, element, 64) for _ in range(2)]
    for step, updated in zip((gradient, gradient.float()), steps, strict=True):
        triton_blocks.block_update(*part, step, -0.1, 7, *updated)
    assert_same(*map(tuple, steps))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_a_device_has_the_bits_of_the_reference(element: Element, block: int, seed: int | None) -> None:
    found = results(torch.ops.fedomc, element, block, seed, 70001, "cuda")
    assert_same(found, results(reference_blocks, element, block, seed, 70001))
