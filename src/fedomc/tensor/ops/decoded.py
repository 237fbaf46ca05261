"""Runs torch functions on whole decoded weights, saving codes instead of weights for the backward pass.

[Note: saving the codes, not the weight]
Autograd saves a linear layer's weight for the backward pass. Saving decoded copies would keep the whole FP32 model in
memory. A hook therefore inspects each tensor that autograd saves while such a function runs. A tensor that shares the
memory of a decoded weight is replaced by a recipe, the compressed weight and the view's geometry, and is decoded again
when the backward pass needs it. The backward formulas remain those of torch, and with a lossless format training is
bit-identical to that of the plain model. As in torch, changing a weight between forward and backward raises an error;
torch skips this check for tensors saved through hooks, so it is made here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedomc._torch import run_next_in_backward, saved_tensors_hooks, tree_leaves, tree_map
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.dtypes import DTYPES


class _Decode(torch.autograd.Function):
    """Decodes a weight to a dtype; its backward pass returns the gradient in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: CompressedTensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.decode(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


@dataclass
class Saved:
    """A tensor saved for the backward pass, with its version at that time."""

    tensor: Tensor
    version: int

    def load(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: the tensor has been modified in place since it was saved.
        """
        if self.tensor._version != self.version:
            what = self.tensor.variable if isinstance(self.tensor, CompressedTensor) else "a tensor"
            raise RuntimeError(
                f"{what} was changed in place after the forward pass and before its backward pass "
                f"(version {self.tensor._version}, expected {self.version}). With step_in_backward, run the backward "
                "pass of one forward pass before the next forward pass, or step with an optimizer after all of them"
            )
        return self.tensor


@dataclass
class _SavedWeight(Saved):
    """A saved view of a decoded weight, represented by the compressed weight and the view's dtype and geometry."""

    dtype: torch.dtype
    geometry: tuple[Any, ...]

    def load(self) -> Tensor:
        weight = super().load()
        assert isinstance(weight, CompressedTensor)
        return weight.decode(self.dtype).as_strided(*self.geometry)


@dataclass
class _SavedElsewhere:
    """A tensor saved through an outer hook, such as that of a checkpoint."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    def load(self) -> Tensor:
        return self.unpack(self.packed)


def with_decoded_weights(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None = None
) -> Any:
    """Call a torch function on decoded weights, none of which outlives the call.

    Args:
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        dtype: to which weights are decoded; None is the dtype of each.
    """
    weights: dict[int, CompressedTensor] = {}  # keyed by the address of the decoded values

    def decode(x: Any) -> Any:
        if not is_compressed(x):
            return x
        values: Tensor = _Decode.apply(x, dtype or x.dtype)  # type: ignore[no-untyped-call]
        if values.grad_fn is not None:
            # Otherwise this node would run last in the backward pass, with the gradients of all layers alive.
            run_next_in_backward(values)
        weights[values.untyped_storage().data_ptr()] = x
        return values

    def pack(saved: Tensor) -> Saved | _SavedElsewhere:
        dense = type(saved) is Tensor and saved.layout is torch.strided  # other tensors may have no storage
        weight = weights.get(saved.untyped_storage().data_ptr()) if dense else None
        if weight is not None:
            geometry = (saved.size(), saved.stride(), saved.storage_offset())
            return _SavedWeight(weight, weight._version, saved.dtype, geometry)
        if outer is not None:
            return _SavedElsewhere(outer[0](saved), outer[1])
        # Detach (the version is shared): a function that saves its own result would keep itself alive.
        return Saved(saved.detach(), saved._version)

    def unpack(saved: Saved | _SavedElsewhere) -> Tensor:
        return saved.load()

    outer = saved_tensors_hooks()

    args, kwargs = tree_map(decode, (args, kwargs))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return func(*args, **kwargs)


def with_autocast(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do the same as ``with_decoded_weights`` for functions that autocast runs in lower precision.

    The weights are decoded to the autocast dtype: otherwise autocast would cast them and autograd would save the copy.
    """
    weight = next(x for x in tree_leaves((args, kwargs)) if is_compressed(x))
    return with_decoded_weights(func, args, kwargs, autocast_dtype(weight))


def einsum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``torch.einsum``; with one operand it may return a view, so that case is left to the dispatcher."""
    if sum(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))) == 1:
        return func(*args, **kwargs)
    return with_autocast(func, args, kwargs)


def autocast_dtype(weight: CompressedTensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts a weight, or None if autocast is off for its device."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_operand(x: Tensor, weight: CompressedTensor) -> bool:
    """Tell whether a tensor can be multiplied with a weight in panels: it must be dense and of the same dtype.

    Under autocast, which casts both, it may be any dtype that is cast.
    """
    if is_compressed(x) or x.layout is not torch.strided or x.is_nested:
        return False
    return x.dtype is weight.dtype or (x.dtype in DTYPES and torch.is_autocast_enabled(weight.device.type))
