"""Room for decoded weights and for gradients, which is used again and again.

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
class ScratchUse:
    """Bytes of scratch memory.

    Attributes:
        lent: held by tensors now.
        idle: kept for the next ones.
        peak: the most that was lent and idle at a time.
    """

    lent: int
    idle: int
    peak: int


class Scratch:
    """Pieces of memory that are lent as tensors and come back by themselves; safe for several threads.

    Args:
        keep: bytes that are kept idle at most.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._idle: list[_Piece] = []  # least recently used first
        self._lent = self._peak = 0
        self._lock = threading.RLock()  # a finalizer may run while this thread holds it

    def empty(self, numel: int, device: torch.device) -> Tensor:
        """Lend float32 ``[numel]``; on other devices than the CPU, torch's allocator does the same."""
        if device.type != "cpu" or numel < _SMALL or torch.compiler.is_compiling():
            return torch.empty(numel, device=device)
        with self._lock:
            piece = self._take(numel)
            self._lent += piece.nbytes
            self._peak = max(self._peak, self._lent + self._idle_bytes())
        view = piece[:numel]
        weakref.finalize(view, self._give_back, piece).atexit = False
        return torch.from_numpy(view)

    def use(self) -> ScratchUse:
        """Report the bytes lent and idle."""
        with self._lock:
            return ScratchUse(self._lent, self._idle_bytes(), self._peak)

    def clear(self) -> None:
        """Give idle memory back to the system, and forget the peak."""
        with self._lock:
            self._idle.clear()
            self._peak = self._lent

    def forget_lock(self) -> None:
        """Make a new lock: in a forked process nobody is left who could release the old one."""
        self._lock = threading.RLock()

    def _take(self, numel: int) -> _Piece:
        """Take the smallest piece that fits without wasting more than a fifth of it, or a new one."""
        fitting = [piece for piece in self._idle if numel <= piece.size <= 1.25 * numel]
        if not fitting:
            unaligned = np.empty(numel + _LINE, np.float32)
            skip = -unaligned.ctypes.data // unaligned.itemsize % _LINE
            return unaligned[skip : skip + numel]
        best = min(fitting, key=len)
        self._idle = [piece for piece in self._idle if piece is not best]
        return best

    def _give_back(self, piece: _Piece) -> None:
        with self._lock:
            self._lent -= piece.nbytes
            if piece.nbytes <= self.keep:
                self._idle.append(piece)
            while self._idle_bytes() > self.keep:
                self._idle.pop(0)

    def _idle_bytes(self) -> int:
        return sum(piece.nbytes for piece in self._idle)


scratch = Scratch(keep=3 * PANEL_BYTES)
"""What this process uses."""

os.register_at_fork(after_in_child=scratch.forget_lock)
