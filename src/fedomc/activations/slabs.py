"""Memory for the codes of activations, apart from that of the activations themselves.

[Note: why not the allocator]
A forward pass allocates an activation, packs it into a quarter of its size and frees it. What is allocated then, be it
codes or a node of the graph, may be put where the activation was, so that the next activation does not fit there: the
process grows as if nothing was packed. Codes are therefore put one after the other into slabs that are mapped from the
system. The tensors in a slab share its storage, so that it is unmapped when the last of them is gone. The gaps that
smaller objects leave in the heap are given back to the system (``codec.heap``). Mapping each activation on its own
would take less memory still, but a page of a new mapping costs time.
"""

import mmap

import torch
from torch import Tensor

SLAB_BYTES = 8 * 2**20
_LINE = 64  # bytes of a cache line


class Slabs:
    """Allocates tensors one after the other in slabs; torch's allocator serves devices other than the CPU."""

    def __init__(self) -> None:
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate an uninitialized tensor ``[length]``."""
        if device.type != "cpu":
            return torch.empty(length, dtype=dtype, device=device)
        nbytes = length * dtype.itemsize
        if self._used + nbytes > len(self._slab):
            self._slab, self._used = _mapped(max(nbytes, SLAB_BYTES)), 0
        room = self._slab[self._used : self._used + nbytes]
        self._used += -(-nbytes // _LINE) * _LINE
        return room.view(dtype)


def _mapped(nbytes: int) -> Tensor:
    """Map memory from the system; it is unmapped with the last tensor in it."""
    mapped = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8)
