"""The functions that use a whole compressed weight for one moment and keep only its codes for the backward pass.

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
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from fedomc.tensor import FUNCTIONS, CompressedTensor


class _Decode(torch.autograd.Function):
    """Decode a weight; its gradient is that of the decoded values."""

    @staticmethod
    def forward(ctx: Any, weight: CompressedTensor) -> Tensor:
        return weight.dequantize()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass
class _Saved:
    """A tensor that autograd saved: itself, or the compressed weight and the geometry of a view of its values."""

    tensor: Tensor
    version: int
    geometry: tuple[Any, ...] | None

    def load(self) -> Tensor:
        if self.tensor._version != self.version:
            what = self.tensor.variable if isinstance(self.tensor, CompressedTensor) else "a tensor"
            raise RuntimeError(
                f"{what} was changed in place after the forward pass and before its backward pass "
                f"(version {self.tensor._version}, expected {self.version}). With step_in_backward, run the backward "
                "pass of one forward pass before the next forward pass, or step with an optimizer after all of them"
            )
        if self.geometry is None:
            return self.tensor
        assert isinstance(self.tensor, CompressedTensor)
        return self.tensor.dequantize().as_strided(*self.geometry)


def with_decoded_weights(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch on decoded weights, none of which outlives the call."""
    weights: dict[int, CompressedTensor] = {}  # by address of the decoded values

    def decode(x: Any) -> Any:
        if not isinstance(x, CompressedTensor):
            return x
        values: Tensor = _Decode.apply(x)  # type: ignore[no-untyped-call]
        weights[values.untyped_storage().data_ptr()] = x
        return values

    def pack(saved: Tensor) -> _Saved:
        weight = weights.get(saved.untyped_storage().data_ptr()) if type(saved) is Tensor else None
        if weight is None:
            return _Saved(saved, saved._version, None)
        return _Saved(weight, weight._version, (saved.size(), saved.stride(), saved.storage_offset()))

    args, kwargs = tree_map(decode, (args, kwargs))
    with torch.autograd.graph.saved_tensors_hooks(pack, _Saved.load):
        return func(*args, **kwargs)


def _embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    max_norm = kwargs.get("max_norm", args[3] if len(args) > 3 else None)
    if max_norm is not None:  # writes to the weight, which the dispatcher encodes again
        return func(*args, **kwargs)
    return with_decoded_weights(func, args, kwargs)


def _setitem(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    target, index, value = args
    if not isinstance(target, CompressedTensor):
        dense = value.dequantize() if isinstance(value, CompressedTensor) else value
        func(target, index, dense)
        return
    values = target.dequantize()
    values[index] = value.dequantize() if isinstance(value, CompressedTensor) else value
    target.copy_(values)


FUNCTIONS.update(
    dict.fromkeys(
        (
            F.linear,
            F.bilinear,
            F.conv1d,
            F.conv2d,
            F.conv3d,
            F.conv_transpose1d,
            F.conv_transpose2d,
            F.conv_transpose3d,
            F.multi_head_attention_forward,
            torch.matmul,
            torch.mm,
            torch.bmm,
            torch.addmm,
            torch.baddbmm,
            torch.einsum,
            Tensor.matmul,
            Tensor.__matmul__,
            Tensor.__rmatmul__,
        ),
        with_decoded_weights,
    )
)
FUNCTIONS[F.embedding] = _embedding
FUNCTIONS[Tensor.__setitem__] = _setitem
