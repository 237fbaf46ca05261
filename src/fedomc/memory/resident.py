"""How large a process grows: the lifetimes of storages, played through an allocator as glibc's.

[Note: what a process holds]
A process holds more than its tensors. What is freed stays in the heap, and only what fits into a hole can use it;
tensors of 32 MB and more are mapped, and come on top of all that the heap has ever held. On the Conformer of 115.6 M
parameters, with four utterances of ten seconds, tensors take 1572 MB and the process grows by 2107 MB. So the
allocator is played: the best fit among the holes with room for alignment, neighbouring holes merged, large requests
mapped, the end of the heap given back, and the whole heap trimmed where ``codec.heap`` does.

What operators allocate inside themselves makes further holes, of which no shape tells. Between two trims they grow up
to the bytes that ``codec.heap`` leaves alone, and scratch memory that is idle is kept as well. The Conformer uses this
slack up; ``docs/performance.md`` has predictions beside measurements.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fedomc.codec.heap import heap
from fedomc.codec.workspace import workspace

PROGRAM = 25_000_000
"""By how much the first training step makes a process grow beside its tensors: code of torch and oneDNN that is loaded
and compiled when it is first used, and Python's objects. Measured with models of less than 10 MB."""

_SLACK = heap.growth + workspace.keep
"""The bytes of holes and idle scratch memory at most; a small process has at most a third of its size."""

_LARGEST_THRESHOLD = 32 * 2**20
_SMALLEST_THRESHOLD = 128 * 1024
_LARGE, _MAPPED = -1, -2  # places of blocks outside of the heap: mapped for their size, or whatever it is
_LINE, _HEADER, _PAGE = 64, 16, 4096
_ALIGNING = _LINE
"""By how much a hole must be larger than what is put there: torch asks for multiples of 64 as addresses, for which
glibc looks for a block that has one wherever it begins. What was freed between two others is too small for the same."""


class ResidentHeap:
    """The bytes of a process that are in memory, as blocks are allocated and freed.

    Args:
        mapped_from: bytes from which on a block is mapped, until a larger one that was mapped is freed.

    Attributes:
        resident: the bytes now.
        peak: their maximum.
    """

    def __init__(self, mapped_from: int = _SMALLEST_THRESHOLD) -> None:
        self.resident = self.peak = 0
        self._end = self._smallest = self._counted = 0
        self._threshold = mapped_from
        self._holes: list[tuple[int, int]] = []  # size and start, sorted
        self._by_start: dict[int, tuple[int, int]] = {}  # size, and how much of it is in memory
        self._by_end: dict[int, int] = {}

    def allocate(self, nbytes: int) -> tuple[int, int]:
        """Allocate a block and write to all of it; return what ``free`` needs."""
        if nbytes >= self._threshold:
            return _LARGE, self.map(nbytes)[1]
        size = -(-(nbytes + _HEADER) // _LINE) * _LINE
        place = bisect_left(self._holes, (size + _ALIGNING, 0))
        if place < len(self._holes):
            found, start = self._holes[place]
            resident = self._take(found, start)
        else:  # at the end, where a hole may begin already
            start = self._by_end.get(self._end, self._end)
            found = self._end - start
            resident = self._take(found, start) if found else 0
            self._end = start + size
            found = size
        kept = min(resident, found - size)
        if found > size:
            self._put(start + size, found - size, kept)
        self._grow(size - (resident - kept))
        return start, size

    def map(self, nbytes: int) -> tuple[int, int]:
        """Map a block from the system, whatever its size; return what ``free`` needs."""
        size = -(-nbytes // _PAGE) * _PAGE
        self._grow(size)
        return _MAPPED, size

    def free(self, block: tuple[int, int]) -> None:
        """Free a block."""
        start, size = block
        if start < 0:
            self.resident -= size
            if start == _LARGE and size <= _LARGEST_THRESHOLD:
                self._threshold = max(self._threshold, size)
            return
        resident = size
        if start in self._by_end:
            before = self._by_end[start]
            length = start - before
            resident += self._take(length, before)
            start, size = before, size + length
        if start + size in self._by_start:
            length = self._by_start[start + size][0]
            resident += self._take(length, start + size)
            size += length
        if start + size == self._end and size > 2 * self._threshold:
            self._end = start
            self.resident -= resident
        else:
            self._put(start, size, resident)

    def count(self, nbytes: int) -> None:
        """Count bytes as ``codec.heap`` does, and trim where it does."""
        self._counted += nbytes
        if self._counted < heap.every:
            return
        self._counted = 0
        if self.resident > self._smallest + heap.growth:
            for start, (size, resident) in self._by_start.items():
                left = min(resident, _PAGE)
                self.resident -= resident - left
                self._by_start[start] = size, left
            self._smallest = self.resident
        self._smallest = min(self._smallest, self.resident)

    def _grow(self, nbytes: int) -> None:
        self.resident += nbytes
        self.peak = max(self.peak, self.resident)

    def _put(self, start: int, size: int, resident: int) -> None:
        insort(self._holes, (size, start))
        self._by_start[start] = size, resident
        self._by_end[start + size] = start

    def _take(self, size: int, start: int) -> int:
        self._holes.pop(bisect_left(self._holes, (size, start)))
        del self._by_end[start + size]
        return self._by_start.pop(start)[1]


class Block(NamedTuple):
    """A storage: its bytes, its first and last moment, and whether it is mapped whatever its size."""

    nbytes: int
    start: int
    end: int
    is_mapped: bool = False


def peak_resident(blocks: Iterable[Block], counted: Mapping[int, int], moments: int) -> int:
    """Return the largest size of a process that holds some storages, above its size before.

    Args:
        blocks: the storages; those that are empty are ignored.
        counted: the bytes that are counted for trims, by moment.
        moments: the last moment.
    """
    started: dict[int, list[Block]] = {}
    for block in blocks:
        if block.nbytes:
            started.setdefault(block.start, []).append(block)
    process = ResidentHeap(_LARGEST_THRESHOLD)  # building and packing a model has freed large values before
    ended: dict[int, list[tuple[int, int]]] = {}
    for moment in range(moments + 1):
        for block in started.get(moment, ()):
            place = (process.map if block.is_mapped else process.allocate)(block.nbytes)
            ended.setdefault(max(block.start, block.end), []).append(place)
        for place in ended.pop(moment, ()):
            process.free(place)
        if moment in counted:
            process.count(counted[moment])
    return PROGRAM + process.peak + min(_SLACK, process.peak // 3)
