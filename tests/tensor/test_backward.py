"""Backward passes that are given compressed tensors as what they begin with or what they differentiate."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.conftest import compressed, lossless, randn, same_bits

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    "convolution": lambda: nn.Conv1d(8, 8, 3, padding=1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda y, parameters: torch.autograd.grad(y, parameters),
        lambda y, parameters: [y.backward(inputs=parameters), [p.grad for p in parameters]][1],
        lambda y, parameters: [torch.autograd.backward(y, inputs=parameters), [p.grad for p in parameters]][1],
    ],
    ids=["grad", "Tensor.backward", "backward"],
)
def test_a_checkpoint_is_computed_again_in_the_same_way(
    differentiate: Callable[[Tensor, list[nn.Parameter]], list[Tensor]], name: str
) -> None:
    torch.manual_seed(0)
    plain = LAYERS[name]()
    packed, x = compressed(plain), randn(2, 8, 8).requires_grad_()
    gradients = [
        differentiate(checkpoint(model, x, use_reentrant=False).sin().sum(), list(model.parameters()))
        for model in (plain, packed)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda p: torch.autograd.grad(p.clone(), p, randn(3)),
        lambda p: torch.autograd.grad([p], [p], [randn(3)]),
        lambda p: torch.autograd.grad(p.pow(3).sum(), p, create_graph=True),
        lambda p: torch.autograd.grad(torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)[0].sum(), p),
        lambda p: [p.clone().backward(randn(3)), p.grad][1:],
        lambda p: [p.clone().backward(randn(3), inputs=[p]), p.grad][1:],
        lambda p: [torch.autograd.backward([p.clone(), p.sin()], [randn(3), randn(3)]), p.grad][1:],
    ],
)
def test_compressed_tensors_on_both_ends(differentiate: Callable[[Tensor], list[Tensor]]) -> None:
    (found,), (expected,) = (differentiate(nn.Parameter(make(randn(3, seed=1)))) for make in (lossless, torch.clone))
    assert same_bits(found, expected)


def test_unused_and_frozen() -> None:
    p = nn.Parameter(lossless(randn(3), name="layer.weight"))
    y = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(y.sum(), p, allow_unused=True) == (None,)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(y.sum(), p)
    with pytest.raises(RuntimeError, match=r"layer\.weight.* does not require grad"):
        torch.autograd.grad(y.sum(), p.requires_grad_(False))


def test_a_checkpoint_that_ends_with_a_product_finds_the_weights_compressed_when_it_is_computed_again() -> None:
    """The product's backward asks for its input first, which runs the forward pass of the checkpoint."""
    packed = compressed(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False)))
    x = randn(4, 8)
    gradients = []
    for again in (False, True):
        packed.zero_grad()
        (x + (checkpoint(packed, x, use_reentrant=False) if again else packed(x))).sum().backward()
        gradients.append([parameter.grad for parameter in packed.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))
