import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedomc import CompressedTensor, CompressionPolicy, NonFiniteError, PolicyError, compress_, step_in_backward
from tests.conftest import allocations, assert_same_parameters, compressed, randn

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01}),
]


def model() -> nn.Module:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), shared, nn.Tanh(), shared, nn.LayerNorm(6), nn.Linear(6, 3))


def loss(module: nn.Module, step: int) -> torch.Tensor:
    return module(randn(4, 8, seed=step)).square().sum()


@pytest.mark.parametrize(("optimizer", "kwargs"), OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
def test_is_ordinary_training(
    optimizer: Callable[..., torch.optim.Optimizer], kwargs: dict[str, object], clip: float | None
) -> None:
    plain, packed, stepped = model(), compressed(model()), model()
    ordinary = optimizer(plain.parameters(), **kwargs)
    handles = [step_in_backward(m, optimizer, clip_norm=clip, **kwargs) for m in (packed, stepped)]
    assert all(list(h.optimizers) == [name for name, _ in plain.named_parameters()] for h in handles)
    for step in range(3):
        ordinary.zero_grad()
        loss(plain, step).backward()
        for p in plain.parameters():
            if clip is not None:
                nn.utils.clip_grad_norm_([p], clip)
        ordinary.step()
        for m in (packed, stepped):
            loss(m, step).backward()
            assert all(p.grad is None for p in m.parameters())
    assert_same_parameters(plain, packed)
    assert_same_parameters(plain, stepped)
    assert all(isinstance(p, CompressedTensor) for p in packed.parameters())


def test_clipping_bounds_each_variable() -> None:
    module = compressed(model())
    before = {name: p.dequantize() for name, p in module.named_parameters()}
    step_in_backward(module, torch.optim.SGD, lr=1.0, clip_norm=0.01)
    loss(module, 0).backward()
    for name, p in module.named_parameters():
        assert float((p.dequantize() - before[name]).norm()) <= 0.01 * (1 + 1e-3)


def test_removed_hooks_leave_gradients() -> None:
    module = compressed(model())
    handle = step_in_backward(module, torch.optim.SGD, lr=0.1)
    handle.remove()
    handle.remove()
    before = copy.deepcopy(module)
    loss(module, 0).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert_same_parameters(before, module)


def test_frozen_variables_have_no_optimizer() -> None:
    module = compressed(model())
    module[0].weight.requires_grad_(False)
    before = module[0].weight.dequantize()
    handle = step_in_backward(module, torch.optim.SGD, lr=0.1)
    assert "0.weight" not in handle.optimizers and "0.bias" in handle.optimizers
    loss(module, 0).backward()
    assert torch.equal(module[0].weight.dequantize(), before)


def test_gradients_of_two_layers_never_exist_together() -> None:
    size = 256

    def peak(layers: int) -> int:
        module = compressed(nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))), "S1E2M3")
        step_in_backward(module, torch.optim.SGD, lr=0.1)
        x = torch.randn(1, size)
        module(x).sum().backward()
        levels = list(itertools.accumulate(allocations(lambda: module(x).sum().backward())))
        assert levels[-1] < size * size
        return max(levels)

    assert peak(10) - peak(2) < 4 * size * size


def test_a_diverging_step_names_the_variable_and_the_model_goes_on() -> None:
    module = compressed(model())
    handle = step_in_backward(module, torch.optim.SGD, lr=0.1)
    with pytest.raises(NonFiniteError, match=r"6\.(weight|bias)"):
        (loss(module, 0) * float("inf")).backward()
    for p in module.parameters():
        p.grad = None
        assert torch.isfinite(p.dequantize()).all()
    loss(module, 0).backward()
    handle.remove()


def test_what_is_stepped_cannot_be_replaced_or_stepped_twice() -> None:
    module = model()
    stepping = step_in_backward(module, torch.optim.SGD, lr=0.1)
    with pytest.raises(PolicyError, match="stepped in backward already"):
        step_in_backward(module, torch.optim.SGD, lr=0.1)
    policy = CompressionPolicy("S1E3M7")
    with pytest.raises(PolicyError, match="remove"):
        compress_(module, policy.select(module))
    stepping.remove()
    compress_(module, policy.select(module))
    step_in_backward(module, torch.optim.SGD, lr=0.1)
