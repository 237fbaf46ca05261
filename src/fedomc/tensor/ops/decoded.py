"""Runs functions of torch on whole decoded weights, and saves codes in place of the weights for the backward pass.

[Note: saving the codes, not the weight]
Autograd saves a linear layer's weight for the backward pass, and a decoded copy saved like that would live as long as
the FP32 model. So while such a function runs on decoded weights, a hook looks at each tensor that autograd saves: one
that lies in a decoded weight is replaced by a recipe, the compressed weight and the view's geometry, and decoded
again when the backward pass asks for it. The backward formulas stay those of torch, and with a lossless format every
bit of the training is that of the plain model. A weight that was changed between forward and backward raises, as it
does in torch; torch skips that check for tensors under hooks, so it is made here for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedomc._torch import run_next_in_backward, saved_tensors_hooks, tree_leaves, tree_map
from fedomc.tensor.compressed import CompressedTensor, is_compressed

_CAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts; the first as well without it


class _Decode(torch.autograd.Function):
    """Decodes a weight; the gradient of the values is the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: CompressedTensor) -> Tensor:
        return weight.decode()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass
class Saved:
    """A tensor saved for the backward pass, and its version when it was saved."""

    tensor: Tensor
    version: int

    def load(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it was changed in place since.
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
    """A view of a decoded weight that autograd saved, as the compressed weight and the view's dtype and geometry."""

    dtype: torch.dtype
    geometry: tuple[Any, ...]

    def load(self) -> Tensor:
        weight = super().load()
        assert isinstance(weight, CompressedTensor)
        return weight.decode().to(self.dtype).as_strided(*self.geometry)


@dataclass
class _SavedElsewhere:
    """A tensor that autograd saved under another hook, such as that of a checkpoint."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    def load(self) -> Tensor:
        return self.unpack(self.packed)


def with_decoded_weights(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype = torch.float32
) -> Any:
    """Call a function of torch on decoded weights of some dtype, none of which outlives the call."""
    weights: dict[int, CompressedTensor] = {}  # by address of the decoded values

    def decode(x: Any) -> Any:
        if not is_compressed(x):
            return x
        values: Tensor = _Decode.apply(x)  # type: ignore[no-untyped-call]
        if values.grad_fn is not None:
            # Else the backward pass would come here last, when the gradients of all layers are there.
            run_next_in_backward(values)
        values = values.to(dtype)
        weights[values.untyped_storage().data_ptr()] = x
        return values

    def pack(saved: Tensor) -> Saved | _SavedElsewhere:
        dense = type(saved) is Tensor and saved.layout is torch.strided  # else there may be no storage to ask
        weight = weights.get(saved.untyped_storage().data_ptr()) if dense else None
        if weight is not None:
            geometry = (saved.size(), saved.stride(), saved.storage_offset())
            return _SavedWeight(weight, weight._version, saved.dtype, geometry)
        if outer is not None:
            return _SavedElsewhere(outer[0](saved), outer[1])
        # Detached, with the same version: what a function saves of its own result would keep itself alive.
        return Saved(saved.detach(), saved._version)

    def unpack(saved: Saved | _SavedElsewhere) -> Tensor:
        return saved.load()

    outer = saved_tensors_hooks()

    args, kwargs = tree_map(decode, (args, kwargs))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return func(*args, **kwargs)


def with_autocast(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do the same for functions that autocast runs in its lower precision.

    Autocast would cast the decoded weight, and autograd would save that copy.
    """
    return with_decoded_weights(func, args, kwargs, autocast_dtype(args, kwargs) or torch.float32)


def einsum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``torch.einsum``; of one operand, which may give a view of it, by the dispatcher."""
    if sum(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))) == 1:
        return func(*args, **kwargs)
    return with_autocast(func, args, kwargs)


def autocast_dtype(*operands: Any) -> torch.dtype | None:
    """Return what autocast, if it is on, casts operands of these devices to."""
    device = next(x.device.type for x in tree_leaves(operands) if is_compressed(x))
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_operand(x: Tensor, weight: CompressedTensor) -> bool:
    """Tell whether a tensor can be multiplied with a weight piece by piece: a dense one of a dtype that fits."""
    dtypes = _CAST if torch.is_autocast_enabled(weight.device.type) else _CAST[:1]
    return not is_compressed(x) and x.layout is torch.strided and not x.is_nested and x.dtype in dtypes
