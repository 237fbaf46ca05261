"""Functions that run a backward pass and are given compressed tensors.

While a function of torch runs for a compressed tensor, no other function is handed to ``CompressedTensor``. A backward
pass may compute a checkpoint again, which must come to the same operators as in the forward pass. So these functions
are called on what stands for the tensors in the graph, with everything else as usual.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.handlers import BACKWARD


def _grad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``torch.autograd.grad``."""
    outputs, inputs, *others = args
    return func(_roots(outputs), _edges(inputs), *others, **kwargs)


def _backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run ``torch.autograd.backward``."""
    tensors, *others = args
    inputs = kwargs.get("inputs")
    func(_roots(tensors), *others, **{**kwargs, "inputs": None if inputs is None else _edges(inputs)})


def _backward_from(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run ``Tensor.backward``."""
    names = ("gradient", "retain_graph", "create_graph", "inputs")
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    torch.autograd.backward(_roots(args[:1]), grad_tensors=given.pop("gradient", None), **given)


def _roots(outputs: Sequence[Any]) -> list[Any]:
    """Return what the pass begins with: views of compressed tensors, which do not come back here."""
    with torch.enable_grad():
        return [x.view_as(x) if is_compressed(x) else x for x in outputs]


def _edges(inputs: Sequence[Any]) -> list[Any]:
    return [_edge(x) if is_compressed(x) else x for x in inputs]


def _edge(x: CompressedTensor) -> GradientEdge:
    """Return the place of a tensor in the graph.

    Raises:
        RuntimeError: it does not require a gradient.
    """
    if not x.requires_grad:
        raise RuntimeError(f"{x.variable} is to be differentiated and does not require grad")
    if x.grad_fn is not None:
        return GradientEdge(x.grad_fn, x.output_nr)
    with torch.enable_grad():  # an alias of a leaf comes next to what accumulates its gradient
        alias: Tensor = torch.ops.aten.alias(x)
    assert alias.grad_fn is not None
    node = alias.grad_fn.next_functions[0][0]
    assert node is not None
    return GradientEdge(node, 0)


BACKWARD[torch.autograd.grad] = _grad
BACKWARD[torch.autograd.backward] = _backward
BACKWARD[Tensor.backward] = _backward_from
