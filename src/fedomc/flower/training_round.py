"""One round of training on the server: from the replies that come back to a new model and its metrics."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from flwr.app import ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Strategy

from fedomc.errors import NonFiniteError, PayloadError
from fedomc.flower import defences
from fedomc.flower._flower import logger
from fedomc.flower.aggregation import Mean, averages, decoded, is_the_mean
from fedomc.flower.arrays import dense_array, in_dtype, view_dense
from fedomc.flower.downlink import Broadcast
from fedomc.flower.metrics import ReplyMetrics, WeightCap, common_metrics, with_weight
from fedomc.flower.replies import Reply, checked_replies, like_most, log_left_out, without_others
from fedomc.flower.traffic import RoundReport

Result = tuple[ArrayRecord | None, MetricRecord | None]

_FEW = 3
"""Replies of a stream that are added together: with fewer the sums are read and written more often."""

_IGNORING_METRICS = (FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan)
"""The classes of Flower whose ``aggregate_train`` uses no metric but the weight, and ``train_metrics_aggr_fn``."""


class TrainingRound:
    """The replies of one round and how they are aggregated.

    Args:
        broadcast: what was sent.
        sent: the metadata of the messages that carried it.
        report: gets bytes and seconds.
        weight_name: the name of the metric that is a reply's weight.
        weight_cap: the most that a reply may weigh, as a multiple of the median weight; None sets no cap.
        of_weights: whether the clients' weights are averaged; otherwise what they changed.
        name_of: names a node; replies are aggregated in the order of these names.

    Attributes:
        received: how many replies were used.
    """

    def __init__(
        self,
        broadcast: Broadcast,
        sent: Sequence[Metadata],
        report: RoundReport,
        *,
        weight_name: str,
        weight_cap: float | None,
        of_weights: bool,
        name_of: Callable[[int], str | int],
    ) -> None:
        self.broadcast = broadcast
        self.number = broadcast.round
        self.report = report
        self.received = 0
        self._sent = sent
        self._weight_name = weight_name
        self._cap = WeightCap(weight_cap)
        self._of_weights = of_weights
        self._name_of = name_of

    def aggregate(self, inner: Strategy, messages: Iterable[Message]) -> Result:
        """Check the replies and have the inner strategy aggregate what they decode to.

        If the inner strategy needs no more than a mean, a few replies at a time are added to it and released; of an
        iterator no more than these are in memory at any time. Other strategies get all replies, whose arrays decode
        when they are asked for their values.
        """
        errors = list[Message]()
        if isinstance(messages, Sequence):
            asked = [message for message in messages if message.metadata.src_node_id in self.broadcast.nodes]
            others = [message for message in messages if message.metadata.src_node_id not in self.broadcast.nodes]
            replies = list(self._checked(self._sorted(asked) + others, errors))
            self._cap.add(reply.metrics.weight for reply in replies)
            arrays, metrics = self._aggregate(inner, _released(replies), errors, streaming=False)
        else:
            arrays, metrics = self._aggregate(inner, self._checked(messages, errors), errors, streaming=True)
        if arrays is None:
            return None, metrics
        try:
            return _in_dtypes_of(self.broadcast.arrays, arrays), metrics
        except NonFiniteError as error:
            logger.error("round %d: %s; the model stays as it was", self.number, error)
            return None, metrics

    def _checked(self, messages: Iterable[Message], errors: list[Message]) -> Iterator[Reply]:
        return checked_replies(self.broadcast, self._sent, messages, errors, self.report, self._weight_name)

    def _aggregate(
        self, inner: Strategy, replies: Iterator[Reply], errors: list[Message], *, streaming: bool
    ) -> Result:
        if averages(inner):
            return self._mean(inner, replies, errors, streaming)
        every = list(replies)
        if streaming:
            self._cap.add(reply.metrics.weight for reply in every)
        return self._of_all(inner, every, errors)

    # ---- strategies that need a mean --------------------------------------------------------------------------------

    def _mean(self, inner: Strategy, replies: Iterator[Reply], errors: list[Message], streaming: bool) -> Result:
        """Aggregate with a strategy that takes the mean for the reply of a single client."""
        assert isinstance(inner, FedAvg)
        mean, kept = self._streamed_mean(replies, streaming)
        if not mean.weight:
            return inner.aggregate_train(self.number, errors)
        kept.sort(key=lambda pair: str(self._name_of(pair[1].node)))
        contents = self._metric_contents(kept)
        logger.info("round %d: the mean of %d replies, %d errors", self.number, len(kept), len(errors))
        if is_the_mean(inner):
            with self.report.timed("aggregate"):
                arrays = mean.arrays()
                return arrays, inner.train_metrics_aggr_fn(contents, self._weight_name) if contents else MetricRecord()
        message = kept[0][0]
        message.content = RecordDict({"arrays": mean.result(), "metrics": MetricRecord({self._weight_name: 1.0})})
        with _metrics_of(inner, contents), self.report.timed("aggregate"):
            return inner.aggregate_train(self.number, [*errors, message])

    def _streamed_mean(
        self, replies: Iterator[Reply], streaming: bool
    ) -> tuple[Mean, list[tuple[Message, ReplyMetrics]]]:
        """Add replies to a mean, a few at a time; their messages are kept without arrays.

        Where the cap is lower than what an earlier reply weighs in the mean, as the median has fallen since, everything
        that was added is scaled down until it weighs no more than the cap. So no reply weighs more than the cap in the
        end, whatever the order; without weights above the cap nothing is scaled.
        """
        mean, kept, heaviest = (
            Mean(self.broadcast, of_weights=self._of_weights),
            list[tuple[Message, ReplyMetrics]](),
            0.0,
        )
        while some := list(islice(replies, _FEW)):
            if streaming:
                self._cap.add(reply.metrics.weight for reply in some)
            if heaviest > self._cap.limit:
                logger.warning(
                    "round %d: the %d replies added so far are scaled by %g: one of them counts with %g, and the cap "
                    "is %g now (weight_cap)",
                    *(self.number, len(kept), self._cap.limit / heaviest, heaviest, self._cap.limit),
                )
                mean.scale(self._cap.limit / heaviest)
                heaviest = self._cap.limit
            weights = [self._cap.capped(reply.metrics, self.number) for reply in some]
            heaviest = max(heaviest, *weights)
            with self.report.timed("decode"):
                mean.add([(reply.variables, weight) for reply, weight in zip(some, weights, strict=True)])
            for reply in some:
                self._count(reply)
                content = without_others(reply, self.number).items()
                reply.message.content = RecordDict({k: one for k, one in content if not isinstance(one, ArrayRecord)})
                kept.append((reply.message, reply.metrics))
            del some, reply, content  # before the next ones are there
        return mean, kept

    def _metric_contents(self, replies: Sequence[tuple[Message, ReplyMetrics]]) -> list[RecordDict]:
        """Return contents with the common metrics of the replies that have them all, for a function of metrics."""
        rows, _ = common_metrics([metrics for _, metrics in replies], self.number)
        contents = []
        for (message, metrics), row in zip(replies, rows, strict=True):
            if row is not None:
                others = {k: r for k, r in message.content.items() if not isinstance(r, ArrayRecord | MetricRecord)}
                contents.append(
                    RecordDict({**others, metrics.record: with_weight(row, self._weight_name, self._cap.limit)})
                )
        used = [metrics.weight for (_, metrics), row in zip(replies, rows, strict=True) if row is not None]
        return contents if any(used) else []

    # ---- strategies that need all replies ---------------------------------------------------------------------------

    def _of_all(self, inner: Strategy, replies: list[Reply], errors: list[Message]) -> Result:
        """Aggregate with a strategy that looks at each reply."""
        owner = _owner(inner)
        custom = owner.__module__.split(".")[0] != "flwr"
        if custom:  # which may look at further records, and at any metric
            replies = like_most(replies, self.number)
        rows, _ = common_metrics([reply.metrics for reply in replies], self.number)
        contents: list[RecordDict] | None = None
        if None in rows and owner in _IGNORING_METRICS:
            contents = self._metric_contents([(reply.message, reply.metrics) for reply in replies])
            name = self._weight_name
            rows = [MetricRecord({name: reply.metrics.metrics[name]}) for reply in replies]
        received = []
        for reply, row in zip(replies, rows, strict=True):
            if row is None:
                log_left_out(self.number, reply.metrics.node, "the strategy may need the metrics that it lacks")
                continue
            weight = self._cap.capped(reply.metrics, self.number)
            if self._decode(inner, reply, with_weight(row, self._weight_name, weight), custom):
                received.append(reply)
        if not any(reply.metrics.weight > 0 for reply in received):
            received = []  # a mean of nothing
        if not received and not errors:
            return None, None
        messages = self._sorted([reply.message for reply in received])
        for reply in received:
            reply.variables = {}
        with self.report.timed("aggregate"):
            if contents is None or not isinstance(inner, FedAvg):
                return inner.aggregate_train(self.number, [*errors, *messages])
            with _metrics_of(inner, contents):
                return inner.aggregate_train(self.number, [*errors, *messages])

    def _decode(self, inner: Strategy, reply: Reply, metrics: MetricRecord, custom: bool) -> bool:
        """Put the decoded arrays and the metrics into a reply's message; tell whether it can be used."""
        arrays = decoded(self.broadcast, reply.variables, of_weights=self._of_weights)
        try:
            arrays = defences.bounded(inner, self.broadcast, arrays)
        except PayloadError as error:
            log_left_out(self.number, reply.metrics.node, error)
            return False
        self._count(reply)
        if custom:
            content = dict(reply.message.content.items())
            content |= {reply.record: arrays, reply.metrics.record: metrics}
        else:  # Flower checks that all replies name their records alike
            used = (reply.record, reply.metrics.record)
            content = {k: r for k, r in without_others(reply, self.number).items() if k not in used}
            content |= {"arrays": arrays, "metrics": metrics}
        reply.message.content = RecordDict(content)
        return True

    # ---- both -------------------------------------------------------------------------------------------------------

    def _count(self, reply: Reply) -> None:
        self.report.count("up", reply.message)
        self.received += 1

    def _sorted(self, messages: Iterable[Message]) -> list[Message]:
        """Sort by the clients' names, so that the result does not depend on who answered first."""
        return sorted(messages, key=lambda message: str(self._name_of(message.metadata.src_node_id)))


def _owner(strategy: Strategy) -> type:
    """Return the class that a strategy's ``aggregate_train`` is from; a replaced method is not Flower's."""
    if "aggregate_train" in vars(strategy):
        return TrainingRound  # any class that is not Flower's
    return next(cls for cls in type(strategy).__mro__ if "aggregate_train" in vars(cls))


def _released(replies: list[Reply]) -> Iterator[Reply]:
    """Yield the replies of a list and release each."""
    replies.reverse()
    while replies:
        yield replies.pop()


@contextmanager
def _metrics_of(strategy: FedAvg, contents: list[RecordDict]) -> Iterator[None]:
    """Have a strategy aggregate the metrics of these contents instead of those of the replies that it is given."""
    own = strategy.train_metrics_aggr_fn
    strategy.train_metrics_aggr_fn = lambda _, name: own(contents, name) if contents else MetricRecord()
    try:
        yield
    finally:
        strategy.train_metrics_aggr_fn = own


def _in_dtypes_of(sent: ArrayRecord, arrays: ArrayRecord) -> ArrayRecord:
    """Give the new values the dtypes that were sent: Flower's adaptive strategies compute in float64 with numpy 2.

    Raises:
        NonFiniteError: a new value is NaN or infinite, at the latest in the dtype that was sent.
    """
    result = ArrayRecord()
    for name, array in arrays.items():
        dtype = sent[name].dtype
        if array.dtype != dtype:
            array = dense_array(in_dtype(array.numpy(), dtype))
        try:
            view_dense(array, name)
        except PayloadError:
            raise NonFiniteError(f"{name} would become NaN or infinite") from None
        result[name] = array
    return result
