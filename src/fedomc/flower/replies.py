"""Checking what came back from clients: who may answer, and the variables and metrics of a reply."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord

from fedomc.errors import PayloadError
from fedomc.flower import defences
from fedomc.flower._flower import logger
from fedomc.flower.arrays import STYPE, read_packed, records_of, view_dense
from fedomc.flower.downlink import Broadcast
from fedomc.flower.traffic import RoundReport
from fedomc.flower.variables import ReplyVariable
from fedomc.methods.packed import Packed
from fedomc.serialization import frame

Checked = tuple[Message, dict[str, ReplyVariable]]
"""A reply with its variables."""

_LARGEST_WEIGHT = 2.0**63
"""The largest weight of a reply: it is a count, and sums of larger numbers might not be finite."""


def checked_replies(
    broadcast: Broadcast,
    sent: Sequence[Metadata],
    replies: Iterable[Message],
    errors: list[Message],
    report: RoundReport,
    weight_name: str,
) -> Iterator[Checked]:
    """Yield the replies to a broadcast that can be used; each of the others is named in the log.

    Args:
        broadcast: what was sent.
        sent: the metadata of the messages that carried it.
        replies: what came back, drawn one by one; nothing of a reply is held once the next one is asked for.
        errors: gets the replies that report an error.
        report: gets the time that checking takes.
        weight_name: the name of the metric that is the reply's weight.
    """
    answered = set[int]()
    for reply in replies:
        node = reply.metadata.src_node_id
        if reply.has_error():
            node = _asked_node(sent, reply)
            errors.append(reply)
            answered.add(node)
            log_left_out(broadcast.round, node, defences.explained(reply.error))
        elif node not in broadcast.nodes or node in answered:
            log_left_out(broadcast.round, node, "it was not asked, or has answered before")
        else:
            answered.add(node)
            try:
                with report.timed("decode"):
                    variables = read_variables(broadcast, reply)
                check_metrics(reply, weight_name)
            except PayloadError as error:
                log_left_out(broadcast.round, node, error)
            else:
                yield reply, variables
                del variables
        del reply
    for node in sorted(broadcast.nodes - answered):
        log_left_out(broadcast.round, node, "no reply came in time")


def _asked_node(sent: Sequence[Metadata], reply: Message) -> int:
    """Return the node whose reply this is: for a node that is gone, the SuperLink answers in its own name."""
    asked = {metadata.message_id: metadata.dst_node_id for metadata in sent if metadata.message_id}
    return asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)


def log_left_out(server_round: int, node: int, reason: object) -> None:
    """Log that a node's reply is not used."""
    logger.warning("round %d: left out node %d: %s", server_round, node, reason)


# ---- variables ------------------------------------------------------------------------------------------------------


def read_variables(broadcast: Broadcast, reply: Message) -> dict[str, ReplyVariable]:
    """Check all variables of a reply; they stay packed where they lie in it.

    Raises:
        PayloadError: a variable is damaged, not finite, or of another model.
    """
    records = list(records_of(reply.content, ArrayRecord).values())
    if len(records) != 1:
        raise PayloadError(f"the reply has {len(records)} array records, one expected")
    if set(records[0]) != set(broadcast.arrays):
        raise PayloadError("the reply's variables are not those of the model that was sent")
    sent = broadcast.packed(reply.metadata.src_node_id)
    return {name: _read_variable(broadcast, name, array, sent.get(name)) for name, array in records[0].items()}


def _read_variable(broadcast: Broadcast, name: str, array: Array, packed: Packed | None) -> ReplyVariable:
    own = broadcast.arrays[name]
    if tuple(array.shape) != tuple(own.shape):
        raise PayloadError(f"{name}: shape {array.shape}, but {own.shape} was sent")
    sent = broadcast.dense(name) if packed is None else packed
    if array.stype != STYPE:
        values = view_dense(array, name)
        if values.dtype != own.dtype:
            raise PayloadError(f"{name}: dtype {values.dtype}, but {own.dtype} was sent")
        return ReplyVariable(values, sent, False)
    if own.dtype != "float32":
        raise PayloadError(f"{name}: compressed values came back, but {own.dtype} was sent")
    parsed = read_packed(array, name, copy=False, sent=packed)
    is_update = parsed.kind == frame.UPDATE
    if is_update and packed is None:
        raise PayloadError(f"{name}: an update came back, but the variable was sent in FP32")
    in_message = len(array.data) > parsed.packed.codes.nbytes
    return ReplyVariable(parsed.packed if in_message else partial(_codes, array, name, packed), sent, is_update)


def _codes(array: Array, name: str, sent: Packed | None) -> Packed:
    return read_packed(array, name, copy=False, sent=sent).packed


# ---- metrics --------------------------------------------------------------------------------------------------------


def check_metrics(reply: Message, weight_name: str) -> None:
    """Check that a weighted mean of a reply's metrics would mean something.

    Raises:
        PayloadError: there is no weight, or a metric is not finite.
    """
    records = list(records_of(reply.content, MetricRecord).values())
    if len(records) != 1:
        raise PayloadError(f"the reply has {len(records)} metric records, one expected")
    for name, value in records[0].items():
        if not all(map(_is_a_number, value if isinstance(value, list) else [value])):
            raise PayloadError(f"metric {name}={value} is not finite, or beyond 64 bits")
    weight = records[0].get(weight_name)
    if isinstance(weight, list) or weight is None or not 0 <= weight <= _LARGEST_WEIGHT:
        raise PayloadError(f"metric {weight_name}={weight}: a number from 0 to 2**63 is expected")


def weight_of(reply: Message, weight_name: str) -> float:
    """Return the weight of a reply that was checked."""
    return float(cast(float, next(iter(records_of(reply.content, MetricRecord).values()))[weight_name]))


def like_most(replies: Iterable[Message]) -> Callable[[int, Message], bool]:
    """Return what tells whether a reply's records and metrics are named as those of most of these replies."""
    counts = Counter(_structure(reply) for reply in replies)
    usual = counts.most_common(1)[0][0] if counts else None

    def is_like(server_round: int, reply: Message) -> bool:
        if _structure(reply) == usual:
            return True
        reason = "its records or metrics are not those of the other replies"
        log_left_out(server_round, reply.metadata.src_node_id, reason)
        return False

    return is_like


def _structure(reply: Message) -> tuple[object, ...]:
    metrics = next(iter(records_of(reply.content, MetricRecord).values()))
    kinds = sorted((name, len(value) if isinstance(value, list) else -1) for name, value in metrics.items())
    return (*sorted(records_of(reply.content, ArrayRecord)), *sorted(records_of(reply.content, MetricRecord)), *kinds)


def _is_a_number(value: float) -> bool:
    """Tell whether numpy can add up such values; Python's whole numbers have no bound."""
    return math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63
