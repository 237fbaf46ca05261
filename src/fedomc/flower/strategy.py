"""``OMCStrategy``: any Flower strategy, with compressed messages.

[Note: what aggregation adds up]
The server holds FP32 values V; a client is sent Q(V), trains, and returns R. Plain averaging (``value``, the paper)
makes the mean of the R the new model, and with it the error Q(V) - V, which is the same for every client and larger
than a round's update. ``difference`` takes V + (R - Q(V)) for R: the error of the broadcast cancels, and what remains
is the rounding of the client's own steps. With two parts the client returns R - Q(V) itself, the update.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from logging import ERROR, WARNING
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedomc import frame
from fedomc.errors import NonFiniteError, PayloadError, PolicyError
from fedomc.flower.arrays import CONFIG, STYPE, packed_array, read_dense, read_packed, to_config
from fedomc.formats import FloatFormat
from fedomc.lossless import require
from fedomc.policy import CompressionPolicy, Selection
from fedomc.transform import Packed, encode

AGGREGATES = ("difference", "value")
LOSSLESS = ("none", "down", "up", "both")

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
    client. Each variable is encoded once a round, whatever the number of clients. A reply must hold one ``ArrayRecord``
    with the variables that were sent (what ``collect`` gives) and one ``MetricRecord`` with the weight; one that is
    damaged, of another model, not finite or was not asked for is left out and named in the log. The inner strategy
    aggregates the others, decoding one variable at a time; a result that is not finite is dropped.

    Names alone do not tell parameters from buffers: float32 buffers of two dimensions are compressed like parameters
    unless the policy excludes them.

    Attributes:
        inner: the wrapped strategy.
        policy: how to compress; None sends FP32 and only counts.
        aggregate: ``difference`` or ``value``.
        client_name: names a node for the draw: the node's number by default, which a simulation changes in each run.
        lossless: which messages go through the lossless stage: ``none``, ``down``, ``up`` or ``both``. It needs
            zstandard on both sides, and clients that give ``collect`` the message.
        rest_format: in which the variables travel that partial quantization leaves in FP32; None is FP32.
        traffic: bytes by round, of training messages.

    Raises:
        FormatError: no such format of the rest.
        PolicyError: an unknown way to aggregate or direction, or the lossless stage without zstandard.
    """

    def __init__(
        self,
        inner: Strategy,
        policy: CompressionPolicy | None,
        *,
        aggregate: str = "difference",
        client_name: Callable[[int], str | int] = str,
        lossless: str = "none",
        rest_format: str | FloatFormat | None = None,
    ) -> None:
        if aggregate not in AGGREGATES:
            raise PolicyError(f"aggregate={aggregate!r} is unknown: use one of {', '.join(AGGREGATES)}")
        if lossless not in LOSSLESS:
            raise PolicyError(f"lossless={lossless!r} is unknown: use one of {', '.join(LOSSLESS)}")
        if lossless != "none":
            require()
        self.inner = inner
        self.policy = policy
        self.aggregate = aggregate
        self.lossless = lossless
        self.rest_format = None if rest_format is None else FloatFormat.parse(rest_format)
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
        self._broadcast = _Broadcast(
            arrays, self.policy, server_round, self.client_name, self.lossless, self.rest_format
        )
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
        broadcast, up_bytes = self._broadcast, {}

        def check(reply: Message) -> None:
            up_bytes[id(reply)] = _bytes_of(reply)
            broadcast.decode(reply, self.aggregate)
            self._check_metrics(reply)

        agreed = _usable(server_round, broadcast.expected(replies), check)
        received = [reply for reply in agreed if not reply.has_error()]
        self.traffic[-1] = replace(
            self.traffic[-1], received=len(received), up_bytes=sum(up_bytes[id(reply)] for reply in received)
        )
        if not any(self._weight(reply) > 0 for reply in received):
            agreed = [reply for reply in agreed if reply.has_error()]  # a mean of nothing
        arrays, metrics = self.inner.aggregate_train(server_round, agreed)
        if arrays is None:
            return None, metrics
        try:
            return _in_dtypes_of(broadcast.arrays, arrays), metrics
        except NonFiniteError as error:
            log(ERROR, "round %d: %s; the model stays as it was", server_round, error)
            return None, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy choose the clients; they evaluate what they would be sent for training."""
        broadcast = _Broadcast(arrays, self.policy, server_round, self.client_name, self.lossless, self.rest_format)
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        for message in messages:
            broadcast.compress(message)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check the metrics and let the inner strategy aggregate them."""
        agreed = _usable(server_round, replies, self._check_metrics)
        if not any(self._weight(reply) > 0 for reply in agreed if not reply.has_error()):
            return None
        return self.inner.aggregate_evaluate(server_round, agreed)

    def _check_metrics(self, reply: Message) -> None:
        """Refuse what would make a weighted mean mean nothing."""
        records = list(reply.content.metric_records.values())
        if len(records) != 1:
            raise PayloadError(f"the reply has {len(records)} metric records, one expected")
        for name, value in records[0].items():
            if not np.isfinite(value).all():
                raise PayloadError(f"metric {name}={value} is not finite")
        weight = records[0].get(self._weighted_by)
        if isinstance(weight, list) or weight is None or weight < 0:
            raise PayloadError(f"metric {self._weighted_by}={weight}: a number that is not negative is expected")

    @property
    def _weighted_by(self) -> str:
        return getattr(self.inner, "weighted_by_key", "num-examples")

    def _weight(self, reply: Message) -> float:
        return float(cast(float, next(iter(reply.content.metric_records.values()))[self._weighted_by]))


def _left_out(server_round: int, reply: Message, why: object) -> None:
    log(WARNING, "round %d: left out node %d: %s", server_round, reply.metadata.src_node_id, why)


def _bytes_of(message: Message) -> int:
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def _usable(server_round: int, replies: Iterable[Message], check: Callable[[Message], None]) -> list[Message]:
    """Return errors, and the replies that pass a check and are alike, since Flower aggregates none otherwise."""
    checked = []
    for reply in replies:
        try:
            if not reply.has_error():
                check(reply)
            checked.append(reply)
        except PayloadError as error:
            _left_out(server_round, reply, error)
    return _of_one_structure(server_round, checked)


def _of_one_structure(server_round: int, replies: list[Message]) -> list[Message]:
    """Leave out replies whose records or metrics are named otherwise than most."""

    def structure(reply: Message) -> tuple[object, ...]:
        metrics = next(iter(reply.content.metric_records.values()))
        kinds = sorted((name, len(value) if isinstance(value, list) else -1) for name, value in metrics.items())
        return (*sorted(reply.content.array_records), *sorted(reply.content.metric_records), *kinds)

    counts = Counter(structure(reply) for reply in replies if not reply.has_error())
    if len(counts) < 2:
        return replies
    usual = counts.most_common(1)[0][0]
    agreed = []
    for reply in replies:
        if reply.has_error() or structure(reply) == usual:
            agreed.append(reply)
        else:
            _left_out(server_round, reply, "its records or metrics are not those of the other replies")
    return agreed


class _Broadcast:
    """One round's model: the FP32 values, each variable encoded at most once, and who was sent what."""

    def __init__(
        self,
        arrays: ArrayRecord,
        policy: CompressionPolicy | None,
        server_round: int,
        client_name: Callable[[int], str | int],
        lossless: str = "none",
        rest_format: FloatFormat | None = None,
    ) -> None:
        self.arrays = arrays
        self.policy = policy
        self.round = server_round
        self.client_name = client_name
        self.shapes = {name: tuple(array.shape) for name, array in arrays.items() if array.dtype == "float32"}
        self.lossless_down = lossless in ("down", "both")
        self.lossless_up = lossless in ("up", "both")
        self.rest_format = rest_format
        self.packed: dict[str, Packed] = {}
        self.encoded: dict[str, Array] = {}
        self.rest_packed: dict[str, Packed] = {}
        self.rest_encoded: dict[str, Array] = {}
        self.selections: dict[int, Selection] = {}
        self.nodes: set[int] = set()

    def expected(self, replies: Iterable[Message]) -> list[Message]:
        """Return the errors, and one reply of each node that was sent a message, in order of the clients' names.

        So that a sum does not depend on who was first.
        """
        errors, answered = [], {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                errors.append(reply)
            elif node in self.nodes and node not in answered:
                answered[node] = reply
            else:
                _left_out(self.round, reply, "it was not asked, or has answered before")
        return [*errors, *(answered[node] for node in sorted(answered, key=lambda node: str(self.client_name(node))))]

    def compress(self, message: Message) -> int:
        """Replace the model in a message by the client's own payload; returns the bytes of its arrays."""
        node = message.metadata.dst_node_id
        self.nodes.add(node)
        if self.policy is not None:
            client = self.client_name(node)
            selection = self.policy.select(self.shapes, round=self.round, client=client)
            rest = self.policy.compressible(self.shapes) if self.rest_format is not None else {}
            self.selections[node] = selection
            payload = ArrayRecord()
            for name, array in self.arrays.items():
                if name in selection:
                    payload[name] = self._encoded(name)
                else:
                    payload[name] = self._rest(name) if name in rest else array
            content = RecordDict(dict(message.content.items()))
            models = [key for key, record in message.content.array_records.items() if set(record) == set(self.arrays)]
            if not models:
                raise PolicyError(
                    "the inner strategy sends no model of the variables it was given: nothing to compress"
                )
            for key in models:
                content[key] = payload
            content[CONFIG] = to_config(
                self.policy.encoding(round=self.round, client=client),
                lossless=self.lossless_up,
                rest_format=self.rest_format,
            )
            message.content = content
        return _bytes_of(message)

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
            sent = self.packed[name] if name in selection else self.rest_packed.get(name)
            decoded[name] = self._decoder(name, array, sent, aggregate)
        content = RecordDict(dict(reply.content.items()))
        content[key] = decoded
        reply.content = content

    def _encoded(self, name: str) -> Array:
        if name not in self.encoded:
            assert self.policy is not None
            how = self.policy.encoding(round=self.round)
            values = torch.from_numpy(self.arrays[name].numpy())
            self.packed[name] = encode(values, how.format, how.transform, how.base_rounding, how.seed, name)
            self.encoded[name] = packed_array(self.packed[name], tuple(values.shape), lossless=self.lossless_down)
        return self.encoded[name]

    def _rest(self, name: str) -> Array:
        if name not in self.rest_encoded:
            assert self.policy is not None and self.rest_format is not None
            values = torch.from_numpy(self.arrays[name].numpy())
            packed = encode(values, self.rest_format, self.policy.transform, name=name)
            self.rest_packed[name] = packed
            self.rest_encoded[name] = packed_array(
                packed, tuple(values.shape), frame.DENSE, lossless=self.lossless_down
            )
        return self.rest_encoded[name]

    def _decoder(self, name: str, array: Array, sent: Packed | None, aggregate: str) -> Array:
        """Check an array and return one that decodes when it is its turn; ``sent`` is what went down packed, if so."""
        shape = tuple(array.shape)
        if array.stype == STYPE:

            def parsed() -> frame.Frame:
                return read_packed(array, name, copy=False, sent=sent)

            is_update = parsed().kind == frame.UPDATE  # checked now, and read again when it is its turn
            if is_update and sent is None:
                raise PayloadError(f"{name}: an update came back, but the variable was sent in FP32")

            def returned() -> _Values:
                return _decode(parsed().packed, shape)

        else:
            dtype = read_dense(array, name).dtype  # likewise
            if dtype != self.arrays[name].dtype:
                raise PayloadError(f"{name}: dtype {dtype}, but {self.arrays[name].dtype} was sent")
            if sent is None or aggregate == "value":
                return array

            def returned() -> _Values:
                return read_dense(array, name)

            is_update = False

        def values() -> _Values:
            result = returned()
            flat = torch.from_numpy(result).view(-1)
            if sent is not None and is_update and aggregate == "value":
                sent.add_to(flat)
            elif sent is not None and aggregate == "difference":
                if not is_update:
                    sent.add_to(flat, -1.0)
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
    """Give the new values the dtypes that were sent: Flower's adaptive strategies compute in float64 with numpy 2.

    Raises:
        NonFiniteError: a new value is NaN or infinite, at the latest in the dtype that was sent.
    """
    result = ArrayRecord()
    for name, array in arrays.items():
        values, wanted = array.numpy(), sent[name].dtype
        if array.dtype != wanted:
            values = np.asarray(values if np.dtype(wanted).kind == "f" else np.rint(values), dtype=wanted)
            array = Array(values)
        if not np.isfinite(values).all():
            raise NonFiniteError(f"{name} would become NaN or infinite")
        result[name] = array
    return result


def _decode(packed: Packed, shape: tuple[int, ...]) -> _Values:
    values: _Values = packed.decode(torch.empty(packed.numel)).view(shape).numpy()
    return values
