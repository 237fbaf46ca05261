"""Updates past ``Optimizer.step``: the values, the state and the ``state_dict`` are those of torch's own step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedomc import CompressionPolicy, compress_, step_in_backward
from fedomc.tensor.compressed import CompressedTensor
from fedomc.training.updates import update_of
from tests.conftest import randn, same_bits

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD, momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD, everything": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True}),
    "SGD, dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "SGD, lr as a tensor": (SGD, {"lr": torch.tensor(0.1)}),
    "Adam": (Adam, {"lr": 0.01}),
    "Adam, amsgrad": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01, "maximize": True}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW, lr as a tensor": (AdamW, {"lr": torch.tensor(0.01), "foreach": False}),
}
STEPS = 4


class InFull(SGD):
    """A subclass, which only ``step`` knows how to step."""


def trained(optimizer_class: Callable[..., Optimizer], settings: dict[str, Any], format: str | None) -> Any:
    """Train a small model, in backward if it is compressed; return it and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3))
    if format is not None:
        transform = "none" if format == "S1E8M23" else "scaled"
        policy = CompressionPolicy(format, transform=transform, weight_matrices_only=False)
        compress_(model, policy.select(model))
        optimizer = step_in_backward(model, optimizer_class, **settings).optimizer
    else:
        optimizer = optimizer_class([{"params": [variable]} for variable in model.named_parameters()], **settings)
    for step in range(STEPS):
        model(randn(5, 12, seed=step)).square().sum().backward()
        if format is None:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def dense(values: Any) -> Any:
    return values.dequantize() if isinstance(values, CompressedTensor) else values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lossless_training_is_that_of_torch(name: str) -> None:
    plain, theirs = trained(*OPTIMIZERS[name], None)
    packed, ours = trained(*OPTIMIZERS[name], "S1E8M23")
    for a, b in zip(plain.parameters(), packed.parameters(), strict=True):
        assert same_bits(a.detach(), dense(b.detach()))
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert {k: list(v) for k, v in mine["state"].items()} == {k: list(v) for k, v in other["state"].items()}
    for index, state in other["state"].items():
        assert all(same_bits(mine["state"][index][key], value) for key, value in state.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_way_past_step_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(*OPTIMIZERS[name], "S1E3M7")
    monkeypatch.setattr("fedomc.training.stepping.update_of", lambda *args: None)
    in_full, other = trained(*OPTIMIZERS[name], "S1E3M7")
    for a, b in zip(model.parameters(), in_full.parameters(), strict=True):
        assert same_bits(dense(a.detach()), dense(b.detach()))
        for key, value in optimizer.state[a].items():
            assert same_bits(value, other.state[b][key])


def stepped_once(optimizer_class: type[Optimizer], **settings: Any) -> tuple[Optimizer, nn.Parameter]:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([parameter], **settings)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_way_past_step_is_taken(name: str) -> None:
    optimizer, parameter = stepped_once(OPTIMIZERS[name][0], **OPTIMIZERS[name][1])
    taken = update_of(optimizer, optimizer.param_groups[0], parameter) is not None
    assert taken is not bool(optimizer.param_groups[0]["foreach"])


IN_FULL: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "another optimizer": (torch.optim.RMSprop, {}),
    "a subclass": (InFull, {}),
    "fused": (SGD, {"fused": True}),
    "for each": (Adam, {"foreach": True}),
    "differentiable": (Adam, {"differentiable": True}),
}


@pytest.mark.parametrize("name", IN_FULL)
def test_whatever_else_goes_through_step(name: str) -> None:
    settings = IN_FULL[name][1]
    parameter = nn.Parameter(torch.ones(3))
    optimizer = IN_FULL[name][0]([parameter], lr=0.1, **settings)
    parameter.grad = torch.ones(3)
    assert update_of(optimizer, optimizer.param_groups[0], parameter) is None


def test_the_first_step_makes_the_state() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    for optimizer, stateless in ((SGD([parameter]), True), (SGD([parameter], momentum=0.9), False)):
        assert (update_of(optimizer, optimizer.param_groups[0], parameter) is not None) is stateless
    optimizer = Adam([parameter])
    assert update_of(optimizer, optimizer.param_groups[0], parameter) is None


def test_a_sparse_gradient_goes_through_step() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2).to_sparse()
    optimizer = SGD([parameter])
    assert update_of(optimizer, optimizer.param_groups[0], parameter) is None


def test_hooks_of_the_step_are_called() -> None:
    model = nn.Linear(3, 2)
    stepping = step_in_backward(model, SGD, lr=0.1)
    calls: list[str] = []
    stepping.optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    stepping.optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    model(randn(4, 3)).sum().backward()
    assert calls == ["before", "after"] * 2


def test_a_scheduler_sees_the_steps(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Linear(3, 2)
    stepping = step_in_backward(model, SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(stepping.optimizer, 1, gamma=0.5)
    for _ in range(2):
        before = model.weight.detach().clone()
        rate = stepping.optimizer.param_groups[0]["lr"]
        model(torch.ones(1, 3)).sum().backward()
        torch.testing.assert_close(before - model.weight.detach(), torch.full((2, 3), rate))
        scheduler.step()
    assert not [warning for warning in recwarn if "lr_scheduler.step" in str(warning.message)]
