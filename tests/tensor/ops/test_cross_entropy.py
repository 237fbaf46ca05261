"""The loss of a head in slices of its classes is the loss of torch, with the same gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fedomc
from tests.conftest import randn

TARGETS = torch.tensor([3, 0, 299, 7, 128, 3, 127, 290])


def found(loss: Any, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Give the loss and the gradients."""
    x, weight = x.clone().requires_grad_(), torch.nn.Parameter(weight)
    value = loss(x, weight)
    (2 * value).backward()
    return [value.detach(), x.grad, weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("targets", [TARGETS, TARGETS.where(TARGETS != 3, -100)], ids=["all", "ignored"])
@pytest.mark.parametrize("classes", [1, 128, 300, 1000])
@pytest.mark.parametrize("format", ["", "S1E4M3/64", "S1E3M7@0.9", "S1E2M3/64+S1E2M1/64"])
def test_it_is_the_loss_of_torch(format: str, classes: int, targets: Tensor) -> None:
    x, plain = randn(8, 64), randn(300, 64) / 4
    weight = plain
    if format:
        layer = torch.nn.Linear(64, 300, bias=False)
        layer.weight = torch.nn.Parameter(plain)
        weight = fedomc.compress_(layer, format).weight.detach()
        plain = weight.dequantize()
    expected = found(lambda x, w: F.cross_entropy(F.linear(x, w), targets), x, plain)
    sliced = found(lambda x, w: fedomc.linear_cross_entropy(x, w, targets, classes=classes), x, weight)
    torch.testing.assert_close(sliced, expected, rtol=1e-4, atol=1e-5)  # sums have another order


def test_in_bfloat16_the_loss_is_summed_in_float32() -> None:
    x, weight = randn(8, 64).bfloat16(), (randn(300, 64) / 4).bfloat16()
    loss, of_x, of_weight = found(lambda x, w: fedomc.linear_cross_entropy(x, w, TARGETS, classes=100), x, weight)
    expected = found(lambda x, w: F.cross_entropy(F.linear(x, w), TARGETS), x.float(), weight.float())
    assert (loss.dtype, of_x.dtype, of_weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    for value, exact in zip((loss, of_x, of_weight), expected, strict=True):
        assert torch.linalg.norm(value.float() - exact) < 0.02 * torch.linalg.norm(exact)


def test_what_is_frozen_gets_no_gradient_and_a_change_in_place_is_an_error() -> None:
    layer = fedomc.compress_(torch.nn.Linear(64, 300, bias=False), "S1E4M3/64").requires_grad_(False)
    x = randn(8, 64).requires_grad_()
    fedomc.linear_cross_entropy(x, layer.weight, TARGETS).backward()
    assert x.grad is not None and layer.weight.grad is None
    loss = fedomc.linear_cross_entropy(x, layer.weight, TARGETS)
    layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize(
    ("targets", "options", "kind", "says"),
    [
        (TARGETS[:3], {}, ValueError, r"targets \(3,\) do not fit"),
        (TARGETS, {"classes": 0}, ValueError, "classes=0"),
        (TARGETS + 1, {}, IndexError, r"outside of \[0, 300\)"),
        (TARGETS - 1, {}, IndexError, r"outside of \[0, 300\)"),
    ],
)
def test_what_does_not_fit_is_named(targets: Tensor, options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        fedomc.linear_cross_entropy(randn(8, 64), randn(300, 64), targets, **options)
