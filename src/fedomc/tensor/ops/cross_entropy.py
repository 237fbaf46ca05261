"""``linear_cross_entropy``: the loss of a language model's head, with the logits of a few classes in memory at a time.

[Note: why slices of classes]
Of 128 tokens and a vocabulary of 262 144, the logits take 134 MB, and their backward pass three times as much. Slices
of tokens, as in ``torch.nn.functional.linear_cross_entropy``, read the whole weight once for each slice, which a
compressed weight is decoded for. Slices of classes read it once in each pass, and decode as much as a slice needs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedomc._torch import no_overrides
from fedomc.tensor.compressed import CompressedTensor
from fedomc.tensor.ops.decoded import Saved
from fedomc.tensor.ops.products import product, project


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, classes: int = 8192, ignore_index: int = -100
) -> Tensor:
    """Compute the mean of ``cross_entropy(linear(x, weight), targets)`` without all logits in memory.

    The backward pass computes logits again, so that the three products take about 1.5 times as long as the two of the
    plain loss; no other memory is held than x, and the gradient of the weight if it is trained.

    Args:
        x: the inputs of the head, ``[N, D]``, of any floating dtype.
        weight: of the head, ``[V, D]``, in the dtype of x, plain or compressed, frozen or trained.
        targets: class numbers, int64 ``[N]``.
        classes: how many classes' logits ``[N, classes]`` are in memory at a time.
        ignore_index: the target that does not count.

    Returns:
        The loss in nats, float32 ``[]``; NaN if no target counts, as in torch.

    Raises:
        ValueError: the shapes do not fit, or ``classes`` is not positive.
        IndexError: a target is not in ``[0, V)``.

    Example:
        >>> x, weight = torch.randn(16, 64), torch.randn(1000, 64)
        >>> loss = fedomc.linear_cross_entropy(x, weight, torch.arange(16), classes=128)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(x @ weight.T, torch.arange(16)))
        True
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} do not fit: they "
            "must be [N, D], [V, D] and [N]"
        )
    if classes < 1:
        raise ValueError(f"classes={classes}: it must be 1 or more")
    counted = targets != ignore_index
    if bool((counted & ((targets < 0) | (targets >= len(weight)))).any()):
        raise IndexError(f"targets has a number outside of [0, {len(weight)}), the rows of the weight")
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, counted, classes)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, counted: Tensor, classes: int) -> Tensor:
        total = x.new_full((len(x),), -torch.inf, dtype=torch.float32)  # the logarithm of all exponentials so far
        chosen = torch.zeros_like(total)  # the logits of the targets
        with no_overrides():
            for start, rows in _slices(weight, classes, x.dtype):
                logits = project(x, rows, None).float()  # [N, rows]
                total = torch.logaddexp(total, logits.logsumexp(1))
                at, column = _inside(targets, start, len(rows))
                chosen[at] = logits[at, column]
        ctx.save_for_backward(x, targets, counted, total)
        ctx.weight, ctx.classes = Saved(weight, weight._version), classes
        return torch.where(counted, total - chosen, 0).sum() / counted.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, targets, counted, total = ctx.saved_tensors
        weight = ctx.weight.load()
        of_each = gradient * counted / counted.sum()  # [N]
        of_x = torch.zeros_like(x, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty(weight.shape, dtype=x.dtype, device=x.device) if ctx.needs_input_grad[1] else None
        with no_overrides():
            for start, rows in _slices(weight, ctx.classes, x.dtype):
                of_logits = project(x, rows, None).float().sub_(total[:, None]).exp_()  # probabilities [N, rows]
                at, column = _inside(targets, start, len(rows))
                of_logits[at, column] -= 1
                scaled = of_logits.mul_(of_each[:, None]).to(x.dtype)
                if of_x is not None:
                    of_x += product(scaled, rows)
                if of_weight is not None:
                    of_weight[start : start + len(rows)] = product(scaled.t(), x)
        return None if of_x is None else of_x.to(x.dtype), of_weight, None, None, None


def _slices(weight: Tensor, classes: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Give the rows of a weight in slices, decoded into scratch memory, with the number of the first."""
    for start in range(0, len(weight), classes):
        stop = min(start + classes, len(weight))
        if isinstance(weight, CompressedTensor):
            yield start, weight.decode_rows(start, stop, dtype)
        else:
            yield start, weight[start:stop].to(dtype)


def _inside(targets: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Return which targets lie in a slice of the classes, and where."""
    [at] = ((targets >= start) & (targets < start + length)).nonzero(as_tuple=True)
    return at, targets[at] - start
