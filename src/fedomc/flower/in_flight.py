"""The messages that nodes have been sent and have not replied to yet, across the rounds of an asynchronous run."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message, Metadata

from fedomc.flower.downlink import Broadcast
from fedomc.flower.grid import POLL_INTERVAL, StreamingGrid


@dataclass(frozen=True)
class Flight:
    """A message that a node has not replied to yet.

    Attributes:
        metadata: the message's metadata.
        broadcast: the model that the node was sent, against which its change is taken.
        deadline: the time on the monotonic clock after which the node counts as dead.
    """

    metadata: Metadata
    broadcast: Broadcast
    deadline: float

    @property
    def node(self) -> int:
        """The node that was sent the message."""
        return self.metadata.dst_node_id


class InFlight:
    """The messages in flight. Each broadcast is held only as long as a reply to it may come.

    Args:
        grid: the grid that connects the nodes.
        timeout: the number of seconds after which a node that has not replied counts as dead.
    """

    def __init__(self, grid: StreamingGrid, timeout: float) -> None:
        self.grid = grid
        self.timeout = timeout
        self._flights: dict[str, Flight] = {}
        self._arriving: Iterator[tuple[str, list[Message]]] | None = None
        self._looked = 0.0  # when that look began, by the monotonic clock

    def __len__(self) -> int:
        """Count the messages."""
        return len(self._flights)

    def nodes(self) -> set[int]:
        """Return the nodes that have not replied yet."""
        return {flight.node for flight in self._flights.values()}

    def send(self, messages: Iterable[Message], broadcast: Broadcast) -> None:
        """Send messages that ``broadcast`` has compressed; one that Flower does not take is not waited for."""
        messages, deadline = list(messages), time.monotonic() + self.timeout
        pushed = set(self.grid.push_messages(messages))  # which gives each message its ID
        for message in messages:
            if message.metadata.message_id in pushed:
                self._flights[message.metadata.message_id] = Flight(message.metadata, broadcast, deadline)

    def poll(self) -> Iterator[tuple[Flight, Message | None]]:
        """Look for the reply to each message once, and then wait a little if none has come.

        Each reply is processed before the next one is fetched. If a step ends in between, the next call goes on there.

        Yields:
            The message that was sent, which is no longer in flight, and the reply to it, or None if its time is up.
        """
        began, found = time.monotonic(), False
        if self._arriving is None:
            self._arriving, self._looked = self.grid.arrived(self._flights), began
        for key, replies in self._arriving:
            flight = self._flights.pop(key, None)
            if flight is not None:  # else it has been given up
                found = True
                yield flight, replies.pop()
        self._arriving = None
        for key, flight in list(self._flights.items()):
            if self._looked >= flight.deadline:  # then its reply has been looked for since
                found = True
                del self._flights[key]
                yield flight, None
        if not found:
            time.sleep(max(POLL_INTERVAL, time.monotonic() - began))

    def give_up(self, before: int) -> list[Flight]:
        """Wait no longer for the replies to the broadcasts of rounds before this one, and return their messages."""
        old = {key: flight for key, flight in self._flights.items() if flight.broadcast.round < before}
        for key in old:
            del self._flights[key]
        return list(old.values())

    def release(self) -> None:
        """Release what was sent to nodes that are not waited for any longer."""
        waiting: dict[int, tuple[Broadcast, set[int]]] = {}
        for flight in self._flights.values():
            waiting.setdefault(id(flight.broadcast), (flight.broadcast, set()))[1].add(flight.node)
        for broadcast, nodes in waiting.values():
            broadcast.retain(nodes)
