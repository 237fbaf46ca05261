import ctypes
import sys

import pytest

from fedomc.codec import heap
from fedomc.codec.heap import Heap, resident_bytes

MB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says how much memory a process has")


@pytest.mark.parametrize(
    ("sizes", "trims"),
    [
        ([100, 110, 120, 130], [0]),  # the first time, as it never was smaller
        ([100, 151, 140], [0, 1]),
        ([100, 40, 80, 91, 91], [0, 3]),  # since it was smallest
        ([100, 151, 202, 253], [0, 1, 2, 3]),
    ],
)
def test_the_heap_is_trimmed_when_the_process_has_grown(
    sizes: list[int], trims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    subject = Heap(growth=50, every=1)
    for step, size in enumerate(sizes):
        monkeypatch.setattr(heap, "resident_bytes", lambda size=size: size)
        monkeypatch.setattr(subject, "_trim", lambda _, step=step: found.append(step))
        subject.count(1)
    assert found == trims


def test_the_size_is_looked_up_every_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr(heap, "resident_bytes", lambda: looked.append(1) or 0)
    subject = Heap(growth=50, every=100)
    monkeypatch.setattr(subject, "_trim", print)
    for _ in range(10):
        subject.count(30)
    assert len(looked) == 2
    monkeypatch.setattr(subject, "_trim", None)  # another C library or system
    subject.count(1000)
    assert len(looked) == 2


@linux
def test_what_was_freed_between_what_lives_is_given_back() -> None:
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        pytest.skip("the C library is not glibc")
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = 100_000  # less than what malloc maps
    pieces = [library.malloc(size) for _ in range(2000)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for place, piece in enumerate(pieces):
        if place % 50:
            library.free(piece)
    before = resident_bytes()
    Heap(growth=MB, every=1).count(1)
    assert before - resident_bytes() > 150 * MB
    for piece in pieces[::50]:
        library.free(piece)
