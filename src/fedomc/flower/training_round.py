"""One round of training on the server: aggregates the replies to a new model and its metrics."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from flwr.app import ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Strategy

from fedomc.errors import NonFiniteError, PayloadError
from fedomc.flower import defences, krum
from fedomc.flower._flower import logger
from fedomc.flower.aggregation import Mean, averages
from fedomc.flower.arrays import array_of, view_dense
from fedomc.flower.decoding import VALUE_BY_VALUE, Stretches, decoded
from fedomc.flower.downlink import Broadcast
from fedomc.flower.mapped import nbytes_of, set_aside
from fedomc.flower.metrics import ReplyMetrics, WeightCap, common_metrics, named, with_weight
from fedomc.flower.replies import Reply, checked_replies, like_most, log_left_out, without_others
from fedomc.flower.server_optimizers import RoundFiles, ServerOptimizer, has_optimizer, owner_of
from fedomc.flower.traffic import RoundReport
from fedomc.serialization.mapped_file import Scratch

Result = tuple[ArrayRecord | None, MetricRecord | None]

_FEW = 3
"""The number of replies of a stream that are added together; with fewer, the sums are read and written more often."""

_SMALL = 2**26
"""The number of bytes of replies that may be in memory together, whatever the size of the model."""

_IGNORING_METRICS = (FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan)
"""The classes of Flower whose ``aggregate_train`` uses only the weight metric and ``train_metrics_aggr_fn``."""


class TrainingRound:
    """Checks and aggregates the replies of one round.

    Args:
        broadcast: the model as it was sent.
        sent: the metadata of the messages that were sent.
        report: the report, to which bytes and seconds are added.
        weight_name: the name of the metric that is a reply's weight.
        weight_cap: the maximum weight of a reply, as a multiple of the median weight; None sets no cap.
        of_weights: whether the clients' weights are averaged, rather than their changes.
        name_of: returns the name of a node; replies are aggregated in the order of these names.
        files: where the sums and the result are; None keeps them in memory.
        enough: the number of usable replies after which no more are drawn from an iterator; None draws all.

    Attributes:
        received: the number of replies that were used.
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
        files: RoundFiles | None = None,
        enough: int | None = None,
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
        self._files = files
        self._enough = enough

    def aggregate(self, inner: Strategy, messages: Iterable[Message]) -> Result:
        """Check the replies, decode them and have the inner strategy aggregate them.

        If the inner strategy only needs a mean, a few replies at a time are added to it and released; if the replies
        come from an iterator, no others are in memory. Other strategies are given all replies, with arrays that are
        decoded when their values are read; until then they are packed, in files if the round has some.
        """
        errors = list[Message]()
        if isinstance(messages, Sequence):
            asked = [message for message in messages if message.metadata.src_node_id in self.broadcast.nodes]
            others = [message for message in messages if message.metadata.src_node_id not in self.broadcast.nodes]
            replies = list(self._checked(self._sorted(asked) + others, errors))
            self._cap.add(reply.metrics.weight for reply in replies)
            return self._aggregate(inner, _released(replies), errors, streaming=False)
        if self._files is not None and not averages(inner):
            messages = _set_aside(messages, self._files)
        return self._aggregate(inner, self._checked(messages, errors, self._enough), errors, streaming=True)

    def _checked(
        self, messages: Iterable[Message], errors: list[Message], enough: int | None = None
    ) -> Iterator[Reply]:
        return checked_replies(self.broadcast, self._sent, messages, errors, self.report, self._weight_name, enough)

    def _aggregate(
        self, inner: Strategy, replies: Iterator[Reply], errors: list[Message], *, streaming: bool
    ) -> Result:
        if averages(inner):
            return self._mean(inner, replies, errors, streaming)
        every = list(replies)
        if streaming:
            self._cap.add(reply.metrics.weight for reply in every)
        return self._converted(self._of_all(inner, every, errors))

    def _converted(self, result: Result) -> Result:
        """Convert the model that a strategy of its own has aggregated."""
        arrays, metrics = result
        if arrays is None:
            return None, metrics
        return self._finite(lambda: _in_dtypes_of(self.broadcast.arrays, arrays)), metrics

    def _finite(self, make: Callable[[], ArrayRecord]) -> ArrayRecord | None:
        """Make the new model; None if a value is not finite."""
        try:
            return make()
        except NonFiniteError as error:
            logger.error("round %d: %s; the model remains unchanged", self.number, error)
            if self._files is not None:
                self._files.discard()
            return None

    # ---- strategies that need a mean --------------------------------------------------------------------------------

    def _mean(self, inner: Strategy, replies: Iterator[Reply], errors: list[Message], streaming: bool) -> Result:
        """Aggregate with a strategy that is given the mean as if it were the reply of a single client."""
        assert isinstance(inner, FedAvg)
        mean, kept = self._streamed_mean(replies, streaming)
        if not mean.weight:
            return inner.aggregate_train(self.number, errors)
        kept.sort(key=lambda pair: self._place(pair[1].node))
        contents = self._metric_contents(kept)
        logger.info("round %d: averaged %d replies; %d clients reported errors", self.number, len(kept), len(errors))
        if has_optimizer(inner):
            metrics = inner.train_metrics_aggr_fn(contents, self._weight_name) if contents else MetricRecord()
            optimizer = ServerOptimizer(inner, self.number)
            with self.report.timed("aggregate"):
                return self._finite(lambda: optimizer.update(self.broadcast, mean, self._files)), metrics
        message = kept[0][0]
        message.content = RecordDict({"arrays": mean.result(), "metrics": MetricRecord({self._weight_name: 1.0})})
        with _metrics_of(inner, contents), self.report.timed("aggregate"):
            return self._converted(inner.aggregate_train(self.number, [*errors, message]))

    def _streamed_mean(
        self, replies: Iterator[Reply], streaming: bool
    ) -> tuple[Mean, list[tuple[Message, ReplyMetrics]]]:
        """Add replies to a mean, a few at a time; their messages are kept without arrays.

        If the median falls, the cap may fall below the weight of a reply that has already been added. The whole mean is
        then scaled down until no reply in it exceeds the cap. In the end, no reply weighs more than the cap, whatever
        the order; if no weight exceeds it, nothing is scaled.
        """
        mean = Mean(
            self.broadcast, of_weights=self._of_weights, zeros=None if self._files is None else self._files.zeros
        )
        kept, heaviest = list[tuple[Message, ReplyMetrics]](), 0.0
        while some := self._together(replies):
            if streaming:
                self._cap.add(reply.metrics.weight for reply in some)
            if heaviest > self._cap.limit:
                logger.warning(
                    "round %d: the %d replies added so far are scaled by %g, because one of them has weight %g and the "
                    "cap is now %g (weight_cap)",
                    *(self.number, len(kept), self._cap.limit / heaviest, heaviest, self._cap.limit),
                )
                mean.scale(self._cap.limit / heaviest)
                heaviest = self._cap.limit
            weights = [self._cap.capped(reply.metrics, self.number) for reply in some]
            heaviest = max(heaviest, *weights)
            with self.report.timed("decode"):
                shares = [reply.factor * weight for reply, weight in zip(some, weights, strict=True)]
                unchanged = math.fsum(weights) - math.fsum(shares)
                mean.add([(reply.variables, s) for reply, s in zip(some, shares, strict=True)], unchanged=unchanged)
            for reply in some:
                self._count(reply)
                content = without_others(reply, self.number).items()
                reply.message.content = RecordDict({k: one for k, one in content if not isinstance(one, ArrayRecord)})
                kept.append((reply.message, reply.metrics))
            del some, reply, content  # release them before the next ones are fetched
        return mean, kept

    @functools.cached_property
    def _room(self) -> int:
        """The number of bytes of replies that may be in memory together."""
        return max(_SMALL, sum(nbytes_of(array) for array in self.broadcast.arrays.values()) // 2)

    def _together(self, replies: Iterator[Reply]) -> list[Reply]:
        """Draw the next replies that are added together: a few, and of a large model not more than half its size."""
        some, size = list[Reply](), 0
        while reply := next(replies, None):
            some.append(reply)
            record = reply.message.content[reply.record]
            assert isinstance(record, ArrayRecord)
            own = sum(nbytes_of(array) for array in record.values())
            size += own
            if len(some) == _FEW or size + own > self._room:
                break
        return some

    def _metric_contents(self, replies: Sequence[tuple[Message, ReplyMetrics]]) -> list[RecordDict]:
        """Return contents for Flower's metric functions: the common metrics of all replies that have all of them."""
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
        """Aggregate with a strategy that needs the individual replies."""
        owner = _owner(inner)
        custom = owner.__module__.split(".")[0] != "flwr"
        if custom:  # it may use further records and any metric
            replies = like_most(replies, self.number)
        rows, _ = common_metrics([reply.metrics for reply in replies], self.number)
        contents: list[RecordDict] | None = None
        if None in rows and owner in _IGNORING_METRICS:
            contents = self._metric_contents([(reply.message, reply.metrics) for reply in replies])
            name = self._weight_name
            rows = [MetricRecord({name: reply.metrics.metrics[name]}) for reply in replies]
        stretches = None
        if owner in VALUE_BY_VALUE:
            stretches = Stretches(self.broadcast, (reply.variables for reply in replies))
        received = []
        for reply, row in zip(replies, rows, strict=True):
            if row is None:
                log_left_out(self.number, reply.metrics.node, "it lacks metrics that the strategy may need")
                continue
            weight = self._cap.capped(reply.metrics, self.number)
            if self._decode(inner, reply, with_weight(row, self._weight_name, weight), custom, stretches):
                received.append(reply)
        if not any(reply.metrics.weight > 0 for reply in received):
            received = []  # their weighted mean is undefined
        if not received and not errors:
            return None, None
        received.sort(key=lambda reply: self._place(reply.metrics.node))
        aggregate, used = inner.aggregate_train, received
        if owner is MultiKrum and isinstance(inner, MultiKrum) and received:
            # After its selection, Flower's method does what that of its base class does.
            aggregate, used = functools.partial(FedAvg.aggregate_train, inner), self._krum(inner, received)
        for reply in received:
            reply.variables = {}
        own_metrics = (
            nullcontext() if contents is None or not isinstance(inner, FedAvg) else _metrics_of(inner, contents)
        )
        with self.report.timed("aggregate"), own_metrics:
            arrays, metrics = aggregate(self.number, [*errors, *(reply.message for reply in used)])
        return arrays if arrays is None or stretches is None else stretches.joined(arrays), metrics

    def _krum(self, inner: MultiKrum, replies: Sequence[Reply]) -> list[Reply]:
        """Return the replies that Krum selects, the best first; see the note in ``krum``."""
        variables = [reply.variables for reply in replies]
        with self.report.timed("decode"):
            squares = krum.distances(Stretches(self.broadcast, variables), variables, of_weights=self._of_weights)
        chosen = [replies[i] for i in krum.selected(squares, inner.num_malicious_nodes, inner.num_nodes_to_select)]
        nodes = named([reply.metrics.node for reply in chosen])
        logger.info("round %d: %s selected %s of %d", self.number, type(inner).__name__, nodes, len(replies))
        return chosen

    def _decode(
        self, inner: Strategy, reply: Reply, metrics: MetricRecord, custom: bool, stretches: Stretches | None
    ) -> bool:
        """Put the decoded arrays and the metrics into a reply's message; return whether the reply can be used."""
        if stretches is None:
            arrays = decoded(self.broadcast, reply.variables, of_weights=self._of_weights)
        else:
            arrays = stretches.decoded(reply.variables, of_weights=self._of_weights)
        try:
            arrays = defences.bounded(inner, self.broadcast, arrays)
        except PayloadError as error:
            log_left_out(self.number, reply.metrics.node, error)
            return False
        self._count(reply)
        if custom:
            content = dict(reply.message.content.items())
            content |= {reply.record: arrays, reply.metrics.record: metrics}
        else:  # Flower requires the same record names in all replies
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
        return sorted(messages, key=lambda message: self._place(message.metadata.src_node_id))

    def _place(self, node: int) -> str:
        """Return by what replies are sorted, so that the result does not depend on the order of arrival."""
        return str(self._name_of(node))


def _owner(strategy: Strategy) -> type:
    """Return the class that defines a strategy's ``aggregate_train``; a replaced method does not count as Flower's."""
    if "aggregate_train" in vars(strategy):
        return TrainingRound  # any class that is not Flower's
    return owner_of(strategy)


def _set_aside(messages: Iterable[Message], files: RoundFiles) -> Iterator[Message]:
    """Yield messages whose arrays are in files, so that all of them can be held."""
    scratch = Scratch(files.folder)
    for message in messages:
        if message.has_content():
            content = dict(message.content.items())
            content |= {
                key: set_aside(record, scratch) for key, record in content.items() if isinstance(record, ArrayRecord)
            }
            message.content = RecordDict(content)
        yield message
        del message


def _released(replies: list[Reply]) -> Iterator[Reply]:
    """Yield the replies of a list, removing each from it."""
    replies.reverse()
    while replies:
        yield replies.pop()


@contextmanager
def _metrics_of(strategy: FedAvg, contents: list[RecordDict]) -> Iterator[None]:
    """Make a strategy aggregate the metrics of these contents instead of those of its replies."""
    own = strategy.train_metrics_aggr_fn
    strategy.train_metrics_aggr_fn = lambda _, name: own(contents, name) if contents else MetricRecord()
    try:
        yield
    finally:
        strategy.train_metrics_aggr_fn = own


def _in_dtypes_of(sent: ArrayRecord, arrays: ArrayRecord) -> ArrayRecord:
    """Convert the new values to the dtypes that were sent; with numpy 2, Flower's adaptive strategies return float64.

    Raises:
        NonFiniteError: a new value is NaN or infinite, possibly only after the conversion.
    """
    result = ArrayRecord()
    for name, array in arrays.items():
        dtype = sent[name].dtype
        if array.dtype != dtype:
            array = array_of(array.numpy(), dtype)
        try:
            view_dense(array, name)
        except PayloadError:
            raise NonFiniteError(f"{name} would become NaN or infinite") from None
        result[name] = array
    return result
