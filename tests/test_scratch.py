import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedomc.scratch import Scratch

CPU = torch.device("cpu")
N = 100_000


def test_memory_comes_back_and_is_lent_again() -> None:
    scratch = Scratch(keep=10 * 4 * N)
    first = scratch.empty(N, CPU)
    assert first.dtype is torch.float32 and first.shape == (N,) and first.data_ptr() % 64 == 0
    address = first.data_ptr()
    assert scratch.use().lent >= 4 * N and scratch.use().idle == 0
    part = first[5:7]  # who holds a part holds all of it
    del first
    assert scratch.empty(N, CPU).data_ptr() != address
    part.fill_(3)
    del part
    gc.collect()
    assert scratch.use().lent == 0 and scratch.use().idle >= 8 * N
    held = [scratch.empty(N, CPU) for _ in range(2)]
    assert address in [values.data_ptr() for values in held]


def test_a_piece_is_not_lent_for_much_less() -> None:
    scratch = Scratch(keep=10 * 4 * N)
    large = scratch.empty(2 * N, CPU)
    address = large.data_ptr()
    del large
    assert scratch.empty(N, CPU).data_ptr() != address
    assert scratch.empty(2 * N - 1000, CPU).data_ptr() == address


def test_what_is_idle_is_bounded() -> None:
    scratch = Scratch(keep=3 * 4 * N)
    held = [scratch.empty(N, CPU) for _ in range(5)]
    peak = scratch.use().peak
    del held
    use = scratch.use()
    assert use.lent == 0 and 8 * N <= use.idle <= 12 * N and use.peak == peak >= 20 * N
    scratch.clear()
    assert scratch.use().idle == scratch.use().peak == 0


@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_small_tensors_are_those_of_torch(numel: int) -> None:
    scratch = Scratch(keep=4 * N)
    assert scratch.empty(numel, CPU).shape == (numel,) and scratch.use().peak == 0


@given(st.lists(st.tuples(st.integers(2**15, 2**17), st.integers(0, 9)), max_size=30))
def test_no_two_tensors_share_memory(requests: list[tuple[int, int]]) -> None:
    scratch = Scratch(keep=2**20)
    held: dict[int, torch.Tensor] = {}
    for numel, slot in requests:
        held[slot] = scratch.empty(numel, CPU).fill_(slot)
        assert all(bool((values == at).all()) for at, values in held.items())
    assert scratch.use().lent >= sum(values.nbytes for values in held.values())


def test_several_threads() -> None:
    scratch = Scratch(keep=8 * 4 * N)
    wrong = []

    def work(value: int) -> None:
        for _ in range(200):
            mine = scratch.empty(N // 2, CPU).fill_(value)
            if not bool((mine == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and scratch.use().lent == 0
