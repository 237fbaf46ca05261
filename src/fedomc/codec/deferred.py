"""Encoding on a device that decides for itself, so that the host need not wait for it.

On a CPU the host looks at the largest magnitude of what it encodes: to choose the scale, and to refuse what is not
finite. On a device, looking means waiting for all that was launched before. So the kernels choose the scale there, and
what must not be written is replaced there by what was present; the host learns of it when it looks for other reasons.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedomc.codec import triton_dispatch
from fedomc.codec.elements import FloatElement
from fedomc.codec.layout import SUMS


class Outcome(NamedTuple):
    """The result of encoding or updating values.

    Attributes:
        absmax_bits: the float32 bits of the largest magnitude. They are ``INFINITY_BITS`` or more if a value is not
            finite; the output is then undefined.
        changed: whether any value differs from the decoded one; always true if nothing was decoded.
    """

    absmax_bits: int
    changed: bool


class Deferred(NamedTuple):
    """An outcome on a device, which the host need not wait for.

    Attributes:
        status: int64 ``[2]``: ``Outcome.absmax_bits`` and ``Outcome.changed``.
    """

    status: Tensor

    def outcome(self) -> Outcome:
        """Wait for the device and return the outcome."""
        bits, changed = self.status.tolist()
        return Outcome(bits, bool(changed))


DEVICES = {"cuda"}


def defers(device: torch.device) -> bool:
    """Tell whether the codec decides on a device what it decides on the host elsewhere: on CUDA, with Triton."""
    return device.type in DEVICES and triton_dispatch.is_installed()


def encode_there(
    stretches: Callable[[], Iterable[tuple[int, Tensor, Tensor]]], element: FloatElement, scaled: bool,
    seed: int | None, scale_offset: Tensor,
) -> Deferred:  # fmt: skip
    """Encode a whole variable on a device for which ``defers`` is true, and which chooses the scale.

    Args:
        stretches: yields the index of the first value, the values and the words of each stretch; called twice if
            ``scaled``, as the scale follows from all values.
        element: the number format.
        scaled: whether to choose a power of two as the scale; otherwise it is 1.
        seed: the seed of stochastic rounding; None rounds to nearest.
        scale_offset: float32 ``[2]``; overwritten.

    Returns:
        The outcome.
    """
    e, m, device = element.exponent_bits, element.mantissa_bits, scale_offset.device
    status = torch.zeros(2, dtype=torch.int64, device=device)
    found = torch.zeros_like(status)
    exponent = torch.zeros(1, dtype=torch.int32, device=device)
    for _, values, _ in stretches() if scaled else ():
        torch.ops.fedomc.absmax(values, found.narrow(0, 0, 1))
        torch.maximum(status, found, out=status)
    torch.ops.fedomc.choose_exponent(status, e, m, seed is not None, exponent, scale_offset)
    for start, values, words in stretches():
        sums = torch.empty(0, SUMS, dtype=torch.float64, device=device)
        torch.ops.fedomc.encode_scaled(values, e, m, exponent, seed, start, words, sums, found)
        torch.maximum(status, found, out=status)
    return Deferred(status)


def keep_present(present: Sequence[Tensor], out: Sequence[Tensor], outcome: Deferred) -> None:
    """Write the present fields of a variable over the new ones if those are not finite, or if no value changed."""
    for field, new in zip(present, out, strict=True):
        torch.ops.fedomc.keep(field, outcome.status, new)
