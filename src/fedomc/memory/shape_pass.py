"""A forward pass whose activations are packed, on shapes alone: what is held as codes or bits in any format."""

from weakref import ref

import torch
from torch import Tensor

from fedomc.activations.forward_pass import ForwardPass
from fedomc.activations.kept import Kept, Span
from fedomc.activations.operations import Keeping
from fedomc.memory.liveness import StorageTracker
from fedomc.methods import parse_method


class ShapePass(ForwardPass):
    """Packs what a forward pass saves into tensors without values, of the kinds ``codes`` and ``flags``.

    A tensor of the kind ``codes`` has as many values as there are codes, so that its bytes in any format follow.

    Args:
        model: whose forward pass this is.
        tracker: is told their kinds.
    """

    def __init__(self, model: torch.nn.Module, tracker: StorageTracker) -> None:
        super().__init__(model, parse_method("S1E4M3"), "nearest", 0, 0)
        self._tracker = tracker
        self._values: dict[tuple[object, ...], ref[Tensor]] = {}

    def _shrunk(
        self, saved: Tensor, by: str, keeping: Keeping, identity: tuple[int, int], saved_bytes: int
    ) -> Kept | None:
        with torch.no_grad():
            span = Span.of(saved.detach())
            place = (*identity, *span.place)
            found = self._values[place]() if keeping is Keeping.CODES and place in self._values else None
            if found is None:
                codes = keeping is Keeping.CODES
                count = len(span.values) if codes else -(-len(span.values) // 32)  # of four bytes
                found = torch.empty(count, dtype=torch.float32, device=saved.device)
                self._tracker.tag("codes" if codes else "flags", found)
                self._tracker.count(saved_bytes)
                if codes:
                    self._values[place] = ref(found)
            return _Shape(saved.dtype, span, found, self._tracker)


class _Shape(Kept):
    """Stands for codes, which are loaded as a tensor without values."""

    def __init__(self, dtype: torch.dtype, span: Span, held: Tensor, tracker: StorageTracker) -> None:
        self._held, self._span = held, (span.size, span.stride, span.values.numel())
        self._dtype, self._tracker = dtype, tracker

    def load(self) -> Tensor:
        """Return a tensor of the size of the one that was saved."""
        size, stride, numel = self._span
        self._tracker.count(4 * numel)
        with torch.no_grad():
            values = torch.empty(numel, dtype=torch.float32, device=self._held.device)
            return values.as_strided(size, stride).to(self._dtype)
