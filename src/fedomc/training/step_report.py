"""``step_report``: how much of the training steps arrives in a compressed model, by variable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fedomc.tensor.compressed import is_compressed
from fedomc.tensor.steps import StepRecord


@dataclass(frozen=True)
class StepQuality:
    """What became of the steps of one variable, or of all.

    Attributes:
        kept: the share of what the steps asked for that arrived; stochastic rounding has 1 but for chance.
        noise: the energy of what else the values moved, by the energy of the steps.
        drift: how far that noise carried the values in all steps so far, relative to their size.
        steps: how many changes in place there were, of the variable that had most.
    """

    kept: float
    noise: float
    drift: float
    steps: int


@dataclass(frozen=True)
class StepReport:
    """How much of the training steps arrived in a compressed model.

    Attributes:
        total: over all compressed variables, weighted by the energy of their steps.
        variables: by qualified name.
    """

    total: StepQuality
    variables: Mapping[str, StepQuality]

    def __str__(self) -> str:
        """Write a table, the variables that keep least first."""
        rows = sorted(self.variables.items(), key=lambda row: row[1].kept)
        width = max(map(len, ("variable", "total", *self.variables)))
        lines = [f"{'variable':{width}}     kept     noise     drift     steps"]
        for name, row in [("total", self.total), *rows]:
            lines.append(f"{name:{width}}  {row.kept:7.1%}  {row.noise:8.3g}  {row.drift:8.3g}  {row.steps:8d}")
        return "\n".join(lines)


def step_report(model: nn.Module) -> StepReport:
    """Tell how much of the steps so far arrived in a model's compressed variables.

    The figures are measured on a sample of steps and values while the model trains; see ``fedomc.tensor.steps``. They
    count from when the model was compressed.

    Args:
        model: a model with compressed parameters.

    Example:
        >>> report = step_report(model)  # doctest: +SKIP
        >>> report.total.kept  # doctest: +SKIP
        0.998
    """
    records = {name: p.steps for name, p in model.named_parameters() if is_compressed(p) and p.steps.samples}
    asked, moved, noise = (
        math.fsum(getattr(record, field) for record in records.values()) for field in ("asked", "moved", "noise")
    )
    size = math.fsum(record.size for record in records.values())
    drifted = math.fsum(record.drift**2 * record.size for record in records.values())
    total = StepQuality(
        moved / asked if asked else 1.0,
        noise / asked if asked else 0.0,
        math.sqrt(drifted / size) if size else 0.0,
        max((record.steps for record in records.values()), default=0),
    )
    return StepReport(total, {name: _quality(record) for name, record in records.items()})


def _quality(record: StepRecord) -> StepQuality:
    return StepQuality(record.kept, record.relative_noise, record.drift, record.steps)
