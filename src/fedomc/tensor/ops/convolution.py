"""Convolutions with large weights, decoded in panels along the weight's first dimension."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.ops.decoded import Saved, autocast_dtype, is_operand, with_autocast, with_decoded_weights

CONVOLUTIONS: dict[Callable[..., Any], tuple[int, bool]] = {
    F.conv1d: (1, False),
    F.conv2d: (2, False),
    F.conv3d: (3, False),
    F.conv_transpose1d: (1, True),
    F.conv_transpose2d: (2, True),
    F.conv_transpose3d: (3, True),
}
"""For each function, the number of spatial dimensions and whether the convolution is transposed."""


class _Convolution(torch.autograd.Function):
    """A convolution without bias and with one group, which saves x and the codes of W for the backward pass.

    The first dimension of W indexes output channels, so each panel produces a slice of the output. In a transposed
    convolution it indexes input channels, so each panel consumes a slice of the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: CompressedTensor, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.how = Saved(weight, weight._version), how
        transposed = how[3]
        out: Tensor | None = None
        for start, stop in weight.panels():
            at_x = x[:, start:stop] if transposed else x
            part = torch.ops.aten.convolution(at_x, weight.decode_rows(start, stop, x.dtype), None, *how)
            if transposed:
                out = part if out is None else out.add_(part)
                continue
            if out is None:
                shape, order = (len(part), len(weight), *part.shape[2:]), _memory_format(part)
                out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=order)
            out[:, start:stop] = part
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, how = ctx.weight.load(), ctx.how
        of_x, of_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # double backward
            out = with_decoded_weights(torch.ops.aten.convolution, (x, weight, None, *how), {}, x.dtype)
            inputs = [tensor for tensor, of in ((x, of_x), (weight, of_weight)) if of]
            gradients = list(torch.autograd.grad(out, inputs, gradient, create_graph=True))
            return gradients.pop(0) if of_x else None, gradients.pop(0) if of_weight else None, None
        transposed = how[3]
        x_gradient = torch.zeros_like(x) if of_x else None
        weight_gradient = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if of_weight else None
        for start, stop in weight.panels():
            place = (slice(None), slice(start, stop))
            at_x, at_gradient = (x[place], gradient) if transposed else (x, gradient[place])
            to_x, to_weight, _ = torch.ops.aten.convolution_backward(
                at_gradient, at_x, weight.decode_rows(start, stop, x.dtype), None, *how, (of_x, of_weight, False)
            )
            if x_gradient is not None:
                (x_gradient[place] if transposed else x_gradient).add_(to_x)
            if weight_gradient is not None:
                weight_gradient[start:stop] = to_weight
        return x_gradient, weight_gradient, None


def convolution(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a convolution in panels if the weight has more than one, otherwise on the whole weight."""
    dimensions, transposed = CONVOLUTIONS[func]
    x, weight, bias, stride, padding, output_padding, groups, dilation = (
        _transposed_arguments if transposed else _arguments
    )(*args, **kwargs)
    sizes = [_each(size, dimensions) for size in (stride, padding, dilation, output_padding)]
    plain = groups == 1 and None not in sizes
    if not (plain and is_compressed(weight) and _fits(x, weight, bias, dimensions, transposed)):
        return with_autocast(func, args, kwargs)  # reports invalid arguments
    how = (*sizes[:3], transposed, sizes[3], groups)
    dtype = autocast_dtype(weight)
    out: Tensor = _Convolution.apply(x if dtype is None else x.to(dtype), weight, how)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias.to(out.dtype).view(-1, *[1] * dimensions)


def _fits(x: Tensor, weight: CompressedTensor, bias: Tensor | None, dimensions: int, transposed: bool) -> bool:
    if not (is_operand(x, weight) and x.dim() == weight.dim() == dimensions + 2 and len(weight.panels()) > 1):
        return False
    into, out_of = weight.shape[:2] if transposed else weight.shape[1::-1]
    return x.shape[1] == into and (bias is None or (is_operand(bias, weight) and bias.shape == (out_of,)))


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of a dense tensor."""
    for dimensions, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dimensions and x.is_contiguous(memory_format=order) and not x.is_contiguous():
            return order
    return torch.contiguous_format


def _each(size: Any, dimensions: int) -> list[int] | None:
    """Return one size for each dimension, or None if the argument is neither an integer nor that many integers."""
    each = [size] * dimensions if isinstance(size, int) else list(size)
    return each if len(each) == dimensions and all(isinstance(one, int) for one in each) else None


def _arguments(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, 0, groups, dilation


def _transposed_arguments(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> tuple[Any, ...]:  # fmt: skip
    return input, weight, bias, stride, padding, output_padding, groups, dilation
