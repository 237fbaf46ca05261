"""Tensors that stay in a file: mapped into memory to be read, and written a stretch at a time.

[Note: what mapped memory costs]
The values are pages of the file. Those that are read become resident, which the kernel counts apart from a process's
own, anonymous memory (``RssFile`` for ``RssAnon`` in ``/proc/self/status``). They can be dropped and read again
whenever memory is short, because the file holds them.
"""

import math
import mmap
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from fedomc.serialization.atomic_file import open_temporary, sync_folder
from fedomc.serialization.tensor_file import (
    NO_DIGEST,
    TensorFile,
    dense_piece,
    header_of,
    tensor_digest,
    write_tensor_file,
)

Place = tuple[torch.dtype, tuple[int, ...], int]
"""The dtype and the shape of a tensor, and the number of bytes of the file before its values."""

Values = np.ndarray[Any, Any]

REPLACEABLE = os.name == "posix"
"""Whether a file that is mapped can be renamed, replaced and removed."""

_SMALL = 2**16
"""Up to this number of bytes, values are copied rather than mapped again."""

_FIRST_BLOCK, _LAST_BLOCK = 2**20, 2**26
"""The bytes of the first and of the largest files of a ``Scratch``, each twice as large as the one before."""


class MappedFile:
    """The tensors of a file that does not change, mapped into memory.

    The file may be renamed or removed meanwhile: its space on the disk is freed when nothing maps it any more.

    Args:
        descriptor: of the file, which this object closes in the end.
        places: where the tensors are, by name.
    """

    def __init__(self, descriptor: int, places: Mapping[str, Place]) -> None:
        self._descriptor = descriptor
        self.places = dict(places)
        size = os.fstat(descriptor).st_size
        self._bytes = np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self._descriptor)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "MappedFile":
        """Map a safetensors file; if it has digests, as each file that fedomc wrote, every tensor is checked.

        Raises:
            PayloadError: the file is damaged, or no safetensors file, or has a dtype that is not stored.
            OSError: it cannot be read.
        """
        with TensorFile.open(path) as file:
            places = {key: file.place(key) for key in sorted(file.keys)}
            for key in places:
                file.tensor(key)
            return cls(os.dup(file.fileno()), places)  # of the file that was checked, which may have been replaced

    def data(self, key: str) -> Values:
        """Return the bytes of a tensor, uint8 ``[nbytes]``, which cannot be modified."""
        return self._part(self._bytes, key)

    def values(self, key: str) -> Values:
        """Return a tensor whose values cannot be modified; one of bfloat16 as int16."""
        return self._typed(self.data(key), key)

    def copy(self, key: str) -> Values:
        """Return a copy of a tensor; a large one has memory of its own only for the pages that are modified."""
        if self.data(key).nbytes > _SMALL and sys.platform == "linux":
            path, size = f"/proc/self/fd/{self._descriptor}", self._bytes.size
            with suppress(RuntimeError, OSError):  # where /proc is not mounted
                private = torch.from_file(path, shared=False, size=size, dtype=torch.uint8, device="cpu").numpy()
                return self._typed(self._part(private, key), key)
        return self.values(key).copy()

    def _part(self, data: Values, key: str) -> Values:
        dtype, shape, begin = self.places[key]
        return data[begin : begin + dtype.itemsize * math.prod(shape)]

    def _typed(self, data: Values, key: str) -> Values:
        dtype, shape, _ = self.places[key]
        values = data.view(_numpy_dtype(dtype))
        return values.reshape(shape)


class FileDraft:
    """A safetensors file that is written a stretch of a tensor at a time, and gets its name when it is complete.

    What has been written can be read before that. A draft whose process is killed is removed as any temporary file.

    Args:
        folder: where the file will be.
        tensors: the dtype and the shape of each tensor, by name.
        room: the number of bytes to reserve for the metadata, which are known last.

    Raises:
        PayloadError: a name is not Unicode.
        OSError: the folder cannot be written to, or the disk has no room for the file.
    """

    def __init__(
        self, folder: str | os.PathLike[str], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], room: int
    ) -> None:
        made = [dense_piece(key, torch.empty(shape, dtype=d, device="meta")) for key, (d, shape) in tensors.items()]
        self._ordered = sorted(made, key=lambda piece: piece.order)
        self._digests = {piece.key: tensor_digest(piece.dtype, piece.shape) for piece in self._ordered}
        header = header_of({}, dict.fromkeys(self._digests, NO_DIGEST), self._ordered)
        self._room = end = len(header) + -(-room // 8) * 8
        places, self._written = {}, {}
        for piece in self._ordered:
            places[piece.key] = (*tensors[piece.key], end)
            self._written[piece.key] = end
            end += piece.size
        self._folder = os.path.realpath(folder)
        self._temporary, self._descriptor = open_temporary(self._folder, 0o666)
        try:
            _reserve(self._descriptor, end)
            self.file = MappedFile(os.dup(self._descriptor), places)
        except BaseException:
            self.discard()
            raise

    def write(self, key: str, values: Values) -> None:
        """Write the next values of a tensor, which are contiguous and of its dtype.

        Raises:
            OSError: they cannot be written.
        """
        data = values.reshape(-1).view(np.uint8).data
        self._digests[key].update(data)
        while data:
            count = os.pwrite(self._descriptor, data, self._written[key])
            self._written[key] += count
            data = data[count:]

    def commit(self, path: str | os.PathLike[str], texts: Mapping[str, str]) -> None:
        """Give the complete file its name; it replaces a former one as a whole.

        Args:
            path: of the file, in the folder of the draft.
            texts: its metadata. If they take more than the reserved room, the file is copied.

        Raises:
            PayloadError: a text is not Unicode.
            OSError: the file cannot be written.
        """
        digests = {key: digest.hexdigest() for key, digest in self._digests.items()}
        header = header_of(texts, digests, self._ordered, self._room)
        if len(header) > self._room:
            write_tensor_file(path, texts, self._pieces())
            self.discard()
            return
        try:
            os.pwrite(self._descriptor, header, 0)
            os.fsync(self._descriptor)
            os.replace(self._temporary, path)
        except BaseException:
            self.discard()
            raise
        self._close()
        sync_folder(self._folder)

    def discard(self) -> None:
        """Remove the file unless it is complete; what has been read from it stays valid."""
        if self._descriptor >= 0:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _pieces(self) -> Iterable[Any]:
        for piece in self._ordered:
            tensor = torch.empty(piece.shape, dtype=self.file.places[piece.key][0], device="meta")
            yield dense_piece(piece.key, tensor, lambda key=piece.key: self.file.data(key).data)  # type: ignore[misc]


def scratch(folder: str | os.PathLike[str], numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros, ``[numel]``, in a file without a name, whose space is freed with the tensor or the process.

    Raises:
        OSError: the folder cannot be written to, or the disk has no room.
    """
    size = numel * dtype.itemsize
    if not size:
        return torch.zeros(numel, dtype=dtype, device="cpu")
    path, descriptor = open_temporary(os.path.realpath(folder), 0o600)
    try:
        _reserve(descriptor, size)  # a full disk would otherwise end the process at a write
        return torch.from_file(path, shared=True, size=numel, dtype=dtype, device="cpu")
    finally:
        os.close(descriptor)
        os.unlink(path)


class Zeros:
    """Zeros in files without names, which are used again: to make the pages of a file takes longer than to fill them.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder
        self._kept: dict[torch.dtype, torch.Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros, ``[numel]``; raises as ``scratch``."""
        kept = self._kept.pop(dtype, None)
        if kept is not None and kept.numel() == numel:
            return kept.zero_()
        return scratch(self._folder, numel, dtype)

    def give_back(self, tensor: torch.Tensor) -> None:
        """Keep a tensor that ``take`` returned, and that nothing uses any more, for the next one of its size."""
        self._kept[tensor.dtype] = tensor


class Scratch:
    """Bytes in files without names, whose space is freed with them or with the process.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder
        self._free = np.empty(0, np.uint8)
        self._size = _FIRST_BLOCK

    def put(self, data: bytes) -> memoryview:
        """Return the bytes as a view of a file.

        Raises:
            OSError: the folder cannot be written to, or the disk has no room.
        """
        if self._free.size < len(data):
            self._free = scratch(self._folder, max(self._size, len(data)), torch.uint8).numpy()
            self._size = min(2 * self._size, _LAST_BLOCK)
        own, self._free = self._free[: len(data)], self._free[-(-len(data) // 64) * 64 :]
        own[:] = np.frombuffer(data, np.uint8)
        return own.data


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and the room on the disk if the system can reserve it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def dtype_of(dtype: np.dtype[Any]) -> torch.dtype:
    """Return the dtype of torch that is one of numpy."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    if dtype is torch.bfloat16:
        return np.dtype(np.int16)
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
