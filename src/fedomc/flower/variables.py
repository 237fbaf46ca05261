"""A variable of a client's reply, and the weighted sum of its changes over clients."""

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
    """A checked variable of a reply, which is decoded only when its values are needed.

    A reply has hundreds of variables. Each holds as few objects as possible, because with more of them the garbage
    collector took as long as checking the replies.

    Attributes:
        held: the returned codes or values, as views of the reply's message. Entropy-coded codes are decoded on each
            access, so that the codes of many replies are never in memory together.
        sent: the codes or values that the client was sent.
        is_update: whether the reply already contains the difference to ``sent``.
    """

    held: Packed | Values | Callable[[], Packed]
    sent: Packed | Values
    is_update: bool

    def read(self) -> Packed | Values:
        """Return the returned codes or values."""
        return self.held() if callable(self.held) else self.held

    def change(self, values: Packed | Values, out: Tensor, start: int) -> Tensor:
        """Write the changes from index ``start`` on, a multiple of ``BLOCK``, to ``out`` and return it.

        Args:
            values: the result of ``read``.
            out: float32, flat.
            start: the index of its first value.
        """
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
        """Add ``weight`` times the changes from index ``start`` on to ``total``, given the result of ``read``."""
        sent, stop = self.sent, start + total.numel()
        if self.is_update:
            assert isinstance(values, Packed)
            values.add_to(total, weight, start)
        elif isinstance(values, Packed) and isinstance(sent, Packed):
            values.add_difference_to(total, sent, weight, start)
        elif isinstance(values, Packed) or isinstance(sent, Packed):
            total.add_(self.change(values, torch.empty_like(total), start), alpha=weight)
        elif total.dtype == torch.float32 and total.numel() >= codec.CHUNK and values.dtype == np.float32:
            codec.add_difference(flat_tensor(values)[start:stop], flat_tensor(sent)[start:stop], weight, total)
        else:  # a model has hundreds of small variables, for which numpy is faster than a call of the codec
            added = total.numpy()
            change = np.subtract(_flat(values)[start:stop], _flat(sent)[start:stop], dtype=added.dtype)
            change *= added.dtype.type(weight)
            added += change


def add_changes(total: Tensor, replies: Sequence[tuple[ReplyVariable, float]]) -> None:
    """Add the weighted changes that clients made to a variable to a flat sum.

    The differences are computed first, value by value, so that the sum is rounded on the scale of the changes.

    Args:
        total: the sum, float32 ``[numel]``, or float64 for dense values of no shorter float.
        replies: the variable in each reply and the reply's weight, in the order of addition.
    """
    read = [(variable, variable.read(), weight) for variable, weight in replies]
    for start in range(0, total.numel(), STRETCH):
        stretch = total[start : start + STRETCH]
        for variable, values, weight in read:
            variable.add_change(values, stretch, weight, start)


def _flat(values: Values) -> Values:
    return values.reshape(-1)
