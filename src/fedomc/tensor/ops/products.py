"""Matrix products on the faster of torch's two CPU backends, chosen by processor and shape.

[Note: which backend]
torch computes products with its BLAS, which on x86 is Intel's MKL, and also ships oneDNN. Which is faster depends on
the processor and on the shape; ``python -m benchmarks.products`` compares both with what the rule picks.

- Intel's processors (measured on a Xeon with AVX-512): MKL, except where it copies one operand for few rows of the
  other: for ``x W^T``, which reads W across its rows, with 4 to 200 rows x and a large or narrow W, and for the other
  layouts with 64 to 200 rows and a very large matrix.
- Others with AVX2 and without AVX-512 (measured on an AMD EPYC of the third generation): both have vectors of the same
  width. MKL is faster for small and medium sizes, by up to 2.8 times; oneDNN for ``x W^T`` with a large W, for sums of
  few terms, and for few rows of a very wide result.
- All others (measured on AMD with AVX-512): MKL uses half the vector width or less there, so that oneDNN is twice as
  fast above a certain size.

The rule depends on nothing but processor and shape, so that a run gives the same bits twice. The two backends sum in
different orders. ``FEDOMC_PRODUCTS`` (``auto``, ``blas`` or ``onednn``), or ``use``, fixes the choice: with ``blas``
the bits are those of torch's own product. ``torch.backends.mkldnn.enabled = False`` (or ``flags``) does the same.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc._torch import linear_of_onednn, processor_name

BACKENDS = ("auto", "blas", "onednn")

_LEAST_SIZE, _LEAST_PRODUCTS = 8, 2**20  # thresholds above which oneDNN is faster where MKL's vectors are narrow


_backend = "auto"


def use(backend: str) -> None:
    """Set the backend of all products on the CPU: ``auto`` (the rule above), ``blas`` or ``onednn``.

    Raises:
        ValueError: there is no such backend, or torch was built without oneDNN.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"products on {backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "onednn" and _LINEAR is None:
        raise ValueError("products on 'onednn': this torch was built without it, use auto or blas")
    _backend = backend


def backend() -> str:
    """Return the backend of products on the CPU that is set: ``auto``, ``blas`` or ``onednn``."""
    return _backend


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x W^T + b`` for x ``[..., in]`` and W ``[out, in]``."""
    columns = weight.shape[0]
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    by_onednn = _by_onednn(rows, columns, True) and (bias is None or bias.shape == (columns,))  # no broadcasting
    out = _onednn(rows, weight, bias) if by_onednn else F.linear(rows, weight, bias)
    if x.dim() == 2:
        return out
    # Not a view for autograd, so that the output of an autograd function may be modified in place.
    shaped: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], columns))
    return shaped


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a b`` for a ``[M, K]`` and b ``[K, N]``."""
    return _onednn(a, b.t()) if _by_onednn(a, b.shape[1], b.stride(1) > 1) else torch.mm(a, b)


def onednn_is_faster(rows: int, inner: int, columns: int, *, across: bool, processor: str | None = None) -> bool:
    """Tell for which float32 products ``[rows, inner] [inner, columns]`` the rule picks oneDNN.

    Args:
        rows: the rows of the left operand.
        inner: its columns.
        columns: the columns of the right operand.
        across: whether the right operand is the transpose of a contiguous matrix, as W in ``x W^T``.
        processor: ``Intel``, ``AVX2`` or ``other``, as in the note; None asks for this one.
    """
    processor = processor or PROCESSOR
    if processor == "other":
        return rows * inner * columns >= _LEAST_PRODUCTS and min(rows, inner, columns) >= _LEAST_SIZE
    if processor == "AVX2":
        if across:
            return rows >= 8 and inner * columns >= 2**21
        few_terms = 8 <= inner <= 32 and rows * columns >= 2**21
        return few_terms or (8 <= rows <= 256 and inner >= 512 and columns >= 4096)
    values, narrow = inner * columns, inner >= 1024 and columns <= 128
    if not across:
        return 64 < rows < 200 and values >= 2**22
    if rows < 16:
        return rows >= 4 and values >= (2**20 if rows >= 8 else 2**23)
    if rows < 32:
        return narrow or values >= 2**20
    if rows < 200:
        return narrow or (inner >= 1024 and values >= 2**21)
    return inner >= 4096 and columns <= 64


def _by_onednn(a: Tensor, columns: int, across: bool) -> bool:
    rows, inner = a.shape
    if _backend == "blas" or not (_backend == "onednn" or onednn_is_faster(rows, inner, columns, across=across)):
        return False
    if _LINEAR is None or not (rows and inner and columns) or not torch.backends.mkldnn.enabled:
        return False
    return a.dtype is torch.float32 and a.device.type == "cpu"


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    product: Tensor = _LINEAR(_ordered(x), _ordered(weight), bias, "none", [], "")
    return product


def _ordered(x: Tensor) -> Tensor:
    """Copy a matrix whose rows overlap or have gaps, a layout that oneDNN cannot describe."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _kind_of_processor() -> str:
    if processor_name().startswith("Intel"):
        return "Intel"
    return "AVX2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "other"


_LINEAR = linear_of_onednn()
PROCESSOR = _kind_of_processor()
"""The kind of this processor: ``Intel``, ``AVX2`` (another one, without AVX-512) or ``other``."""

use(os.environ.get("FEDOMC_PRODUCTS", "auto"))
