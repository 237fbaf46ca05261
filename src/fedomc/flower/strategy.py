"""``OMCStrategy``: any Flower strategy, with compressed messages.

[Note: what aggregation adds up]
The server holds FP32 values V; a client is sent Q(V), trains, and returns R. Plain averaging (``value``, the paper)
makes the mean of the R the new model, and with it the error Q(V) - V, which is the same for every client and larger
than a round's update. ``difference`` takes V + (R - Q(V)) for R: the error of the broadcast cancels, and what remains
is the rounding of the client's own steps. With two parts the client returns R - Q(V) itself, the update.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedomc import frame
from fedomc.errors import PayloadError, PolicyError
from fedomc.flower.arrays import CONFIG, STYPE, packed_array, read_dense, read_packed, to_config
from fedomc.policy import CompressionPolicy, Selection
from fedomc.transform import Packed, encode

AGGREGATES = ("difference", "value")

_Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Traffic:
    """Bytes of the arrays in a round's training messages.

    Attributes:
        round: number of the round.
        sent: how many messages went down.
        received: how many valid ones came up.
        down_bytes: of all messages down.
        up_bytes: of all valid messages up.
    """

    round: int
    sent: int
    received: int = 0
    down_bytes: int = 0
    up_bytes: int = 0


class OMCStrategy(Strategy):
    """Wrap a strategy so that what it sends is compressed and what it aggregates is decoded.

    Every client gets its own payload: which variables stay FP32 is drawn from the policy's seed, the round and the
    client. Each variable is encoded once a round, whatever the number of clients. A reply that is damaged, of another
    model or not finite is left out and named in the log; the inner strategy aggregates the others, decoding one
    variable at a time.

    Attributes:
        inner: the wrapped strategy.
        policy: how to compress; None sends FP32 and only counts.
        aggregate: ``difference`` or ``value``.
        client_name: names a node for the draw: the node's number by default, which a simulation changes in each run.
        traffic: bytes by round, of training messages.

    Raises:
        PolicyError: an unknown way to aggregate.
    """

    def __init__(
        self,
        inner: Strategy,
        policy: CompressionPolicy | None,
        *,
        aggregate: str = "difference",
        client_name: Callable[[int], str | int] = str,
    ) -> None:
        if aggregate not in AGGREGATES:
            raise PolicyError(f"aggregate={aggregate!r} is unknown: use one of {', '.join(AGGREGATES)}")
        self.inner = inner
        self.policy = policy
        self.aggregate = aggregate
        self.client_name = client_name
        self.traffic: list[Traffic] = []
        self._broadcast: _Broadcast | None = None

    def summary(self) -> None:
        """Log the settings of the inner strategy."""
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy choose the clients, then give each its own payload."""
        self._broadcast = _Broadcast(arrays, self.policy, server_round, self.client_name)
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        down_bytes = sum(self._broadcast.compress(message) for message in messages)
        self.traffic.append(Traffic(server_round, len(messages), down_bytes=down_bytes))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and let the inner strategy aggregate their decoded values."""
        if self._broadcast is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        decoded, up_bytes = [], 0
        # In order of the clients' names, so that the sum does not depend on who was first.
        for reply in sorted(replies, key=lambda reply: str(self.client_name(reply.metadata.src_node_id))):
            if reply.has_error():
                decoded.append(reply)
                continue
            size = sum(len(array.data) for record in reply.content.array_records.values() for array in record.values())
            try:
                self._broadcast.decode(reply, self.aggregate)
            except PayloadError as error:
                log(WARNING, "round %d: left out node %d: %s", server_round, reply.metadata.src_node_id, error)
                continue
            decoded.append(reply)
            up_bytes += size
        received = sum(not reply.has_error() for reply in decoded)
        self.traffic[-1] = replace(self.traffic[-1], received=received, up_bytes=up_bytes)
        arrays, metrics = self.inner.aggregate_train(server_round, decoded)
        return None if arrays is None else _in_dtypes_of(self._broadcast.arrays, arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy choose the clients; they evaluate what they would be sent for training."""
        broadcast = _Broadcast(arrays, self.policy, server_round, self.client_name)
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        for message in messages:
            broadcast.compress(message)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the inner strategy aggregate the metrics."""
        return self.inner.aggregate_evaluate(server_round, replies)


class _Broadcast:
    """One round's model: the FP32 values, each variable encoded at most once, and who was sent what."""

    def __init__(
        self,
        arrays: ArrayRecord,
        policy: CompressionPolicy | None,
        server_round: int,
        client_name: Callable[[int], str | int],
    ) -> None:
        self.arrays = arrays
        self.policy = policy
        self.round = server_round
        self.client_name = client_name
        self.shapes = {name: tuple(array.shape) for name, array in arrays.items() if array.dtype == "float32"}
        self.packed: dict[str, Packed] = {}
        self.encoded: dict[str, Array] = {}
        self.selections: dict[int, Selection] = {}

    def compress(self, message: Message) -> int:
        """Replace the model in a message by the client's own payload; returns the bytes of its arrays."""
        node = message.metadata.dst_node_id
        if self.policy is not None:
            client = self.client_name(node)
            selection = self.policy.select(self.shapes, round=self.round, client=client)
            self.selections[node] = selection
            payload = ArrayRecord()
            for name, array in self.arrays.items():
                payload[name] = self._encoded(name) if name in selection else array
            content = RecordDict(dict(message.content.items()))
            for key, record in message.content.array_records.items():
                if record is self.arrays:
                    content[key] = payload
            content[CONFIG] = to_config(self.policy.encoding(round=self.round, client=client))
            message.content = content
        return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())

    def decode(self, reply: Message, aggregate: str) -> None:
        """Check a reply and replace its arrays by ones that decode when they are asked for their values.

        Raises:
            PayloadError: it is damaged, not finite, or of another model.
        """
        records = list(reply.content.array_records.items())
        if len(records) != 1:
            raise PayloadError(f"the reply has {len(records)} array records, one expected")
        key, record = records[0]
        if set(record) != set(self.arrays):
            raise PayloadError("the reply's variables are not those of the model that was sent")
        selection = self.selections.get(reply.metadata.src_node_id, Selection({}))
        decoded = ArrayRecord()
        for name, array in record.items():
            if tuple(array.shape) != tuple(self.arrays[name].shape):
                raise PayloadError(f"{name}: shape {array.shape}, but {self.arrays[name].shape} was sent")
            decoded[name] = self._decoder(name, array, name in selection, aggregate)
        content = RecordDict(dict(reply.content.items()))
        content[key] = decoded
        reply.content = content

    def _encoded(self, name: str) -> Array:
        if name not in self.encoded:
            assert self.policy is not None
            how = self.policy.encoding(round=self.round)
            values = torch.from_numpy(self.arrays[name].numpy())
            self.packed[name] = encode(values, how.format, how.transform, how.base_rounding, how.seed, name)
            self.encoded[name] = packed_array(self.packed[name], tuple(values.shape))
        return self.encoded[name]

    def _decoder(self, name: str, array: Array, was_packed: bool, aggregate: str) -> Array:
        shape = tuple(array.shape)
        if array.stype == STYPE:
            parsed = read_packed(array, name, copy=False)
            if parsed.kind == frame.UPDATE and not was_packed:
                raise PayloadError(f"{name}: an update came back, but the variable was sent in FP32")

            def returned() -> _Values:
                return _decode(parsed.packed, shape)

            is_update = parsed.kind == frame.UPDATE
        else:
            read_dense(array, name)  # checked now, and read again when it is its turn
            if not was_packed or aggregate == "value":
                return array

            def returned() -> _Values:
                return read_dense(array, name)

            is_update = False

        def values() -> _Values:
            result = returned()
            if is_update and aggregate == "value":
                result += _decode(self.packed[name], shape)
            elif aggregate == "difference" and (is_update or was_packed):
                if not is_update:
                    result -= _decode(self.packed[name], shape)
                result += self.arrays[name].numpy()
            return result

        return _DecodedArray(array.dtype, shape, values)


class _DecodedArray(Array):
    """An ``Array`` whose values are made when they are asked for; it is never sent."""

    def __init__(self, dtype: str, shape: tuple[int, ...], values: Callable[[], _Values]) -> None:
        super().__init__(dtype, shape, STYPE, b"")
        self.__dict__["_values"] = values

    def numpy(self) -> _Values:
        """Decode the values."""
        values: _Values = self.__dict__["_values"]()
        return values


def _in_dtypes_of(sent: ArrayRecord, arrays: ArrayRecord) -> ArrayRecord:
    """Give the new values the dtypes that were sent: Flower's adaptive strategies compute in float64 with numpy 2."""
    result = ArrayRecord()
    for name, array in arrays.items():
        wanted = sent[name].dtype
        result[name] = array if array.dtype == wanted else Array(array.numpy().astype(wanted))
    return result


def _decode(packed: Packed, shape: tuple[int, ...]) -> _Values:
    values: _Values = packed.decode(torch.empty(packed.numel)).view(shape).numpy()
    return values
