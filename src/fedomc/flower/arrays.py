"""Between models and Flower's records: a compressed variable travels as an ``Array`` whose data is a frame."""

import ctypes
import functools
import io
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fedomc import codec
from fedomc.codec.elements import FloatFormat
from fedomc.errors import OMCError, PayloadError
from fedomc.flower.chunks import ChunkedArray
from fedomc.methods.packed import Encoding, Packed, encode
from fedomc.serialization import frame
from fedomc.tensor.compressed import CompressedTensor
from fedomc.training.model import replace_parameters
from fedomc.training.module_state import check_names, fill_, some, state_of

STYPE = "fedomc.serialization.frame"
"""The serialization type of an ``Array`` that holds a compressed variable."""

CONFIG = "fedomc"
"""The name of the ``ConfigRecord`` that tells a client how to encode its updates."""

_WORTH_GIVING_BACK = 32 * 2**20
"""Bytes that were freed from which on the C library is asked to return them to the system."""

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


@dataclass(frozen=True)
class Instructions:
    """What a server tells a client.

    Attributes:
        encoding: of the variables that the client keeps compressed.
        lossless: whether the client's frames go through the lossless stage.
        rest_format: in which those that partial quantization leaves in FP32 travel; None is FP32.
    """

    encoding: Encoding
    lossless: bool = False
    rest_format: FloatFormat | None = None


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return a message's records of one kind.

    Flower's own ``array_records`` and so on are views in reference cycles: whatever they saw, the whole content with
    it, stays in memory until the garbage collector comes by.
    """
    return {key: record for key, record in content.items() if isinstance(record, kind)}


def packed_array(
    packed: Packed,
    shape: tuple[int, ...],
    kind: int = frame.VARIABLE,
    *,
    lossless: bool = False,
    sent: Packed | None = None,
) -> Array:
    """Put packed codes into an ``Array``; arguments as ``frame.to_bytes`` has them."""
    return Array("float32", tuple(shape), STYPE, frame.to_bytes(packed, shape, kind, lossless=lossless, sent=sent))


def read_packed(array: Array, name: str, *, copy: bool, sent: Packed | None = None) -> frame.Frame:
    """Take packed codes from an ``Array``, whose shape must be known to be that of the variable.

    Raises:
        PayloadError: the data is not a frame of the array's shape.
    """
    return frame.from_bytes(array.data, name, copy=copy, shape=tuple(array.shape), sent=sent)


def read_dense(array: Array, name: str) -> np.ndarray[Any, Any]:
    """Take plain finite values from an ``Array``: a copy, which may be written.

    Raises:
        PayloadError: the data is not a numpy array of the array's shape, or a value is NaN or infinite.
    """
    return view_dense(array, name).copy()


def view_dense(array: Array, name: str, *, check: bool = True) -> np.ndarray[Any, Any]:
    """Take plain values from an ``Array`` where they lie in its data.

    Args:
        array: what holds them.
        name: of the variable, for errors.
        check: whether they must be finite.

    Raises:
        PayloadError: the data is not a numpy array of the array's shape, or a value is NaN or infinite.
    """
    if array.stype != "numpy.ndarray":
        raise PayloadError(f"{name}: serialization type {array.stype!r} is unknown")
    data = array.data
    try:
        begin = 10 + int.from_bytes(data[8:10], "little")
        shape, columns_first, dtype = _read_header(data[:begin])
    except Exception as error:
        raise PayloadError(f"{name}: not a numpy array: {error}") from error
    if shape != tuple(array.shape) or dtype.kind not in "fiub" or not dtype.isnative:
        raise PayloadError(f"{name}: the data claims {dtype} {shape}, its array says {array.dtype} {array.shape}")
    if math.prod(shape) * dtype.itemsize != len(data) - begin:
        raise PayloadError(f"{name}: {len(data)} bytes do not hold {dtype} {shape}")
    values = np.frombuffer(data, dtype, offset=begin).reshape(shape, order="F" if columns_first else "C")
    if check and not _all_finite(values):
        raise PayloadError(f"{name} has a value that is NaN or infinite")
    return values


def flat_tensor(values: np.ndarray[Any, Any]) -> Tensor:
    """View values as a flat tensor; it is not to be written, as they may lie in a message."""
    return from_dlpack(values.reshape(-1))


def _all_finite(values: np.ndarray[Any, Any]) -> bool:
    if values.dtype == np.float32 and values.size >= codec.CHUNK and values.flags.c_contiguous:
        return codec.magnitude_bits(flat_tensor(values)) < codec.INFINITY_BITS  # where numpy makes an array of truths
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


@functools.lru_cache(maxsize=256)  # a model has few shapes, and parsing one takes longer than checking its values
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("version 1.0 expected")
    return np.lib.format.read_array_header_1_0(file)


def to_config(encoding: Encoding, *, lossless: bool = False, rest_format: FloatFormat | None = None) -> ConfigRecord:
    """Write instructions for a client."""
    rest = {} if rest_format is None else {"rest_format": str(rest_format)}
    return ConfigRecord({**frame.encoding_fields(encoding), "lossless": lossless, **rest})


def from_config(config: Mapping[str, Any]) -> Instructions:
    """Read instructions.

    Raises:
        PayloadError: a field is missing or wrong.
    """
    try:
        lossless, rest = config.get("lossless", False), config.get("rest_format")
        if type(lossless) is not bool:
            raise PayloadError(f"lossless={lossless!r} is neither true nor false")
        encoding = frame.read_encoding(config)
        return Instructions(encoding, lossless, None if rest is None else FloatFormat.parse(rest))
    except OMCError as error:
        raise PayloadError(f"the message's {CONFIG!r} record: {error}") from None


def install(model: nn.Module, message: Message | RecordDict, *, consume: bool = False) -> nn.Module:
    """Fill a model from a message; its compressed variables stay packed, and no FP32 copy of them is made.

    Args:
        model: may lie on the meta device; its parameters and persistent buffers are replaced. Buffers that are not
            part of the state_dict must be real already: no message carries them.
        message: with one ``ArrayRecord`` of all parameters and persistent buffers, and the ``fedomc`` config record
            if variables are compressed.
        consume: let go of the message's bytes as they are read, so that message and model are never both in memory.
            What ``collect`` will need of them stays.

    Returns:
        The model.

    Raises:
        PayloadError: something is missing, unknown, damaged or of another shape; the model is as it was, but of the
            message nothing may be left if it was to be consumed.
    """
    arrays, told = _content(message)
    state, aliases = state_of(model)
    tied = [name for name in arrays if name in aliases]
    if tied:
        raise PayloadError(f"{some(tied)} is tied to another variable and travels under one name: send collect(model)")
    check_names(model, arrays.keys())
    items = _consumed(message, told) if consume else iter(arrays.items())
    size = sum(len(array.data) for array in arrays.values())
    del arrays
    fill_(model, ((name, _read(array, name, state[name], told)) for name, array in items))
    if consume:
        _give_back_memory(size)
    return model


def _give_back_memory(freed: int) -> None:
    """Have the C library return what was freed to the system; glibc alone keeps so much that it matters.

    Not a few megabytes, which the training takes again: that costs a visit with a small model an eighth of its time.
    A message arrives in pieces of all sizes, and its blocks lie between those of what came before and after: without
    this a client's process stays larger by more than the message (240 MB of 1000, with 190 MB of message).
    """
    if freed >= _WORTH_GIVING_BACK and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _consumed(message: Message | RecordDict, told: Instructions | None) -> Iterator[tuple[str, Array]]:
    """Give a message's arrays and forget them one by one; the message has them without data from now on."""
    content = message.content if isinstance(message, Message) else message
    ((key, record),) = records_of(content, ArrayRecord).items()
    waiting = deque(record.items())
    if isinstance(message, Message):  # others may have the same content; and the same record, which stays as it is
        message.content = content = RecordDict(dict(content.items()))
    content[key] = _without_data(record, told)
    del record
    while waiting:
        yield waiting.popleft()


def _without_data(record: Mapping[str, Array], told: Instructions | None) -> ArrayRecord:
    left = ArrayRecord()
    for name, array in record.items():
        left[name] = array if _needed_later(array, told) else Array(array.dtype, tuple(array.shape), array.stype, b"")
    return left


def _needed_later(array: Array, told: Instructions | None) -> bool:
    """Tell whether ``collect`` writes a difference to what this array holds."""
    if told is None or array.stype != STYPE:
        return False
    return told.rest_format is not None or (told.lossless and told.encoding.update_format is None)


def collect(model: nn.Module, message: Message | RecordDict | None = None, *, consume: bool = False) -> ArrayRecord:
    """Give a model's parameters and persistent buffers as arrays, packed as they are.

    Of a variable in two parts only the update travels; the base is what the receiver sent.

    Args:
        model: plain or compressed.
        message: what the model was filled from. With it the arrays travel as its sender asked for: through the lossless
            stage, which needs to know what was sent, and what arrived in the rest's format goes back in it, as an
            update.
        consume: let go of each parameter when it is written, so that model and arrays are never both in memory, and
            hold the arrays as they are sent, so that sending makes no copy. The parameters lie on the meta device
            afterwards, without gradients; ``install`` can fill the model again.

    Returns:
        The arrays by qualified name; tied parameters once.

    Raises:
        NonFiniteError: an update in the rest's format has a value that is NaN or infinite.
        PayloadError: a variable of a dtype that numpy does not have; the message is damaged or of another model.
        PolicyError: the sender asked for the lossless stage, but zstd is not installed; or a parameter of a model that
            is to be consumed is stepped in backward.
    """
    sent, told = ({}, None) if message is None else _content(message)
    state = state_of(model)[0]
    record, written = ArrayRecord(), [0]

    def emptied() -> Iterator[tuple[str, Tensor]]:
        for name in list(state):
            tensor = state.pop(name)
            array = _written(tensor, name, sent.get(name), told)
            written[0] += len(array.data)
            record[name] = ChunkedArray(array) if consume else array
            del array
            if consume and isinstance(tensor, nn.Parameter):
                tensor.grad = None
                yield name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    replace_parameters(model, emptied())
    if consume:
        _give_back_memory(written[0])
    return record


def _content(message: Message | RecordDict) -> tuple[Mapping[str, Array], Instructions | None]:
    content = message.content if isinstance(message, Message) else message
    records = list(records_of(content, ArrayRecord).values())
    if len(records) != 1:
        raise PayloadError(f"the message has {len(records)} array records, one expected")
    config = records_of(content, ConfigRecord).get(CONFIG)
    return records[0], None if config is None else from_config(config)


def _written(tensor: Tensor, name: str, array: Array | None, told: Instructions | None) -> Array:
    """Write a variable as it is to travel; the array is what was sent of it."""
    if array is not None and tuple(array.shape) != tuple(tensor.shape):
        raise PayloadError(f"{name}: shape {tuple(tensor.shape)}, but {tuple(array.shape)} was sent")
    if isinstance(tensor, CompressedTensor):
        return _packed(tensor, array, name, told is not None and told.lossless)
    if told is not None and told.rest_format is not None and array is not None and array.stype == STYPE:
        return _rest_update(tensor, array, name, told)
    try:
        return Array(tensor.detach().cpu().numpy())
    except TypeError as error:
        raise PayloadError(f"{name} is {tensor.dtype}, which cannot be sent: call model.float() first") from error


def _packed(tensor: CompressedTensor, array: Array | None, name: str, lossless: bool) -> Array:
    """Write what is to travel of a compressed variable."""
    shape = tuple(tensor.shape)
    if tensor.update is not None:
        return packed_array(tensor.update, shape, frame.UPDATE, lossless=lossless)
    sent = None
    if lossless and array is not None and array.stype == STYPE:
        sent = read_packed(array, name, copy=False).packed
    return packed_array(tensor.base, shape, lossless=lossless, sent=sent)


def _rest_update(tensor: Tensor, array: Array, name: str, told: Instructions) -> Array:
    """Write what changed of a dense variable since it arrived in the rest's format."""
    assert told.rest_format is not None
    flat = tensor.detach().cpu().to(torch.float32, copy=True).view(-1)
    read_packed(array, name, copy=False).packed.add_to(flat, -1.0)
    update = encode(flat, told.rest_format, told.encoding.transform, name=name)
    return packed_array(update, tuple(tensor.shape), frame.UPDATE, lossless=told.lossless)


def _read(array: Array, name: str, old: Tensor, told: Instructions | None) -> Tensor:
    if tuple(array.shape) != tuple(old.shape):
        raise PayloadError(f"{name}: shape {tuple(array.shape)}, but the model's is {tuple(old.shape)}")
    if array.stype != STYPE:
        try:
            return torch.from_numpy(read_dense(array, name))
        except TypeError as error:
            raise PayloadError(f"{name}: {error}") from None
    if told is None:
        raise PayloadError(f"{name} is compressed, but the message has no {CONFIG!r} config record")
    # A base is never rewritten and may lie in the message; a variable in one part needs memory of its own.
    parsed = read_packed(array, name, copy=told.encoding.update_format is None)
    if parsed.kind == frame.UPDATE:
        raise PayloadError(f"{name} is only an update: a model cannot be filled from it")
    if parsed.kind != frame.DENSE:
        return CompressedTensor.from_packed(parsed.packed, told.encoding, parsed.shape, name)
    if parsed.packed.format != told.rest_format:
        raise PayloadError(f"{name} is {parsed.packed.format}, but the config record's rest is {told.rest_format}")
    return parsed.packed.decode(torch.empty(parsed.packed.numel, dtype=torch.float32)).view(parsed.shape)
