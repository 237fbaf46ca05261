"""``step_report``: measures how much of the training steps survives rounding, for each compressed variable."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fedomc.tensor.compressed import is_compressed
from fedomc.tensor.steps import StepRecord, total


@dataclass(frozen=True)
class StepQuality:
    """The effect of rounding on the training steps of one variable, or of all variables together.

    Attributes:
        kept: the share of the requested change that took effect. With stochastic rounding, its expected value is 1.
        noise: the energy of the rounding noise, relative to the energy of the steps.
        drift: the root mean square of the accumulated rounding noise, relative to that of the values.
        steps: the number of in-place changes; for all variables together, the largest such number.
    """

    kept: float
    noise: float
    drift: float
    steps: int


@dataclass(frozen=True)
class StepReport:
    """The effect of rounding on the training steps of a compressed model.

    Attributes:
        total: the figures of all compressed variables together, weighted by the energy of their steps.
        variables: the figures of each compressed variable, by qualified name.
    """

    total: StepQuality
    variables: Mapping[str, StepQuality]

    def __str__(self) -> str:
        """Format the report as a table, with the variables that lose most of their steps first."""
        rows = sorted(self.variables.items(), key=lambda row: row[1].kept)
        width = max(map(len, ("variable", "total", *self.variables)))
        lines = [f"{'variable':{width}}     kept     noise     drift     steps"]
        for name, row in [("total", self.total), *rows]:
            lines.append(f"{name:{width}}  {row.kept:7.1%}  {row.noise:8.3g}  {row.drift:8.3g}  {row.steps:8d}")
        return "\n".join(lines)


def step_report(model: nn.Module) -> StepReport:
    """Report how much of the training steps so far took effect in a model's compressed variables.

    The figures are measured on a sample of steps and values while the model trains; see ``fedomc.tensor.steps``. They
    cover all steps since the model was compressed.

    Args:
        model: a model with compressed parameters.

    Returns:
        The report. Variables whose steps have not been sampled yet are left out.

    Example:
        >>> report = step_report(model)  # doctest: +SKIP
        >>> report.total.kept  # doctest: +SKIP
        0.998
    """
    records = {name: p.steps for name, p in model.named_parameters() if is_compressed(p) and p.steps.samples}
    steps = max((record.steps for record in records.values()), default=0)
    return StepReport(
        StepQuality(*total(records.values()), steps), {name: _quality(record) for name, record in records.items()}
    )


def _quality(record: StepRecord) -> StepQuality:
    return StepQuality(record.kept, record.relative_noise, record.drift, record.steps)
