"""A grid that yields replies one by one, whereas Flower's own grids hold all replies of a round in memory."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedomc.flower._flower import inflating_by_arrays

POLL_INTERVAL = 0.1
"""The minimum number of seconds between two polls for replies; if a poll takes longer, the interval is as long."""


class StreamingGrid(Grid):
    """A wrapper around a grid whose ``send_and_receive`` fetches each reply only after the previous one is processed.

    Args:
        grid: the wrapped grid.
        in_order: yield the replies in the order of the messages, so that sums of them are bitwise reproducible.
            Replies that arrive early wait outside this process.
    """

    def __init__(self, grid: Grid, *, in_order: bool = False) -> None:
        self.grid = grid
        self.in_order = in_order

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages immediately, and return an iterator that fetches the replies.

        Args:
            messages: the messages to send.
            timeout: the number of seconds after which no more replies are fetched; None waits for all replies.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._fetched([sent for sent in self.grid.push_messages(messages) if sent is not None], deadline)

    def _fetched(self, waiting: list[str], deadline: float | None) -> Iterator[Message]:
        while waiting:
            began = time.monotonic()
            still = []
            for sent in waiting:
                replies = list(self.pull_messages([sent]))  # one at a time, so that only one is in memory
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
                time.sleep(max(POLL_INTERVAL, time.monotonic() - began))
            waiting = still

    def set_run(self, run: Any) -> None:
        """Set the run of the wrapped grid."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the wrapped grid."""
        return self.grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message with the wrapped grid."""
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the IDs of the nodes of the wrapped grid."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return the nodes of the wrapped grid."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages through the wrapped grid."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch the replies to messages that have arrived so far."""
        with inflating_by_arrays():
            return list(self.grid.pull_messages(message_ids))
