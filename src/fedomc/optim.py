"""Stepping in the backward pass: a variable is updated and its gradient dropped as soon as the gradient is complete."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class StepInBackward:
    """The optimizers of a model, one a variable, that step when its gradient is complete.

    Attributes:
        optimizers: by qualified name.
    """

    def __init__(self, optimizers: dict[str, Optimizer], hooks: list[Any]) -> None:
        """Keep the optimizers and the handles of their hooks."""
        self.optimizers = optimizers
        self._hooks = hooks

    def remove(self) -> None:
        """Stop stepping: gradients accumulate again as usual."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def step_in_backward(
    model: nn.Module,
    optimizer_class: Callable[..., Optimizer],
    *,
    clip_norm: float | None = None,
    **kwargs: Any,
) -> StepInBackward:
    """Make every backward pass train the model: no gradient outlives the moment in which it is complete.

    Args:
        model: plain or compressed; its parameters that require a gradient are trained.
        optimizer_class: from ``torch.optim``, one that works parameter by parameter; one is made for each variable.
        clip_norm: scales the gradient of each variable down to this Euclidean norm. (A norm over all variables does
            not exist in the backward pass: when the last gradient is complete the first is gone.)
        **kwargs: for the optimizer.

    Returns:
        The optimizers and a way to stop.
    """
    optimizers: dict[str, Optimizer] = {}
    hooks = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        optimizer = optimizers[name] = optimizer_class([parameter], **kwargs)

        def step(parameter: Tensor, optimizer: Optimizer = optimizer) -> None:
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_([parameter], clip_norm)
            try:
                optimizer.step()
            finally:
                parameter.grad = None

        hooks.append(parameter.register_post_accumulate_grad_hook(step))  # type: ignore[no-untyped-call]
    return StepInBackward(optimizers, hooks)
