"""Checks the replies of clients: their sender, the message that they reply to, and their variables."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict

from fedomc.errors import PayloadError
from fedomc.flower import defences
from fedomc.flower._flower import logger
from fedomc.flower.arrays import STYPE, dtype_of, read_packed, records_of, view_dense
from fedomc.flower.downlink import Broadcast
from fedomc.flower.mapped import nbytes_of
from fedomc.flower.metrics import ReplyMetrics, WeightCap, common_metrics, named, read_metrics, with_weight
from fedomc.flower.traffic import RoundReport
from fedomc.flower.variables import ReplyVariable
from fedomc.methods import Method, Packed
from fedomc.serialization import frame
from fedomc.tensor.dtypes import NAMES


@dataclass
class Reply:
    """A reply that has been checked.

    Attributes:
        message: the message of the reply.
        record: the name of the array record that holds the model.
        variables: the variables of the model.
        metrics: the metrics and the weight.
        factor: what the client's change is multiplied by, from 0 to 1.
    """

    message: Message
    record: str
    variables: dict[str, ReplyVariable]
    metrics: ReplyMetrics
    factor: float = 1.0

    def others(self) -> list[str]:
        """Return the names of the array and metric records that are neither the model nor its metrics."""
        used = {self.record, self.metrics.record}
        kinds = (ArrayRecord, MetricRecord)
        return [name for name, one in self.message.content.items() if isinstance(one, kinds) and name not in used]


def checked_replies(
    broadcast: Broadcast,
    sent: Sequence[Metadata],
    replies: Iterable[Message],
    errors: list[Message],
    report: RoundReport,
    weight_name: str,
    enough: int | None = None,
) -> Iterator[Reply]:
    """Yield the usable replies to a broadcast; a warning is logged for each of the others.

    Args:
        broadcast: the model as it was sent.
        sent: the metadata of the messages that were sent.
        replies: the replies, which are drawn one by one; each is released before the next one is drawn.
        errors: gets the replies that report an error.
        report: the report, to which the time for checking is added.
        weight_name: the name of the metric that is the reply's weight.
        enough: the number of usable replies after which no more are drawn; None draws all.
    """
    asked, answered, usable = asked_nodes(sent), set[int](), 0
    for message in replies:
        node, reason = sender_of(asked, message)
        if node not in broadcast.nodes or node in answered:
            reason = reason or "it was not selected, or has already replied"
        if reason:
            log_left_out(broadcast.round, node, reason)
        else:
            answered.add(node)
            reply = checked_reply(broadcast, node, message, errors, report, weight_name)
            if reply is not None:
                usable += 1
                yield reply
                del reply
        del message
        if usable == enough:
            log_not_awaited(broadcast.round, usable, broadcast.nodes - answered)
            return
    for node in sorted(broadcast.nodes - answered):
        log_left_out(broadcast.round, node, "no reply came in time")


def checked_reply(
    broadcast: Broadcast, node: int, message: Message, errors: list[Message], report: RoundReport, weight_name: str
) -> Reply | None:
    """Return a node's reply if it is usable; otherwise log a warning and return None.

    Args:
        broadcast: the model as it was sent to the node.
        node: the node, as ``sender_of`` returns it.
        message: its reply.
        errors: gets the message if it reports an error.
        report: the report, to which the time for checking is added.
        weight_name: the name of the metric that is the reply's weight.
    """
    if message.has_error():
        errors.append(message)
        log_left_out(broadcast.round, node, defences.explained(message.error))
        return None
    try:
        with report.timed("decode"):
            record, variables = read_variables(broadcast, message)
        metrics = read_metrics(message, broadcast.round, weight_name)
    except PayloadError as error:
        log_left_out(broadcast.round, node, error)
        return None
    return Reply(message, record, variables, metrics)


def checked_evaluations(
    sent: Sequence[Metadata],
    replies: Iterable[Message],
    server_round: int,
    weight_name: str,
    weight_cap: float | None,
    enough: int | None = None,
) -> list[Message] | None:
    """Return the errors and the usable replies of an evaluation, reduced to their common metrics.

    Args:
        sent: the metadata of the messages that were sent.
        replies: the replies.
        server_round: the number of the round.
        weight_name: the name of the metric that is a reply's weight.
        weight_cap: the maximum weight of a reply, as a multiple of the median weight; None sets no cap.
        enough: the number of usable replies after which no more are drawn from an iterator; None draws all.

    Returns:
        The messages, or None if no reply has a positive weight.
    """
    errors, usable, answered = list[Message](), list[tuple[Message, ReplyMetrics]](), set[int]()
    asked = asked_nodes(sent)
    for message in replies:
        node, reason = sender_of(asked, message)
        if reason or node in answered:
            log_left_out(server_round, node, reason or "it has already replied")
            continue
        answered.add(node)
        if message.has_error():
            errors.append(message)
            log_left_out(server_round, node, defences.explained(message.error))
            continue
        try:
            usable.append((message, read_metrics(message, server_round, weight_name)))
        except PayloadError as error:
            log_left_out(server_round, node, error)
        if len(usable) == enough and not isinstance(replies, Sequence):
            log_not_awaited(server_round, len(usable), {metadata.dst_node_id for metadata in sent} - answered)
            break
    cap = WeightCap(weight_cap)
    cap.add(metrics.weight for _, metrics in usable)
    chosen, weights = list[Message](), list[float]()
    rows, _ = common_metrics([metrics for _, metrics in usable], server_round)
    for (message, metrics), row in zip(usable, rows, strict=True):
        if row is not None:
            weights.append(cap.capped(metrics, server_round))
            others = {k: one for k, one in message.content.items() if not isinstance(one, MetricRecord)}
            message.content = RecordDict({**others, "metrics": with_weight(row, weight_name, weights[-1])})
            chosen.append(message)
    return [*errors, *chosen] if any(weights) else None


def log_left_out(server_round: int, node: int, reason: object) -> None:
    """Log a warning that a node's reply is not used."""
    logger.warning("round %d: left out node %d: %s", server_round, node, reason)


def log_not_awaited(server_round: int, usable: int, nodes: Collection[int]) -> None:
    """Log which nodes' replies a round did not wait for."""
    if nodes:
        logger.info(
            "round %d: went on with the first %d usable replies, without %s (over_selection)",
            *(server_round, usable, named(nodes)),
        )


def like_most(replies: Sequence[Reply], server_round: int) -> list[Reply]:
    """Return the replies that have the most common record names; a warning is logged for each of the others."""
    structures = [(reply.record, reply.metrics.record, *sorted(reply.others())) for reply in replies]
    usual = min(Counter(structures).items(), key=lambda item: (-item[1], item[0]))[0] if replies else None
    chosen = []
    for reply, structure in zip(replies, structures, strict=True):
        if structure == usual:
            chosen.append(reply)
        else:
            log_left_out(
                server_round, reply.metrics.node, f"its records are {structure}, but those of most replies are {usual}"
            )
    return chosen


def without_others(reply: Reply, server_round: int) -> RecordDict:
    """Return a reply's content without additional array and metric records, which are logged."""
    others = reply.others()
    if others:
        logger.warning(
            "round %d: node %d: dropped %s, because the strategy aggregates only one model and its metrics, %s and %s",
            *(server_round, reply.metrics.node, ", ".join(others), reply.record, reply.metrics.record),
        )
    return RecordDict({key: record for key, record in reply.message.content.items() if key not in others})


def asked_nodes(sent: Iterable[Metadata]) -> dict[str, int]:
    """Return the node that each message was sent to, by its ID; none for a grid that gives its messages no IDs."""
    return {metadata.message_id: metadata.dst_node_id for metadata in sent if metadata.message_id}


def sender_of(asked: Mapping[str, int], message: Message) -> tuple[int, str]:
    """Return the node that a reply belongs to, and the reason why it is not valid in this round, empty if it is.

    For a node that has disappeared, the SuperLink replies in its own name. The node is therefore determined by the
    message that is replied to, unless the grid gives its messages no IDs.

    Args:
        asked: the result of ``asked_nodes``.
        message: the reply.
    """
    source, answered = message.metadata.src_node_id, message.metadata.reply_to_message_id
    if not asked:
        return source, ""
    if answered not in asked:
        return source, f"it replies to message {answered!r}, which does not belong to this round"
    if asked[answered] != source and not message.has_error():
        return source, f"it replies to the message for node {asked[answered]}"
    return asked[answered], ""


# ---- variables ------------------------------------------------------------------------------------------------------


def read_variables(broadcast: Broadcast, reply: Message) -> tuple[str, dict[str, ReplyVariable]]:
    """Check all variables of a reply; they stay packed, as views of its data.

    Returns:
        The name of the array record that holds the model, and its variables.

    Raises:
        PayloadError: a variable is damaged, not finite, or belongs to another model.
    """
    records, node = records_of(reply.content, ArrayRecord), reply.metadata.src_node_id
    models = [key for key, record in records.items() if set(record) == set(broadcast.arrays)]
    if not records:
        raise PayloadError("the reply has no array record")
    if not models:
        raise PayloadError("the reply has other variables than the model that was sent")
    named_as_sent = [key for key in models if key in broadcast.record_names(node)]
    if len(models) > 1 and len(named_as_sent) != 1:
        raise PayloadError(
            f"each of the records {', '.join(models)} could be the model: name it {broadcast.record_names(node)[0]!r}"
        )
    name = (named_as_sent or models)[0]
    sent = broadcast.packed(node)
    return name, {
        key: _read_variable(broadcast, key, array, sent.get(key), broadcast.uplink_of(node, key))
        for key, array in records[name].items()
    }


def _read_variable(
    broadcast: Broadcast, name: str, array: Array, packed: Packed | None, uplink: Method | None
) -> ReplyVariable:
    own = broadcast.arrays[name]
    if tuple(array.shape) != tuple(own.shape):
        raise PayloadError(f"{name} has shape {array.shape}, but was sent with {own.shape}")
    sent = broadcast.dense(name) if packed is None else packed
    if array.stype != STYPE:
        values = view_dense(array, name)
        if dtype_of(array, values) != own.dtype:
            raise PayloadError(f"{name} has dtype {dtype_of(array, values)}, but was sent as {own.dtype}")
        return ReplyVariable(values, sent, False)
    if own.dtype not in NAMES:
        raise PayloadError(f"{name} is compressed, but was sent as {own.dtype}")
    parsed = read_packed(array, name, copy=False, sent=packed)
    is_update = parsed.kind == frame.UPDATE
    if uplink is not None and not (is_update and parsed.packed.method == uplink):
        what = "an update" if is_update else "a variable"
        raise PayloadError(
            f"{name} is {what} in {parsed.packed.method}, but its change in {uplink} was requested: the client must "
            "pass the message to collect, as in collect(model, message)"
        )
    if is_update and packed is None and uplink is None:
        raise PayloadError(f"{name} is an update, but the variable was sent in FP32")
    in_message = nbytes_of(array) > parsed.packed.codes.nbytes
    return ReplyVariable(parsed.packed if in_message else partial(_codes, array, name, packed), sent, is_update)


def _codes(array: Array, name: str, sent: Packed | None) -> Packed:
    return read_packed(array, name, copy=False, sent=sent).packed
