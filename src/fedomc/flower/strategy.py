"""``OMCStrategy``: any of Flower's strategies, with compressed messages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedomc.errors import PayloadError, PolicyError
from fedomc.flower import defences
from fedomc.flower._flower import logger, stand_in
from fedomc.flower.aggregation import AGGREGATES
from fedomc.flower.checkpointing import RunState, digest, from_checkpoint, settings_of, to_checkpoint
from fedomc.flower.downlink import Broadcast, float32_shapes
from fedomc.flower.grid import StreamingGrid
from fedomc.flower.replies import checked_evaluations
from fedomc.flower.supervision import Supervision
from fedomc.flower.tiers import NodeCapabilities
from fedomc.flower.traffic import Observer, RoundReport, Traffic
from fedomc.flower.training_round import TrainingRound
from fedomc.methods import Encoding, Method
from fedomc.serialization.checkpointing import Checkpoints
from fedomc.serialization.entropy import require
from fedomc.training.policy import CompressionPolicy, TieredPolicy

DIRECTIONS = ("none", "down", "up", "both")


class OMCStrategy(Strategy):
    """A strategy that compresses what another strategy sends, and decodes what it aggregates.

    Every client gets a payload of its own: which variables stay FP32 is drawn from the policy's seed, the round and the
    client. Each variable is encoded once a round, whatever the number of clients. A reply must hold one ``ArrayRecord``
    with the variables that were sent (what ``collect`` returns) and a ``MetricRecord`` with the weight. A reply that is
    damaged, of another model, not finite, too late, to another round's message or from a node that was not asked is
    left out and named in the log; the inner strategy aggregates the others. A result that is not finite is dropped.

    A metric that is not finite, or that no more than half of the replies have, is dropped with a warning, but not the
    reply. So are further array and metric records, unless the inner strategy has an ``aggregate_train`` of its own,
    which is given them. No reply weighs more than ``weight_cap`` times the median weight; of a stream of replies the
    median is that of those read so far, and the log names who is capped.

    The server's memory: for strategies that need a mean (``FedAvg``, ``FedAvgM``, ``FedProx``, ``FedAdam``,
    ``FedYogi``, ``FedAdagrad``, and subclasses that leave ``aggregate_train`` alone) it does not grow with the number
    of clients, as ``start`` takes replies one by one. Any other strategy holds all replies, packed, and what it
    decodes of them: one variable of all replies in FP32 with ``FedMedian`` and ``FedTrimmedAvg``, all variables of all
    replies, several times, with ``Krum``, ``MultiKrum`` and ``Bulyan``, and with the strategies of differential privacy
    that clip on the server; those that clip on the clients need one variable of one reply at a time.

    Differential privacy goes inside, ``OMCStrategy(DifferentialPrivacyServerSideFixedClipping(FedAvg(), ...))``; the
    module ``defences`` says what is refused, and what becomes of a client's clipping.

    Names alone do not tell parameters from buffers: float32 buffers of two dimensions are compressed like parameters
    unless the policy excludes them.

    Attributes:
        inner: the wrapped strategy.
        policy: how to compress; None sends FP32 and only counts bytes. With a ``TieredPolicy`` each client gets the
            format of its tier, which it announces if its app has ``app.query("fedomc")(fedomc.flower.announce)``.
        aggregate: ``delta`` averages what the clients changed, ``weights`` the weights that they returned.
        client_name: names a node for the random draws. By default it is the node's number, which a simulation changes
            in each run.
        entropy_coding: which messages are entropy coded: ``none``, ``down``, ``up`` or ``both``. It needs zstandard
            on both sides, and clients that give ``collect`` the message.
        unquantized_format: the format of the variables that partial quantization leaves unquantized; None is FP32.
        weight_cap: the most that a reply weighs, as a multiple of the median weight; None sets no cap.
        checkpoints: where the state is kept after each round, for ``start`` to resume from.
        observers: are called with the report of each round of training.
        failed_rounds: how many rounds in a row without a usable reply end the run with an error, and whether a run of
            which every round failed does; None goes on whatever happens.
        traffic: the bytes of training messages, by round.
        report: what the last round took, by variable; its totals are among the round's metrics, as ``fedomc.up-bytes``.

    Raises:
        FormatError: there is no such format.
        PolicyError: an unknown way to aggregate or direction, a cap below 1, entropy coding without zstandard,
            ``weights`` with a strategy that clips, or an unquantized format that is only for an uplink.
    """

    def __init__(
        self,
        inner: Strategy,
        policy: CompressionPolicy | TieredPolicy | None,
        *,
        aggregate: str = "delta",
        client_name: Callable[[int], str | int] = str,
        entropy_coding: str = "none",
        unquantized_format: str | Method | None = None,
        weight_cap: float | None = 10.0,
        checkpoints: Checkpoints | None = None,
        observers: Sequence[Observer] = (),
        failed_rounds: int | None = 3,
    ) -> None:
        if aggregate not in AGGREGATES:
            raise PolicyError(f"aggregate={aggregate!r} is unknown: use one of {', '.join(AGGREGATES)}")
        if entropy_coding not in DIRECTIONS:
            raise PolicyError(f"entropy_coding={entropy_coding!r} is unknown: use one of {', '.join(DIRECTIONS)}")
        if weight_cap is not None and not weight_cap >= 1:
            raise PolicyError(f"weight_cap={weight_cap} would cap the median client: use 1 or more, or None for no cap")
        if entropy_coding != "none":
            require()
        defences.check_aggregate(inner, aggregate)
        self.inner = inner
        self.policy = policy
        self.aggregate = aggregate
        self.entropy_coding = entropy_coding
        self.unquantized_format = None if unquantized_format is None else Encoding.parse(str(unquantized_format)).format
        self.client_name = client_name
        self.weight_cap = weight_cap
        self.checkpoints = checkpoints
        self.observers = observers
        self.failed_rounds = failed_rounds
        self.traffic: list[Traffic] = []
        self.report: RoundReport | None = None
        self._supervision = Supervision(failed_rounds)
        self._round: TrainingRound | None = None
        self._broadcast: Broadcast | None = None
        self._evaluation: Sequence[Metadata] = ()
        self._capabilities = NodeCapabilities()

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

        If the inner strategy has a ``start`` of its own, for instance to log or to keep the best model, that one runs,
        and what it sends and aggregates is compressed.

        Args:
            grid: the grid that the nodes are on.
            initial_arrays: the model.
            num_rounds: how many rounds.
            timeout: the seconds to wait for the replies of a round; later replies are left out.
            train_config: is sent to the clients for training.
            evaluate_config: is sent to the clients for evaluation.
            evaluate_fn: measures the model on the server, before the first round (as round 0) and after each.

        Returns:
            The last model and the metrics by round, those of rounds before a resumption included.

        Raises:
            PayloadError: the checkpoint is of another model or other settings, or none is whole; or it is of a finished
                run that began with another initial model.
            PolicyError: there are checkpoints, but the inner strategy has a ``start`` of its own, which keeps none.
            RoundsFailedError: in ``failed_rounds`` rounds in a row, or in all of a shorter run, no reply was usable.
        """
        streaming = StreamingGrid(grid)
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        if type(self.inner).start is not Strategy.start:
            return self._inner_in_place().start(
                streaming, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
            )
        state = self._resumed(initial_arrays, num_rounds)
        logger.info("Starting %s around %s:", type(self).__name__, type(self.inner).__name__)
        size = sum(len(array.data) for array in initial_arrays.values()) / 2**20
        logger.info("%d rounds of a model of %.2f MB", num_rounds, size)
        self.summary()

        def measure(number: int) -> None:
            metrics = None if evaluate_fn is None else evaluate_fn(number, state.arrays)
            if metrics is not None:
                logger.info("round %d: measured on the server: %s", number, metrics)
                state.result.evaluate_metrics_serverapp[number] = metrics

        if not state.round:
            measure(0)
        for number in range(state.round + 1, num_rounds + 1):
            logger.info("[ROUND %d/%d]", number, num_rounds)
            messages = self.configure_train(number, state.arrays, train_config, streaming)
            new, metrics = self.aggregate_train(number, streaming.send_and_receive(messages, timeout=timeout))
            if new is not None:
                state.arrays = new
            if metrics is not None:
                logger.info("round %d: metrics of training: %s", number, metrics)
                state.result.train_metrics_clientapp[number] = metrics
            messages = self.configure_evaluate(number, state.arrays, evaluate_config, streaming)
            metrics = self.aggregate_evaluate(number, streaming.send_and_receive(messages, timeout=timeout))
            if metrics is not None:
                logger.info("round %d: metrics of evaluation: %s", number, metrics)
                state.result.evaluate_metrics_clientapp[number] = metrics
            measure(number)
            state.round = number
            if self.checkpoints is not None:
                self.checkpoints.save(number, to_checkpoint(state, self.inner, self._settings()))
        if self.checkpoints is not None:
            self.checkpoints.release()
        self._supervision.finish()
        state.result.arrays = state.arrays
        return state.result

    def initialize_parameters(self, client_manager: object) -> NoReturn:
        """Refuse Flower's legacy workflows, SecAgg+ among them, which begin by asking for this.

        Raises:
            PolicyError: always.
        """
        raise PolicyError(
            "OMCStrategy cannot run in a legacy workflow (start_server, ServerAppComponents, SecAggPlusWorkflow): use "
            "flwr.serverapp, that is app = ServerApp() with @app.main(), and strategy.start(grid, arrays) in it. "
            f"{defences.NO_SECURE_AGGREGATION}"
        )

    def resume(self, arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
        """Restore the last checkpoint, if there is one: the strategies' state, and Python's random state.

        Flower draws nodes with Python's random numbers, so the rounds go on as they would have without an interruption.

        Args:
            arrays: the initial model.

        Returns:
            The model to go on with, and how many rounds it has had.

        Raises:
            PayloadError: the checkpoint is of another model or other settings, or none is whole.
        """
        state = self._restored(arrays)
        return state.arrays, state.round

    def _resumed(self, arrays: ArrayRecord, num_rounds: int) -> RunState:
        """Return the state to start from, and log where it is from."""
        state = self._restored(arrays)
        if self.checkpoints is None or not state.round:
            return state
        folder, other = self.checkpoints.folder, state.initial != digest(arrays)
        if state.round >= num_rounds:
            if other:
                raise PayloadError(
                    f"the run in {folder} is finished after round {state.round}, but began with another initial model: "
                    "use another folder for another run, or give the model that it began with"
                )
            logger.info("already finished: %s has the model after round %d of %d", folder, state.round, num_rounds)
            return state
        logger.info("resumed after round %d of %d from %s", state.round, num_rounds, folder)
        if other:
            logger.warning(
                "the run in %s began with another initial model than the one given, which is not used: for a run "
                "that begins with it use another folder",
                folder,
            )
        return state

    def _restored(self, arrays: ArrayRecord) -> RunState:
        stored = None if self.checkpoints is None else self.checkpoints.resume()
        if stored is None:
            return RunState(0, arrays, "" if self.checkpoints is None else digest(arrays), self.traffic)
        state = from_checkpoint(stored, self.inner, self._settings(), arrays)
        self.traffic = state.traffic
        return state

    def _settings(self) -> dict[str, object]:
        return {**settings_of(self.inner, self.aggregate, self.policy), "weight_cap": self.weight_cap}

    def _inner_in_place(self) -> Strategy:
        """Return the inner strategy as its own ``start`` is to see it: configuring and aggregating as this one does."""
        if self.checkpoints is not None:
            name = type(self.inner).__name__
            raise PolicyError(
                f"checkpoints are saved by OMCStrategy.start, but {name} has a start of its own: override start in a "
                "subclass of OMCStrategy instead, or set checkpoints=None and save them there"
            )
        names = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
        return stand_in(self.inner, {method: getattr(self, method) for method in names})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy choose the clients, then give each its own payload.

        Raises:
            PolicyError: the inner strategy clips what it cannot, or this one is inside a strategy that clips.
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
        report.errors = broadcast.errors
        self.traffic.append(Traffic(server_round, len(messages), down_bytes=report.down_bytes.total()))
        self._round = TrainingRound(
            broadcast,
            [message.metadata for message in messages],
            report,
            weight_name=self._weight_name,
            weight_cap=self.weight_cap,
            of_weights=self.aggregate == "weights",
            name_of=self.client_name,
        )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and have the inner strategy aggregate what they decode to.

        Args:
            server_round: the round's number.
            replies: what came back. Of an iterator, such as ``StreamingGrid`` gives, no more than a few replies are in
                memory at any time if the inner strategy needs no more than their mean.

        Returns:
            The new model, and the metrics, with the report's totals among them; None where there are none.

        Raises:
            RuntimeError: ``configure_train`` was not called.
        """
        if self._round is None or self.report is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        self._round.received = 0
        arrays, metrics = self._round.aggregate(self.inner, replies)
        up_bytes = self.report.up_bytes.total()
        self.traffic[-1] = replace(self.traffic[-1], received=self._round.received, up_bytes=up_bytes)
        if metrics is not None:
            metrics = MetricRecord({**metrics, **self.report.metrics(variables=False)})
        for observer in self.observers:
            observer(self.report)
        sent, received = self.traffic[-1].sent, self._round.received
        self._supervision.add(server_round, sent, received, metrics)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy choose the clients; they evaluate what they would be sent for training."""
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        broadcast = self._broadcast_of(arrays, server_round, grid, messages)
        self._send(broadcast, messages)
        self._evaluation = [message.metadata for message in messages]
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check the metrics and have the inner strategy aggregate them; None if no reply has a weight above zero."""
        messages = checked_evaluations(self._evaluation, replies, server_round, self._weight_name, self.weight_cap)
        return None if messages is None else self.inner.aggregate_evaluate(server_round, messages)

    def _send(self, broadcast: Broadcast, messages: Iterable[Message]) -> None:
        """Give each message its payload; the broadcast takes the place of the former one."""
        for message in messages:
            broadcast.compress(message)
        broadcast.release_former()
        self._broadcast = broadcast

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
        return Broadcast(
            arrays,
            policy_of,
            server_round,
            self.client_name,
            self.entropy_coding,
            self.unquantized_format,
            self._broadcast,
        )

    @property
    def _weight_name(self) -> str:
        return getattr(defences.innermost(self.inner), "weighted_by_key", "num-examples")
