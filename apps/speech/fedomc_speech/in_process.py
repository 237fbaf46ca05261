"""A federation in one process: the server's side calls the same ClientApp for one client after the other.

It is for experiments, where many small runs share a machine. Without processes and a network in between, a round takes
half the time, and each core works on a run of its own. Messages and models are those of Flower's engines, bit for bit.
"""

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class InProcess(Grid):
    """A grid whose nodes do their work when their replies are pulled.

    Args:
        clients: number of nodes; they hold the parts 0 to ``clients - 1`` of the data.
        first: ID of the first node.
    """

    def __init__(self, clients: int, first: int = 1) -> None:
        self.clients, self.first = clients, first
        self._waiting: dict[str, Message] = {}
        if TaskIdentity._run_id is None:  # messages can only be made by a process that has an identity
            TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def get_node_ids(self) -> list[int]:
        """Return the IDs of all nodes."""
        return list(range(self.first, self.first + self.clients))

    def part_of(self, node: int) -> int:
        """Return which part of the data a node holds."""
        return node - self.first

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Store messages until their replies are pulled, and return their IDs."""
        self._waiting = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"to {message.metadata.dst_node_id}"
            self._waiting[message.metadata.message_id] = message
        return list(self._waiting)  # in order, as Flower promises

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the nodes that these messages are for, and return their replies."""
        return [reply for key in message_ids for reply in self.answers(self._waiting[key])]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def answers(self, message: Message) -> list[Message]:
        """Return the replies of the node that a message is for; none if it is silent."""
        from fedomc_speech.client import app

        node = message.metadata.dst_node_id
        config: dict[str, Any] = {"partition-id": self.part_of(node), "num-partitions": self.clients}
        try:
            return [app(message, Context(1, node, config, RecordDict(), {}))]
        except Exception as error:  # an error of a client ends only its own part of the round, as in Flower's engines
            reason = f"{type(error).__name__}: {error}"
            return [Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)]

    def set_run(self, run: Any) -> None:
        """Do nothing: there is only one run."""

    @property
    def run(self) -> Any:
        """None: there is no record of the run."""
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
