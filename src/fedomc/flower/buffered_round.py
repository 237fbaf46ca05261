"""One step of an asynchronous run: the replies that fill a buffer, each compared with the broadcast that it answers."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from fedomc.errors import PolicyError
from fedomc.flower.in_flight import Flight
from fedomc.flower.replies import Reply, asked_nodes, checked_reply, log_left_out, sender_of
from fedomc.flower.training_round import Result, TrainingRound


class BufferedRound(TrainingRound):
    """Checks replies to several broadcasts, weights them by staleness and aggregates them; see ``TrainingRound``.

    The staleness s of a reply is the number of steps that the server has made since it sent the model. A reply counts
    with its weight n in the mean, but its change is multiplied by w(s): with the changes d, the step is
    ``sum(n w(s) d) / sum(n)``, as in FedBuff (https://arxiv.org/abs/2106.06639), where all n are equal.

    Args:
        limit: the number of lost replies after which a step without a usable one ends.
        staleness_weight: returns w for a staleness.
        **kwargs: the arguments of ``TrainingRound``, of which ``enough`` is the size of the buffer.
    """

    def __init__(self, *args: Any, limit: int, staleness_weight: Callable[[int], float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = limit
        self._staleness_weight = staleness_weight

    def aggregate_arrivals(self, inner: Strategy, arrivals: Iterator[tuple[Flight, Message | None]]) -> Result:
        """Check the replies, and have the inner strategy make a step when there are enough of them."""
        errors = list[Message]()
        return self._mean(inner, self._usable(arrivals, errors), errors, streaming=True)

    def _usable(self, arrivals: Iterator[tuple[Flight, Message | None]], errors: list[Message]) -> Iterator[Reply]:
        staleness, lost = list[int](), 0
        for flight, message in arrivals:
            reply = None if message is None else self._reply(flight, message, errors)
            if message is None:
                log_left_out(self.number, flight.node, "no reply came in time; another node is asked")
            del message
            if reply is None:
                lost += 1
                if lost >= self._limit and not staleness:
                    return
                continue
            staleness.append(self.number - flight.broadcast.round)
            reply.factor = self._staleness_weight(staleness[-1])
            if not 0 <= reply.factor <= 1:
                raise PolicyError(f"staleness_weight({staleness[-1]}) is {reply.factor}: return a number from 0 to 1")
            self.report.staleness = statistics.fmean(staleness)
            yield reply
            del reply
            if len(staleness) == self._enough:
                return

    def _reply(self, flight: Flight, message: Message, errors: list[Message]) -> Reply | None:
        node, reason = sender_of(asked_nodes([flight.metadata]), message)
        if reason or (node != flight.node and not message.has_error()):
            log_left_out(self.number, node, reason or f"it replies to the message for node {flight.node}")
            return None
        return checked_reply(flight.broadcast, flight.node, message, errors, self.report, self._weight_name)
