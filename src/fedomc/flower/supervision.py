"""Supervises a federated run on the server: detects rounds that fail and training steps that rounding loses."""

import statistics

from flwr.app import MetricRecord

from fedomc.errors import RoundsFailedError
from fedomc.flower._flower import logger
from fedomc.tensor.steps import KEPT_ENOUGH

STEP_KEPT, STEP_NOISE = "fedomc.step-kept", "fedomc.step-noise"
"""The names of the metrics that ``step_metrics`` adds to a reply."""

_MIN_ROUNDS = 5  # over fewer rounds, stochastic rounding may seem to lose steps by chance


class Supervision:
    """Raises an error if several rounds in a row fail, and warns once if rounding loses the clients' training steps.

    Args:
        failures: the number of consecutive rounds without a usable reply that raises the error; None never raises it.
    """

    def __init__(self, failures: int | None) -> None:
        self._failures = failures
        self._failed = self._rounds = self._used = 0
        self._kept: list[float] = []
        self._warned = False

    def add(self, number: int, sent: int, received: int, metrics: MetricRecord | None) -> None:
        """Record the result of a round of training.

        Args:
            number: the number of the round.
            sent: the number of messages that were sent.
            received: the number of usable replies.
            metrics: the aggregated metrics of the round, if any.

        Raises:
            RoundsFailedError: as many rounds in a row have failed as ``failures`` says.
        """
        if not sent:
            return
        self._rounds += 1
        self._used += received > 0
        self._failed = 0 if received else self._failed + 1
        if self._failed and self._failed == self._failures:
            raise RoundsFailedError(_failure(f"in round {number} and the {self._failed - 1} before it", sent))
        self._check_steps(number, metrics)

    def finish(self) -> None:
        """Check that not every round failed.

        Raises:
            RoundsFailedError: no round had a usable reply, so the model is still the initial one.
        """
        if self._rounds and not self._used and self._failures is not None:
            raise RoundsFailedError(_failure(f"in any of {self._rounds} rounds"))

    def _check_steps(self, number: int, metrics: MetricRecord | None) -> None:
        kept = None if metrics is None else metrics.get(STEP_KEPT)
        if not isinstance(kept, float | int) or self._warned:
            return
        self._kept.append(kept)
        if len(self._kept) < _MIN_ROUNDS:
            return
        mean, error = statistics.mean(self._kept), statistics.stdev(self._kept) / len(self._kept) ** 0.5
        if mean + 3 * error < KEPT_ENOUGH:
            self._warned = True
            logger.warning(
                "round %d: only %.0f%% of the clients' training steps take effect (%s); rounding loses the rest. Use "
                "rounding='stochastic', a format with more bits, an update part or a higher learning rate. On a "
                "client, fedomc.step_report(model) shows the figures of each variable",
                *(number, 100 * mean, STEP_KEPT),
            )


def _failure(when: str, sent: int | None = None) -> str:
    selected = "" if sent is None else f" of the {sent} selected"
    return (
        f"no client{selected} sent a usable reply {when}; the log names each node and the reason. "
        "Fix the clients, or set failed_rounds=None to continue regardless"
    )
