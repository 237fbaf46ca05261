"""Matrix products on the faster of torch's two CPU backends.

[Note: oneDNN]
The BLAS that torch uses on x86 restricts AMD processors to instructions of half the vector width. oneDNN, which also
ships with torch, does not: above a certain size it is twice as fast on AMD processors and equally fast on others. It
sums in a different order; ``torch.backends.mkldnn.enabled = False`` (or ``flags``) restores the exact bits of torch's
own product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc._torch import linear_of_onednn

_LEAST_SIZE, _LEAST_PRODUCTS = 8, 2**20  # thresholds above which oneDNN is faster


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x W^T + b`` for x ``[..., in]`` and W ``[out, in]``."""
    rows = x.reshape(-1, x.shape[-1])
    by_onednn = _by_onednn(rows, len(weight)) and (bias is None or bias.shape == (len(weight),))  # no broadcasting
    out = _onednn(rows, weight, bias) if by_onednn else F.linear(rows, weight, bias)
    # Not a view for autograd, so that the output of an autograd function may be modified in place.
    shaped: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))
    return shaped


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a b`` for a ``[M, K]`` and b ``[K, N]``."""
    return _onednn(a, b.t()) if _by_onednn(a, b.shape[1]) else torch.mm(a, b)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    product: Tensor = _LINEAR(_ordered(x), _ordered(weight), bias, "none", [], "")
    return product


def _ordered(x: Tensor) -> Tensor:
    """Copy a matrix whose rows overlap or have gaps, a layout that oneDNN cannot describe."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _by_onednn(a: Tensor, columns: int) -> bool:
    return (
        _LINEAR is not None
        and a.numel() * columns >= _LEAST_PRODUCTS
        and min(*a.shape, columns) >= _LEAST_SIZE
        and a.dtype is torch.float32
        and a.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
    )


_LINEAR = linear_of_onednn()
