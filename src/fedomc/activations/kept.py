"""What stands in for a tensor that autograd saves: the tensor itself, codes, or a bit a value.

[Note: the version of a tensor that is gone]
Autograd raises an error if a saved tensor was changed in place before the backward pass, but does not check tensors
that hooks save. The check is therefore made here. It needs the tensor's version counter and not its memory: a detached
alias shares the counter, and still does after its data are replaced by an empty tensor.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedomc.activations.bits import pack_bits, unpack_bits
from fedomc.codec import absmax_bits
from fedomc.codec.workspace import workspace
from fedomc.methods import Packed

_SAMPLE = 64  # values, to see at once that a tensor is no mask


@dataclass(frozen=True)
class Span:
    """The values of a tensor as a flat one, in the order of its memory if there are no gaps in it.

    Attributes:
        values: ``[n]``, contiguous; a view of the tensor where it is dense.
        size: the size of the tensor.
        stride: its stride in ``values``.
        place: what identifies the values within their storage.
    """

    values: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    place: tuple[Any, ...]

    @classmethod
    def of(cls, x: Tensor) -> "Span":
        """Make the span of a detached tensor; gaps and repetitions are copied away."""
        if _is_dense(x):
            values = x.as_strided((x.numel(),), (1,), x.storage_offset())
            return cls(values, x.size(), x.stride(), (x.dtype, x.storage_offset(), x.numel()))
        copy = x.contiguous()
        place = (x.dtype, x.storage_offset(), x.size(), x.stride())
        return cls(copy.view(-1), x.size(), copy.stride(), place)


def _is_dense(x: Tensor) -> bool:
    """Tell whether a tensor's values lie side by side in memory, in any order of its dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.size(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


class Kept:
    """A tensor that autograd saved.

    Args:
        saved: the tensor.
        by: the operation that saves it, for error messages.
    """

    def __init__(self, saved: Tensor, by: str) -> None:
        self._alias = saved.detach()
        self._version, self._by = saved._version, by

    def load(self) -> Tensor:
        """Return the tensor, decoded into scratch memory if it is packed.

        Raises:
            RuntimeError: it was changed in place since it was saved.
        """
        if self._alias._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"tensor that {self._by} saved is at version {self._alias._version}; expected version {self._version} "
                "instead. Change a copy of it"
            )
        return self._values()

    def _values(self) -> Tensor:
        return self._alias

    def _let_go(self, saved: Tensor) -> None:
        """Drop the memory of the tensor; see the note on its version."""
        self._alias.data = saved.new_empty(0)


class _Flat(Kept, ABC):
    """A tensor whose values are made anew, as a flat one, each time that it is loaded."""

    def __init__(self, saved: Tensor, by: str, span: Span) -> None:
        super().__init__(saved, by)
        self._dtype, self._device, self._numel = saved.dtype, saved.device, saved.numel()
        self._size, self._stride = span.size, span.stride
        self._let_go(saved)

    def _values(self) -> Tensor:
        with torch.no_grad():
            return self.flat().as_strided(self._size, self._stride).to(self._dtype)

    def flat(self) -> Tensor:
        """Decode into scratch memory, as a flat float32 tensor."""
        return self.decode(workspace.empty(self._numel, self._device))

    @abstractmethod
    def decode(self, out: Tensor) -> Tensor:
        """Write the values into ``out``, flat float32."""


class Coded(_Flat):
    """A tensor held as codes, which other saved tensors of the same memory share."""

    def __init__(self, saved: Tensor, by: str, span: Span, packed: Packed) -> None:
        super().__init__(saved, by, span)
        self._packed = packed

    def decode(self, out: Tensor) -> Tensor:
        """Write the values into ``out``, flat float32."""
        return self._packed.decode(out)


class Flags(_Flat):
    """A tensor of two values, 0 and another one, held as a bit a value."""

    def __init__(self, saved: Tensor, by: str, span: Span, flags: Tensor, value: float) -> None:
        super().__init__(saved, by, span)
        self.bits, self._value = pack_bits(flags), value

    @classmethod
    def of_mask(cls, saved: Tensor, by: str, span: Span) -> "Flags | None":
        """Hold a tensor that has no other values than 0 and one other; None for all other tensors."""
        values = span.values
        low, high = values[:_SAMPLE].aminmax()
        if not bool(low) and not bool(high):
            low, high = values.aminmax()
        value = float(high if high > 0 else low)
        if not _has_only(values[:_SAMPLE], value):
            return None
        mask = cls(saved, by, span, values.bool(), value)
        return mask if absmax_bits(mask.flat().sub_(values)) == 0 else None

    @classmethod
    def of_signs(cls, saved: Tensor, by: str, span: Span) -> "Flags":
        """Hold which values are positive, as 1 and 0."""
        return cls(saved, by, span, span.values > 0, 1.0)

    def decode(self, out: Tensor) -> Tensor:
        """Write the values into ``out``, flat float32."""
        values = unpack_bits(self.bits, out)
        return values if self._value == 1 else values.mul_(self._value)


def _has_only(values: Tensor, value: float) -> bool:
    return bool(((values == value) | (values == 0)).all())
