"""Gives memory that a training step has freed back to the system.

[Note: why the heap grows]
The C library keeps what is freed, in case it is needed again. A tensor of 32 MB and more is mapped from the system and
unmapped again; all others are put into the heap, whose free parts can be used only by what fits into them. Codes and
nodes of the graph that live long lie in between. So a backward pass that frees one activation after the other does not
make the process smaller, and what is mapped then adds to all that the heap has ever held at a time.

``malloc_trim`` unmaps the free pages of the heap, wherever they lie. The next tensor there must be mapped again, which
takes time. So it is called only when the process has grown by ``growth`` bytes since it was smallest.
"""

import ctypes
import os
import sys
from collections.abc import Callable

_PATH = "/proc/self/statm"


class Heap:
    """Trims the heap of this process when it has grown; does nothing where the system does not tell its size.

    Args:
        growth: bytes by which the process may grow without being trimmed.
        every: the size is looked up whenever so many bytes were counted.

    Attributes:
        growth: as given.
        every: as given.
    """

    def __init__(self, growth: int, every: int) -> None:
        self.growth, self.every = growth, every
        self._counted = self._smallest = 0
        self._trim = _trim_of_c() if os.path.exists(_PATH) else None

    def count(self, nbytes: int) -> None:
        """Count bytes that were, or are about to be, freed."""
        self._counted += nbytes
        if self._counted < self.every or self._trim is None:
            return
        self._counted = 0
        resident = resident_bytes()
        if resident > self._smallest + self.growth:
            self.trim()
        else:
            self._smallest = min(self._smallest, resident)

    def trim(self) -> None:
        """Give the free pages back now."""
        if self._trim is not None:
            self._trim(0)
            self._smallest = resident_bytes()


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory, on Linux."""
    with open(_PATH, "rb", buffering=0) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _trim_of_c() -> Callable[[int], object] | None:
    """Return ``malloc_trim``, which is of glibc alone."""
    library = None if sys.platform == "win32" else ctypes.CDLL(None)
    trim: Callable[[int], object] | None = getattr(library, "malloc_trim", None)
    return trim


heap = Heap(growth=64 * 2**20, every=16 * 2**20)
"""The heap of this process."""
