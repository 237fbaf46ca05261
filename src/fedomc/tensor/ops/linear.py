"""``F.linear``, decoding and multiplying the weight in panels of at most ``PANEL_BYTES``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedomc._torch import apply_untransformed, no_overrides
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.ops.decoded import Saved, autocast_dtype, is_operand, with_autocast, with_decoded_weights
from fedomc.tensor.ops.products import product, project


class _Linear(torch.autograd.Function):
    """Computes ``x W^T + b``; saves the codes of W, and x if W needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: CompressedTensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.weight, ctx.shape = Saved(weight, weight._version), x.shape
        panels = weight.panels()
        if len(panels) == 1:
            return project(x, weight.decode(x.dtype), bias)
        out = x.new_empty(*x.shape[:-1], len(weight))  # [..., rows]
        for start, stop in panels:
            part = None if bias is None else bias[start:stop]
            out[..., start:stop] = project(x, weight.decode_rows(start, stop, x.dtype), part)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors  # a checkpoint computes its forward pass again here, which needs the overrides
        with no_overrides():
            return _gradients(ctx, gradient, x)


_apply = apply_untransformed(_Linear)


def _gradients(ctx: Any, gradient: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias = ctx.needs_input_grad
    rows = gradient if gradient.dim() == 2 else gradient.reshape(-1, gradient.shape[-1])  # [N, out]
    # Double backward needs torch's own product, which is differentiable.
    times_weight, times_x = (_torch_times_weight, torch.mm) if torch.is_grad_enabled() else (_times_weight, product)
    if of_weight and x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    of_rows = times_weight(rows, ctx.weight.load()) if of_x else None
    return (
        of_rows if of_rows is None or len(ctx.shape) == 2 else of_rows.view(ctx.shape),
        times_x(rows.t(), x).to(ctx.weight.tensor.dtype) if of_weight else None,  # [out, in]
        rows.sum(0) if of_bias else None,
    )


def _times_weight(rows: Tensor, weight: CompressedTensor) -> Tensor:
    panels = weight.panels()
    if len(panels) == 1:
        return product(rows, weight.decode(rows.dtype))
    out = rows.new_zeros(len(rows), weight.shape[1], dtype=torch.float32)  # a narrower sum would round at each panel
    for start, stop in panels:
        out += product(rows[:, start:stop], weight.decode_rows(start, stop, rows.dtype))
    return out.to(rows.dtype)


def _torch_times_weight(rows: Tensor, weight: CompressedTensor) -> Tensor:
    result: Tensor = with_decoded_weights(torch.mm, (rows, weight), {}, rows.dtype)
    return result


def linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``F.linear`` in panels if the weight is compressed and the operands fit, otherwise on whole weights."""
    x, weight, bias = _arguments(*args, **kwargs)
    if not (is_compressed(weight) and _fits(x, weight, bias)):
        return with_autocast(func, args, kwargs)  # reports invalid arguments
    dtype = autocast_dtype(weight)
    if dtype is None:
        return _apply(x, weight, bias)
    with torch.autocast(weight.device.type, enabled=False):
        return _apply(x.to(dtype), weight, None if bias is None else bias.to(dtype))


def _fits(x: Tensor, weight: CompressedTensor, bias: Tensor | None) -> bool:
    shape = weight.shape
    if not is_operand(x, weight) or x.dim() == 0 or len(shape) != 2 or 0 in shape or x.shape[-1] != shape[1]:
        return False
    return bias is None or (is_operand(bias, weight) and bias.shape == shape[:1])


def _arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias
