"""``omc_mod``: compresses the messages of a client whose own code does not use fedomc."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedomc.errors import PayloadError, PolicyError
from fedomc.flower._flower import is_legacy_content
from fedomc.flower.arrays import STYPE, array_of, framed_array, read_dense, read_packed, records_of, view_dense
from fedomc.flower.config import CONFIG, from_config
from fedomc.flower.feedback import Residuals
from fedomc.flower.mapped import BFLOAT16, nbytes_of
from fedomc.serialization import frame
from fedomc.serialization.uplink import Sent, UplinkConfig, reply_frame

Received = dict[str, Sent | None]
"""The variables of a record that go back in another form than the client returns: as a change of what is here or in its
format; or, where there is None, as bfloat16."""


def omc_mod(
    message: Message,
    context: Context,
    call_next: Callable[[Message, Context], Message],
    *,
    error_feedback: bool = False,
) -> Message:
    """Decode messages from ``OMCStrategy`` for unchanged client code, and encode its replies.

    Use it as ``ClientApp(mods=[omc_mod])`` if the training loop cannot be changed. It compresses **only
    communication**: the client's code receives, trains and returns FP32 arrays, and needs as much memory as without
    compression. A loop that uses ``install`` and ``collect`` keeps the parameters packed while it trains.

    It must be the first mod, as in ``mods=[omc_mod, fixedclipping_mod]``. The other mods then see FP32 arrays, and the
    message as the wrapped strategy made it.

    Variables that were received compressed are compressed in the reply, see ``reply_frame``; with an uplink method in
    the policy, so are those that partial quantization left in FP32. Variables of bfloat16, which numpy has not, are
    float32 to the client and go back as bfloat16. All are looked up in the record of the reply that has the same name
    as the received one; other records are not changed.

    ``ClientApp(mods=[functools.partial(omc_mod, error_feedback=True)])`` keeps in the context's state what the receiver
    still lacks of the changes so far, and adds it to the next one; see ``flower.feedback`` for when it helps.

    The mod does not know the client's model. It therefore refuses messages whose FP32 values would take more than
    ``frame.MAX_EXPANSION`` times the received bytes.

    Raises:
        PayloadError: a received variable is damaged, a returned one has another shape or dtype, or the decoded message
            would be too large.
        NonFiniteError: a returned value is NaN or infinite.
        PolicyError: the message belongs to Flower's legacy API, which ``OMCStrategy`` does not support; or
            error feedback is requested, but the server's policy has no uplink.
    """
    if is_legacy_content(message.content):
        raise PolicyError(
            "omc_mod has no effect in a legacy app (client_fn, NumPyClient), whose messages are never compressed: "
            "write the client with @app.train() of flwr.clientapp.ClientApp and the server with flwr.serverapp and "
            "OMCStrategy, or remove omc_mod"
        )
    config = records_of(message.content, ConfigRecord).get(CONFIG)
    if config is None and not _has_bfloat16(message.content):
        return call_next(message, context)
    records = records_of(message.content, ArrayRecord)
    _check_expansion(records.values())
    uplink, sent = None if config is None else from_config(config), dict[str, Received]()
    content = RecordDict({key: record for key, record in message.content.items() if key != CONFIG})
    for key, record in records.items():
        content[key], received = _decoded(record, uplink)
        if received:
            sent[key] = received
    del records
    message.content = content
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    content = RecordDict(dict(reply.content.items()))
    records = records_of(reply.content, ArrayRecord)
    for key, (sent_as, received) in _answers(sent, records).items():
        residuals = Residuals(context, sent_as, uplink) if error_feedback and uplink is not None else None
        content[key] = _encoded(records[key], received, uplink, residuals)
    reply.content = content
    return reply


def _has_bfloat16(content: RecordDict) -> bool:
    records = records_of(content, ArrayRecord).values()
    return any(array.stype == BFLOAT16 for record in records for array in record.values())


def _check_expansion(records: Iterable[ArrayRecord]) -> None:
    """Check that decoding does not expand a message too far; an entropy-coded constant could have any length."""
    arrays = [(name, array) for record in records for name, array in record.items() if array.stype == STYPE]
    sizes = [(4 * math.prod(map(abs, array.shape)), name) for name, array in arrays]
    arrived, needed = sum(nbytes_of(array) for _, array in arrays), sum(size for size, _ in sizes)
    if needed > frame.MAX_EXPANSION * arrived:
        largest, name = max(sizes)
        raise PayloadError(
            f"{name} would expand to {largest} bytes of FP32 values, and the whole message of {arrived} bytes to "
            f"{needed}. omc_mod does not know the model and expands no message more than {frame.MAX_EXPANSION} times: "
            "fill the model with fedomc.flower.install, which knows it, or send without entropy coding"
        )


def _decoded(record: ArrayRecord, uplink: UplinkConfig | None) -> tuple[ArrayRecord, Received]:
    """Return a record with arrays that numpy can read, and the variables that must not go back as such."""
    decoded, received = ArrayRecord(), Received()
    for name, array in record.items():
        if array.stype == STYPE and uplink is not None:
            received[name] = parsed = read_packed(array, name, copy=False)
            array = Array(
                parsed.packed.decode(torch.empty(parsed.packed.numel, dtype=torch.float32, device="cpu"))
                .view(parsed.shape)
                .numpy()
            )
        elif uplink is not None and uplink.asks_for_change(name):
            received[name] = read_dense(array, name)
        if array.stype == BFLOAT16:
            received.setdefault(name, None)
            array = Array(view_dense(array, name))
        decoded[name] = array
    return decoded, received


def _answers(sent: Mapping[str, Received], records: Mapping[str, ArrayRecord]) -> dict[str, tuple[str, Received]]:
    """Return the received record for each record of a reply, and its name: the same, or there is only one."""
    answers = {key: (key, sent[key]) for key in records if key in sent}
    if not answers and len(sent) == len(records) == 1:
        answers = {next(iter(records)): next(iter(sent.items()))}
    return answers


def _encoded(
    record: ArrayRecord, received: Received, uplink: UplinkConfig | None, residuals: Residuals | None
) -> ArrayRecord:
    encoded = ArrayRecord()
    for name, array in record.items():
        shape = tuple(array.shape)
        feedback = None if residuals is None else residuals.feedback(name, shape)
        sent = received.get(name)
        if sent is not None:
            data = reply_frame(torch.from_numpy(array.numpy()), sent, uplink, name, feedback)
            assert data is not None
            array = framed_array(data, shape)
        elif name in received:
            array = array_of(array.numpy(), "bfloat16")
        if residuals is not None and feedback is not None:
            residuals.add(name, shape, feedback)
        encoded[name] = array
    if residuals is not None:
        residuals.keep(record)
    return encoded
