"""A pool of reusable scratch buffers for decoded weights and new codes.

[Note: why not the allocator]
A layer's decoded weight lives only for one multiplication. If such buffers of several megabytes were allocated and
freed with malloc each time, they would either return to the system, so that every page of the next buffer must be
mapped and zeroed again, or remain as fragments between small long-lived allocations. Both the time and the peak memory
of a training step would grow severalfold. The pool therefore keeps freed buffers for the next layer. A buffer becomes
free when the last tensor that uses it is gone, whoever holds it, so it cannot be overwritten while in use.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedomc.codec.heap import heap

PANEL_BYTES = 8 * 2**20
"""The maximum size of the part of a weight that is decoded at a time."""

_SMALL = 2**15  # float32 values; malloc handles smaller buffers well
_LINE = 16  # values per cache line
_Piece = np.ndarray[tuple[int], np.dtype[np.float32]]
_View = _Piece
_ITEM = 4  # bytes of a float32, in which pieces are counted


@dataclass(frozen=True)
class WorkspaceUse:
    """The size of the scratch memory, in bytes.

    Attributes:
        lent: bytes currently used by tensors.
        idle: bytes kept for reuse.
        peak: the maximum of ``lent + idle`` so far.
    """

    lent: int
    idle: int
    peak: int


class Workspace:
    """A thread-safe pool of buffers that are lent as tensors and return to the pool when the tensors are gone.

    Args:
        keep: the maximum number of idle bytes.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._idle: list[_Piece] = []  # least recently used first
        self._views: dict[int, tuple[weakref.ref[_View], _Piece]] = {}  # lent buffers, by id of the weak reference
        self._returned: deque[int] = deque()  # ids of lent buffers whose tensors are gone
        self._idle_bytes = self._lent_bytes = self._peak = 0
        self._lock, self._busy = threading.RLock(), False

    def empty(
        self, numel: int, device: torch.device, dtype: torch.dtype = torch.float32, *, exact: bool = False
    ) -> Tensor:
        """Lend an uninitialized tensor; torch's allocator serves small sizes and devices other than the CPU.

        Args:
            numel: how many values.
            device: the device of the tensor.
            dtype: float32, int32, bfloat16 or float16.
            exact: do not lend a larger buffer; for tensors that may live long.
        """
        size = -(-numel * dtype.itemsize // _ITEM)
        if size < _SMALL or device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(numel, dtype=dtype, device=device)
        heap.count(_ITEM * size)
        with self._lock:
            if self._busy:  # see _alone; a context manager of its own would double the time of this method
                return torch.empty(numel, dtype=dtype, device=device)
            self._busy = True
            try:
                self._take_back()
                piece = self._take(size, size if exact else int(1.25 * size))
                view: _View = piece[:size]
                reference = weakref.ref(view, self._give_back)
                self._views[id(reference)] = reference, piece
                self._lent_bytes += piece.nbytes
                self._peak = max(self._peak, self._lent_bytes + self._idle_bytes)
            finally:
                self._busy = False
        lent = torch.from_numpy(view)
        return lent if dtype is torch.float32 else lent.view(dtype)[:numel]

    def use(self) -> WorkspaceUse:
        """Report how many bytes are lent and idle."""
        with self._alone():
            return WorkspaceUse(self._lent_bytes, self._idle_bytes, self._peak)

    def clear(self) -> None:
        """Release idle buffers to the system and reset the peak."""
        with self._alone() as alone:
            if alone:
                self._idle.clear()
                self._idle_bytes = 0
                self._peak = self._lent_bytes

    def forget_lock(self) -> None:
        """Replace the lock: in a forked process, the thread that held the old one does not exist."""
        self._lock, self._busy = threading.RLock(), False

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Lock the pool and collect returned buffers.

        Yields:
            False if the same thread already holds the pool, because a signal handler or the garbage collector
            interrupted it; nothing may be changed then.
        """
        with self._lock:
            if self._busy:
                yield False
                return
            try:
                self._busy = True
                self._take_back()
                yield True
            finally:
                self._busy = False

    def _take(self, numel: int, most: int) -> _Piece:
        """Take the smallest idle buffer of ``numel`` to ``most`` values, or allocate a new one."""
        best = -1
        for i, piece in enumerate(self._idle):
            if numel <= piece.size <= most and (best < 0 or piece.size < self._idle[best].size):
                best = i
        if best >= 0:
            piece = self._idle.pop(best)
            self._idle_bytes -= piece.nbytes
            return piece
        unaligned = np.empty(numel + _LINE, np.float32)
        skip = -unaligned.ctypes.data // unaligned.itemsize % _LINE
        return unaligned[skip : skip + numel]

    def _give_back(self, reference: "weakref.ref[_View]") -> None:
        self._returned.append(id(reference))  # atomic; if the pool is busy, it is collected later
        with self._lock:
            if not self._busy:
                self._busy = True
                try:
                    self._take_back()
                finally:
                    self._busy = False

    def _take_back(self) -> None:
        while self._returned:
            _, piece = self._views.pop(self._returned.popleft())
            self._lent_bytes -= piece.nbytes
            self._idle.append(piece)
            self._idle_bytes += piece.nbytes
        while self._idle_bytes > self.keep:
            self._idle_bytes -= self._idle.pop(0).nbytes


workspace = Workspace(keep=3 * PANEL_BYTES)
"""The pool of this process."""

os.register_at_fork(after_in_child=workspace.forget_lock)
