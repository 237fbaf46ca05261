"""A grid of simulated nodes on a virtual clock, which jumps from reply to reply."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

from flwr.app import Message
from flwr.serverapp import Grid

from fedomc.flower._flower import name_message


class VirtualGrid:
    """A grid whose nodes reply after a time on a virtual clock, which is that of ``fedomc`` within ``as_grid``.

    A node works on one message at a time, in the order in which they were sent.

    Args:
        nodes: the IDs of the nodes.
        answer: returns a node's reply to a message; it is called when the reply is fetched.
        seconds: returns the time from the moment when a node can begin with a message to that of its reply; infinity
            for a node that dies.

    Attributes:
        now: the time on the clock, in seconds.
        asked: the nodes that were sent messages, in this order.
    """

    def __init__(
        self,
        nodes: Iterable[int],
        answer: Callable[[Message], Message | None],
        seconds: Callable[[Message], float] = lambda message: 1.0,
    ) -> None:
        self.nodes = list(nodes)
        self.now = 0.0
        self.asked: list[int] = []
        self._answer = answer
        self._seconds = seconds
        self._busy: dict[int, float] = {}
        self._sent: dict[str, tuple[Message, float]] = {}

    @contextmanager
    def as_grid(self) -> Iterator[Grid]:
        """Return this object as what it stands in for, and have ``fedomc`` wait on its clock."""
        with patch("fedomc.flower.grid.time", self), patch("fedomc.flower.in_flight.time", self):
            yield cast(Any, self)

    def monotonic(self) -> float:
        """Return the time, in seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass up to the next reply, or by the given seconds, at least one, if there will be none."""
        coming = [arrival for _, arrival in self._sent.values() if self.now < arrival < math.inf]
        self.now = min(coming, default=self.now + max(1.0, seconds))

    def get_node_ids(self) -> list[int]:
        """List the nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Have the nodes begin, and return the IDs that the messages get."""
        pushed = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(node)
            key = f"message {len(self.asked)}"
            name_message(message, key)
            self._busy[node] = max(self.now, self._busy.get(node, 0.0)) + self._seconds(message)
            self._sent[key] = message, self._busy[node]
            pushed.append(key)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return those of the replies that have arrived by now."""
        replies = []
        for key in message_ids:
            message, arrival = self._sent.get(key, (None, math.inf))
            if message is not None and arrival <= self.now:
                del self._sent[key]
                reply = self._answer(message)
                if reply is not None:
                    replies.append(reply)
        return replies
