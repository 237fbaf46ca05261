"""The update of one variable by an optimizer of torch, without the machinery around ``Optimizer.step``.

[Note: one variable at a time]
``Optimizer.step`` is made to be called once for all variables. Called for each, its hooks, profiler ranges, lists and
choices of an implementation cost more than the update of a small variable. SGD, Adam and AdamW are therefore asked for
the update itself, through the functions on which their ``step`` is built, with the state where ``step`` keeps it:
values, state and ``state_dict`` are the same. Whatever else was asked for, such as hooks of the step, a fused
implementation or another optimizer, goes through ``step``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fedomc._torch import steps_plainly
from fedomc.tensor.compressed import is_compressed
from fedomc.training.optimizer_state import PackedAdam, PackedAdamW, PackedSGD, PackedStateOptimizer

Update = Callable[[Optimizer, dict[str, Any], Tensor], None]


def update_of(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Update | None:
    """Return the function that updates a variable of this group by its gradient, or None if only ``step`` can.

    ``step`` also makes the state that a variable does not have yet.

    Args:
        optimizer: the optimizer.
        group: the one of its ``param_groups`` that holds the variable.
        parameter: the variable, which has a gradient.
    """
    update = _UPDATES.get(type(optimizer))
    if update is None or not steps_plainly(optimizer):
        return None
    if group["foreach"] or group["fused"] or group["differentiable"] or group.get("capturable"):
        return None
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided or gradient.device.type != "cpu":
        return None
    if gradient.dtype is not parameter.dtype:
        return None
    stateless = update is _sgd and not group["momentum"]
    return update if stateless or optimizer.state.get(parameter) else None


def _sgd(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    gradient, momentum = parameter.grad, group["momentum"]
    assert gradient is not None
    if group["weight_decay"] or momentum or group["maximize"] or isinstance(group["lr"], Tensor):
        buffer = optimizer.state[parameter]["momentum_buffer"] if momentum else None
        sgd(
            [parameter], [gradient], [buffer], foreach=False, fused=False, weight_decay=group["weight_decay"],
            momentum=momentum, lr=group["lr"], dampening=group["dampening"], nesterov=group["nesterov"],
            maximize=group["maximize"],
        )  # fmt: skip
    elif is_compressed(parameter):
        parameter.add_part(gradient.reshape(-1), -group["lr"])  # what add_ does behind the dispatcher
        torch.autograd.graph.increment_version(parameter)
    else:
        parameter.add_(gradient, alpha=-group["lr"])


def _adam(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    gradient, state, amsgrad = parameter.grad, optimizer.state[parameter], group["amsgrad"]
    assert gradient is not None
    beta1, beta2 = group["betas"]
    adam(
        [parameter], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]],
        [state["max_exp_avg_sq"]] if amsgrad else [], [state["step"]], foreach=False, fused=False, amsgrad=amsgrad,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=group["maximize"], decoupled_weight_decay=group["decoupled_weight_decay"],
    )  # fmt: skip


def _packed(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    assert isinstance(optimizer, PackedStateOptimizer)
    optimizer.update(group, parameter)


_UPDATES: dict[type[Optimizer], Update] = {
    SGD: _sgd, Adam: _adam, AdamW: _adam, PackedSGD: _packed, PackedAdam: _packed, PackedAdamW: _packed
}  # fmt: skip
