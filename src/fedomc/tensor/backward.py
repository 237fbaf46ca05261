"""Handlers of functions that run a backward pass and receive compressed tensors as arguments.

While a torch function runs for a compressed tensor, ``__torch_function__`` is disabled for nested calls. A backward
pass may recompute a checkpointed region, which must dispatch to the same operators as in the forward pass. These
handlers therefore replace each compressed tensor by a view or a graph edge and call the function with overrides still
enabled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.handlers import BACKWARD


def _grad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Handle ``torch.autograd.grad``."""
    outputs, inputs, *others = args
    return func(_roots(outputs), _edges(inputs), *others, **kwargs)


def _backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Handle ``torch.autograd.backward``."""
    tensors, *others = args
    inputs = kwargs.get("inputs")
    func(_roots(tensors), *others, **{**kwargs, "inputs": None if inputs is None else _edges(inputs)})


def _backward_from(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Handle ``Tensor.backward``."""
    names = ("gradient", "retain_graph", "create_graph", "inputs")
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    torch.autograd.backward(_roots(args[:1]), grad_tensors=given.pop("gradient", None), **given)


def _roots(outputs: Sequence[Any]) -> list[Any]:
    """Return the roots of the pass, with compressed tensors replaced by views, which these handlers do not catch."""
    with torch.enable_grad():
        return [x.view_as(x) if is_compressed(x) else x for x in outputs]


def _edges(inputs: Sequence[Any]) -> list[Any]:
    return [_edge(x) if is_compressed(x) else x for x in inputs]


def _edge(x: CompressedTensor) -> GradientEdge:
    """Return the gradient edge of a tensor in the autograd graph.

    Raises:
        RuntimeError: the tensor does not require a gradient.
    """
    if not x.requires_grad:
        raise RuntimeError(f"{x.variable} does not require grad, so there is no gradient with respect to it")
    if x.grad_fn is not None:
        return GradientEdge(x.grad_fn, x.output_nr)
    with torch.enable_grad():  # the next function of a leaf's alias is the node that accumulates its gradient
        alias: Tensor = torch.ops.aten.alias(x)
    assert alias.grad_fn is not None
    node = alias.grad_fn.next_functions[0][0]
    assert node is not None
    return GradientEdge(node, 0)


BACKWARD[torch.autograd.grad] = _grad
BACKWARD[torch.autograd.backward] = _backward
BACKWARD[Tensor.backward] = _backward_from
