"""``FedBuff``: buffered asynchronous rounds, in which no client waits for another one."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedomc.errors import PolicyError
from fedomc.flower._flower import logger
from fedomc.flower.aggregation import averages
from fedomc.flower.buffered_round import BufferedRound
from fedomc.flower.downlink import Broadcast
from fedomc.flower.grid import StreamingGrid
from fedomc.flower.in_flight import Flight, InFlight
from fedomc.flower.replies import log_left_out
from fedomc.flower.server_optimizers import release_current
from fedomc.flower.strategy import OMCStrategy
from fedomc.flower.traffic import RoundReport, Traffic
from fedomc.training.policy import DEFAULT, CompressionPolicy, TieredPolicy


def polynomial_staleness(staleness: int) -> float:
    """Return ``1 / sqrt(1 + staleness)``, with which FedBuff's authors multiply a change."""
    return float((1 + staleness) ** -0.5)


class FedBuff(OMCStrategy):
    """An ``OMCStrategy`` whose rounds are the steps of buffered asynchronous training, FedBuff.

    As many clients as the inner strategy would select for a round train at any time. When one of them replies, another
    node is sent the current model at once. Each time ``buffer_size`` usable replies have come, the server makes a step,
    which is a round: reports, metrics, evaluations, checkpoints and failed rounds are those of ``OMCStrategy``, and so
    are the checks of replies. The change of a client is taken against the model that the client was sent. Models that
    were sent stay packed until the last reply to them has come; only the variables that a client was sent in FP32 stay
    in FP32. A change is multiplied by a weight that falls with its staleness, the number of steps since its model was
    sent; the round's metric ``fedomc.staleness`` is the mean staleness.

    A node replies to at most one message for each step. If every node has, and nothing more is in flight, the step is
    made with fewer replies. A node that does not reply within the ``timeout`` of ``start`` is left out with a warning,
    and another one is asked. A resumed run first asks the nodes again whose replies had not come when the checkpoint
    was written.

    Evaluation on clients is synchronous, and waits for clients that are training: prefer ``evaluate_fn`` of ``start``.

    Source: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, https://arxiv.org/abs/2106.06639.

    Example::

        strategy = FedBuff(FedAvg(fraction_train=0.1, fraction_evaluate=0.0), buffer_size=10)
        strategy.start(grid, arrays, num_rounds=500, timeout=600, evaluate_fn=evaluate)

    Args:
        inner: a strategy that needs only the mean of the replies: ``FedAvg``, ``FedAvgM``, ``FedProx``, ``FedAdam``,
            ``FedYogi``, ``FedAdagrad``, or a subclass that does not override ``aggregate_train`` or ``start``.
        policy: as in ``OMCStrategy``.
        buffer_size: the number of usable replies for a step.
        staleness_weight: returns the number from 0 to 1 by which a change of the given staleness is multiplied.
        max_staleness: the largest staleness of a reply that is waited for. Older ones are given up with a warning, so
            at most ``max_staleness + 1`` models are held. None waits for all.
        **kwargs: the other attributes of ``OMCStrategy``; ``aggregate`` must be ``delta``, and ``over_selection``
            applies to evaluations.

    Raises:
        PolicyError: the inner strategy needs individual replies or has its own ``start``, a number is out of range, or
            ``aggregate`` is not ``delta``; or as ``OMCStrategy``.
    """

    def __init__(
        self,
        inner: Strategy,
        policy: CompressionPolicy | TieredPolicy | str | None = DEFAULT,
        *,
        buffer_size: int = 10,
        staleness_weight: Callable[[int], float] = polynomial_staleness,
        max_staleness: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not averages(inner) or type(inner).start is not Strategy.start:
            name = type(inner).__name__
            raise PolicyError(
                f"{name} cannot run asynchronously, because it needs all replies of a round or has its own start: wrap "
                f"FedAvg, FedAvgM, FedProx, FedAdam, FedYogi or FedAdagrad, or use OMCStrategy({name}(...), "
                "over_selection=1.3), which does not wait for the last clients either"
            )
        if not isinstance(buffer_size, int) or buffer_size < 1 or (max_staleness is not None and max_staleness < 0):
            raise PolicyError(
                f"buffer_size={buffer_size}, max_staleness={max_staleness}: use a buffer of 1 or more replies, and a "
                "staleness of 0 or more, or None"
            )
        super().__init__(inner, policy, **kwargs)
        if self.aggregate != "delta":
            raise PolicyError(
                f"aggregate={self.aggregate!r} would average models of different ages: use aggregate='delta', which "
                "takes each client's change against the model that it was sent"
            )
        self.buffer_size = buffer_size
        self.staleness_weight = staleness_weight
        self.max_staleness = max_staleness
        self._in_flight: InFlight | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse rounds that are run from outside, which would be synchronous.

        Raises:
            PolicyError: always.
        """
        raise PolicyError("the rounds of FedBuff are run by its start: call strategy.start(grid, arrays)")

    def _train(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: StreamingGrid, timeout: float
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if self._in_flight is None or self._in_flight.grid is not grid:  # this is the first step of a start
            self._in_flight = InFlight(grid, timeout)
            if self._averaging.fraction_evaluate:
                logger.warning(
                    "evaluation on clients (fraction_evaluate=%g) waits for clients that are training: set it to 0 and "
                    "use evaluate_fn",
                    self._averaging.fraction_evaluate,
                )
        self.report = RoundReport(number)
        self.traffic.append(Traffic(number, 0))
        self._broadcast = broadcast = self._broadcast_of(arrays, number, grid, [])
        broadcast.release_former()
        old = [] if self.max_staleness is None else self._in_flight.give_up(number - self.max_staleness)
        for flight in old:
            log_left_out(
                number, flight.node, f"the model that it was sent is {number - flight.broadcast.round} steps old"
            )
        self._in_flight.release()
        concurrency = self._concurrency(grid)
        step = BufferedRound(
            broadcast,
            [],
            self.report,
            weight_name=self._weight_name,
            weight_cap=self.weight_cap,
            of_weights=False,
            name_of=self.client_name,
            files=self._files,
            enough=self.buffer_size,
            limit=max(concurrency, self.buffer_size),
            staleness_weight=self.staleness_weight,
        )
        arrivals = self._arrivals(broadcast, config, self._in_flight, concurrency, {flight.node for flight in old})
        return self._finished(number, step, step.aggregate_arrivals(self.inner, arrivals))

    def _arrivals(
        self, broadcast: Broadcast, config: ConfigRecord, in_flight: InFlight, concurrency: int, heard: set[int]
    ) -> Iterator[tuple[Flight, Message | None]]:
        """Keep as many clients at work as there should be, and yield what comes; ``heard`` nodes are not asked."""
        configured = list[Message]()

        def refill() -> None:
            free = concurrency - len(in_flight)
            if free > 0 and not configured:
                chosen = self._choose(in_flight.grid, in_flight.nodes() | heard, free + self.buffer_size)
                configured.extend(self._configured(chosen, broadcast, config, in_flight.grid))
            messages = configured[: max(0, free)]
            if messages:
                del configured[: len(messages)]
                self._send_more(messages, broadcast, in_flight)

        refill()
        while len(in_flight):
            for flight, message in in_flight.poll():
                heard.add(flight.node)
                yield flight, message
                del message
                refill()

    def _send_more(self, messages: list[Message], broadcast: Broadcast, in_flight: InFlight) -> None:
        """Compress the model for some more nodes, send it and account for it."""
        report = self.report
        assert report is not None
        with report.timed("encode"):
            self._compress(broadcast, messages)
        for message in messages:
            report.count("down", message)
        report.errors = {name: (found.error, found.size) for name, found in broadcast.distances.items()}
        self._supervision.check_broadcast(broadcast.round, broadcast.distances)
        sent = self.traffic[-1].sent + len(messages)
        self.traffic[-1] = replace(self.traffic[-1], sent=sent, down_bytes=report.down_bytes.total())
        in_flight.send(messages, broadcast)

    def _choose(self, grid: Grid, busy: set[int], count: int) -> list[int]:
        """Draw nodes that are not busy, after those that a resumed run asks again."""
        idle = [node for node in grid.get_node_ids() if node not in busy]
        first = [node for node in self._asked if node in idle][:count]
        self._asked = [node for node in self._asked if node not in first]
        rest = [node for node in idle if node not in first]
        return [*first, *random.sample(rest, min(len(rest), count - len(first)))]

    def _configured(
        self, nodes: list[int], broadcast: Broadcast, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have the inner strategy configure messages for these nodes, in this order."""
        if not nodes:
            return []
        if isinstance(self.policy, TieredPolicy):
            self._capabilities.ask(grid, set(nodes))
        with _selecting_all(self._averaging):
            messages = list(self.inner.configure_train(broadcast.round, broadcast.arrays, config, _Part(grid, nodes)))
        for message in messages:  # strategies write each round's number into the same config
            own = {k: ConfigRecord({**r}) if isinstance(r, ConfigRecord) else r for k, r in message.content.items()}
            message.content = RecordDict(own)
        release_current(self.inner)
        return sorted(messages, key=lambda message: nodes.index(message.metadata.dst_node_id))

    def _concurrency(self, grid: Grid) -> int:
        """Wait until enough nodes are connected, and return the number of clients that train at a time."""
        inner = self._averaging
        while True:
            connected = len(list(grid.get_node_ids()))
            count = max(int(connected * inner.fraction_train), inner.min_train_nodes)
            if connected >= max(count, inner.min_available_nodes):
                return count
            logger.info("%d nodes are connected, %d are needed", connected, max(count, inner.min_available_nodes))
            time.sleep(1)

    @property
    def _averaging(self) -> FedAvg:
        assert isinstance(self.inner, FedAvg)
        return self.inner

    def _waiting_for(self) -> list[int]:
        return [] if self._in_flight is None else sorted(self._in_flight.nodes())

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "buffer_size": self.buffer_size, "max_staleness": self.max_staleness}


class _Part(StreamingGrid):
    """A grid of which a strategy sees some nodes only."""

    def __init__(self, grid: Grid, nodes: list[int]) -> None:
        super().__init__(grid)
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return the IDs of these nodes."""
        return list(self._nodes)


@contextmanager
def _selecting_all(inner: FedAvg) -> Iterator[None]:
    """Have a strategy select all nodes that it sees."""
    own = inner.fraction_train, inner.min_train_nodes, inner.min_available_nodes
    inner.fraction_train, inner.min_train_nodes, inner.min_available_nodes = 1.0, 1, 1
    try:
        yield
    finally:
        inner.fraction_train, inner.min_train_nodes, inner.min_available_nodes = own
