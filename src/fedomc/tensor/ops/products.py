"""Products of matrices.

[Note: oneDNN]
The BLAS that torch uses on x86 keeps AMD processors to instructions of half the width, and oneDNN, which torch
brings along too, does not: from some size on it is twice as fast there, and as fast elsewhere. Its sums have another
order. ``torch.backends.mkldnn.enabled = False`` (or ``flags``) gives the bits of torch's own product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc._torch import linear_of_onednn

_LEAST_SIZE, _LEAST_PRODUCTS = 8, 2**20  # where oneDNN takes less time


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for ``[..., in]`` and ``[out, in]``."""
    rows = x.reshape(-1, x.shape[-1])
    by_onednn = _by_onednn(rows, len(weight)) and (bias is None or bias.shape == (len(weight),))  # which it takes as is
    out = _onednn(rows, weight, bias) if by_onednn else F.linear(rows, weight, bias)
    # No view to autograd: what an autograd function returns may then be changed in place.
    shaped: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))
    return shaped


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` for ``[M, K]`` and ``[K, N]``."""
    return _onednn(a, b.t()) if _by_onednn(a, b.shape[1]) else torch.mm(a, b)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # its stride is not looked at
    product: Tensor = _LINEAR(_ordered(x), _ordered(weight), bias, "none", [], "")
    return product


def _ordered(x: Tensor) -> Tensor:
    """Copy a matrix whose rows overlap or have gaps, which oneDNN cannot describe."""
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
