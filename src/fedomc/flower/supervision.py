"""What the server watches over from round to round: rounds that fail, and clients whose steps are lost to rounding."""

import statistics

from flwr.app import MetricRecord

from fedomc.errors import RoundsFailedError
from fedomc.flower._flower import logger
from fedomc.tensor.steps import KEPT_ENOUGH

STEP_KEPT, STEP_NOISE = "fedomc.step-kept", "fedomc.step-noise"
"""The metrics of a reply that ``step_metrics`` gives."""

_ENOUGH_ROUNDS = 5  # of stochastic rounding a few may seem to lose what they do not


class Supervision:
    """Raises when round after round fails, and warns once when the clients' steps are lost.

    Args:
        failures: how many rounds in a row may pass without a usable reply; None for any number.
    """

    def __init__(self, failures: int | None) -> None:
        self._failures = failures
        self._failed = self._rounds = self._used = 0
        self._kept: list[float] = []
        self._warned = False

    def add(self, number: int, sent: int, received: int, metrics: MetricRecord | None) -> None:
        """Look at a round of training.

        Args:
            number: the round's.
            sent: how many messages were sent.
            received: how many replies could be used.
            metrics: those of the round.

        Raises:
            RoundsFailedError: this is one failed round too many.
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
            RoundsFailedError: no round had a usable reply, so that the model is the initial one.
        """
        if self._rounds and not self._used and self._failures is not None:
            raise RoundsFailedError(_failure(f"in any of {self._rounds} rounds"))

    def _check_steps(self, number: int, metrics: MetricRecord | None) -> None:
        kept = None if metrics is None else metrics.get(STEP_KEPT)
        if not isinstance(kept, float | int) or self._warned:
            return
        self._kept.append(kept)
        if len(self._kept) < _ENOUGH_ROUNDS:
            return
        mean, error = statistics.mean(self._kept), statistics.stdev(self._kept) / len(self._kept) ** 0.5
        if mean + 3 * error < KEPT_ENOUGH:
            self._warned = True
            logger.warning(
                "round %d: of the clients' training steps %.0f%% arrive (%s), the rest is lost to rounding: use "
                "rounding='stochastic', a format with more bits or an update part, or a higher learning rate; "
                "fedomc.step_report(model) on a client names the variables",
                *(number, 100 * mean, STEP_KEPT),
            )


def _failure(when: str, sent: int | None = None) -> str:
    asked = "" if sent is None else f" of the {sent} that were asked"
    return (
        f"no client{asked} sent a usable reply {when}: the log names each node and the reason. "
        "Mend the clients, or set failed_rounds=None to go on whatever happens"
    )
