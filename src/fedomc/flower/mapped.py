"""Arrays whose values stay in a file: they are read when they are used, and sent without a copy of the model."""

import io
import os
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedomc.flower._flower import CHUNK_SIZE, ArrayChunk, held_chunks, hold_chunks
from fedomc.serialization.mapped_file import MappedFile, Scratch

BFLOAT16 = "fedomc.bfloat16: read it with fedomc.flower.install"
"""The serialization type of an ``Array`` of bfloat16 values, little-endian, a dtype that numpy does not have."""

_Values = np.ndarray[Any, Any]


def open_arrays(path: str | os.PathLike[str]) -> ArrayRecord:
    """Return the model in a safetensors file, without reading it into memory.

    The values are read from the file when they are used. Files that fedomc wrote are checked against their digests
    first. The file must not be modified while the model is in use; it may be replaced or removed.

    Args:
        path: of the file, such as ``model.safetensors``.

    Raises:
        PayloadError: the file is damaged, no safetensors file, or has a dtype that Flower or fedomc lacks.
        OSError: it cannot be read.

    Example:
        >>> strategy.start(grid, open_arrays("model.safetensors"))  # doctest: +SKIP
    """
    file, record = MappedFile.open(path), ArrayRecord()
    for key in file.places:
        record[key] = MappedArray(file, key)
    return record


def data_of(array: Array) -> bytes | memoryview:
    """Return the data of an array, without a copy if they are a view of a file."""
    if isinstance(array, ViewArray) and not array.parts[0]:
        return array.parts[1]
    return array.data


def set_aside(arrays: ArrayRecord, scratch: Scratch) -> ArrayRecord:
    """Return the same arrays with their data in files.

    Raises:
        OSError: the folder of the files cannot be written to, or the disk has no room.
    """
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = ViewArray(array.dtype, tuple(array.shape), array.stype, scratch.put(array.data))
    return record


class ViewArray(Array):
    """An ``Array`` whose data are a view of a file; it otherwise behaves as a plain one.

    Each access to ``data`` makes a copy. Chunks are made as they are sent.

    Args:
        dtype: as of ``Array``.
        shape: as of ``Array``.
        stype: as of ``Array``.
        view: the data.
        header: bytes that come before those of the view.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, view: memoryview, header: bytes = b"") -> None:
        self.dtype, self.shape, self.stype = dtype, shape, stype
        self._header, self._view = header, view

    @property
    def nbytes(self) -> int:
        """The number of bytes of ``data``."""
        return len(self._header) + self._view.nbytes

    @property
    def parts(self) -> tuple[bytes, memoryview]:
        """The data in two parts."""
        return self._header, self._view

    def __getattr__(self, name: str) -> Any:
        if name != "data":
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return b"".join(self.parts)

    def slice_array(self) -> Any:
        """Return the chunks in which Flower sends the data: their IDs, and objects that read the file when needed."""
        if held_chunks(self) is None:
            chunks = [_ViewChunk(self, start) for start in range(0, self.nbytes, CHUNK_SIZE)]
            hold_chunks(self, [(chunk.object_id, chunk) for chunk in chunks], keep_data=True)
        return held_chunks(self)

    def deflate(self) -> bytes:
        """Return the serialized form of a plain array with the same chunks, since it names the class of its object."""
        plain = Array(self.dtype, self.shape, self.stype, b"")
        hold_chunks(plain, self.slice_array(), keep_data=True)
        return plain.deflate()

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def stretch(self, start: int) -> memoryview:
        """Return the data of the chunk that starts at an index; only the first one is copied, if there is a header."""
        stop, skip = min(start + CHUNK_SIZE, self.nbytes), len(self._header)
        if start >= skip:
            return self._view[start - skip : stop - skip]
        return memoryview(b"".join((self._header[start:stop], self._view[: max(stop - skip, 0)])))


class MappedArray(ViewArray):
    """A tensor of a mapped file.

    ``numpy`` returns an array that may be modified, of which only the modified pages take memory; neither the file nor
    this array changes with it.
    """

    def __init__(self, file: MappedFile, key: str) -> None:
        dtype, shape, _ = file.places[key]
        self._file, self._key = file, key
        if dtype is torch.bfloat16:
            super().__init__("bfloat16", shape, BFLOAT16, file.data(key).data)
        else:
            values = file.values(key)
            super().__init__(str(values.dtype), shape, "numpy.ndarray", file.data(key).data, npy_header(values))

    @property
    def values(self) -> _Values:
        """The values as they are in the file, which cannot be modified; those of bfloat16 are a float32 copy."""
        values = self._file.values(self._key)
        if self.stype != BFLOAT16:
            return values
        return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy()

    def numpy(self) -> _Values:
        """Return the values; those of bfloat16 as float32."""
        return self.values if self.stype == BFLOAT16 else self._file.copy(self._key)


class _ViewChunk(ArrayChunk):
    """A chunk of an array's data, which is read from the file when it is used."""

    def __init__(self, array: ViewArray, start: int) -> None:
        self._array, self._start = array, start

    def __getattr__(self, name: str) -> Any:
        if name != "data":
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self._array.stretch(self._start)

    def deflate(self) -> bytes:
        """Return the serialized form of a plain chunk, since it names the class of its object."""
        return ArrayChunk(self.data).deflate()


def nbytes_of(array: Array) -> int:
    """Return the number of bytes of an array's data, which are not read for it."""
    return array.nbytes if isinstance(array, ViewArray) else len(array.data)


def parts_of(array: Array) -> tuple[bytes | memoryview, ...]:
    """Return an array's data in parts, without a copy."""
    return array.parts if isinstance(array, ViewArray) else (array.data,)


def npy_header(values: _Values) -> bytes:
    """Return what numpy writes into a file before the values of an array, which includes their order in memory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    return header.getvalue()
