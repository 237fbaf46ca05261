"""Measures how much of each training step survives rounding in a compressed variable, on samples during training.

[Note: measuring steps]
A step requests the change d, and the decoded values change by u. The kept share is ``<u, d> / <d, d>``. Its expected
value is 1 with stochastic rounding, whereas rounding to nearest silently loses steps smaller than half the distance
between codes. The remainder is noise, of relative energy ``|u - d|**2 / |d|**2``. Both are measured on a single block
of values, a different one each time, at steps 1, 3, 6, 10, 15, ..., so that the cost is negligible over a training run.
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
"""Variables that keep a smaller share of their steps than this trigger a warning."""

_ENOUGH_SAMPLES = 5
_ADVERBS = {"nearest": "to nearest", "stochastic": "stochastically"}
_NAMED = 3  # how many variables a warning lists by name


class _Sample(NamedTuple):
    start: int
    before: Tensor
    asked: Tensor


class StepRecord:
    """Compares the changes requested by the steps of one variable with the changes of its decoded values.

    In the sums below, d is the requested change and u the actual one.

    Attributes:
        variable: the qualified name of the variable.
        method: the name of the method of the part that steps rewrite.
        rounding: ``nearest`` or ``stochastic``.
        steps: the number of in-place changes.
        samples: the number of measured steps.
        asked: the sum of d * d over all measured steps.
        moved: the sum of u * d.
        noise: the sum of (u - d)**2.
        size: the sum of the squared values before each measured step.
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
        """The share of the requested change that was kept; 1 if no change was requested."""
        return self.moved / self.asked if self.asked else 1.0

    @property
    def relative_noise(self) -> float:
        """The energy of the noise relative to that of the requested change; 0 if no change was requested."""
        return self.noise / self.asked if self.asked else 0.0

    @property
    def drift(self) -> float:
        """An estimate of the distance by which the noise of all steps has moved the values, relative to their norm."""
        return math.sqrt(self.noise / self.size * self.steps / self.samples) if self.size and self.samples else 0.0

    @property
    def loses_steps(self) -> bool:
        """Whether rounding to nearest loses most of the steps.

        Stochastic rounding loses none on average. In a sample of steps that are far smaller than the distance between
        codes it may well seem to, as the few values that move by a whole distance are easily missed.
        """
        return self.rounding == "nearest" and self.samples >= _ENOUGH_SAMPLES and self.kept < KEPT_ENOUGH

    def begin(self, part: Packed, asked: Callable[[int, int], Tensor]) -> _Sample | None:
        """Count a step, and record a block of values before it if this step is to be measured.

        Args:
            part: the part that is about to change.
            asked: returns the requested change of values ``[start, stop)``.
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
        """Measure the change of the recorded block after the step."""
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
    """Issue one warning about all variables that lose steps and have not been reported yet."""
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
        f"most of the training steps are lost to rounding. The share that takes effect: {worst}{others}. "
        "Round stochastically (rounding='stochastic'), use a format with more bits or an update part, or raise the "
        "learning rate; fedomc.step_report(model) lists all variables",
        RuntimeWarning,
        stacklevel=2,
    )
