"""Helpers of the tests of packed activations: the oracle is the gradient of plain torch."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from fedomc._torch import saved_tensors_hooks
from fedomc.activations import forward_pass

LOSSLESS = "S1E8M23"


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let a format with every bit be packed, with which gradients are those of torch to the last bit."""
    monkeypatch.setattr(forward_pass, "_GAIN", 2.0)
    return LOSSLESS


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Check that no test leaves a hook of saved tensors or a mode behind."""
    yield
    assert saved_tensors_hooks() is None
    assert not has_torch_function((torch.ones(1),))


class Function(nn.Module):
    """A function of the input and of a parameter, as a module."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def gradients(model: nn.Module, *inputs: Tensor, backward: Callable[..., Any] | None = None) -> list[Tensor]:
    """Run both passes under a seed and return the gradients of all parameters and floating-point inputs."""
    torch.manual_seed(0)
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    model.zero_grad()
    out = model(*leaves)
    loss = (out[0] if isinstance(out, tuple) else out).float().square().mean()
    if backward is None:
        loss.backward()
    else:
        backward(loss)
    return [x.grad.clone() for x in (*leaves, *model.parameters()) if x.grad is not None]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the norm of the difference, relative to that of what is expected."""
    assert len(found) == len(expected) > 0
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((difference / sum(float(b.square().sum()) for b in expected)) ** 0.5)
