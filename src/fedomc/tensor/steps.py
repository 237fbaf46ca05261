"""Measures how much of each training step survives rounding in a compressed variable, on samples during training.

[Note: measuring steps]
A step requests the change d, and the decoded values change by u. The kept share is ``<u, d> / <d, d>``. Its expected
value is 1 with stochastic rounding, whereas rounding to nearest silently loses steps smaller than half the distance
between codes. The remainder is noise, of relative energy ``|u - d|**2 / |d|**2``. Both are measured on a single block
of values, a different one each time, at steps 1, 3, 6, 10, 15, ..., so that the cost is negligible over a training run.

[Note: when rounding noise is too much]
Where neighbouring codes are q apart, stochastic rounding of a step d has the variance ``q |d| - d**2``, which for small
steps is far more than their own energy, and independent from step to step. After n steps the noise has therefore moved
a variable by ``sqrt(n E|u - d|**2)``. The drift is this distance relative to the norm of the values: what rounding has
done to the weights, unless training undid it. It does harm where two things meet:

- The drift is large: 0.55 is a signal-to-noise ratio of 5 dB, about that of weights in two or three bits. Of 14 models
  trained alone in 400 to 3000 steps, the six that lost more than 2 points had 0.58 or more; of the six that lost less
  than one, three long runs had as much (up to 0.98): what training undoes is not known.
- The noise has not much less energy than the steps. Steps are noisy, too: near a minimum with curvature h, gradient g
  and learning rate r, rounding leaves the values with a variance of ``q |g| / 2h`` and the choice of the batches with
  ``r Var(g) / 2h``. Both raise the loss in proportion, so that relative noise of 0.3 costs about a third of what the
  batches cost. (The first does not fall with the learning rate, which is why slow learning suffers most. The second
  condition also keeps a fine format silent in a run of many steps, whose drift grows without bound.)

Both are judged for all variables together, as a model is one function. In a federation the mean over K clients divides
the energy of the noise by K, and a server's momentum b multiplies the distance by ``1 / (1 - b)``:
``flower.supervision`` adds the rounds up, and clients do not judge. ``docs/results/recipes.md`` compares the warnings
with what was lost.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fedomc.codec import BLOCK
from fedomc.methods import Packed

KEPT_ENOUGH = 0.5
"""Variables that keep a smaller share of their steps than this trigger a warning."""
DRIFT_LIMIT = 0.55
"""A model whose values the noise has moved by more than this share of their norm triggers a warning, ..."""
NOISE_LIMIT = 0.3
"""... if the noise has more than this share of the energy of the steps."""

WAY_OUT = (
    "the steps in an update part (such as S1E2M3+S1E3M4), use a format with more bits or with scales by block "
    "(such as S1E2M3/64), or leave the worst variables out with exclude=[...]"
)
"""What to do about noise, after the word "keep"."""

_ENOUGH_SAMPLES = 5
_ADVERBS = {"nearest": "to nearest", "stochastic": "stochastically"}
_NAMED = 3  # how many variables a warning lists by name


class _Sample(NamedTuple):
    start: int
    before: Tensor
    asked: Tensor
    size: Tensor


class StepRecord:
    """Compares the changes requested by the steps of one variable with the changes of its decoded values.

    In the sums below, d is the requested change and u the actual one. Each sum is an estimate for the whole variable
    from one block of it.

    Attributes:
        variable: the qualified name of the variable.
        method: the name of the method of the part that steps rewrite.
        rounding: ``nearest`` or ``stochastic``.
        seed: chooses the block that is measured first.
        judged_here: whether too much noise is warned of here; False on a federation's clients, whose server averages
            over them and judges the result.
        steps: the number of in-place changes.
        samples: the number of measured steps.
        asked: the sum of d * d over all measured steps.
        moved: the sum of u * d.
        noise: the sum of (u - d)**2.
        size: the sum of the squared values of the variable before each measured step.
    """

    def __init__(self, variable: str, method: str, rounding: str, seed: int = 0) -> None:
        self.variable = variable
        self.method = method
        self.rounding = rounding
        self.seed = seed
        self.judged_here = True
        self.steps = self.samples = 0
        self.asked = self.moved = self.noise = self.size = 0.0
        self.warned = self.warned_of_noise = False

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
        return math.sqrt(self.noise / self.size * self.steps) if self.size else 0.0

    @property
    def loses_steps(self) -> bool:
        """Whether rounding to nearest loses most of the steps.

        Stochastic rounding loses none on average. In a sample of steps that are far smaller than the distance between
        codes it may well seem to, as the few values that move by a whole distance are easily missed.
        """
        return self.rounding == "nearest" and self.samples >= _ENOUGH_SAMPLES and self.kept < KEPT_ENOUGH

    @property
    def _may_warn(self) -> bool:
        return self.rounding == "stochastic" and self.judged_here and not self.warned_of_noise

    def begin(
        self, part: Packed, asked: Callable[[int, int], Tensor], values: Callable[[int, int], Tensor]
    ) -> _Sample | None:
        """Count a step, and record a block of values before it if this step is to be measured.

        Args:
            part: the part that is about to change.
            asked: returns the requested change of values ``[start, stop)``.
            values: returns the values ``[start, stop)`` of the variable, all of its parts together.
        """
        if self.samples == _ENOUGH_SAMPLES and not self.warned:
            _warn_of_lost_steps()
        self.steps += 1
        if self.steps < (self.samples + 1) * (self.samples + 2) // 2 or part.numel == 0:
            return None
        _records.add(self)
        blocks = -(-part.numel // BLOCK)
        start = (self.seed + self.samples * 7919) % blocks * BLOCK
        stop = min(start + BLOCK, part.numel)
        before = part.decode(torch.empty(stop - start, dtype=torch.float32, device=part.codes.device), start)
        present = values(start, stop)
        return _Sample(start, before, asked(start, stop), present.dot(present))

    def end(self, part: Packed, sample: _Sample) -> None:
        """Measure the change of the recorded block after the step."""
        before, asked = sample.before, sample.asked
        change = part.decode(torch.empty_like(before), sample.start).sub_(before)
        found = [asked.dot(asked), change.dot(asked), sample.size]
        noise = change.sub_(asked)
        found.append(noise.dot(noise))
        self.samples += 1
        blocks = part.numel / before.numel()
        asked_energy, moved, size, noise_energy = (blocks * each for each in torch.stack(found).tolist())
        if math.isfinite(asked_energy + moved + size + noise_energy):
            self.asked += asked_energy
            self.moved += moved
            self.noise += noise_energy
            self.size += size
        # The drift of all exceeds the limit only if that of one does.
        if self.samples >= _ENOUGH_SAMPLES and self._may_warn and self.drift > DRIFT_LIMIT:
            _warn_of_noise()


class Total(NamedTuple):
    """What became of the steps of several variables together; see ``StepRecord``."""

    kept: float
    noise: float
    drift: float


def total(records: Iterable[StepRecord]) -> Total:
    """Sum up over variables: shares and noise relative to all steps, the drift relative to the norm of all values."""
    measured = [record for record in records if record.samples]
    asked = math.fsum(record.asked for record in measured)
    size = math.fsum(record.size / record.samples for record in measured)
    drifted = math.fsum(record.noise / record.samples * record.steps for record in measured)
    return Total(
        math.fsum(record.moved for record in measured) / asked if asked else 1.0,
        math.fsum(record.noise for record in measured) / asked if asked else 0.0,
        math.sqrt(drifted / size) if size else 0.0,
    )


def is_too_noisy(
    noise: float, drift: float, noise_limit: float = NOISE_LIMIT, drift_limit: float = DRIFT_LIMIT
) -> bool:
    """Tell whether the noise of rounding harms a model; see the note in this module.

    Args:
        noise: the energy of the noise relative to that of the steps.
        drift: the distance by which it has moved the values, relative to their norm.
        noise_limit: what the noise must exceed.
        drift_limit: what the drift must exceed as well.
    """
    return drift > drift_limit and noise > noise_limit


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
    warnings.warn(
        f"most of the training steps are lost to rounding. The share that takes effect: {worst}{_others(losing)}. "
        "Round stochastically (rounding='stochastic'), use a format with more bits or an update part, or raise the "
        "learning rate; fedomc.step_report(model) lists all variables",
        RuntimeWarning,
        stacklevel=2,
    )


def _warn_of_noise() -> None:
    """Issue one warning about all variables together if the noise of rounding harms them."""
    measured = [record for record in list(_records) if record._may_warn]
    found = total(measured)
    if not is_too_noisy(found.noise, found.drift):
        return
    for record in measured:
        record.warned_of_noise = True
    measured.sort(key=lambda record: (-record.drift, record.variable))
    worst = ", ".join(f"{each.variable} ({each.drift:.0%}, {each.method})" for each in measured[:_NAMED])
    warnings.warn(
        f"the noise of rounding spoils training: in {max(record.steps for record in measured)} steps it has moved the "
        f"weights by {found.drift:.0%} of their norm, with {found.noise:.1f} times the energy of the steps; most in "
        f"{worst}{_others(measured)}. Keep {WAY_OUT}; fedomc.step_report(model) lists all variables",
        RuntimeWarning,
        stacklevel=2,
    )


def _others(records: list[StepRecord]) -> str:
    return f" and {len(records) - _NAMED} more" if len(records) > _NAMED else ""
