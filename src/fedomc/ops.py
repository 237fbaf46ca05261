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
    """A tensor that autograd saved, as it is, and its version then."""

    tensor: Tensor
    version: int

    def load(self) -> Tensor:
        if self.tensor._version != self.version:
            what = self.tensor.variable if isinstance(self.tensor, CompressedTensor) else "a tensor"
            raise RuntimeError(
                f"{what} was changed in place after the forward pass and before its backward pass "
                f"(version {self.tensor._version}, expected {self.version}). With step_in_backward, run the backward "
                "pass of one forward pass before the next forward pass, or step with an optimizer after all of them"
            )
        return self.tensor


@dataclass
class _SavedWeight(_Saved):
    """A view of a decoded weight that autograd saved, as the compressed weight and the view's geometry."""

    geometry: tuple[Any, ...]

    def load(self) -> Tensor:
        weight = super().load()
        assert isinstance(weight, CompressedTensor)
        return weight.dequantize().as_strided(*self.geometry)


@dataclass
class _SavedElsewhere:
    """A tensor that autograd saved under another hook, such as that of a checkpoint."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    def load(self) -> Tensor:
        return self.unpack(self.packed)


def with_decoded_weights(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch on decoded weights, none of which outlives the call."""
    weights: dict[int, CompressedTensor] = {}  # by address of the decoded values

    def decode(x: Any) -> Any:
        if not isinstance(x, CompressedTensor):
            return x
        values: Tensor = _Decode.apply(x)  # type: ignore[no-untyped-call]
        weights[values.untyped_storage().data_ptr()] = x
        return values

    def pack(saved: Tensor) -> _Saved | _SavedElsewhere:
        weight = weights.get(saved.untyped_storage().data_ptr()) if type(saved) is Tensor else None
        if weight is not None:
            geometry = (saved.size(), saved.stride(), saved.storage_offset())
            return _SavedWeight(weight, weight._version, geometry)
        if outer is not None:
            return _SavedElsewhere(outer[0](saved), outer[1])
        return _Saved(saved, saved._version)

    def unpack(saved: _Saved | _SavedElsewhere) -> Tensor:
        return saved.load()

    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    args, kwargs = tree_map(decode, (args, kwargs))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return func(*args, **kwargs)


def _embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    max_norm = kwargs.get("max_norm", args[3] if len(args) > 3 else None)
    if max_norm is not None:  # writes to the weight, which the dispatcher encodes again
        return func(*args, **kwargs)
    return with_decoded_weights(func, args, kwargs)


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
            torch.lstm,
            torch.gru,
            torch.rnn_tanh,
            torch.rnn_relu,
            torch.lstm_cell,
            torch.gru_cell,
            torch.rnn_tanh_cell,
            torch.rnn_relu_cell,
            Tensor.matmul,
            Tensor.__matmul__,
            Tensor.__rmatmul__,
        ),
        with_decoded_weights,
    )
)
FUNCTIONS[F.embedding] = _embedding
