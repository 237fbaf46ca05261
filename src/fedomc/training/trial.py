"""Running a copy of a model on a batch, to measure what training or a format would do to it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fedomc.errors import OMCError

Arguments = dict[Any, Any] | tuple[Any, ...]
"""Of a forward pass: by keyword or by position."""


def copied(model: nn.Module, copy_tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a model, without gradients and hooks of variables; ``copy_tensor`` copies each tensor."""
    memo = {id(x): copy_tensor(x) for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def copy_of(x: Any) -> Any:
    """Copy the values of a tensor, or of a parameter, which stays one; return anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    values = x.detach().clone()
    return nn.Parameter(values, x.requires_grad) if isinstance(x, nn.Parameter) else values


def arguments_of(batch: Any) -> Arguments:
    """Return a batch as the arguments of a forward pass: a mapping by keyword, a tuple or list by position."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return tuple(batch) if isinstance(batch, list | tuple) else (batch,)


def forward(model: nn.Module, arguments: Arguments) -> Any:
    """Run a forward pass."""
    return model(**arguments) if isinstance(arguments, dict) else model(*arguments)


def own_loss(output: Any) -> Tensor:
    """Return the loss that a model computes itself: ``output.loss``, or the output if it is a scalar.

    Raises:
        OMCError: the output has none.
    """
    result = getattr(output, "loss", None)
    result = output if result is None else result
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise OMCError(
            f"a {type(output).__name__} has no scalar loss: pass loss=, a function that computes it from the output"
        )
    return result
