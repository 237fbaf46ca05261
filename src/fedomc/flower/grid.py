"""A grid that yields replies one by one; Flower's own grids hold all replies of a round."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

_INTERVAL = 0.1
"""The least seconds between two polls for replies; more if a poll takes longer."""


class StreamingGrid(Grid):
    """A grid whose ``send_and_receive`` fetches a reply of another grid only when the one before was processed.

    Args:
        grid: the other grid, whose nodes are used.
        in_order: yield the replies in the order of the messages, so that sums of them have the same last bits in every
            run. Replies that arrive before their turn wait outside this process.
    """

    def __init__(self, grid: Grid, *, in_order: bool = False) -> None:
        self.grid = grid
        self.in_order = in_order

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages now; the replies are fetched as the iterator is drawn from.

        Args:
            messages: the messages to send.
            timeout: the seconds from now on after which no more replies are fetched; None waits for all.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._fetched([sent for sent in self.grid.push_messages(messages) if sent is not None], deadline)

    def _fetched(self, waiting: list[str], deadline: float | None) -> Iterator[Message]:
        while waiting:
            began = time.monotonic()
            still = []
            for sent in waiting:
                replies = list(self.grid.pull_messages([sent]))  # one at a time, so that no other is in memory
                if not replies:
                    still.append(sent)
                while replies:
                    yield replies.pop()
                if still and self.in_order and not (deadline is not None and began >= deadline):
                    still += waiting[waiting.index(sent) + 1 :]
                    break
            if deadline is not None and began >= deadline:
                return  # the last poll was after the deadline
            if len(still) == len(waiting):
                time.sleep(max(_INTERVAL, time.monotonic() - began))
            waiting = still

    def set_run(self, run: Any) -> None:
        """Set the run of the other grid."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the other grid."""
        return self.grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message with the other grid."""
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes of the other grid."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Describe the nodes of the other grid."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages through the other grid."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch the replies to some messages that have arrived."""
        return self.grid.pull_messages(message_ids)
