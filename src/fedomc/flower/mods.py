"""``omc_mod``: compressed messages for client code that knows nothing of them."""

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedomc.codec.elements import FloatFormat
from fedomc.errors import PayloadError
from fedomc.flower.arrays import CONFIG, STYPE, Instructions, from_config, packed_array, read_packed, records_of
from fedomc.methods.packed import Encoding, Packed, encode
from fedomc.serialization import frame


def omc_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Decode what comes from ``OMCStrategy`` for a client's unchanged code, and encode what it returns.

    For ``ClientApp(mods=[omc_mod])``, where the training loop cannot be changed. It compresses **communication only**:
    the client's code gets, trains and returns FP32 arrays and holds as much memory as without compression. A loop that
    uses ``install`` and ``collect`` keeps the parameters packed while it trains.

    It is the first of the mods, ``mods=[omc_mod, fixedclipping_mod]``: the others then see FP32 arrays, and the message
    as the wrapped strategy made it.

    The variables that came compressed go back so, in the format of the message: as a whole, or, if the policy has an
    ``update_format``, the difference to what came.

    Raises:
        PayloadError: a variable that came is damaged, or one that goes back has another shape or dtype.
        NonFiniteError: a value that goes back is NaN or infinite.
    """
    config = records_of(message.content, ConfigRecord).get(CONFIG)
    if config is None:
        return call_next(message, context)
    instructions, came = from_config(config), dict[str, frame.Frame]()
    content = RecordDict({key: record for key, record in message.content.items() if key != CONFIG})
    for key, record in records_of(message.content, ArrayRecord).items():
        content[key] = decoded = ArrayRecord()
        for name, array in record.items():
            if array.stype == STYPE:
                came[name] = read_packed(array, name, copy=False)
                array = Array(_values(came[name]).numpy())
            decoded[name] = array
    message.content = content
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    content = RecordDict(dict(reply.content.items()))
    for key, record in records_of(reply.content, ArrayRecord).items():
        content[key] = encoded = ArrayRecord()
        for name, array in record.items():
            encoded[name] = _encoded(name, array, came[name], instructions) if name in came else array
    reply.content = content
    return reply


def _encoded(name: str, array: Array, came: frame.Frame, instructions: Instructions) -> Array:
    if tuple(array.shape) != came.shape or array.dtype != "float32":
        raise PayloadError(
            f"{name} goes back as {array.dtype} {tuple(array.shape)}, but came as float32 {came.shape}: "
            "return what was received, trained"
        )
    values, how = torch.from_numpy(array.numpy()), instructions.encoding
    lossless = instructions.lossless
    if came.kind == frame.VARIABLE and how.update_format is None:
        packed = _encode(name, values, came.packed.format, how)
        return packed_array(packed, came.shape, lossless=lossless, sent=came.packed)
    format = how.update_format if came.kind == frame.VARIABLE else instructions.rest_format
    if format is None:
        raise PayloadError(f"{name} came in a format of the rest, but the message's {CONFIG!r} record names none")
    change = came.packed.add_to(values.reshape(-1), -1.0)
    return packed_array(_encode(name, change, format, how), came.shape, frame.UPDATE, lossless=lossless)


def _encode(name: str, values: Tensor, format: FloatFormat, how: Encoding) -> Packed:
    return encode(values, format, how.transform, how.rounding, how.seed, name)


def _values(parsed: frame.Frame) -> Tensor:
    return parsed.packed.decode(torch.empty(parsed.packed.numel, dtype=torch.float32)).view(parsed.shape)
