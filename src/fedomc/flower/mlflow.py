"""Log the reports of rounds to MLflow; needs the extra ``fedomc[mlflow]``."""

from itertools import islice
from typing import cast

from fedomc.errors import OMCError
from fedomc.flower.traffic import RoundReport

_MOST = 1000
"""The number of metrics that MLflow takes at a time."""


class MLflow:
    """An observer of ``OMCStrategy`` that logs each round's report to a run of MLflow, with the round as the step.

    In the names of the figures of variables, ``.`` stands for ``/``, as in ``fedomc.up-bytes.layer.weight``: MLflow's
    file store would need ``fedomc.up-bytes`` to be a folder and a file.

    Args:
        run_id: the run's ID; None takes the active run.
        variables: whether to log the figures of each variable too, not only those of the whole model.

    Raises:
        ImportError: MLflow is not installed.
        OMCError: no run is given, and none is active.
    """

    def __init__(self, run_id: str | None = None, *, variables: bool = True) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ImportError("MLflow is not installed: pip install 'fedomc[mlflow]'") from error
        if run_id is None:
            active = mlflow.active_run()
            if active is None:
                raise OMCError("no run of MLflow is active: call mlflow.start_run first, or pass a run's ID")
            run_id = active.info.run_id
        self.run_id = run_id
        self.variables = variables
        self._log = mlflow.log_metrics

    def __call__(self, report: RoundReport) -> None:
        """Log a report."""
        metrics = report.metrics(variables=self.variables).items()
        for begin in range(0, len(metrics), _MOST):
            part = {name.replace("/", "."): cast(float, value) for name, value in islice(metrics, begin, begin + _MOST)}
            self._log(part, step=report.round, run_id=self.run_id)
