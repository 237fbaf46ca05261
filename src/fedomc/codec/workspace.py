"""Room for decoded weights and for new codes, which is used again and again.

[Note: why not the allocator]
A layer's decoded weight lives for one multiplication. Asked from malloc and given back each time, such pieces of some
megabytes either go back to the system, and every page of the next one must be mapped and zeroed again, or stay between
small long-lived pieces and can never be joined: both the time and the peak of memory of a training step grow several
times. So what was given back is kept here for the next layer. A piece is free again when the last tensor on it is
gone, whoever kept it: nothing can be overwritten while it is still looked at.
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

PANEL_BYTES = 8 * 2**20
"""How much of a weight is decoded at a time."""

_SMALL = 2**15  # what malloc serves well by itself
_LINE = 16  # values of a cache line
_Piece = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True)
class WorkspaceUse:
    """Bytes of scratch memory.

    Attributes:
        lent: held by tensors now.
        idle: kept for the next ones.
        peak: the most that was lent and idle at a time.
    """

    lent: int
    idle: int
    peak: int


class Workspace:
    """Pieces of memory that are lent as tensors and come back by themselves; safe for several threads.

    Args:
        keep: bytes that are kept idle at most.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._idle: list[_Piece] = []  # least recently used first
        self._views: dict[int, tuple[weakref.ref[_Piece], _Piece]] = {}  # what is lent, by the reference's identity
        self._returned: deque[int] = deque()  # of what is lent, what came back since
        self._idle_bytes = self._lent_bytes = self._peak = 0
        self._lock, self._busy = threading.RLock(), False

    def empty(self, numel: int, device: torch.device) -> Tensor:
        """Lend float32 ``[numel]``; on other devices than the CPU, torch's allocator does the same."""
        if numel < _SMALL or device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(numel, dtype=torch.float32, device=device)
        with self._alone() as alone:
            if not alone:
                return torch.empty(numel, dtype=torch.float32, device=device)
            piece = self._take(numel)
            view = piece[:numel]
            reference = weakref.ref(view, self._give_back)
            self._views[id(reference)] = reference, piece
            self._lent_bytes += piece.nbytes
            self._peak = max(self._peak, self._lent_bytes + self._idle_bytes)
        return torch.from_numpy(view)

    def use(self) -> WorkspaceUse:
        """Report the bytes lent and idle."""
        with self._alone():
            return WorkspaceUse(self._lent_bytes, self._idle_bytes, self._peak)

    def clear(self) -> None:
        """Give idle memory back to the system, and forget the peak."""
        with self._alone() as alone:
            if alone:
                self._idle.clear()
                self._idle_bytes = 0
                self._peak = self._lent_bytes

    def forget_lock(self) -> None:
        """Make a new lock: in a forked process nobody is left who could release the old one."""
        self._lock, self._busy = threading.RLock(), False

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Take what came back, and let nobody else in.

        Yields:
            False in the midst of such a context of the same thread, which a signal handler or the garbage collector
            interrupted: nothing may be changed then.
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

    def _take(self, numel: int) -> _Piece:
        """Take the smallest piece that fits without wasting more than a fifth of it, or a new one."""
        best = -1
        for i, piece in enumerate(self._idle):
            if numel <= piece.size <= 1.25 * numel and (best < 0 or piece.size < self._idle[best].size):
                best = i
        if best >= 0:
            piece = self._idle.pop(best)
            self._idle_bytes -= piece.nbytes
            return piece
        unaligned = np.empty(numel + _LINE, np.float32)
        skip = -unaligned.ctypes.data // unaligned.itemsize % _LINE
        return unaligned[skip : skip + numel]

    def _give_back(self, reference: "weakref.ref[_Piece]") -> None:
        self._returned.append(id(reference))  # in one instant; in the midst of another context it stays there
        with self._alone():
            pass

    def _take_back(self) -> None:
        while self._returned:
            _, piece = self._views.pop(self._returned.popleft())
            self._lent_bytes -= piece.nbytes
            self._idle.append(piece)
            self._idle_bytes += piece.nbytes
        while self._idle_bytes > self.keep:
            self._idle_bytes -= self._idle.pop(0).nbytes


workspace = Workspace(keep=3 * PANEL_BYTES)
"""What this process uses."""

os.register_at_fork(after_in_child=workspace.forget_lock)
