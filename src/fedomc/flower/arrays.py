"""Converts between values and Flower's ``Array``; a compressed variable is sent as an ``Array`` that holds a frame."""

import functools
import io
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedomc import codec
from fedomc.errors import PayloadError
from fedomc.flower.mapped import BFLOAT16, MappedArray, data_of, npy_header
from fedomc.methods import Packed
from fedomc.serialization import frame
from fedomc.serialization.mapped_file import MappedFile
from fedomc.serialization.tensor_file import raw_bytes

STYPE = "fedomc.frame: read it with fedomc.flower.install or fedomc.flower.omc_mod"
"""The serialization type of an ``Array`` that holds a compressed variable.

A client that does not know fedomc fails with Flower's error "Unsupported serialization type". The type is the only part
of that message that can tell its user what to do.
"""

STRETCH = 8 * codec.CHUNK
"""The number of values of a variable that are processed at a time, so that they stay in the processor's cache."""

Values = np.ndarray[Any, Any]

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return the records of one kind in a message's content, by name.

    Flower's own ``array_records``, ``config_records`` and ``metric_records`` create reference cycles, which keep the
    whole content in memory until the garbage collector runs.
    """
    return {key: record for key, record in content.items() if isinstance(record, kind)}


def packed_array(
    packed: Packed,
    shape: tuple[int, ...],
    kind: int = frame.VARIABLE,
    *,
    entropy_coding: bool = False,
    sent: Packed | None = None,
) -> Array:
    """Put packed codes into an ``Array``; the arguments are those of ``frame.to_bytes``."""
    return framed_array(frame.to_bytes(packed, shape, kind, lossless=entropy_coding, sent=sent), shape)


def framed_array(data: bytes, shape: tuple[int, ...]) -> Array:
    """Put a frame of a variable with the given shape into an ``Array``; its dtype is the receiver's own."""
    return Array("float32", tuple(shape), STYPE, data)


def read_packed(array: Array, name: str, *, copy: bool, sent: Packed | None = None) -> frame.Frame:
    """Read the frame in an ``Array`` whose shape has been checked against the receiver's own variable.

    Args:
        array: the array. Its shape determines how much memory is allocated, so it must be checked first.
        name: the variable's name, for error messages.
        copy: whether to copy the codes; otherwise they may be views of the array's data.
        sent: the codes that the sender of the frame had received; those in the frame may be stored as differences to
            them.

    Raises:
        PayloadError: the data is not a frame of the array's shape.
    """
    return frame.from_bytes(data_of(array), name, copy=copy, shape=tuple(array.shape), sent=sent)


def view_dense(array: Array, name: str, *, check: bool = True) -> Values:
    """View the values of a plain ``Array`` in its data, without a copy; they must not be modified.

    Those of bfloat16 are a float32 copy, and those that are stored columns first a copy in which rows come first, as
    variables are processed in flat stretches.

    Args:
        array: the array.
        name: the variable's name, for error messages.
        check: whether to check that all values are finite.

    Raises:
        PayloadError: the data is not a numpy array of the array's shape, or a value is NaN or infinite.
    """
    if isinstance(array, MappedArray) or array.stype == BFLOAT16:
        values = array.values if isinstance(array, MappedArray) else _read_bfloat16(array, name).float().numpy()
        if check and not _all_finite(values):
            raise PayloadError(f"{name} has a value that is NaN or infinite")
        return values
    if array.stype != "numpy.ndarray":
        raise PayloadError(f"{name}: serialization type {array.stype!r} is unknown")
    data = data_of(array)
    try:
        begin = 10 + int.from_bytes(data[8:10], "little")
        shape, columns_first, dtype = _read_header(bytes(data[:begin]))
    except Exception as error:
        raise PayloadError(f"{name}: the data is not a numpy array: {error}") from error
    if shape != tuple(array.shape) or min(shape, default=0) < 0 or dtype.kind not in "fiub" or not dtype.isnative:
        raise PayloadError(f"{name}: the data describe {dtype} {shape}, but the array {array.dtype} {array.shape}")
    if math.prod(shape) * dtype.itemsize != len(data) - begin:
        raise PayloadError(f"{name}: {len(data)} bytes do not hold {dtype} {shape}")
    values = np.frombuffer(data, dtype, offset=begin).reshape(shape, order="F" if columns_first else "C")
    if not (values.flags.aligned and values.flags.c_contiguous):
        values = values.copy()
    if check and not _all_finite(values):
        raise PayloadError(f"{name} has a value that is NaN or infinite")
    return values


def read_dense(array: Array, name: str, *, check: bool = True) -> Tensor:
    """View the values of a plain ``Array`` as a tensor of its dtype; arguments and errors as in ``view_dense``."""
    if array.stype == BFLOAT16 and not check:
        return _read_bfloat16(array, name)
    values = view_dense(array, name, check=check)
    try:
        tensor = flat_tensor(values).view(tuple(array.shape))
    except (TypeError, BufferError) as error:
        raise PayloadError(f"{name}: {error}") from None
    return tensor.to(torch.bfloat16) if array.stype == BFLOAT16 else tensor


def dtype_of(array: Array, values: Values) -> str:
    """Return the name of the dtype of a plain ``Array``'s values, of which ``view_dense`` gave a view."""
    return "bfloat16" if array.stype == BFLOAT16 else str(values.dtype)


def plain_array(tensor: Tensor, name: str) -> Array:
    """Put a dense tensor into a plain ``Array``.

    Raises:
        PayloadError: numpy does not have the dtype, and it is not bfloat16.
    """
    values = tensor.detach().cpu()
    if values.dtype is torch.bfloat16:
        return Bfloat16Array(values)
    try:
        return dense_array(values.numpy())
    except TypeError as error:
        raise PayloadError(f"{name} is {tensor.dtype}, which cannot be sent: call model.float() first") from error


def array_of(values: Values, dtype: str) -> Array:
    """Put values into a plain ``Array`` of a dtype; conversion to integers rounds."""
    if dtype == "bfloat16":
        return Bfloat16Array(flat_tensor(np.ascontiguousarray(values)).to(torch.bfloat16).view(tuple(values.shape)))
    return dense_array(in_dtype(values, dtype))


class Bfloat16Array(Array):
    """An ``Array`` of bfloat16 values, which it gives to strategies as float32."""

    def __init__(self, values: Tensor) -> None:
        """Copy the values of a tensor on the CPU."""
        super().__init__("bfloat16", tuple(values.shape), BFLOAT16, bytes(raw_bytes(values)))

    def numpy(self) -> Values:
        """Return the values as float32."""
        return view_dense(self, "the array", check=False)

    def deflate(self) -> bytes:
        """Return the serialized form of a plain array, since it names the class of its object."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __reduce__(self) -> Any:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def flat_tensor(values: Values) -> Tensor:
    """View values as a flat tensor; it must not be modified, because the values may be part of a message."""
    return from_dlpack(values.reshape(-1))


def dense_array(values: Values) -> Array:
    """Put values into a plain ``Array`` with a single copy; Flower's constructor makes three."""
    values = np.asarray(values, order="C")  # the header says in which order they are
    data = b"".join((npy_header(values), values.reshape(-1).view(np.uint8).data))
    return Array(str(values.dtype), tuple(values.shape), "numpy.ndarray", data)


def in_dtype(values: Values, dtype: str) -> Values:
    """Convert values to a dtype; conversion to integers rounds, and bfloat16 is float32 with the values of bfloat16."""
    if dtype == "bfloat16":
        return flat_tensor(np.ascontiguousarray(values)).to(torch.bfloat16).float().numpy().reshape(values.shape)
    target = np.dtype(dtype)
    if values.dtype == target:
        return values
    return np.asarray(values if target.kind == "f" else np.rint(values)).astype(target)


def stored_model(file: MappedFile, kind: str, like: ArrayRecord) -> ArrayRecord:
    """Return the model in a checkpoint's file, in the order and in the dtypes of a model like it.

    The values stay in the file, except those of bfloat16, which the file has in float32.

    Args:
        file: of the checkpoint.
        kind: of the arrays in it.
        like: a model with the same variables.
    """
    record = ArrayRecord()
    for name, array in like.items():
        own = MappedArray(file, f"{kind}/{name}")
        record[name] = own if own.dtype == array.dtype else array_of(own.values, array.dtype)
    return record


class LazyArray(Array):
    """An ``Array`` that computes its values every time they are read; it is never sent."""

    def __init__(self, dtype: object, shape: tuple[int, ...], values: Callable[[], Values]) -> None:
        super().__init__(str(dtype), tuple(shape), "fedomc.lazy", b"")
        self._values = values

    def numpy(self) -> Values:
        """Compute the values."""
        return self._values()


def _read_bfloat16(array: Array, name: str) -> Tensor:
    data, negative = data_of(array), min(array.shape, default=0) < 0
    if array.dtype != "bfloat16" or negative or math.prod(array.shape) * 2 != len(data):
        raise PayloadError(f"{name}: {len(data)} bytes do not hold {array.dtype} {tuple(array.shape)} as bfloat16")
    if not len(data):
        return torch.empty(tuple(array.shape), dtype=torch.bfloat16, device="cpu")
    words = np.frombuffer(data, "<i2").astype(np.int16, copy=False)
    return from_dlpack(words).view(torch.bfloat16).view(tuple(array.shape))


def _all_finite(values: Values) -> bool:
    if values.dtype == np.float32 and values.size >= codec.CHUNK and values.flags.c_contiguous:
        return codec.absmax_bits(flat_tensor(values)) < codec.INFINITY_BITS  # numpy would allocate an array of bools
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


@functools.lru_cache(maxsize=256)  # a model has few shapes, and parsing a header takes longer than checking values
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its format is not version 1.0")
    return np.lib.format.read_array_header_1_0(file)
