"""``OMCStrategy``: adds compressed messages to any of Flower's strategies."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedomc.errors import PolicyError
from fedomc.flower import defences
from fedomc.flower._flower import logger, stand_in
from fedomc.flower.base_model import name_base, read_digests
from fedomc.flower.checkpointing import settings_of
from fedomc.flower.downlink import Broadcast
from fedomc.flower.grid import StreamingGrid
from fedomc.flower.mapped import nbytes_of
from fedomc.flower.options import check_options, read_unquantized
from fedomc.flower.replies import checked_evaluations
from fedomc.flower.server_optimizers import RoundFiles, release_current
from fedomc.flower.store import Store
from fedomc.flower.supervision import Supervision, gain_of
from fedomc.flower.tiers import NodeCapabilities
from fedomc.flower.traffic import Observer, RoundReport, Traffic
from fedomc.flower.training_round import Result as RoundResult
from fedomc.flower.training_round import TrainingRound
from fedomc.methods import Method
from fedomc.serialization.checkpointing import Checkpoints
from fedomc.training.policy import DEFAULT, CompressionPolicy, TieredPolicy


class OMCStrategy(Strategy):
    """A strategy that wraps another one, compresses the messages that it sends, and decodes the replies for it.

    Each client gets its own payload: the variables that stay in FP32 are drawn from the policy's seed, the round and
    the client. Each variable is encoded once per round and format, whatever the number of clients. A reply must have an
    ``ArrayRecord`` with the variables that were sent, such as ``collect`` returns, and a ``MetricRecord`` with the
    weight. A reply is left out with a warning if it is damaged, not finite, late, of another model, for a message of
    another round or from a node that was not selected; the inner strategy aggregates the others. A new model that is
    not finite is discarded.

    A metric that is not finite, or that at most half of the replies have, is dropped with a warning, but its reply is
    kept. Additional array and metric records are dropped with a warning, too, unless the inner strategy has its own
    ``aggregate_train``, which is then given them. No reply weighs more than ``weight_cap`` times the median weight; for
    a stream of replies, this is the median of the replies read so far. A warning names each capped client.

    The server's memory does not grow with the number of clients for strategies that need only a mean (``FedAvg``,
    ``FedAvgM``, ``FedProx``, ``FedAdam``, ``FedYogi``, ``FedAdagrad``, and subclasses that do not override
    ``aggregate_train``), because ``start`` fetches replies one by one. Any other strategy holds all packed replies and
    the values that it decodes from them: 2 to 4 MB of each reply in FP32 with ``FedMedian``, ``FedTrimmedAvg``,
    ``Krum`` and ``MultiKrum``; several copies of all variables of all replies with ``Bulyan`` and the strategies of
    differential privacy that clip on the server; one variable of one reply with those that clip on the clients.

    Strategies of differential privacy must be wrapped, as in
    ``OMCStrategy(DifferentialPrivacyServerSideFixedClipping(FedAvg(), ...))``; see the module ``defences`` for what is
    refused and for clipping on the clients.

    Parameters and buffers cannot be distinguished by name, so two-dimensional buffers of floats are compressed like
    parameters unless the policy excludes them.

    Attributes:
        inner: the wrapped strategy.
        policy: how to compress, or a policy's string such as ``S1E3M7@0.9``; None sends FP32 and counts bytes. With a
            ``TieredPolicy`` each client gets the format of the tier that its ``app.query("fedomc")(announce)`` names.
        aggregate: ``delta`` averages the clients' changes, ``weights`` the weights that they return.
        client_name: returns the name of a node for random draws. The default is the node's ID, which differs between
            runs of a simulation.
        entropy_coding: which messages are entropy coded: ``none``, ``down``, ``up`` or ``both``. Entropy coding needs
            zstandard on both sides, and clients that pass the message to ``collect``.
        unquantized_format: the format of the variables that partial quantization leaves unquantized; None is FP32.
        weight_cap: the maximum weight of a reply, as a multiple of the median weight; None sets no cap.
        checkpoints: stores the state after each round, for ``start`` to resume from.
        observers: functions that are called with the report of each round of training.
        failed_rounds: the number of consecutive rounds without a usable reply that ends the run with an error. A
            shorter run in which every round failed ends with the error, too. None never raises it.
        over_selection: how many clients are selected for each usable reply that a round needs. With 1.3, a round or an
            evaluation for which the inner strategy selects 130 clients goes on with the first 100 usable replies, as
            long as the replies come from an iterator. With 1 it waits for all of them.
        base: the digests of the base models that a client may have, each from ``fedomc.base_digest(model)``, if the
            messages have only what is trained, such as adapters. ``install`` refuses a message for another base model.
        traffic: the bytes of the training messages of each round.
        report: the cost of the last round, by variable. Its totals are among the round's metrics, such as
            ``fedomc.up-bytes``.

    Raises:
        FormatError: a format does not exist.
        PolicyError: an argument is of the wrong kind, unknown or out of range, zstandard is not installed but entropy
            coding is requested, ``weights`` is used with a strategy that clips, the unquantized format is only for an
            uplink or has several parts, or a text is not a digest.
    """

    def __init__(
        self,
        inner: Strategy,
        policy: CompressionPolicy | TieredPolicy | str | None = DEFAULT,
        *,
        aggregate: str = "delta",
        client_name: Callable[[int], str | int] = str,
        entropy_coding: str = "none",
        unquantized_format: str | Method | None = None,
        weight_cap: float | None = 10.0,
        checkpoints: Checkpoints | None = None,
        observers: Sequence[Observer] = (),
        failed_rounds: int | None = 3,
        base: str | Sequence[str] = (),
        over_selection: float = 1.0,
    ) -> None:
        check_options(
            inner=inner, aggregate=aggregate, entropy_coding=entropy_coding, weight_cap=weight_cap,
            over_selection=over_selection, failed_rounds=failed_rounds, checkpoints=checkpoints, observers=observers,
        )  # fmt: skip
        defences.check_aggregate(inner, aggregate)
        self.inner = inner
        self.policy = policy = CompressionPolicy.parse(policy) if isinstance(policy, str) else policy
        self.aggregate = aggregate
        self.entropy_coding = entropy_coding
        self.unquantized_format = read_unquantized(unquantized_format)
        self.client_name = client_name
        self.weight_cap = weight_cap
        self.checkpoints = checkpoints
        self.observers = observers
        self.failed_rounds = failed_rounds
        self.over_selection = over_selection
        self.base = read_digests(base)
        self.traffic: list[Traffic] = []
        self.report: RoundReport | None = None
        self._supervision = Supervision(
            failed_rounds, gain_of(defences.innermost(inner)), "" if policy is None else str(policy)
        )
        self._round: TrainingRound | None = None
        self._files: RoundFiles | None = None
        self._broadcast: Broadcast | None = None
        self._evaluation: Sequence[Metadata] = ()
        self._capabilities = NodeCapabilities()
        self._asked: list[int] = []

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
        """Run the rounds as Flower does, but process the replies one by one as they arrive.

        If the inner strategy has its own ``start``, for instance to log or to keep the best model, that method is run
        with compressed messages.

        Args:
            grid: the grid that connects the nodes.
            initial_arrays: the initial model.
            num_rounds: the number of rounds.
            timeout: the number of seconds to wait for the replies of a round; later replies are left out.
            train_config: the config that is sent to the clients for training.
            evaluate_config: the config that is sent to the clients for evaluation.
            evaluate_fn: evaluates the model on the server, before the first round (as round 0) and after each round.

        Returns:
            The last model and the metrics of all rounds, including those before the run was resumed.

        Raises:
            PayloadError: the checkpoint has another model or other settings, every checkpoint is damaged, or the
                checkpoint is that of a finished run with another initial model.
            OSError: a checkpoint cannot be written, for instance because the disk is full.
            PolicyError: there are checkpoints, but the inner strategy has its own ``start``, which does not save any.
            RoundsFailedError: no reply was usable in ``failed_rounds`` consecutive rounds, or in all rounds of a
                shorter run.
        """
        streaming = StreamingGrid(grid)
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        if type(self.inner).start is not Strategy.start:
            return self._inner_in_place().start(
                streaming, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
            )
        with Store(self.checkpoints, self.inner, self._settings(), self.traffic) as store:
            state = store.begin(initial_arrays, num_rounds)
            del initial_arrays  # which stay in memory only if the caller keeps them
            self.traffic, self._asked = state.traffic, state.asked
            self._supervision.begin()
            logger.info("Starting %s around %s:", type(self).__name__, type(self.inner).__name__)
            size = sum(nbytes_of(array) for array in state.arrays.values()) / 2**20
            logger.info("%d rounds of a model of %.2f MB", num_rounds, size)
            self.summary()

            def measure(number: int) -> None:
                metrics = None if evaluate_fn is None else evaluate_fn(number, state.arrays)
                if metrics is not None:
                    logger.info("round %d: metrics of the evaluation on the server: %s", number, metrics)
                    state.result.evaluate_metrics_serverapp[number] = metrics

            if not state.round:
                measure(0)
            for number in range(state.round + 1, num_rounds + 1):
                logger.info("[ROUND %d/%d]", number, num_rounds)
                with store.round(state) as self._files:
                    new, metrics = self._train(number, state.arrays, train_config, streaming, timeout)
                    self._round = None  # which holds the former model
                    if new is not None:
                        state.arrays = new
                    del new
                    if metrics is not None:
                        logger.info("round %d: training metrics: %s", number, metrics)
                        state.result.train_metrics_clientapp[number] = metrics
                    messages = self.configure_evaluate(number, state.arrays, evaluate_config, streaming)
                    metrics = self.aggregate_evaluate(number, streaming.send_and_receive(messages, timeout=timeout))
                    del messages
                    if metrics is not None:
                        logger.info("round %d: evaluation metrics: %s", number, metrics)
                        state.result.evaluate_metrics_clientapp[number] = metrics
                    measure(number)
                    state.round, state.asked = number, self._waiting_for()
                    store.save(state)
        self._supervision.finish()
        state.result.arrays = state.arrays
        return state.result

    def _train(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: StreamingGrid, timeout: float
    ) -> RoundResult:
        messages = self.configure_train(number, arrays, config, grid)
        return self.aggregate_train(number, grid.send_and_receive(messages, timeout=timeout))

    def _waiting_for(self) -> list[int]:
        """Return the nodes whose replies may still come after a round."""
        return []

    def initialize_parameters(self, client_manager: object) -> NoReturn:
        """Refuse Flower's legacy workflows, including SecAgg+, which begin by calling this method.

        Raises:
            PolicyError: always.
        """
        raise PolicyError(
            "OMCStrategy cannot run in a legacy workflow (start_server, ServerAppComponents, SecAggPlusWorkflow): use "
            "flwr.serverapp, that is app = ServerApp() with @app.main(), and strategy.start(grid, arrays) in it. "
            f"{defences.NO_SECURE_AGGREGATION}"
        )

    def resume(self, arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
        """Restore the last checkpoint, if there is one, including the strategies' state and Python's random state.

        Flower samples nodes with Python's random generator, so the run continues as it would have without interruption.

        Args:
            arrays: the initial model.

        Returns:
            The restored model and the number of rounds that it has been trained.

        Raises:
            PayloadError: the checkpoint has another model or other settings, or every checkpoint is damaged.
        """
        state = Store(self.checkpoints, self.inner, self._settings(), self.traffic).restored(arrays)
        self.traffic = state.traffic
        return state.arrays, state.round

    def _settings(self) -> dict[str, object]:
        settings = {**settings_of(self.inner, self.aggregate, self.policy), "weight_cap": self.weight_cap}
        settings |= {"over_selection": self.over_selection} if self.over_selection > 1 else {}
        return {**settings, "base": list(self.base)} if self.base else settings

    def _inner_in_place(self) -> Strategy:
        """Return the inner strategy for its own ``start``, with its configuring and aggregating methods replaced."""
        if self.checkpoints is not None:
            name = type(self.inner).__name__
            raise PolicyError(
                f"checkpoints are saved by OMCStrategy.start, but {name} has its own start: override start in a "
                "subclass of OMCStrategy instead, or set checkpoints=None and save checkpoints in that start"
            )
        names = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
        return stand_in(self.inner, {method: getattr(self, method) for method in names})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have the inner strategy select the clients, and compress the model for each of them.

        Raises:
            PolicyError: the inner strategy clips and a variable cannot be clipped, or a strategy that clips wraps this
                one.
        """
        defences.check_nesting(self.inner)
        defences.check_model(self.inner, arrays)
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        broadcast = self._broadcast_of(arrays, server_round, grid, messages)
        self.report = report = RoundReport(server_round)
        with report.timed("encode"):
            self._send(broadcast, messages)
        for message in messages:
            report.count("down", message)
        report.errors = {name: (found.error, found.size) for name, found in broadcast.distances.items()}
        self._supervision.check_broadcast(server_round, broadcast.distances)
        self.traffic.append(Traffic(server_round, len(messages), down_bytes=report.down_bytes.total()))
        self._round = TrainingRound(
            broadcast,
            [message.metadata for message in messages],
            report,
            weight_name=self._weight_name,
            weight_cap=self.weight_cap,
            of_weights=self.aggregate == "weights",
            name_of=self.client_name,
            files=self._files,
            enough=self._enough(len(messages)),
        )
        release_current(self.inner)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, decode them and have the inner strategy aggregate them.

        Args:
            server_round: the number of the round.
            replies: the replies. If they come from an iterator, such as that of ``StreamingGrid``, and the inner
                strategy only needs their mean, only a few of them are in memory at a time.

        Returns:
            The new model, or None; and the metrics including the report's totals, or None.

        Raises:
            RuntimeError: ``configure_train`` was not called.
        """
        if self._round is None or self.report is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        self._round.received = 0
        return self._finished(server_round, self._round, self._round.aggregate(self.inner, replies))

    def _finished(self, server_round: int, finished: TrainingRound, result: RoundResult) -> RoundResult:
        """Account for a round of training, and return its result with the report's totals among the metrics."""
        assert self.report is not None
        arrays, metrics = result
        up_bytes = self.report.up_bytes.total()
        self.traffic[-1] = replace(self.traffic[-1], received=finished.received, up_bytes=up_bytes)
        if metrics is not None:
            metrics = MetricRecord({**metrics, **self.report.metrics(variables=False)})
        for observer in self.observers:
            observer(self.report)
        self._supervision.add(server_round, self.traffic[-1].sent, finished.received, metrics)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have the inner strategy select the clients; they evaluate the model as it would be sent for training."""
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        broadcast = self._broadcast_of(arrays, server_round, grid, messages)
        self._send(broadcast, messages)
        self._evaluation = [message.metadata for message in messages]
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check the metrics and have the inner strategy aggregate them; None if no reply has a positive weight."""
        enough = self._enough(len(self._evaluation))
        messages = checked_evaluations(
            self._evaluation, replies, server_round, self._weight_name, self.weight_cap, enough
        )
        return None if messages is None else self.inner.aggregate_evaluate(server_round, messages)

    def _send(self, broadcast: Broadcast, messages: Iterable[Message]) -> None:
        """Compress the model in each message; the broadcast replaces the former one."""
        self._compress(broadcast, messages)
        broadcast.release_former()
        self._broadcast = broadcast

    def _compress(self, broadcast: Broadcast, messages: Iterable[Message]) -> None:
        for message in messages:
            broadcast.compress(message)
            name_base(message, self.base)

    def _broadcast_of(self, arrays: ArrayRecord, server_round: int, grid: Grid, messages: list[Message]) -> Broadcast:
        nodes = {message.metadata.dst_node_id for message in messages}
        policy_of = self._capabilities.policies(self.policy, nodes, grid, arrays, server_round, self.client_name)
        return Broadcast(
            arrays,
            policy_of,
            server_round,
            self.client_name,
            self.entropy_coding,
            self.unquantized_format,
            self._broadcast,
            None if self._files is None else self._files.scratch,
        )

    def _enough(self, selected: int) -> int:
        """Return the number of usable replies with which a round goes on, of as many as there are selected clients."""
        return math.ceil(selected / self.over_selection - 1e-9)

    @property
    def _weight_name(self) -> str:
        return getattr(defences.innermost(self.inner), "weighted_by_key", "num-examples")
