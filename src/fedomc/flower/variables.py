"""One variable of a client's reply, and the sum over clients of what they changed of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedomc import codec
from fedomc.flower.arrays import STRETCH, Values, flat_tensor
from fedomc.methods import Packed


@dataclass(frozen=True, slots=True)
class ReplyVariable:
    """One variable of a reply, checked, and not decoded until its values are needed.

    A reply has hundreds of these. They hold as few objects as possible: with more of them the garbage collector ran so
    often that it took as long as checking the replies.

    Attributes:
        held: what came back, as a view of the reply's message. Codes that were entropy coded are decoded anew on each
            access, so that the codes of many replies are never in memory together.
        sent: what the client had been sent.
        is_update: whether what came back is the difference to ``sent`` already.
    """

    held: Packed | Values | Callable[[], Packed]
    sent: Packed | Values
    is_update: bool

    def read(self) -> Packed | Values:
        """Return what came back."""
        return self.held() if callable(self.held) else self.held

    def change(self, out: Tensor) -> Tensor:
        """Write what the client changed to ``out``, float32 ``[numel]``, and return it."""
        return self.change_from(self.read(), out, 0)

    def change_from(self, values: Packed | Values, out: Tensor, start: int) -> Tensor:
        """Write the changes from ``start`` on, a multiple of the block, given what ``read`` returned."""
        stop = start + out.numel()
        if not isinstance(values, Packed):
            np.copyto(out.numpy(), _flat(values)[start:stop])
        else:
            values.decode(out, start)
        if self.is_update:
            return out
        if isinstance(self.sent, Packed):
            return self.sent.add_to(out, -1.0, start)
        np.subtract(out.numpy(), _flat(self.sent)[start:stop], out=out.numpy())
        return out

    def add_change(self, values: Packed | Values, total: Tensor, weight: float, start: int) -> None:
        """Add ``weight`` times the changes from ``start`` on to ``total``, given what ``read`` returned."""
        sent, stop = self.sent, start + total.numel()
        if self.is_update:
            assert isinstance(values, Packed)
            values.add_to(total, weight, start)
        elif isinstance(values, Packed) and isinstance(sent, Packed):
            values.add_difference_to(total, sent, weight, start)
        elif isinstance(values, Packed) or isinstance(sent, Packed):
            total.add_(self.change_from(values, torch.empty_like(total), start), alpha=weight)
        elif total.dtype == torch.float32 and total.numel() >= codec.CHUNK:
            codec.add_difference(flat_tensor(values)[start:stop], flat_tensor(sent)[start:stop], weight, total)
        else:  # small variables, of which a model has hundreds: calling the codec takes longer than adding in numpy
            added = total.numpy()
            change = np.subtract(_flat(values)[start:stop], _flat(sent)[start:stop], dtype=added.dtype)
            change *= added.dtype.type(weight)
            added += change


def add_changes(total: Tensor, replies: Sequence[tuple[ReplyVariable, float]]) -> None:
    """Add what clients changed of a variable, each times its weight, to a flat sum.

    The difference is taken first, value by value, so that the sum is rounded on the scale of the changes.

    Args:
        total: the sum, float32 ``[numel]`` (or float64, of dense values).
        replies: the variable in each reply, with the reply's weight, in the order in which they are added.
    """
    read = [(variable, variable.read(), weight) for variable, weight in replies]
    for start in range(0, total.numel(), STRETCH):
        stretch = total[start : start + STRETCH]
        for variable, values, weight in read:
            variable.add_change(values, stretch, weight, start)


def _flat(values: Values) -> Values:
    return values.reshape(-1)
