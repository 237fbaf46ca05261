"""Log the reports of rounds to Weights & Biases; needs the extra ``fedomc[wandb]``."""

from typing import Any

from fedomc.errors import OMCError
from fedomc.flower.traffic import RoundReport

_ROUND = "fedomc.round"


class WeightsAndBiases:
    """An observer of ``OMCStrategy`` that logs each round's report to a run of Weights & Biases.

    The figures have an axis of their own, ``fedomc.round``, so that they do not depend on what else the run logs.

    Args:
        run: what ``wandb.init`` returned; None takes the active run.
        variables: whether to log the figures of each variable too, not only those of the whole model.

    Raises:
        ImportError: wandb is not installed.
        OMCError: no run is given, and none is active.
    """

    def __init__(self, run: Any = None, *, variables: bool = True) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("Weights & Biases is not installed: pip install 'fedomc[wandb]'") from error
        self.run: Any = wandb.run if run is None else run
        if self.run is None:
            raise OMCError("no run of Weights & Biases is active: call wandb.init first, or pass what it returned")
        self.variables = variables
        self.run.define_metric(_ROUND, hidden=True)
        self.run.define_metric("fedomc.*", step_metric=_ROUND)

    def __call__(self, report: RoundReport) -> None:
        """Log a report."""
        self.run.log({**report.metrics(variables=self.variables), _ROUND: report.round})
