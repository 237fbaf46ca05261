"""``F.linear``: decoded and multiplied by panels, each as many rows of the weight as fit into the bound."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc.ops.whole import Saved, autocast_dtype, with_autocast, with_decoded_weights
from fedomc.scratch import scratch
from fedomc.tensor import CompressedTensor, is_compressed


class _Linear(torch.autograd.Function):
    """``x W^T + b``, saving x and the codes of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: CompressedTensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = Saved(weight, weight._version)
        panels = weight.panels()
        if len(panels) == 1:
            return F.linear(x, weight.decode().to(x.dtype), bias)
        out = x.new_empty(*x.shape[:-1], len(weight))  # [..., rows]
        for start, stop in panels:
            values = weight.decode_rows(start, stop).to(x.dtype)
            out[..., start:stop] = F.linear(x, values, None if bias is None else bias[start:stop])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight.load()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])  # [N, out]
        flat = x.reshape(-1, x.shape[-1])  # [N, in]
        times_weight, outer = _times_weight, _outer
        if torch.is_grad_enabled():  # for a second derivative
            times_weight, outer = _differentiable_times_weight, _differentiable_outer
        return (
            times_weight(rows, weight).view(x.shape) if of_x else None,
            outer(rows, flat) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _times_weight(rows: Tensor, weight: CompressedTensor) -> Tensor:
    panels = weight.panels()
    if len(panels) == 1:
        return torch.mm(rows, weight.decode().to(rows.dtype))
    out = rows.new_zeros(len(rows), weight.shape[1])
    for start, stop in panels:
        out.addmm_(rows[:, start:stop], weight.decode_rows(start, stop).to(rows.dtype))
    return out


def _outer(rows: Tensor, x: Tensor) -> Tensor:
    if rows.dtype is not torch.float32:
        return (rows.t() @ x).float()
    out = scratch.empty(rows.shape[1] * x.shape[1], x.device).view(rows.shape[1], x.shape[1])
    return torch.mm(rows.t(), x, out=out)


def _differentiable_times_weight(rows: Tensor, weight: CompressedTensor) -> Tensor:
    product: Tensor = with_decoded_weights(torch.mm, (rows, weight), {}, rows.dtype)
    return product


def _differentiable_outer(rows: Tensor, x: Tensor) -> Tensor:
    return (rows.t() @ x).float()


def linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``F.linear`` by panels where the weight is what is compressed, and as a whole elsewhere."""
    x, weight, bias = _arguments(*args, **kwargs)
    plain = is_compressed(weight) and weight.dim() == 2 and not is_compressed(x) and not is_compressed(bias)
    if not plain or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return with_autocast(func, args, kwargs)
    dtype = autocast_dtype(weight)
    if dtype is None:
        if x.dtype is not torch.float32 or (bias is not None and bias.dtype is not torch.float32):
            return with_autocast(func, args, kwargs)  # which says what is wrong
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    with torch.autocast(weight.device.type, enabled=False):
        return _Linear.apply(x.to(dtype), weight, None if bias is None else bias.to(dtype))  # type: ignore[no-untyped-call]


def _arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias
