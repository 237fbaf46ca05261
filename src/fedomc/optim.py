"""Stepping in the backward pass: a variable is updated and its gradient dropped as soon as the gradient is complete."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointFunction

from fedomc.errors import PolicyError


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
        model: plain or compressed; its parameters that require a gradient are trained. Compress or install it first:
            new parameters need a new call.
        optimizer_class: from ``torch.optim``, one that works parameter by parameter; one is made for each variable.
        clip_norm: scales the gradient of each variable down to this Euclidean norm. (A norm over all variables does
            not exist in the backward pass: when the last gradient is complete the first is gone.)
        **kwargs: for the optimizer.

    Returns:
        The optimizers and a way to stop.

    Raises:
        PolicyError: a parameter is stepped already.

    A backward pass inside a reentrant checkpoint raises RuntimeError: it cannot know whether a gradient is complete.
    """
    optimizers: dict[str, Optimizer] = {}
    hooks = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter._post_accumulate_grad_hooks:
            raise PolicyError(f"{name} is stepped in backward already: call remove() on what the first call returned")
        optimizer = optimizers[name] = optimizer_class([parameter], **kwargs)

        def step(parameter: Tensor, optimizer: Optimizer = optimizer, name: str = name) -> None:
            if _in_reentrant_checkpoint():
                raise RuntimeError(
                    f"{name} would be stepped inside a reentrant checkpoint, before other uses of it were "
                    "differentiated: pass use_reentrant=False to torch.utils.checkpoint"
                )
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_([parameter], clip_norm)
            try:
                optimizer.step()
            finally:
                parameter.grad = None

        hooks.append(parameter.register_post_accumulate_grad_hook(step))  # type: ignore[no-untyped-call]
    return StepInBackward(optimizers, hooks)


def _in_reentrant_checkpoint() -> bool:
    """Tell whether this backward pass was started by the backward pass of a reentrant checkpoint."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _CHECKPOINT_BACKWARD:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_CHECKPOINT_BACKWARD = CheckpointFunction.backward.__code__
