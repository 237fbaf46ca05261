"""Client tiers: each node announces its capabilities and is sent the model in a format that suits it."""

from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedomc.errors import PolicyError
from fedomc.flower._flower import logger
from fedomc.flower.arrays import records_of
from fedomc.flower.downlink import compressible_shapes
from fedomc.training.policy import CompressionPolicy, TieredPolicy

_ACTION = "fedomc"
"""The name of the query, which ``app.query("fedomc")(announce)`` answers."""

_RECORD = "fedomc-node"
_TIER, _MEMORY = "tier", "memory-bytes"
_TIMEOUT = 60.0  # seconds


def announce(message: Message, context: Context) -> Message:
    """Answer the server's query with the ``tier`` or the ``memory-bytes`` of the node config.

    Register this function on the client with ``app.query("fedomc")(announce)``, and set the value when starting the
    node, such as the number of bytes available to the model's parameters:
    ``flower-supernode --node-config 'memory-bytes=500000000'``.
    """
    config = {key: context.node_config[key] for key in (_TIER, _MEMORY) if key in context.node_config}
    return Message(RecordDict({_RECORD: ConfigRecord({**config})}), reply_to=message)


class NodeCapabilities:
    """The capabilities that nodes have announced. Each node is asked only until it has answered."""

    def __init__(self) -> None:
        self._of: dict[int, dict[str, Any]] = {}

    def ask(self, grid: Grid, nodes: set[int]) -> None:
        """Ask the nodes that have not announced anything yet."""
        unknown = sorted(nodes - self._of.keys())
        if not unknown:
            return
        query = f"{MessageType.QUERY}.{_ACTION}"
        messages = [Message(RecordDict(), dst_node_id=node, message_type=query) for node in unknown]
        for reply in grid.send_and_receive(messages, timeout=_TIMEOUT):
            if not reply.has_error():
                self._of[reply.metadata.src_node_id] = _read(reply.content)
        for node in unknown:
            if node not in self._of:
                logger.warning("node %d did not announce its capabilities and gets the default tier", node)

    def policies(
        self,
        policy: CompressionPolicy | TieredPolicy | None,
        nodes: set[int],
        grid: Grid,
        arrays: ArrayRecord,
        server_round: int,
        client_name: Callable[[int], str | int],
    ) -> Callable[[int], CompressionPolicy | None]:
        """Return the function from a node to its policy, which of a tiered policy is that of what it announces.

        Args:
            policy: the policy of all nodes, or of each tier. A node that announces a tier that does not exist gets the
                default one, with a warning.
            nodes: the nodes to ask for what they announce, if the policy is tiered.
            grid: the grid that connects them.
            arrays: the model.
            server_round: the number of the round.
            client_name: returns the name of a node that is used for random draws.
        """
        if not isinstance(policy, TieredPolicy):
            return lambda node: policy
        self.ask(grid, nodes)
        shapes = compressible_shapes(arrays)

        def policy_of(node: int) -> CompressionPolicy | None:
            client = client_name(node)
            try:
                return policy.choose(shapes, **self._of.get(node, {}), round=server_round, client=client)
            except PolicyError as error:
                logger.warning("round %d: node %d gets the default tier: %s", server_round, node, error)
                return policy.choose()

        return policy_of


def _read(content: RecordDict) -> dict[str, Any]:
    config = records_of(content, ConfigRecord).get(_RECORD, ConfigRecord())
    tier, memory = config.get(_TIER), config.get(_MEMORY)
    return {
        **({"tier": tier} if isinstance(tier, str) else {}),
        **({"memory_bytes": int(memory)} if isinstance(memory, int | float) and 0 < memory < 2**63 else {}),
    }
