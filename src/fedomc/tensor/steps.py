"""How much of each training step arrives in a compressed variable, measured on a sample while it trains.

[Note: measuring steps]
A step asks a variable to move by d, and its codes move by u. What arrives is the share ``<u, d> / <d, d>``: 1 is
expected of stochastic rounding, and rounding to nearest loses the steps that are smaller than half the distance between
codes, in silence. What else moves is noise, ``|u - d|**2 / |d|**2``. Both are measured in a single block of values,
another one each time, at the steps 1, 3, 6, 10, 15, ...: their cost disappears among the steps between.
"""

import math
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedomc.codec import BLOCK
from fedomc.methods import Packed

KEPT_ENOUGH = 0.5
"""Below this share of its steps a variable is warned of."""

_ENOUGH_SAMPLES = 5
_ADVERBS = {"nearest": "to nearest", "stochastic": "stochastically"}
_NAMED = 3  # variables that a warning names


class _Sample(NamedTuple):
    start: int
    before: Tensor
    asked: Tensor


class StepRecord:
    """What the steps of one variable asked for, and what its codes made of them.

    Attributes:
        variable: its qualified name.
        method: the name of the method that is rewritten.
        rounding: how.
        steps: how many changes in place there were.
        samples: how many of them were measured.
        asked: sum of d * d over the sample.
        moved: sum of u * d.
        noise: sum of (u - d)**2.
        size: sum of the squares of the values before each measured step.
    """

    def __init__(self, variable: str, method: str, rounding: str) -> None:
        self.variable = variable
        self.method = method
        self.rounding = rounding
        self.steps = self.samples = 0
        self.asked = self.moved = self.noise = self.size = 0.0
        self.warned = False

    @property
    def kept(self) -> float:
        """The share of what was asked for that arrived; 1 if nothing was asked for."""
        return self.moved / self.asked if self.asked else 1.0

    @property
    def relative_noise(self) -> float:
        """The energy of the noise of a step over that of the step; 0 if nothing was asked for."""
        return self.noise / self.asked if self.asked else 0.0

    @property
    def drift(self) -> float:
        """How far the noise of all steps so far has carried the values, relative to their size."""
        return math.sqrt(self.noise / self.size * self.steps / self.samples) if self.size and self.samples else 0.0

    @property
    def loses_steps(self) -> bool:
        """Whether rounding to nearest loses most of the steps.

        Stochastic rounding loses none on average. In a sample of steps that are far smaller than the distance between
        codes it may well seem to, as the few values that move by a whole distance are easily missed.
        """
        return self.rounding == "nearest" and self.samples >= _ENOUGH_SAMPLES and self.kept < KEPT_ENOUGH

    def begin(self, part: Packed, asked: Callable[[int, int], Tensor]) -> _Sample | None:
        """Count a step, and look at a block before it if the step is to be measured.

        Args:
            part: what is about to be changed.
            asked: returns the change ``[start, stop)`` that is asked for.
        """
        if self.samples == _ENOUGH_SAMPLES and not self.warned:
            _warn_of_lost_steps()
        self.steps += 1
        if self.steps < (self.samples + 1) * (self.samples + 2) // 2 or part.numel == 0:
            return None
        _records.add(self)
        blocks = -(-part.numel // BLOCK)
        start = (self.samples * 7919) % blocks * BLOCK
        stop = min(start + BLOCK, part.numel)
        before = part.decode(torch.empty(stop - start, dtype=torch.float32, device=part.codes.device), start)
        return _Sample(start, before, asked(start, stop))

    def end(self, part: Packed, sample: _Sample) -> None:
        """Look at the block after the step."""
        before, asked = sample.before, sample.asked
        change = part.decode(torch.empty_like(before), sample.start).sub_(before)
        found = [asked.dot(asked), change.dot(asked), before.dot(before)]
        noise = change.sub_(asked)
        found.append(noise.dot(noise))
        self.samples += 1
        asked_energy, moved, size, noise_energy = torch.stack(found).tolist()
        if math.isfinite(asked_energy + moved + size + noise_energy):
            self.asked += asked_energy
            self.moved += moved
            self.noise += noise_energy
            self.size += size


_records: "weakref.WeakSet[StepRecord]" = weakref.WeakSet()


def _warn_of_lost_steps() -> None:
    """Give one warning of all variables that lose steps and were not warned of."""
    losing = []
    for record in list(_records):
        if record.samples >= _ENOUGH_SAMPLES and not record.warned:
            record.warned = True
            if record.loses_steps:
                losing.append(record)
    if not losing:
        return
    losing.sort(key=lambda record: (record.kept, record.variable))
    worst = ", ".join(
        f"{each.variable} ({each.kept:.0%}, {each.method} rounded {_ADVERBS[each.rounding]})"
        for each in losing[:_NAMED]
    )
    others = f" and {len(losing) - _NAMED} more" if len(losing) > _NAMED else ""
    warnings.warn(
        f"most of the training steps are lost to rounding: of what they asked for there arrives, in {worst}{others}. "
        "Round stochastically (rounding='stochastic'), use a format with more bits or an update part, or raise the "
        "learning rate; fedomc.step_report(model) lists all variables",
        RuntimeWarning,
        stacklevel=2,
    )
