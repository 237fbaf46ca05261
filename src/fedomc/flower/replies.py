"""Checking what came back from clients: who may answer, to which message, and with which variables."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict

from fedomc.errors import PayloadError
from fedomc.flower import defences
from fedomc.flower._flower import logger
from fedomc.flower.arrays import STYPE, read_packed, records_of, view_dense
from fedomc.flower.downlink import Broadcast
from fedomc.flower.metrics import ReplyMetrics, WeightCap, common_metrics, read_metrics, with_weight
from fedomc.flower.traffic import RoundReport
from fedomc.flower.variables import ReplyVariable
from fedomc.methods import Method, Packed
from fedomc.serialization import frame


@dataclass
class Reply:
    """A reply that was checked.

    Attributes:
        message: the message that came back.
        record: the name of the array record that holds the model.
        variables: the variables of the model.
        metrics: the metrics and the weight.
    """

    message: Message
    record: str
    variables: dict[str, ReplyVariable]
    metrics: ReplyMetrics

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
) -> Iterator[Reply]:
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
    for message in replies:
        node, reason = _sender(sent, message)
        if node not in broadcast.nodes or node in answered:
            reason = reason or "it was not asked, or has answered before"
        if reason:
            log_left_out(broadcast.round, node, reason)
        elif message.has_error():
            errors.append(message)
            answered.add(node)
            log_left_out(broadcast.round, node, defences.explained(message.error))
        else:
            answered.add(node)
            try:
                with report.timed("decode"):
                    record, variables = read_variables(broadcast, message)
                metrics = read_metrics(message, broadcast.round, weight_name)
            except PayloadError as error:
                log_left_out(broadcast.round, node, error)
            else:
                yield Reply(message, record, variables, metrics)
                del variables
        del message
    for node in sorted(broadcast.nodes - answered):
        log_left_out(broadcast.round, node, "no reply came in time")


def checked_evaluations(
    sent: Sequence[Metadata],
    replies: Iterable[Message],
    server_round: int,
    weight_name: str,
    weight_cap: float | None,
) -> list[Message] | None:
    """Return the errors and the usable replies of an evaluation, all with the same metrics.

    Args:
        sent: the metadata of the messages that asked for it.
        replies: what came back.
        server_round: the round's number.
        weight_name: the name of the metric that is a reply's weight.
        weight_cap: the most that a reply may weigh, as a multiple of the median weight; None sets no cap.

    Returns:
        The messages, or None if no reply has a weight above zero.
    """
    errors, usable, answered = list[Message](), list[tuple[Message, ReplyMetrics]](), set[int]()
    for message in replies:
        node, reason = _sender(sent, message)
        if reason or node in answered:
            log_left_out(server_round, node, reason or "it has answered before")
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
    """Log that a node's reply is not used."""
    logger.warning("round %d: left out node %d: %s", server_round, node, reason)


def like_most(replies: Sequence[Reply], server_round: int) -> list[Reply]:
    """Return the replies whose records are named as those of most replies; the others are named in the log."""
    structures = [(reply.record, reply.metrics.record, *sorted(reply.others())) for reply in replies]
    usual = min(Counter(structures).items(), key=lambda item: (-item[1], item[0]))[0] if replies else None
    chosen = []
    for reply, structure in zip(replies, structures, strict=True):
        if structure == usual:
            chosen.append(reply)
        else:
            log_left_out(server_round, reply.metrics.node, f"its records are {structure}, those of most are {usual}")
    return chosen


def without_others(reply: Reply, server_round: int) -> RecordDict:
    """Return a reply's content without further array and metric records, which are named in the log."""
    others = reply.others()
    if others:
        logger.warning(
            "round %d: node %d: dropped %s: the strategy aggregates one model and its metrics, %s and %s",
            *(server_round, reply.metrics.node, ", ".join(others), reply.record, reply.metrics.record),
        )
    return RecordDict({key: record for key, record in reply.message.content.items() if key not in others})


def _sender(sent: Sequence[Metadata], message: Message) -> tuple[int, str]:
    """Return the node whose reply this is, and why it cannot be one to this round.

    For a node that is gone the SuperLink answers in its own name, so what counts is the message that is answered. Grids
    that give messages no id leave it open which one that is.
    """
    asked = {metadata.message_id: metadata.dst_node_id for metadata in sent if metadata.message_id}
    source, answered = message.metadata.src_node_id, message.metadata.reply_to_message_id
    if not asked:
        return source, ""
    if answered not in asked:
        return source, f"it answers message {answered!r}, which is not one of this round"
    if asked[answered] != source and not message.has_error():
        return source, f"it answers the message to node {asked[answered]}"
    return asked[answered], ""


# ---- variables ------------------------------------------------------------------------------------------------------


def read_variables(broadcast: Broadcast, reply: Message) -> tuple[str, dict[str, ReplyVariable]]:
    """Check all variables of a reply; they stay packed where they lie in it.

    Returns:
        The name of the array record that holds the model, and its variables.

    Raises:
        PayloadError: a variable is damaged, not finite, or of another model.
    """
    records, node = records_of(reply.content, ArrayRecord), reply.metadata.src_node_id
    models = [key for key, record in records.items() if set(record) == set(broadcast.arrays)]
    if not records:
        raise PayloadError("the reply has no array record")
    if not models:
        raise PayloadError("the reply's variables are not those of the model that was sent")
    named_as_sent = [key for key in models if key in broadcast.record_names(node)]
    if len(models) > 1 and len(named_as_sent) != 1:
        raise PayloadError(f"{', '.join(models)} could all be the model: name it {broadcast.record_names(node)[0]!r}")
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
    if uplink is not None and not (is_update and parsed.packed.method == uplink):
        what = "an update" if is_update else "a variable"
        raise PayloadError(
            f"{name}: {what} in {parsed.packed.method} came back, but the change in {uplink} was asked for: the client "
            "has to give collect the message, as in collect(model, message)"
        )
    if is_update and packed is None and uplink is None:
        raise PayloadError(f"{name}: an update came back, but the variable was sent in FP32")
    in_message = len(array.data) > parsed.packed.codes.nbytes
    return ReplyVariable(parsed.packed if in_message else partial(_codes, array, name, packed), sent, is_update)


def _codes(array: Array, name: str, sent: Packed | None) -> Packed:
    return read_packed(array, name, copy=False, sent=sent).packed
