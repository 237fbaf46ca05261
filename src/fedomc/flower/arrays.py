"""Between models and Flower's records: a compressed variable travels as an ``Array`` whose data is a frame."""

import functools
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor, nn

from fedomc import frame
from fedomc.errors import PayloadError
from fedomc.state import check_names, fill_, some, state_of
from fedomc.tensor import CompressedTensor
from fedomc.transform import Encoding, Packed

STYPE = "fedomc.frame"
"""The serialization type of an ``Array`` that holds a compressed variable."""

CONFIG = "fedomc"
"""The name of the ``ConfigRecord`` that tells a client how to encode its updates."""


def packed_array(packed: Packed, shape: tuple[int, ...], kind: int = frame.VARIABLE) -> Array:
    """Put packed codes into an ``Array``."""
    return Array("float32", tuple(shape), STYPE, frame.to_bytes(packed, shape, kind))


def read_packed(array: Array, name: str, *, copy: bool) -> frame.Frame:
    """Take packed codes from an ``Array``.

    Raises:
        PayloadError: the data is not a frame of the array's shape.
    """
    parsed = frame.from_bytes(array.data, name, copy=copy)
    if parsed.shape != tuple(array.shape):
        raise PayloadError(f"{name}: the frame has shape {parsed.shape}, its array says {tuple(array.shape)}")
    return parsed


def read_dense(array: Array, name: str) -> np.ndarray[Any, Any]:
    """Take plain finite values from an ``Array``: a copy, which may be written.

    Raises:
        PayloadError: the data is not a numpy array of the array's shape, or a value is NaN or infinite.
    """
    return view_dense(array, name).copy()


def view_dense(array: Array, name: str) -> np.ndarray[Any, Any]:
    """Take plain finite values from an ``Array`` where they lie in its data.

    Raises:
        PayloadError: the data is not a numpy array of the array's shape, or a value is NaN or infinite.
    """
    if array.stype != "numpy.ndarray":
        raise PayloadError(f"{name}: serialization type {array.stype!r} is unknown")
    try:
        begin = 10 + int.from_bytes(array.data[8:10], "little")
        shape, columns_first, dtype = _read_header(array.data[:begin])
    except Exception as error:
        raise PayloadError(f"{name}: not a numpy array: {error}") from error
    if shape != tuple(array.shape) or dtype.kind not in "fiub" or not dtype.isnative:
        raise PayloadError(f"{name}: the data claims {dtype} {shape}, its array says {array.dtype} {array.shape}")
    if math.prod(shape) * dtype.itemsize != len(array.data) - begin:
        raise PayloadError(f"{name}: {len(array.data)} bytes do not hold {dtype} {shape}")
    values = np.frombuffer(array.data, dtype, offset=begin).reshape(shape, order="F" if columns_first else "C")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise PayloadError(f"{name} has a value that is NaN or infinite")
    return values


@functools.lru_cache(maxsize=256)  # a model has few shapes, and parsing one takes longer than checking its values
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("version 1.0 expected")
    return np.lib.format.read_array_header_1_0(file)


def to_config(encoding: Encoding) -> ConfigRecord:
    """Write an encoding for a client."""
    return ConfigRecord({**frame.encoding_fields(encoding)})


def from_config(config: Mapping[str, Any]) -> Encoding:
    """Read an encoding.

    Raises:
        PayloadError: a field is missing or wrong.
    """
    try:
        return frame.read_encoding(config)
    except PayloadError as error:
        raise PayloadError(f"the message's {CONFIG!r} record: {error}") from None


def install(model: nn.Module, message: Message | RecordDict) -> nn.Module:
    """Fill a model from a message; its compressed variables stay packed, and no FP32 copy of them is made.

    Args:
        model: may lie on the meta device; its parameters and persistent buffers are replaced. Buffers that are not
            part of the state_dict must be real already: no message carries them.
        message: with one ``ArrayRecord`` of all parameters and persistent buffers, and the ``fedomc`` config record
            if variables are compressed.

    Returns:
        The model.

    Raises:
        PayloadError: something is missing, unknown, damaged or of another shape; the model is as it was.
    """
    content = message.content if isinstance(message, Message) else message
    records = list(content.array_records.values())
    if len(records) != 1:
        raise PayloadError(f"the message has {len(records)} array records, one expected")
    config = content.config_records.get(CONFIG)
    encoding = None if config is None else from_config(config)
    state, aliases = state_of(model)
    tied = [name for name in records[0] if name in aliases]
    if tied:
        raise PayloadError(f"{some(tied)} is tied to another variable and travels under one name: send collect(model)")
    check_names(model, records[0].keys())
    fill_(model, ((name, _read(array, name, state[name], encoding)) for name, array in records[0].items()))
    return model


def collect(model: nn.Module) -> ArrayRecord:
    """Give a model's parameters and persistent buffers as arrays, packed as they are.

    Of a variable in two parts only the update travels; the base is what the receiver sent.

    Args:
        model: plain or compressed.

    Returns:
        The arrays by qualified name; tied parameters once.

    Raises:
        PayloadError: a variable of a dtype that numpy does not have.
    """
    record = ArrayRecord()
    for name, tensor in state_of(model)[0].items():
        if isinstance(tensor, CompressedTensor):
            kind = frame.VARIABLE if tensor.update is None else frame.UPDATE
            record[name] = packed_array(tensor.parts[-1], tuple(tensor.shape), kind)
        else:
            try:
                record[name] = Array(tensor.detach().cpu().numpy())
            except TypeError as error:
                raise PayloadError(
                    f"{name} is {tensor.dtype}, which cannot be sent: call model.float() first"
                ) from error
    return record


def _read(array: Array, name: str, old: Tensor, encoding: Encoding | None) -> Tensor:
    if tuple(array.shape) != tuple(old.shape):
        raise PayloadError(f"{name}: shape {tuple(array.shape)}, but the model's is {tuple(old.shape)}")
    if array.stype != STYPE:
        try:
            return torch.from_numpy(read_dense(array, name))
        except TypeError as error:
            raise PayloadError(f"{name}: {error}") from None
    if encoding is None:
        raise PayloadError(f"{name} is compressed, but the message has no {CONFIG!r} config record")
    # A base is never rewritten and may lie in the message; a variable in one part needs memory of its own.
    parsed = read_packed(array, name, copy=encoding.update_format is None)
    if parsed.kind != frame.VARIABLE:
        raise PayloadError(f"{name} is only an update: a model cannot be filled from it")
    if parsed.packed.format != encoding.format:
        raise PayloadError(f"{name} is {parsed.packed.format}, but its config record says {encoding.format}")
    return CompressedTensor.from_packed(parsed.packed, encoding, parsed.shape, name)
