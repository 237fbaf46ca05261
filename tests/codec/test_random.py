import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedomc.codec.random import random_bits

CPU = torch.device("cpu")
KNOWN = [[-1438753951, -1859075753, 1917312890, 843944311], [1305631133, 1198894572, -1840048625, -1933461080]]


def murmur(x: int) -> int:
    """The 32-bit finaliser of MurmurHash3, with unlimited integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ x >> shift) * factor % 2**32
    return x


def oracle(seed: int, counter: int) -> int:
    low, high = murmur(seed % 2**32), murmur(seed >> 32 ^ 0x9E3779B9 ^ counter >> 32)
    word = murmur((murmur(counter % 2**32 ^ low) + high) % 2**32)
    return word - 2**32 if word >> 31 else word


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_same_as_with_unlimited_integers(seed: int, start: int) -> None:
    start = start // 2**32 * 2**32 + min(start % 2**32, 2**32 - 5)
    assert random_bits(seed, start, 5, CPU).tolist() == [oracle(seed, start + i) for i in range(5)]


def test_known_values() -> None:
    assert random_bits(0, 0, 4, CPU).tolist() == KNOWN[0]
    assert random_bits(2**63 + 12345, 2**31 - 2, 4, CPU).tolist() == KNOWN[1]


@given(st.integers(0, 2**64 - 1), st.integers(0, 3000), st.integers(1, 500))
def test_a_stretch_is_part_of_the_whole(seed: int, start: int, count: int) -> None:
    assert torch.equal(random_bits(seed, start, count, CPU), random_bits(seed, 0, 3500, CPU)[start : start + count])


@pytest.mark.parametrize("other", [(1, 0), (2**32, 0), (0, 2**32), (0, 7 * 2**32)])
def test_seed_and_counter_words_all_count(other: tuple[int, int]) -> None:
    n = 10_000
    agree = (random_bits(0, 0, n, CPU) == random_bits(*other, n, CPU)).sum()
    assert agree <= 1


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_every_bit_is_fair_and_unrelated_to_the_next_draw(seed: int) -> None:
    n = 100_000
    words = random_bits(seed, 0, n, CPU)
    bits = ((words[:, None] >> torch.arange(32)) & 1).double()  # [n, 32]
    sigma = 0.5 / n**0.5
    assert (bits.mean(0) - 0.5).abs().max() < 5 * sigma
    for lag in (1, 32, 1024):
        assert ((bits[lag:] == bits[:-lag]).double().mean(0) - 0.5).abs().max() < 5 * sigma * 1.01
