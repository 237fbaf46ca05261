"""On a client: fill a model from a message, and collect what the reply carries."""

import ctypes
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor, nn

from fedomc.errors import PayloadError
from fedomc.flower.arrays import STYPE, flat_tensor, framed_array, read_packed, records_of, view_dense
from fedomc.flower.chunks import ChunkedArray
from fedomc.flower.config import CONFIG, from_config
from fedomc.flower.supervision import STEP_KEPT, STEP_NOISE
from fedomc.serialization import frame
from fedomc.serialization.uplink import Sent, UplinkConfig, reply_frame
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.training.model import replace_parameters
from fedomc.training.module_state import ModuleState, OwnedValue, some
from fedomc.training.step_report import step_report

_LEAST_TRIM = 32 * 2**20
"""Bytes: where less was freed, the C library is not asked to return memory to the system."""


def install(model: nn.Module, message: Message | RecordDict, *, consume: bool = False) -> nn.Module:
    """Fill a model from a message; compressed variables stay packed, and no FP32 copy of them is made.

    Args:
        model: the model, which may lie on the meta device; its parameters and persistent buffers are replaced. Buffers
            that are not part of the state_dict must have values already: no message carries them.
        message: the message, with one ``ArrayRecord`` of all parameters and persistent buffers, and with the
            ``fedomc`` config record if variables are compressed.
        consume: release the message's bytes as they are read, so that message and model are never both in memory.
            The bytes that ``collect`` will need stay: with an uplink, those of variables in one part and of those
            that partial quantization left in FP32.

    Returns:
        The model.

    Raises:
        PayloadError: a variable is missing, unknown, damaged or of another shape. The model is unchanged, but a message
            that was to be consumed may be empty.
    """
    arrays, config = _content(message)
    state = ModuleState.of(model)
    tied = [name for name in arrays if name in state.aliases]
    if tied:
        raise PayloadError(f"{some(tied)} is tied to another variable and travels under one name: send collect(model)")
    state.check_names(arrays.keys())
    parameters = {name for name, tensor in state.tensors.items() if isinstance(tensor, nn.Parameter)}
    items = _consumed(message, parameters, config) if consume else iter(arrays.items())
    size = sum(len(array.data) for array in arrays.values())
    del arrays
    state.fill((name, _read(array, name, state.tensors[name], config)) for name, array in items)
    if consume:
        _trim_memory(size)
    return model


def collect(model: nn.Module, message: Message | RecordDict | None = None, *, consume: bool = False) -> ArrayRecord:
    """Return a model's parameters and persistent buffers as arrays; compressed variables stay packed.

    Of a variable in two parts only the update travels: the base is what the receiver sent.

    Args:
        model: the model, plain or compressed.
        message: the message that the model was filled from. With it the arrays travel as its sender asked for, see
            ``serialization.uplink.reply_frame``: as changes in the method of an uplink, entropy coded, and variables
            that were sent compressed but are dense in the model go back compressed.
        consume: release each parameter once it is written, so that model and arrays are never both in memory, and hold
            the arrays in the form in which Flower sends them, so that sending makes no copy. Afterwards the parameters
            lie on the meta device and have no gradients; ``install`` can fill the model again.

    Returns:
        The arrays by qualified name; tied parameters appear once.

    Raises:
        NonFiniteError: a variable that is encoded here has a value or a change that is NaN or infinite.
        PayloadError: a variable has a dtype that numpy does not have; the message is damaged or of another model, or
            what is needed of it was released.
        PolicyError: the sender asked for entropy coding, but zstandard is not installed; or a parameter of a model that
            is to be consumed is stepped in backward.
    """
    sent, config = ({}, None) if message is None else _content(message)
    state = ModuleState.of(model).tensors
    record, written = ArrayRecord(), [0]

    def emptied() -> Iterator[tuple[str, Tensor]]:
        for name in list(state):
            tensor = state.pop(name)
            array = _written(tensor, name, sent.get(name), config)
            written[0] += len(array.data)
            record[name] = ChunkedArray(array) if consume else array
            del array
            if consume and isinstance(tensor, nn.Parameter):
                tensor.grad = None
                yield name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    replace_parameters(model, emptied())
    if consume:
        _trim_memory(written[0])
    return record


def step_metrics(model: nn.Module) -> dict[str, float]:
    """Tell the server how much of the training steps arrived, as metrics of a reply; see ``fedomc.step_report``.

    Args:
        model: the trained model; before it is given to ``collect(consume=True)``.

    Returns:
        ``fedomc.step-kept`` and ``fedomc.step-noise``; nothing if no step was measured, as of a model in FP32.
    """
    report = step_report(model)
    return {STEP_KEPT: report.total.kept, STEP_NOISE: report.total.noise} if report.variables else {}


def _content(message: Message | RecordDict) -> tuple[Mapping[str, Array], UplinkConfig | None]:
    content = message.content if isinstance(message, Message) else message
    records = list(records_of(content, ArrayRecord).values())
    if len(records) != 1:
        raise PayloadError(f"the message has {len(records)} array records, one expected")
    config = records_of(content, ConfigRecord).get(CONFIG)
    return records[0], None if config is None else from_config(config)


def _read(array: Array, name: str, old: Tensor, config: UplinkConfig | None) -> Tensor | OwnedValue:
    """Read a variable; dense values may lie in the message, and are neither copied nor checked here."""
    if tuple(array.shape) != tuple(old.shape):
        raise PayloadError(f"{name}: shape {tuple(array.shape)}, but the model's is {tuple(old.shape)}")
    if array.stype != STYPE:
        try:
            return flat_tensor(view_dense(array, name, check=False)).view(tuple(array.shape))
        except (TypeError, BufferError) as error:
            raise PayloadError(f"{name}: {error}") from None
    if config is None:
        raise PayloadError(f"{name} is compressed, but the message has no {CONFIG!r} config record")
    # A base is never rewritten and may lie in the message; a variable in one part needs memory of its own.
    parsed = read_packed(array, name, copy=config.encoding.update_format is None)
    if parsed.kind == frame.UPDATE:
        raise PayloadError(f"{name} is only an update: a model cannot be filled from it")
    if parsed.kind != frame.DENSE:
        return CompressedTensor.from_packed(parsed.packed, config.encoding, parsed.shape, name)
    if parsed.packed.method != config.unquantized_format:
        raise PayloadError(
            f"{name} is {parsed.packed.method}, but unquantized_format={config.unquantized_format} in the message"
        )
    values = torch.empty(parsed.packed.numel, dtype=torch.float32, device="cpu")
    return OwnedValue(parsed.packed.decode(values).view(parsed.shape))


def _consumed(
    message: Message | RecordDict, parameters: Collection[str], config: UplinkConfig | None
) -> Iterator[tuple[str, Array]]:
    """Yield a message's arrays and release them one by one; the arrays in the message have no data from now on."""
    content = message.content if isinstance(message, Message) else message
    ((key, record),) = records_of(content, ArrayRecord).items()
    pending = deque(record.items())
    if isinstance(message, Message):  # other messages may share the content and the record, which stay as they are
        message.content = content = RecordDict(dict(content.items()))
    content[key] = _without_data(record, parameters, config)
    del record
    while pending:
        yield pending.popleft()


def _without_data(record: Mapping[str, Array], parameters: Collection[str], config: UplinkConfig | None) -> ArrayRecord:
    emptied = ArrayRecord()
    for name, array in record.items():
        keep = _needed_by_collect(array, name, name in parameters, config)
        emptied[name] = array if keep else Array(array.dtype, tuple(array.shape), array.stype, b"")
    return emptied


def _needed_by_collect(array: Array, name: str, parameter: bool, config: UplinkConfig | None) -> bool:
    """Tell whether ``collect`` reads what this array holds: to write a difference to it, or the format that it had."""
    if config is None or array.stype != STYPE:
        return config is not None and config.asks_for_change(name)
    dense = not parameter or config.unquantized_format is not None  # buffers are dense in the model
    return dense or (_differs_from_codes(config) and config.encoding.update_format is None)


def _differs_from_codes(config: UplinkConfig) -> bool:
    """Tell whether what goes back of a variable in one part is written as a difference to its codes."""
    return config.entropy_coding or config.uplink is not None


def _written(tensor: Tensor, name: str, array: Array | None, config: UplinkConfig | None) -> Array:
    """Write a variable as it is to travel; the array is what was sent of it."""
    if array is not None and tuple(array.shape) != tuple(tensor.shape):
        raise PayloadError(f"{name}: shape {tuple(tensor.shape)}, but {tuple(array.shape)} was sent")
    data = reply_frame(tensor, _sent(tensor, name, array, config), config, name)
    if data is not None:
        return framed_array(data, tuple(tensor.shape))
    try:
        return Array(tensor.detach().cpu().numpy())
    except TypeError as error:
        raise PayloadError(f"{name} is {tensor.dtype}, which cannot be sent: call model.float() first") from error


def _sent(tensor: Tensor, name: str, array: Array | None, config: UplinkConfig | None) -> Sent | None:
    """Read what was sent of a variable, if what goes back depends on it."""
    if array is None or config is None or (array.stype != STYPE and not config.asks_for_change(name)):
        return None
    if is_compressed(tensor) and (tensor.update is not None or not _differs_from_codes(config)):
        return None
    if not array.data:
        raise PayloadError(
            f"{name}: install(consume=True) has released what was sent, which is needed now that the variable is no "
            "longer compressed: install without consume, or collect before you decompress the model"
        )
    if array.stype != STYPE:
        return flat_tensor(view_dense(array, name, check=False)).view(tuple(array.shape))
    return read_packed(array, name, copy=False)


def _trim_memory(freed: int) -> None:
    """Have the C library return freed memory to the system; glibc alone keeps so much that it matters.

    A message arrives in pieces of all sizes, and its blocks lie between others that were allocated before and after it:
    without this a client's process stays larger by more than the message (by 240 of 1000 MB, with 190 MB of message).
    A few megabytes are left alone, as training takes them again: returning them would cost a visit with a small model
    an eighth of its time.
    """
    if freed >= _LEAST_TRIM and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
