"""``OMCStrategy``: any of Flower's strategies, with compressed messages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from fedomc.codec.elements import FloatFormat
from fedomc.errors import NonFiniteError, PayloadError, PolicyError
from fedomc.flower import defences
from fedomc.flower._flower import logger
from fedomc.flower.aggregation import AGGREGATES, Mean, averages, decoded, is_the_mean
from fedomc.flower.arrays import dense_array, in_dtype, records_of, view_dense
from fedomc.flower.checkpointing import RunState, from_checkpoint, settings_of, to_checkpoint
from fedomc.flower.downlink import Broadcast, float32_shapes
from fedomc.flower.grid import StreamingGrid
from fedomc.flower.replies import Checked, check_metrics, checked_replies, like_most, log_left_out, weight_of
from fedomc.flower.tiers import NodeCapabilities
from fedomc.flower.traffic import Observer, RoundReport, Traffic
from fedomc.serialization.checkpointing import Checkpoints
from fedomc.serialization.entropy import require
from fedomc.training.policy import CompressionPolicy, TieredPolicy

LOSSLESS = ("none", "down", "up", "both")

_FEW = 3
"""Of replies that come one by one, so many are added together; and the metrics that most of the first so many have,
all others must have."""


class OMCStrategy(Strategy):
    """Wrap a strategy so that what it sends is compressed and what it aggregates is decoded.

    Every client gets its own payload: which variables stay FP32 is drawn from the policy's seed, the round and the
    client. Each variable is encoded once a round, whatever the number of clients. A reply must hold one ``ArrayRecord``
    with the variables that were sent (what ``collect`` gives) and one ``MetricRecord`` with the weight; one that is
    damaged, of another model, not finite, too late or was not asked for is left out and named in the log. The inner
    strategy aggregates the others; a result that is not finite is dropped.

    What the server's memory is: for strategies that need a mean (``FedAvg``, ``FedAvgM``, ``FedProx``, ``FedAdam``,
    ``FedYogi``, ``FedAdagrad``, and subclasses that leave ``aggregate_train`` alone) it does not grow with the number
    of clients, as ``start`` takes replies one by one. Any other strategy holds all replies, packed, and what it
    decodes of them: one variable of each in FP32 with ``FedMedian`` and ``FedTrimmedAvg``, all of all, several times,
    with ``Krum``, ``MultiKrum`` and ``Bulyan``, and with the strategies of differential privacy that clip on the
    server; those that clip on the clients need one variable of a reply at a time.

    Differential privacy goes inside, ``OMCStrategy(DifferentialPrivacyServerSideFixedClipping(FedAvg(), ...))``; what
    is refused, and what becomes of a client's clipping, is told in ``defences``.

    Names alone do not tell parameters from buffers: float32 buffers of two dimensions are compressed like parameters
    unless the policy excludes them.

    Attributes:
        inner: the wrapped strategy.
        policy: how to compress; None sends FP32 and only counts. With a ``TieredPolicy`` each client gets the format
            of its tier; clients tell it where their app has ``app.query("fedomc")(fedomc.flower.announce)``.
        aggregate: ``difference`` or ``value``.
        client_name: names a node for the draw: the node's number by default, which a simulation changes in each run.
        lossless: which messages go through the lossless stage: ``none``, ``down``, ``up`` or ``both``. It needs
            zstandard on both sides, and clients that give ``collect`` the message.
        rest_format: in which the variables travel that partial quantization leaves in FP32; None is FP32.
        checkpoints: where the state is kept after each round, for ``start`` to resume from.
        observers: are called with the report of each round of training.
        traffic: bytes by round, of training messages.
        report: what the last round took, by variable; its totals are among the round's metrics, as ``fedomc.up-bytes``.

    Raises:
        FormatError: no such format of the rest.
        PolicyError: an unknown way to aggregate or direction, the lossless stage without zstandard, or ``value`` with a
            strategy that clips.
    """

    def __init__(
        self,
        inner: Strategy,
        policy: CompressionPolicy | TieredPolicy | None,
        *,
        aggregate: str = "difference",
        client_name: Callable[[int], str | int] = str,
        lossless: str = "none",
        rest_format: str | FloatFormat | None = None,
        checkpoints: Checkpoints | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        if aggregate not in AGGREGATES:
            raise PolicyError(f"aggregate={aggregate!r} is unknown: use one of {', '.join(AGGREGATES)}")
        if lossless not in LOSSLESS:
            raise PolicyError(f"lossless={lossless!r} is unknown: use one of {', '.join(LOSSLESS)}")
        if lossless != "none":
            require()
        defences.check_aggregate(inner, aggregate)
        self.inner = inner
        self.policy = policy
        self.aggregate = aggregate
        self.lossless = lossless
        self.rest_format = None if rest_format is None else FloatFormat.parse(rest_format)
        self.client_name = client_name
        self.checkpoints = checkpoints
        self.observers = observers
        self.traffic: list[Traffic] = []
        self._broadcast: Broadcast | None = None
        self._sent: list[Metadata] = []
        self._capabilities = NodeCapabilities()
        self.report: RoundReport | None = None

    def summary(self) -> None:
        """Log the settings of the inner strategy."""
        self.inner.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds as Flower does, but take the replies one by one as they arrive.

        Args:
            grid: where the nodes are.
            initial_arrays: the model.
            num_rounds: how many.
            timeout: seconds to wait for the replies of a round; who has not answered by then is left out.
            train_config: for the clients, in training.
            evaluate_config: for the clients, in evaluation.
            evaluate_fn: measures the model on the server, before the first round (as round 0) and after each.

        Returns:
            The last model and the metrics by round.
        """
        one_by_one = StreamingGrid(grid)
        initial_arrays, done = self.resume(initial_arrays)
        logger.info("Starting %s around %s:", type(self).__name__, type(self.inner).__name__)
        size = sum(len(array.data) for array in initial_arrays.values()) / 2**20
        logger.info("%d rounds of a model of %.2f MB", num_rounds, size)
        self.summary()
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        result, arrays = Result(), initial_arrays

        def measure(number: int) -> None:
            metrics = None if evaluate_fn is None else evaluate_fn(number, arrays)
            if metrics is not None:
                logger.info("round %d: measured on the server: %s", number, metrics)
                result.evaluate_metrics_serverapp[number] = metrics

        if not done:
            measure(0)
        for number in range(done + 1, num_rounds + 1):
            logger.info("[ROUND %d/%d]", number, num_rounds)
            messages = self.configure_train(number, arrays, train_config, one_by_one)
            new, metrics = self.aggregate_train(number, one_by_one.send_and_receive(messages, timeout=timeout))
            if new is not None:
                arrays = new
            if metrics is not None:
                logger.info("round %d: metrics of training: %s", number, metrics)
                result.train_metrics_clientapp[number] = metrics
            messages = self.configure_evaluate(number, arrays, evaluate_config, one_by_one)
            metrics = self.aggregate_evaluate(number, one_by_one.send_and_receive(messages, timeout=timeout))
            if metrics is not None:
                logger.info("round %d: metrics of evaluation: %s", number, metrics)
                result.evaluate_metrics_clientapp[number] = metrics
            measure(number)
            if self.checkpoints is not None:
                state = RunState(number, arrays, traffic=self.traffic)
                self.checkpoints.save(number, to_checkpoint(state, self.inner, self._settings()))
        result.arrays = arrays
        return result

    def initialize_parameters(self, client_manager: object) -> NoReturn:
        """Refuse Flower's legacy workflows, SecAgg+ among them, which begin by asking for this.

        Raises:
            PolicyError: always.
        """
        raise PolicyError(f"OMCStrategy cannot run in a legacy workflow: {defences.NO_SECURE_AGGREGATION}")

    def resume(self, arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
        """Take up the last checkpoint, if there is one: the strategies' state, and Python's random state.

        That is what Flower draws nodes with, so that the rounds go on as they would have without an interruption.

        Args:
            arrays: the initial model.

        Returns:
            The model to go on with, and how many rounds it has had.

        Raises:
            PayloadError: the checkpoint is of another model or policy, or none is whole.
        """
        stored = None if self.checkpoints is None else self.checkpoints.load()
        if stored is None:
            return arrays, 0
        state = from_checkpoint(stored, self.inner, self._settings(), arrays)
        self.traffic[:] = state.traffic
        return state.arrays, state.round

    def _settings(self) -> dict[str, object]:
        return settings_of(self.inner, self.aggregate, self.policy)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy choose the clients, then give each its own payload.

        Raises:
            PolicyError: the inner strategy clips what it cannot, or this one is inside a strategy that clips.
        """
        defences.check_nesting()
        defences.check_model(self.inner, arrays)
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        self._broadcast = self._broadcast_of(arrays, server_round, grid, messages)
        self.report = RoundReport(server_round)
        with self.report.timed("encode"):
            for message in messages:
                self._broadcast.compress(message)
        self._sent = [message.metadata for message in messages]
        for message in messages:
            self.report.count("down", message)
        self.report.errors = self._broadcast.errors
        self.traffic.append(Traffic(server_round, len(messages), down_bytes=self.report.down_bytes.total()))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and aggregate what they decode to.

        If the inner strategy needs no more than a mean, a few replies at a time are added to it, one variable of all
        of them after the other, and released; of an iterator, such as ``StreamingGrid`` gives, no more are in memory
        at any time. Other strategies get all replies, which decode when they are looked at.
        """
        if self._broadcast is None or self.report is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        broadcast, errors = self._broadcast, list[Message]()
        usable = self._usable(broadcast, replies, errors)
        aggregate = self._mean if averages(self.inner) else self._all
        arrays, metrics = aggregate(server_round, broadcast, usable, errors)
        if arrays is not None:
            try:
                arrays = _in_dtypes_of(broadcast.arrays, arrays)
            except NonFiniteError as error:
                logger.error("round %d: %s; the model stays as it was", server_round, error)
                arrays = None
        if metrics is not None:
            metrics = MetricRecord({**metrics, **self.report.metrics(variables=False)})
        for observer in self.observers:
            observer(self.report)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy choose the clients; they evaluate what they would be sent for training."""
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        broadcast = self._broadcast_of(arrays, server_round, grid, messages)
        for message in messages:
            broadcast.compress(message)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check the metrics and let the inner strategy aggregate them."""
        agreed = []
        for reply in replies:
            try:
                if not reply.has_error():
                    check_metrics(reply, self._weight_name)
                agreed.append(reply)
            except PayloadError as error:
                log_left_out(server_round, reply.metadata.src_node_id, error)
        is_like = like_most(reply for reply in agreed if not reply.has_error())
        agreed = [reply for reply in agreed if reply.has_error() or is_like(server_round, reply)]
        if not any(weight_of(reply, self._weight_name) > 0 for reply in agreed if not reply.has_error()):
            return None
        return self.inner.aggregate_evaluate(server_round, agreed)

    def _broadcast_of(self, arrays: ArrayRecord, server_round: int, grid: Grid, messages: list[Message]) -> Broadcast:
        tiers = self.policy
        if not isinstance(tiers, TieredPolicy):
            return self._broadcast_by(lambda node: tiers, arrays, server_round)
        self._capabilities.ask(grid, {message.metadata.dst_node_id for message in messages})
        shapes = float32_shapes(arrays)

        def policy_of(node: int) -> CompressionPolicy | None:
            client = self.client_name(node)
            try:
                return tiers.choose(shapes, **self._capabilities.of(node), round=server_round, client=client)
            except PolicyError as error:
                logger.warning("round %d: node %d gets the default tier: %s", server_round, node, error)
                return tiers.choose()

        return self._broadcast_by(policy_of, arrays, server_round)

    def _broadcast_by(
        self, policy_of: Callable[[int], CompressionPolicy | None], arrays: ArrayRecord, server_round: int
    ) -> Broadcast:
        return Broadcast(arrays, policy_of, server_round, self.client_name, self.lossless, self.rest_format)

    def _mean(
        self, server_round: int, broadcast: Broadcast, usable: Iterator[Checked], errors: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate with a strategy that takes the mean for the reply of a single client."""
        assert self.report is not None
        mean, kept = Mean(broadcast, value=self.aggregate == "value"), list[Message]()
        while some := list(islice(usable, _FEW)):
            with self.report.timed("decode"):
                mean.add([(variables, weight_of(reply, self._weight_name)) for reply, variables in some])
            for reply, _ in some:
                reply.content = _without_arrays(reply.content)
                kept.append(reply)
            del some, reply, _  # before the next ones are there
        if not mean.weight:
            return self.inner.aggregate_train(server_round, errors)
        kept = self._sorted(kept)
        contents = [reply.content for reply in kept]
        logger.info("round %d: the mean of %d replies, %d errors", server_round, len(kept), len(errors))
        assert isinstance(self.inner, FedAvg)
        if is_the_mean(self.inner):
            with self.report.timed("aggregate"):
                return mean.arrays(), self.inner.train_metrics_aggr_fn(contents, self._weight_name)
        one = kept[0]
        one.content = RecordDict({"arrays": mean.result(), "metrics": MetricRecord({self._weight_name: 1.0})})
        with _metrics_of(self.inner, contents), self.report.timed("aggregate"):
            return self.inner.aggregate_train(server_round, [*errors, one])

    def _all(
        self, server_round: int, broadcast: Broadcast, usable: Iterator[Checked], errors: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate with a strategy that looks at each reply."""
        received = []
        for reply, variables in usable:
            key = next(iter(records_of(reply.content, ArrayRecord)))
            content = RecordDict(dict(reply.content.items()))
            arrays = decoded(broadcast, variables, value=self.aggregate == "value")
            try:
                content[key] = defences.bounded(self.inner, broadcast, arrays)
            except PayloadError as error:
                log_left_out(server_round, reply.metadata.src_node_id, error)
                continue
            reply.content = content
            received.append(reply)
        if not any(weight_of(reply, self._weight_name) > 0 for reply in received):
            received = []  # a mean of nothing
        if not received and not errors:
            return None, None
        assert self.report is not None
        with self.report.timed("aggregate"):
            return self.inner.aggregate_train(server_round, [*errors, *self._sorted(received)])

    def _sorted(self, replies: Iterable[Message]) -> list[Message]:
        """Sort by the clients' names, so that what is computed does not depend on who was first."""
        return sorted(replies, key=lambda reply: str(self.client_name(reply.metadata.src_node_id)))

    def _usable(self, broadcast: Broadcast, replies: Iterable[Message], errors: list[Message]) -> Iterator[Checked]:
        """Give the replies that can be used; errors are put aside.

        Their metrics must be named alike, since Flower aggregates none otherwise: as those of most, or, where replies
        come one by one, of most of the first few.
        """
        whole = isinstance(replies, Sequence)
        if whole:
            asked = [reply for reply in replies if reply.metadata.src_node_id in broadcast.nodes]
            others = [reply for reply in replies if reply.metadata.src_node_id not in broadcast.nodes]
            replies = self._sorted(asked) + others
        report = self.report
        assert report is not None
        checked = checked_replies(broadcast, self._sent, replies, errors, report, self._weight_name)
        first = list(checked if whole else islice(checked, _FEW))
        is_like = like_most(reply for reply, _ in first)
        received = 0
        for one in _each(first, checked):
            reply = one[0]
            if is_like(broadcast.round, reply):
                report.count("up", reply)
                received += 1
                yield one
            del one, reply
        self.traffic[-1] = replace(self.traffic[-1], received=received, up_bytes=report.up_bytes.total())

    @property
    def _weight_name(self) -> str:
        return getattr(defences.innermost(self.inner), "weighted_by_key", "num-examples")


def _each(first: list[Checked], rest: Iterator[Checked]) -> Iterator[Checked]:
    """Chain without holding on to what was given."""
    while first:
        yield first.pop(0)
    yield from rest


def _without_arrays(content: RecordDict) -> RecordDict:
    return RecordDict({key: record for key, record in content.items() if not isinstance(record, ArrayRecord)})


@contextmanager
def _metrics_of(strategy: FedAvg, contents: list[RecordDict]) -> Iterator[None]:
    """Let a strategy that is given one reply aggregate the metrics of all."""
    own = strategy.train_metrics_aggr_fn
    strategy.train_metrics_aggr_fn = lambda _, weighted_by: own(contents, weighted_by)
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
        wanted = sent[name].dtype
        if array.dtype != wanted:
            array = dense_array(in_dtype(array.numpy(), wanted))
        try:
            view_dense(array, name)
        except PayloadError:
            raise NonFiniteError(f"{name} would become NaN or infinite") from None
        result[name] = array
    return result
