"""Supervises a federated run on the server: detects rounds that fail and training that rounding spoils.

[Note: noise over the rounds]
A client knows how far the noise of its own steps moved the weights (``step_metrics``). On the server the mean of K
clients has a K-th of that energy, independent of the other rounds', whereas steps on which the clients agree keep
theirs. A strategy's momentum b and learning rate s multiply each change by ``s / (1 - b)`` in the end; FedAdam and
others that scale each value by itself have no such factor, and 1 is assumed. The drift of the server's model is the
root of the sum of all rounds' energies times this factor. The limits are lower than for a model trained alone, as the
factor may be too small and clients agree in part only; they separate what was lost in ``docs/results/recipes.md``.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from flwr.app import MetricRecord

from fedomc.errors import RoundsFailedError
from fedomc.flower._flower import logger
from fedomc.tensor.steps import KEPT_ENOUGH, WAY_OUT, is_too_noisy
from fedomc.training.fidelity import Distance, warning_of

STEP_KEPT, STEP_NOISE, STEP_DRIFT = "fedomc.step-kept", "fedomc.step-noise", "fedomc.step-drift"
"""The names of the metrics that ``step_metrics`` adds to a reply."""

_DRIFT_LIMIT, _NOISE_LIMIT = 0.35, 0.2
_MIN_ROUNDS = 5  # over fewer rounds, stochastic rounding may seem to lose steps by chance
_LARGEST = 1e100  # a client may send any number as a figure of its steps, and the squares of those used are finite


class Supervision:
    """Raises an error if several rounds in a row fail, and warns once if rounding loses the clients' training steps.

    It also warns once if the format cannot hold some of the variables that are sent, and once if the noise of rounding
    has moved the server's model too far.

    Args:
        failures: the number of consecutive rounds without a usable reply that raises the error; None never raises it.
        gain: how far a change of the clients' mean moves the server's model in the end; see ``gain_of``.
        format: the format of the policy, for the warnings.
    """

    def __init__(self, failures: int | None, gain: float = 1.0, format: str = "") -> None:
        self._failures = failures
        self._gain = gain
        self._format = format
        self._warned = self._warned_of_noise = self._warned_of_format = False
        self.begin()

    def begin(self) -> None:
        """Begin a run: the rounds of a former one do not count any more; what it warned of is not repeated."""
        self._failed = self._rounds = self._used = 0
        self._kept: list[float] = []
        self._noise_energy = self._step_energy = 0.0  # relative to that of the weights

    def check_broadcast(self, number: int, distances: Mapping[str, Distance]) -> None:
        """Warn if the format cannot hold some of the variables that are sent.

        Args:
            number: the number of the round.
            distances: how far each variable's codes are from its values, by qualified name.
        """
        text = None if self._warned_of_format else warning_of(distances, self._format)
        if text is not None:
            self._warned_of_format = True
            logger.warning("round %d: %s", number, text)

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
        self._check_noise(number, received, metrics)

    def finish(self) -> None:
        """Check that not every round failed.

        Raises:
            RoundsFailedError: no round had a usable reply, so the model is still the initial one.
        """
        if self._rounds and not self._used and self._failures is not None:
            raise RoundsFailedError(_failure(f"in any of {self._rounds} rounds"))

    def _check_steps(self, number: int, metrics: MetricRecord | None) -> None:
        kept = _figure(metrics, STEP_KEPT)
        if kept is None or self._warned:
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

    def _check_noise(self, number: int, received: int, metrics: MetricRecord | None) -> None:
        noise, drift = _figure(metrics, STEP_NOISE), _figure(metrics, STEP_DRIFT)
        if noise is None or drift is None or self._warned_of_noise:
            return
        if not (noise > 0 and drift**2 / noise > 0):
            return
        self._noise_energy += drift**2 / max(1, received)
        self._step_energy += drift**2 / noise
        mean, distance = self._noise_energy / self._step_energy, self._gain * math.sqrt(self._noise_energy)
        if is_too_noisy(mean, distance, _NOISE_LIMIT, _DRIFT_LIMIT):
            self._warned_of_noise = True
            logger.warning(
                "round %d: the noise of rounding%s spoils training: it has moved the server's model by %.0f%% of its "
                "norm (%s) and has, in the mean over clients, %.2f times the energy of their steps (%s): keep %s; "
                "fedomc.step_report(model) on a client names the variables",
                *(
                    number,
                    self._format and f" to {self._format}",
                    100 * distance,
                    STEP_DRIFT,
                    mean,
                    STEP_NOISE,
                    WAY_OUT,
                ),
            )


def _figure(metrics: MetricRecord | None, name: str) -> float | None:
    """Return a figure of ``step_metrics``; None if there is none, or one that is too large to be measured."""
    value = None if metrics is None else metrics.get(name)
    return value if isinstance(value, float | int) and abs(value) <= _LARGEST else None


def gain_of(strategy: Any) -> float:
    """Return how far a change of the clients' mean moves the server's model in the end, by a strategy of Flower.

    FedAvgM has a learning rate and a momentum; for strategies without these it is 1.
    """
    rate: float = getattr(strategy, "server_learning_rate", 1.0)
    momentum: float = getattr(strategy, "server_momentum", 0.0)
    return rate / (1 - momentum) if momentum < 1 else rate


def _failure(when: str, sent: int | None = None) -> str:
    selected = "" if sent is None else f" of the {sent} selected"
    return (
        f"no client{selected} sent a usable reply {when}; the log names each node and the reason. "
        "Fix the clients, or set failed_rounds=None to continue regardless"
    )
