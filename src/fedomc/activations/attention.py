"""Attention that keeps query, key and value alone, which may be packed, and computes the rest again.

[Note: why again]
The backward pass of a fused kernel takes the exponential of the product of query and key, minus the logarithm of its
sum over the keys, and subtracts the sum of the output times its gradient. If it was given decoded inputs and the sums
and the output of exact ones, the probabilities would not add up to 1 and the difference would not cancel; in four bits
the gradient is several times too large. Both are therefore computed from the decoded inputs as well, so that the
gradient is that of attention at these inputs. With dropout, torch's own function runs; see ``operations``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc._torch import is_plain


class _Attention(torch.autograd.Function):
    """Computes attention without dropout; saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[:4]
        again = torch.is_grad_enabled()  # double backward: the results must depend on what was saved
        with torch.enable_grad():
            inputs = [
                x if again or x is None else x.detach().requires_grad_(of_x)
                for x, of_x in zip(saved, needed, strict=True)
            ]
            out = F.scaled_dot_product_attention(*inputs, **ctx.options)
            wanted = [x for x, of_x in zip(inputs, needed, strict=True) if of_x]
            found = list(torch.autograd.grad(out, wanted, gradient, create_graph=again))
        return (*(found.pop(0) if of_x else None for of_x in needed), None)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Do what ``F.scaled_dot_product_attention`` does; its backward pass computes it again if there is no dropout."""
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    inputs: list[Any] = [query, key, value, attn_mask]
    plain = all(x is None or is_plain(x) for x in inputs)
    if dropout_p or not plain or not any(x is not None and x.requires_grad for x in inputs):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        out: Tensor = _Attention.apply(*inputs, options)  # type: ignore[no-untyped-call]
        return out
    dtype = torch.get_autocast_dtype(device)  # the backward pass runs without autocast
    inputs = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in inputs]
    with torch.autocast(device, enabled=False):
        out = _Attention.apply(*inputs, options)  # type: ignore[no-untyped-call]
        return out
