"""A federation in this process: the ServerApp's side talks to the same ClientApp, one client after the other.

For experiments, where many small runs share a machine: without processes and a network between them a round takes half
the time, and each core has a run of its own. The messages, and every bit of the model, are those of Flower's engines.
"""

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class InProcess(Grid):
    """A grid whose nodes do their work when their reply is asked for.

    Args:
        clients: number of nodes, which hold the parts 0 to ``clients - 1`` of the data.
        first: number of the first node.
    """

    def __init__(self, clients: int, first: int = 1) -> None:
        self.clients, self.first = clients, first
        self._waiting: dict[str, Message] = {}
        if TaskIdentity._run_id is None:  # messages can only be made by a process that has an identity
            TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def get_node_ids(self) -> list[int]:
        """List the nodes."""
        return list(range(self.first, self.first + self.clients))

    def part_of(self, node: int) -> int:
        """Return which part of the data a node holds."""
        return node - self.first

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages."""
        self._waiting = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"to {message.metadata.dst_node_id}"
            self._waiting[message.metadata.message_id] = message
        return list(self._waiting)  # in order, as Flower promises

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the nodes work that these messages are for."""
        return [reply for key in message_ids for reply in self.answers(self._waiting[key])]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and let the nodes work."""
        return self.pull_messages(self.push_messages(messages))

    def answers(self, message: Message) -> list[Message]:
        """Answer as the node's ClientApp does."""
        from fedomc_speech.client import app

        node = message.metadata.dst_node_id
        config: dict[str, Any] = {"partition-id": self.part_of(node), "num-partitions": self.clients}
        try:
            return [app(message, Context(1, node, config, RecordDict(), {}))]
        except Exception as error:  # what a client meets ends its part in the round alone, as in Flower's engines
            reason = f"{type(error).__name__}: {error}"
            return [Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)]

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> Any:
        """There is no record of the run."""
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
