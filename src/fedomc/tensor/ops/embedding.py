"""``F.embedding``, decoding only the rows that are looked up and small gaps between them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.ops.decoded import with_decoded_weights

_GAP = 2**14
"""The gap between two rows, in values, that takes as long to decode as starting a new range."""


class _Embedding(torch.autograd.Function):
    """Looks up rows of a weight; the backward pass does not need the weight's values."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: CompressedTensor, padding: int, by_frequency: bool) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.how = (len(weight), padding, by_frequency)
        rows, places = torch.unique(indices, return_inverse=True)  # [U], sorted; like indices
        if len(rows) and not (0 <= int(rows[0]) and int(rows[-1]) < len(weight)):
            raise IndexError(
                f"{weight.variable} has rows 0 to {len(weight) - 1}: no row {int(rows[0 if rows[0] < 0 else -1])}"
            )
        values = torch.empty(len(rows), weight.shape[1], dtype=weight.dtype, device=weight.device)  # [U, D]
        for begin, end in _runs(rows, weight.shape[1], weight.panel_rows):
            first, last = int(rows[begin]), int(rows[end - 1])
            decoded = weight.decode_rows(first, last + 1, weight.dtype)
            torch.index_select(decoded, 0, rows[begin:end] - first, out=values[begin:end])
        return values[places]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(gradient, indices, *ctx.how), None, None


def _runs(rows: Tensor, width: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Split sorted row indices into ranges without large gaps that span at most one panel."""
    begin, listed = 0, rows.tolist()
    for i in range(1, len(listed) + 1):
        if i == len(listed) or (listed[i] - listed[i - 1]) * width > _GAP or listed[i] - listed[begin] >= max_rows:
            yield begin, i
            begin = i


def embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``F.embedding`` on the rows looked up; rare options (``max_norm``, ``sparse``) decode the whole weight."""
    indices, weight, padding, max_norm, by_frequency, sparse = _arguments(*args, **kwargs)
    if max_norm is not None:  # modifies the weight, which the fallback encodes again
        return func(*args, **kwargs)
    plain = is_compressed(weight) and weight.dim() == 2 and not is_compressed(indices)
    if not plain or sparse or indices.dtype not in (torch.int32, torch.int64):
        return with_decoded_weights(func, args, kwargs)
    padding = -1 if padding is None else padding + len(weight) if padding < 0 else padding
    return _Embedding.apply(indices, weight, padding, by_frequency)  # type: ignore[no-untyped-call]


def _arguments(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Any, ...]:
    return input, weight, padding_idx, max_norm, scale_grad_by_freq, sparse
