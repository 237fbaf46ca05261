"""A federation in one process: the server's side calls the same ClientApp for one client after the other.

It is for tests and experiments, where many small runs share a machine. Without processes and a network in between, a
round takes half the time, and each core works on a run of its own. Messages and models are those of Flower's engines,
bit for bit.
"""

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedomc.errors import OMCError
from fedomc.flower._flower import client_failure, identify_process, name_message

_PATIENCE = 10
"""How often a strategy may ask for the nodes, and send nothing, before it is told that there will be no more."""


class InProcess(Grid):
    """A grid whose nodes do their work when their replies are pulled.

    Args:
        client_app: the ClientApp of all nodes.
        clients: number of nodes; they hold the parts 0 to ``clients - 1`` of the data.
        first: ID of the first node.
    """

    def __init__(self, client_app: ClientApp, clients: int, first: int = 1) -> None:
        self.client_app, self.clients, self.first = client_app, clients, first
        self._waiting: dict[str, Message] = {}
        self._pushed = 0
        self._asked = 0
        identify_process()

    def get_node_ids(self) -> list[int]:
        """Return the IDs of all nodes.

        Raises:
            OMCError: it was called ten times in a row without a message being sent; Flower's strategies do so, once a
                second, while they wait for more nodes.
        """
        self._asked += 1
        if self._asked > _PATIENCE:
            raise OMCError(
                f"the strategy waits for more than the {self.clients} nodes of InProcess: make more of them, or lower"
                " the strategy's min_available_nodes, min_train_nodes and min_evaluate_nodes (Flower's default is 2)"
            )
        return list(range(self.first, self.first + self.clients))

    def part_of(self, node: int) -> int:
        """Return which part of the data a node holds."""
        return node - self.first

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Store messages until their replies are pulled, and return their IDs."""
        self._asked = 0
        pushed = list[str]()  # in order, as Flower promises
        for message in messages:
            self._pushed += 1
            name_message(message, f"message {self._pushed}")
            self._waiting[message.metadata.message_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the nodes that these messages are for, unless they have done so, and return their replies."""
        waiting = self._waiting
        return [reply for key in message_ids if key in waiting for reply in self.answers(waiting.pop(key))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def answers(self, message: Message) -> list[Message]:
        """Return the replies of the node that a message is for; none if it is silent."""
        node = message.metadata.dst_node_id
        config: dict[str, Any] = {"partition-id": self.part_of(node), "num-partitions": self.clients}
        try:
            return [self.client_app(message, Context(1, node, config, RecordDict(), {}))]
        except Exception as error:  # an error of a client ends only its own part of the round, as in Flower's engines
            return [client_failure(message, error)]

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
