"""Views of compressed tensors: what is read through them, what is written through them, and their gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import lossless, randn


def padded(p: Tensor, y: Tensor) -> Tensor:
    y[1:7] = p
    return y


def assigned(index: object, value: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """Return a function that writes to an index of a copy."""

    def function(p: Tensor) -> Tensor:
        q = p.clone()
        q[index] = value(p)
        return q

    return function


ASSIGNMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "into a dense tensor": lambda p: padded(p, torch.zeros(8, 8)),
    "into a dense tensor with a history": lambda p: padded(p, torch.zeros(8, 8) + p.sum()),
    "into a dense tensor twice": lambda p: padded(p * 2, padded(p, torch.zeros(8, 8))),
    "into float64": lambda p: padded(p, torch.zeros(8, 8, dtype=torch.float64)).float(),
    "a row": assigned(0, lambda p: 0),
    "a mask": assigned(randn(6, 8) > 0, lambda p: 0.5),
    "rows of a tensor of indices": assigned(torch.tensor([0, 3]), lambda p: p[1:3]),
    "a column, of two columns": assigned((slice(None), 2), lambda p: p[:, 1] * p[:, 0]),
    "everything": assigned(..., lambda p: p[0] * p),
    "a step and a new dimension": assigned((None, slice(0, 6, 2)), lambda p: p[None, 1::2]),
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_assignment_to_an_index_has_the_gradient_of_the_plain_tensor(name: str) -> None:
    p = nn.Parameter(lossless(randn(6, 8)))
    plain = nn.Parameter(randn(6, 8))
    for x in (p, plain):
        y = ASSIGNMENTS[name](x)
        (y * randn(*y.shape, seed=1)).sin().sum().backward()
    assert torch.equal(p.grad, plain.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_assignment_to_an_index_of_a_parameter(mode: Callable[[], torch.no_grad]) -> None:
    p, plain = nn.Parameter(lossless(randn(6, 8))), nn.Parameter(randn(6, 8))
    for x in (p, plain):
        with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
            x[0] = 0
        with mode():
            x[0] = 0
            x[torch.arange(6) > 3] = 2.0
            x[1:2, 3] = x[5, 5]
            x[2][3:5] = x[1][:2]
    assert torch.equal(p.dequantize(), plain.detach())
    p.square().sum().backward()
