import gc
import sys
import threading
import weakref
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedomc.codec.workspace import Workspace, WorkspaceUse

CPU = torch.device("cpu")
N = 100_000


def test_memory_comes_back_and_is_lent_again() -> None:
    workspace = Workspace(keep=10 * 4 * N)
    first = workspace.empty(N, CPU)
    assert first.dtype is torch.float32 and first.shape == (N,) and first.data_ptr() % 64 == 0
    address = first.data_ptr()
    assert workspace.use().lent >= 4 * N and workspace.use().idle == 0
    part = first[5:7]  # who holds a part holds all of it
    del first
    assert workspace.empty(N, CPU).data_ptr() != address
    part.fill_(3)
    del part
    gc.collect()
    assert workspace.use().lent == 0 and workspace.use().idle >= 8 * N
    held = [workspace.empty(N, CPU) for _ in range(2)]
    assert address in [values.data_ptr() for values in held]


def test_a_piece_is_not_lent_for_much_less() -> None:
    workspace = Workspace(keep=10 * 4 * N)
    large = workspace.empty(2 * N, CPU)
    address = large.data_ptr()
    del large
    assert workspace.empty(N, CPU).data_ptr() != address
    assert workspace.empty(2 * N - 1000, CPU).data_ptr() == address


def test_what_is_idle_is_bounded() -> None:
    workspace = Workspace(keep=3 * 4 * N)
    held = [workspace.empty(N, CPU) for _ in range(5)]
    peak = workspace.use().peak
    del held
    use = workspace.use()
    assert use.lent == 0 and 8 * N <= use.idle <= 12 * N and use.peak == peak >= 20 * N
    workspace.clear()
    assert workspace.use().idle == workspace.use().peak == 0


@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_small_tensors_are_those_of_torch(numel: int) -> None:
    workspace = Workspace(keep=4 * N)
    assert workspace.empty(numel, CPU).shape == (numel,) and workspace.use().peak == 0


@given(st.lists(st.tuples(st.integers(2**15, 2**17), st.integers(0, 9)), max_size=30))
def test_no_two_tensors_share_memory(requests: list[tuple[int, int]]) -> None:
    workspace = Workspace(keep=2**20)
    held: dict[int, torch.Tensor] = {}
    for numel, slot in requests:
        held[slot] = workspace.empty(numel, CPU).fill_(slot)
        assert all(bool((values == at).all()) for at, values in held.items())
    assert workspace.use().lent >= sum(values.nbytes for values in held.values())


def test_several_threads() -> None:
    workspace = Workspace(keep=8 * 4 * N)
    wrong = []

    def work(value: int) -> None:
        for _ in range(200):
            mine = workspace.empty(N // 2, CPU).fill_(value)
            if not bool((mine == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and workspace.use().lent == 0


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("method", ["_take", "_take_back"])
@pytest.mark.parametrize("moment", range(20))
def test_what_interrupts_it_in_its_own_thread(moment: int, method: str, ask: bool) -> None:
    """A signal handler or the garbage collector may drop tensors, and ask for some, before any line."""
    workspace = Workspace(keep=8 * 4 * N)
    held = [workspace.empty(N + 1000 * (12 - i), CPU) for i in range(12)]  # the next idle piece is always too small
    del held[::2]
    asked: list[torch.Tensor] = []
    code, lines = getattr(Workspace, method).__code__, 0

    def at_a_line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code is not code:
            return None
        if event == "line" and (lines := lines + 1) > moment:
            held.clear()
            if ask:
                asked.append(workspace.empty(N, CPU).fill_(-1))
                workspace.use()
        return at_a_line

    before = sys.gettrace()
    sys.settrace(at_a_line)
    try:
        found = [workspace.empty(N + 1000 * i, CPU) for i in range(12)]
    finally:
        sys.settrace(before)
    for i, values in enumerate(found):
        assert values.fill_(i).shape == (N + 1000 * i,)
    assert not held and all(bool((values == i).all()) for i, values in enumerate(found))
    assert all(bool((values == -1).all()) for values in asked)
    del values
    for tensors in (found, asked):
        tensors.clear()
    use = workspace.use()
    assert use.lent == 0 and use.idle == sum(piece.nbytes for piece in workspace._idle)
    workspace.clear()
    assert workspace.use() == WorkspaceUse(0, 0, 0)


def test_what_comes_back_beyond_the_bound_is_given_up_at_once() -> None:
    workspace = Workspace(keep=4 * N)
    held = [workspace.empty(N, CPU) for _ in range(3)]
    pieces = [weakref.ref(piece) for _, piece in workspace._views.values()]
    del held
    assert sum(piece() is not None for piece in pieces) <= 1
