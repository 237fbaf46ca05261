import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedomc.codec.random import random_bits

CPU = torch.device("cpu")
KNOWN = [[-377933951, 1733808308, -1223765465, 511481762], [-1217954665, -1580089264, 1113808300, -2065219597]]


def murmur(x: int) -> int:
    """The 32-bit finaliser of MurmurHash3, with unlimited integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ x >> shift) * factor % 2**32
    return x


def oracle(seed: int, index: int) -> int:
    block, row, lane = index // 1024, index % 1024 // 32, index % 32
    low, high = murmur(seed % 2**32), murmur(seed >> 32 ^ 0x9E3779B9)
    first, period = 1024 * block % 2**32, murmur(((1024 * block >> 32) + high) % 2**32)
    lane_word = murmur((murmur((first + lane) % 2**32 ^ low) + period) % 2**32)
    row_word = murmur((murmur(32 + row ^ high) + low) % 2**32)
    word = (lane_word ^ row_word) * 0x9E3779B1 % 2**32
    word = (word ^ word >> 15) * 0x85EBCA77 % 2**32
    return word - 2**32 if word >> 31 else word


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**30), st.integers(0, 1500))
def test_same_as_with_unlimited_integers(seed: int, block: int, index: int) -> None:
    bits = random_bits(seed, 1024 * block, index + 1, CPU)
    assert bits[index] == oracle(seed, 1024 * block + index)


def test_known_values() -> None:
    assert random_bits(0, 0, 4, CPU).tolist() == KNOWN[0]
    assert random_bits(2**63 + 12345, 2**32 - 1024, 4, CPU).tolist() == KNOWN[1]


def test_the_specification_has_the_same_values() -> None:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    section = text[text.index("## Random bits") :]
    written = [int(word, 16) for word in re.findall(r"0x[0-9A-F]{8}", section[section.index("For seed 0") :])[:8]]
    assert written == [value % 2**32 for row in KNOWN for value in row]


@given(st.integers(0, 2**64 - 1), st.integers(0, 5), st.integers(1, 1500))
def test_a_stretch_is_part_of_the_whole(seed: int, block: int, count: int) -> None:
    start = 1024 * block
    assert torch.equal(random_bits(seed, start, count, CPU), random_bits(seed, 0, 7000, CPU)[start : start + count])


@pytest.mark.parametrize("other", [(1, 0), (2**32, 0), (0, 2**32), (0, 7 * 2**32)])
def test_seed_and_counter_words_all_count(other: tuple[int, int]) -> None:
    n = 10_000
    agree = (random_bits(0, 0, n, CPU) == random_bits(*other, n, CPU)).sum()
    assert agree <= 1


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_the_bits_that_are_used_are_fair_and_unrelated_to_those_of_neighbours(seed: int) -> None:
    n = 2**20
    words = random_bits(seed, 0, n, CPU)
    bits = ((words[:, None] >> torch.arange(8, 32)) & 1).float()  # [n, 24]
    sigma = 0.5 / n**0.5
    assert (bits.mean(0) - 0.5).abs().max() < 5 * sigma
    for lag in (1, 8, 32, 64, 512, 1024, 2048):  # lanes, rows and blocks
        assert ((bits[lag:] == bits[:-lag]).float().mean(0) - 0.5).abs().max() < 5 * sigma * 1.01


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_sums_over_lanes_rows_and_blocks_vary_as_those_of_independent_draws(seed: int) -> None:
    blocks = 2048
    uniform = (random_bits(seed, 0, blocks * 1024, CPU).view(blocks, 32, 32).double() / 2**32) * 12**0.5
    for over in (1, 2, (1, 2)):
        sums = uniform.sum(over)
        expected = 1024 if over == (1, 2) else 32
        assert abs(sums.square().mean() / expected - 1) < 5 * (2 / sums.numel()) ** 0.5
    # Lanes and rows are hashed apart and joined: the corners of a rectangle must not tell on each other.
    corners = uniform[:, :-1, :-1] * uniform[:, 1:, :-1] * uniform[:, :-1, 1:] * uniform[:, 1:, 1:]
    assert abs(corners.mean()) < 5 / corners.numel() ** 0.5
