"""``omc_mod``: compressed messages for client code that knows nothing of compression."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedomc.errors import PayloadError, PolicyError
from fedomc.flower._flower import is_legacy_content
from fedomc.flower.arrays import STYPE, flat_tensor, framed_array, read_packed, records_of, view_dense
from fedomc.flower.config import CONFIG, from_config
from fedomc.serialization import frame
from fedomc.serialization.uplink import Sent, UplinkConfig, reply_frame

Received = dict[str, Sent]


def omc_mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Decode what comes from ``OMCStrategy`` for a client's unchanged code, and encode what that returns.

    For ``ClientApp(mods=[omc_mod])``, where the training loop cannot be changed. It compresses **communication only**:
    the client's code gets, trains and returns FP32 arrays and holds as much memory as without compression. A loop that
    uses ``install`` and ``collect`` keeps the parameters packed while it trains.

    It must be the first of the mods, ``mods=[omc_mod, fixedclipping_mod]``: the others then see FP32 arrays, and the
    message as the wrapped strategy made it.

    Variables that came compressed go back compressed, as ``reply_frame`` says, and with an uplink in the policy so do
    those that partial quantization left in FP32. In a reply these are the ones of the record that is named as the one
    that was sent; other records stay as they are.

    The mod does not know the client's model: a message whose FP32 values would take more than ``frame.MAX_EXPANSION``
    times the bytes that arrived is refused.

    Raises:
        PayloadError: a variable that came is damaged, one that goes back has another shape or dtype, or the message
            would become too large.
        NonFiniteError: a value that goes back is NaN or infinite.
        PolicyError: the message is one of Flower's legacy API, which ``OMCStrategy`` cannot send.
    """
    if is_legacy_content(message.content):
        raise PolicyError(
            "omc_mod has nothing to do in a legacy app (client_fn, NumPyClient): its messages are never compressed. "
            "Write the client with @app.train() of flwr.clientapp.ClientApp and the server with flwr.serverapp and "
            "OMCStrategy, or remove omc_mod"
        )
    config = records_of(message.content, ConfigRecord).get(CONFIG)
    if config is None:
        return call_next(message, context)
    records = records_of(message.content, ArrayRecord)
    _check_expansion(records.values())
    uplink, sent = from_config(config), dict[str, Received]()
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
    for key, received in _answers(sent, records).items():
        content[key] = _encoded(records[key], received, uplink)
    reply.content = content
    return reply


def _check_expansion(records: Iterable[ArrayRecord]) -> None:
    """Refuse a message that would become far larger than it is: entropy coded constants can be of any length."""
    arrays = [(name, array) for record in records for name, array in record.items() if array.stype == STYPE]
    sizes = [(4 * math.prod(map(abs, array.shape)), name) for name, array in arrays]
    arrived, needed = sum(len(array.data) for _, array in arrays), sum(size for size, _ in sizes)
    if needed > frame.MAX_EXPANSION * arrived:
        largest, name = max(sizes)
        raise PayloadError(
            f"{name} would become {largest} bytes of FP32 values, and all variables {needed} for the {arrived} bytes "
            f"that arrived: more than {frame.MAX_EXPANSION} for each is refused, as omc_mod does not know the model. "
            "Fill the model with fedomc.flower.install, which does, or send without entropy coding"
        )


def _decoded(record: ArrayRecord, uplink: UplinkConfig) -> tuple[ArrayRecord, Received]:
    """Return a record with plain arrays, and what its reply will be a difference to."""
    decoded, received = ArrayRecord(), Received()
    for name, array in record.items():
        if array.stype == STYPE:
            received[name] = parsed = read_packed(array, name, copy=False)
            array = Array(
                parsed.packed.decode(torch.empty(parsed.packed.numel, dtype=torch.float32, device="cpu"))
                .view(parsed.shape)
                .numpy()
            )
        elif uplink.asks_for_change(name):
            received[name] = flat_tensor(view_dense(array, name)).view(tuple(array.shape))
        decoded[name] = array
    return decoded, received


def _answers(sent: Mapping[str, Received], records: Mapping[str, ArrayRecord]) -> dict[str, Received]:
    """Return what each record of a reply answers: the record of its name, or the only one there is."""
    answers = {key: sent[key] for key in records if key in sent}
    if not answers and len(sent) == len(records) == 1:
        answers = {next(iter(records)): next(iter(sent.values()))}
    return answers


def _encoded(record: ArrayRecord, received: Received, uplink: UplinkConfig) -> ArrayRecord:
    encoded = ArrayRecord()
    for name, array in record.items():
        if name in received:
            data = reply_frame(torch.from_numpy(array.numpy()), received[name], uplink, name)
            assert data is not None
            array = framed_array(data, tuple(array.shape))
        encoded[name] = array
    return encoded
