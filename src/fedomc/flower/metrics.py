"""The metrics and weights of replies: reads them, chooses those to aggregate, and caps the weight of a client."""

import bisect
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from flwr.app import Message, MetricRecord

from fedomc.errors import PayloadError
from fedomc.flower._flower import logger
from fedomc.flower.arrays import records_of

_LARGEST_WEIGHT = 2.0**63
"""The largest valid weight of a reply. A weight is a count, and sums of larger numbers might not be finite."""

_USUAL_NAME = "metrics"
"""The name that Flower's documentation uses for the record of a reply's metrics."""


@dataclass(frozen=True)
class ReplyMetrics:
    """The usable metrics of a reply.

    Attributes:
        node: the node that replied.
        record: the name of the record that contains the weight.
        metrics: the usable metrics of this record, including the weight.
        weight: the weight, a finite number that is not negative.
    """

    node: int
    record: str
    metrics: MetricRecord
    weight: float


def read_metrics(reply: Message, server_round: int, weight_name: str) -> ReplyMetrics:
    """Read the metrics of a reply; a metric that is not finite is dropped with a warning.

    Args:
        reply: the reply. If several metric records have a weight, the record ``metrics`` is read, or else the first one
            by name.
        server_round: the number of the round, for the log.
        weight_name: the name of the metric that is the reply's weight.

    Raises:
        PayloadError: the weight is missing or is not a number from 0 to 2**63.
    """
    node, records = reply.metadata.src_node_id, records_of(reply.content, MetricRecord)
    weighted = sorted((name != _USUAL_NAME, name) for name, record in records.items() if weight_name in record)
    if not weighted:
        raise PayloadError(f"none of its {len(records)} metric records has the weight {weight_name!r}")
    record_name = weighted[0][1]
    usable = MetricRecord()
    for name, value in records[record_name].items():
        if all(map(_is_a_number, value if isinstance(value, list) else [value])):
            usable[name] = value
        elif name != weight_name:
            logger.warning(
                "round %d: node %d: metric %s=%s is dropped, because it is not finite or exceeds 64 bits; the reply is "
                "kept",
                *(server_round, node, name, value),
            )
    weight = records[record_name][weight_name]
    if isinstance(weight, list) or weight_name not in usable or not 0 <= weight <= _LARGEST_WEIGHT:
        raise PayloadError(f"metric {weight_name}={weight} is not a weight: a number from 0 to 2**63 is expected")
    return ReplyMetrics(node, record_name, usable, float(weight))


def common_metrics(replies: Sequence[ReplyMetrics], server_round: int) -> tuple[list[MetricRecord | None], set[str]]:
    """Choose the metrics to aggregate: those that more than half of the replies have.

    Flower's functions for metrics require that all replies have the same metrics. Other metrics are therefore dropped,
    and replies that lack one of the chosen metrics are excluded from the aggregation of metrics; both are logged. Thus
    no single client can prevent a metric from being reported.

    Args:
        replies: the metrics of all replies.
        server_round: the number of the round, for the log.

    Returns:
        The chosen metrics of each reply, or None if it lacks one of them; and the names of the chosen metrics.
    """
    forms = [{(name, _length(value)) for name, value in reply.metrics.items()} for reply in replies]
    counts = Counter(form for each in forms for form in each)
    chosen = {form for form, count in counts.items() if 2 * count > len(replies)}
    for form in sorted(counts, key=lambda form: (form[0], form[1])):
        having = [reply.node for reply, each in zip(replies, forms, strict=True) if form in each]
        lacking = [reply.node for reply, each in zip(replies, forms, strict=True) if form not in each]
        if form not in chosen:
            logger.warning(
                "round %d: metric %s is dropped, because only %d of %d replies have it in this form: %s",
                *(server_round, form[0], len(having), len(replies), named(having)),
            )
        elif lacking:
            logger.warning("round %d: metric %s is aggregated without %s", server_round, form[0], named(lacking))
    names = {name for name, _ in chosen}
    rows = [
        MetricRecord({name: value for name, value in reply.metrics.items() if name in names})
        if chosen <= each
        else None
        for reply, each in zip(replies, forms, strict=True)
    ]
    return rows, names


class WeightCap:
    """A cap on the weight of a single reply: a multiple of the median weight of the round's replies.

    The median is taken over all positive weights added so far. For an even number of weights it is the lower of the
    middle two, so that of two clients the heavier one does not set the cap.

    Args:
        factor: the multiple; None sets no cap.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self._weights: list[float] = []

    def add(self, weights: Iterable[float]) -> None:
        """Include the weights of replies in the median."""
        for weight in weights:
            if weight > 0:
                bisect.insort(self._weights, weight)

    @property
    def limit(self) -> float:
        """The maximum weight of a reply; infinite if there is no cap or no weight yet."""
        if self.factor is None or not self._weights:
            return math.inf
        return self.factor * self._weights[(len(self._weights) - 1) // 2]

    def capped(self, reply: ReplyMetrics, server_round: int) -> float:
        """Return the capped weight of a reply; a warning is logged if it is less than the reply's own weight."""
        limit = self.limit
        if reply.weight <= limit:
            return reply.weight
        logger.warning(
            "round %d: node %d has weight %g, which is capped at %g, %g times the median weight (weight_cap)",
            *(server_round, reply.node, reply.weight, limit, self.factor),
        )
        return limit


def with_weight(metrics: MetricRecord, weight_name: str, weight: float) -> MetricRecord:
    """Return metrics with the weight limited to the given value; an integer weight stays an integer."""
    own = cast(float, metrics[weight_name])
    if own <= weight:
        return metrics
    return MetricRecord({**metrics, weight_name: int(weight) if isinstance(own, int) else weight})


def _length(value: object) -> int:
    return len(value) if isinstance(value, list) else -1


def named(nodes: Collection[int]) -> str:
    """Name up to eight nodes, for the log."""
    shown = ", ".join(map(str, sorted(nodes)[:8]))
    return f"node{'s' * (len(nodes) > 1)} {shown}" + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")


def _is_a_number(value: float) -> bool:
    """Return whether numpy can sum such values; Python's integers are unbounded."""
    return math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63
