"""The Triton kernels that update floats: the same bits as the reference, under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from fedomc import FloatFormat, codec
from fedomc.codec import reference
from tests.codec.test_native import UPDATES, random_words, words_for
from tests.codec.test_triton_encode import FORMATS, SEEDS, assert_same
from tests.conftest import randn, scaling

triton_update = pytest.importorskip("fedomc.codec.triton_update", reason="Triton is not installed")

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]


def updated(
    backend: object, name: str, case: str, seed: int | None, n: int = 1057, rescale: bool = True, device: str = "cpu"
) -> tuple[Tensor, ...]:
    fmt, (scale, offset, alpha) = FloatFormat.parse(name), UPDATES[case]
    words, gradient = random_words(n, fmt).to(device), randn(n, seed=4).to(device)
    if case == "first step":
        words.zero_()
    out, status = words_for(n, fmt).zero_().to(device), torch.zeros(2, dtype=torch.int64, device=device)
    present, new = scaling(scale, offset).to(device), torch.full((2,), -7.0, device=device)
    numbers = fmt.exponent_bits, fmt.mantissa_bits
    backend.update(words, present, *numbers, gradient, alpha, rescale, seed, out, new, status)
    if status[0] >= codec.INFINITY_BITS:  # what was written means nothing then
        return (status.clamp(max=codec.INFINITY_BITS).cpu(),)
    return out.cpu(), new.cpu(), status.cpu()


@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("name", ["S1E2M3", "S1E8M7"])
def test_all_cases_have_the_bits_of_the_reference(name: str, case: str) -> None:
    assert_same(updated(triton_update, name, case, 7), updated(reference, name, case, 7))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FORMATS)
def test_updating_has_the_bits_of_the_reference(name: str, seed: int | None) -> None:
    case = "first step" if seed is None else next(iter(UPDATES))
    assert_same(updated(triton_update, name, case, seed), updated(reference, name, case, seed))


def test_several_programs_without_another_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.codec.triton_words.BLOCKS", 4)
    case = next(iter(UPDATES))
    for n in (0, 4097):
        found = updated(triton_update, "S1E3M7", case, 3, n, rescale=False)
        assert_same(found, updated(reference, "S1E3M7", case, 3, n, rescale=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["S1E3M7", "S1E8M7"])
def test_a_narrow_gradient_counts_as_its_float32_values(name: str, dtype: torch.dtype) -> None:
    fmt, n = FloatFormat.parse(name), 1057
    words, gradient = random_words(n, fmt), randn(n, seed=4).to(dtype)
    results = []
    for step in (gradient, gradient.float()):
        out, new, status = words_for(n, fmt).zero_(), torch.empty(2), torch.zeros(2, dtype=torch.int64)
        numbers = fmt.exponent_bits, fmt.mantissa_bits
        triton_update.update(words, scaling(0.05, 0.0), *numbers, step, -0.1, True, 7, out, new, status)
        results.append((out, new, status))
    assert_same(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_device_updates_to_the_bits_of_the_reference(name: str, seed: int | None, case: str) -> None:
    n = codec.CHUNK + 1025
    assert_same(updated(torch.ops.fedomc, name, case, seed, n, device="cuda"), updated(reference, name, case, seed, n))
