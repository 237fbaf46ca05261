"""A grid that yields replies one by one, whereas Flower's own grids hold all replies of a round in memory."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedomc.flower._flower import holds_replies, inflating_by_arrays

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

    def arrived(self, message_ids: Iterable[str]) -> Iterator[tuple[str, list[Message]]]:
        """Look for the reply to each message once, and yield the ID of the message and the reply if there is one.

        The reply is alone in a list, from which it should be popped: then nothing else holds it.

        From another process, replies are fetched one at a time, so that only one is in memory. Those that are in this
        process already, as in a simulation, are taken together: each look waits for the locks of Flower's engine.
        """
        ids = list(message_ids)
        together = len(ids) if holds_replies(self.grid) and not self.in_order else 1
        for begin in range(0, len(ids), together or 1):
            some = ids[begin : begin + together]
            replies = list(self.pull_messages(some))
            while replies:
                key = some[0] if together == 1 else replies[-1].metadata.reply_to_message_id
                yield key, [replies.pop()]

    def _fetched(self, waiting: list[str], deadline: float | None) -> Iterator[Message]:
        while waiting:
            began = time.monotonic()
            late = deadline is not None and began >= deadline
            asked = waiting[:1] if self.in_order and not late else waiting
            missing = dict.fromkeys(waiting)
            for sent, replies in self.arrived(asked):
                missing.pop(sent, None)
                yield replies.pop()
            if late:
                return  # the last poll was after the deadline
            if len(missing) == len(waiting):
                time.sleep(max(POLL_INTERVAL, time.monotonic() - began))
            waiting = list(missing)

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
