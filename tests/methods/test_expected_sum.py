"""The law of training in few bits: the expected sum of n steps is n steps.

Each case adds n known steps to a variable, under many seeds, and compares the mean of what is there with what was
added. A mean that is off by more than six standard errors fails, which happens by chance less than once in 10**8 cases.
That the standard error itself is small enough to see what matters is checked as well.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedomc.methods import FloatFormat, Packed, encode, parse_method

NUMEL, SEEDS = 4096, 16
# Not S1E1M0: its one magnitude grows with every step, and what is expected is carried by ever rarer values.
FLOATS = ("S1E1M2", "S1E2M0", "S1E2M1", "S1E2M3", "S1E3M0", "S1E3M2", "S1E3M7", "S1E4M3", "S1E5M2", "S1E8M7")
BLOCKWISE = ("INT8", "INT4", "NF4", "MXFP8", "MXFP6", "MXFP4", "S1E2M3/64", "S1E2M1/32", "S1E3M0/64")


@functools.cache
def direction() -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))


def heavy(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    uniform = torch.rand(NUMEL, generator=generator).clamp_min(1e-3)
    return direction().sign() * uniform.pow(-0.75)  # Pareto: the largest of a step is a hundred times the median


STEPS: dict[str, Callable[[int], Tensor]] = {
    "equal": lambda i: direction(),
    "growing": lambda i: direction() * 1.02 ** min(i, 200),
    "shrinking": lambda i: direction() * 0.97**i,
    "alternating": lambda i: direction() * (1.5 if i % 2 else -0.5),
    "heavy-tailed": heavy,
}


def run(start: Packed, steps: Callable[[int], Tensor], n: int) -> tuple[float, float]:
    """Return the mean share of the sum that is there, and its standard error."""
    former = start.decode(torch.empty(NUMEL)).double()
    changes = [steps(i) for i in range(n)]
    wanted = torch.stack(changes).double().sum(0)
    shares = []
    for seed in range(SEEDS):
        packed = start.to("cpu")
        for change in changes:
            packed.add_(change, 1.0, "scaled", "stochastic", seed)
        moved = packed.decode(torch.empty(NUMEL)).double() - former
        shares.append(float(moved @ wanted / (wanted @ wanted)))
    share = torch.tensor(shares, dtype=torch.float64)
    return float(share.mean()), float(share.std()) / math.sqrt(SEEDS)


def check(start: Packed, steps: Callable[[int], Tensor], n: int, least: float) -> None:
    share, error = run(start, steps, n)
    assert error < 0.1, f"the standard error {error:.3f} is too large to see anything"
    assert abs(share - 1) <= 6 * error + least, f"{share:.4f} of {n} steps are there, within {error:.4f}"


@pytest.mark.parametrize("n", [1, 10, 100])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", FLOATS + BLOCKWISE)
def test_of_n_steps_n_are_in_an_update_part(name: str, steps: str, n: int) -> None:
    check(Packed.zeros(parse_method(name), NUMEL, "cpu"), STEPS[steps], n, 1e-3)


@pytest.mark.parametrize("n", [1, 10, 100])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", [*(name for name in FLOATS if name != "S1E2M0"), *BLOCKWISE])
def test_of_n_steps_n_are_in_a_variable_of_one_part(name: str, steps: str, n: int) -> None:
    """The variable is some tens of steps large, so that most steps are a fraction of its codes' distance."""
    generator = torch.Generator().manual_seed(2)
    start = encode(30 * torch.randn(NUMEL, generator=generator), parse_method(name), "scaled")
    check(start, STEPS[steps], n, 1e-3)


@pytest.mark.parametrize("steps", ["equal", "shrinking"])
@pytest.mark.parametrize("name", ["S1E2M1", "S1E3M0", "S1E3M7", "MXFP4"])
def test_a_thousand_steps(name: str, steps: str) -> None:
    check(Packed.zeros(parse_method(name), NUMEL, "cpu"), STEPS[steps], 1000, 1e-3)


@pytest.mark.parametrize("name", ["S1E2M0", "S1E3M0", "S1E2M1"])
def test_without_room_the_sum_would_freeze(name: str) -> None:
    """The check can fail: on a scale that may not grow, most of a hundred equal steps are lost."""
    method = parse_method(name)
    assert isinstance(method, FloatFormat)
    packed = Packed.zeros(method, NUMEL, "cpu")
    packed.add_(direction(), 1.0, "scaled", "stochastic")
    for i in range(1, 100):
        packed.add_(direction(), 1.0, "none", "stochastic", i)
    moved = packed.decode(torch.empty(NUMEL))
    assert float(moved @ direction() / (100 * direction() @ direction())) < 0.5
