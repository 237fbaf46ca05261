"""Fallback for all other operations: run them on decoded copies and encode their writes. Slower, but correct."""

from typing import Any

import torch
from torch import Tensor

from fedomc._torch import schema_of, tree_leaves, tree_map
from fedomc.tensor import views
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.handlers import FALLBACK, METHODS
from fedomc.tensor.schema import returns_view, run, written


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on decoded copies and encode the tensors that it wrote."""
    if returns_view(func) and is_compressed(args[0]):
        return views.view(func, args, kwargs)
    decoded: dict[int, tuple[CompressedTensor, Tensor]] = {}

    def dense(x: Any) -> Any:
        return decoded.setdefault(id(x), (x, x.dequantize()))[1] if is_compressed(x) else x

    targets = {id(x): x for x in written(func, args, kwargs) if is_compressed(x)}
    result = run(func, tree_map(dense, args), tree_map(dense, kwargs), [x.variable for x in targets.values()])
    encoded: dict[int, CompressedTensor] = {}
    for x in targets.values():
        values = decoded[id(x)][1]
        if func.namespace != "c10d" or not torch.equal(
            values, x.dequantize()
        ):  # a broadcast leaves its source unchanged
            x.rewrite_from(values)
        encoded[id(values)] = x
    if func.namespace == "c10d" or schema_of(func).name.startswith(("aten::_foreach", "aten::_fused")):
        # Autograd does not detect the modification of tensors in lists.
        torch.autograd.graph.increment_version(encoded.values())
    return tree_map(lambda x: encoded.get(id(x), x), result)


def _to_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function with an ``out`` argument and encode the results for compressed outputs.

    The function gets decoded copies as outputs: some functions, such as ``torch.kron``, would otherwise write to a
    reshaped copy of a tensor subclass.
    """
    targets = [x for x in tree_leaves(kwargs["out"]) if is_compressed(x)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in targets):
        names = ", ".join(x.variable for x in targets)
        raise RuntimeError(f"functions with out=... arguments don't support automatic differentiation: {names}")
    decoded = {id(x): x.dequantize() for x in targets}
    result = func(*args, **{**kwargs, "out": tree_map(lambda x: decoded.get(id(x), x), kwargs["out"])})
    with torch.inference_mode(False), torch.no_grad():
        for x in targets:
            x.rewrite_from(decoded[id(x)])
        torch.autograd.graph.increment_version(targets)
    encoded = {id(decoded[id(x)]): x for x in targets}
    return tree_map(lambda x: encoded.get(id(x), x), result)


def _set_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Handle ``p.data = values`` by encoding new values of the same shape."""
    target, values = args
    if not is_compressed(target):
        func(target, values.dequantize() if is_compressed(values) else values)
        return
    if values.dtype != target.dtype or values.shape != target.shape or values.device != target.device:
        raise RuntimeError(
            f"{target.variable} is compressed and cannot become {values.dtype} {tuple(values.shape)} "
            f"on {values.device}: decompress_ the model first"
        )
    with torch.no_grad():
        target.copy_(values)


def _apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Handle ``Tensor.apply_``: replace each value by a function of it."""
    target, function = args
    return target.copy_(target.dequantize().apply_(function))


def _share_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move the packed fields to memory shared between processes."""
    for part in args[0].parts:
        for field in part.fields:
            field.share_memory_()
    return args[0]


FALLBACK["operator"] = _on_dense
FALLBACK["out"] = _to_out
METHODS[Tensor.data.__set__] = _set_data  # type: ignore[attr-defined]
METHODS[Tensor.apply_] = _apply
METHODS[Tensor.share_memory_] = _share_memory
