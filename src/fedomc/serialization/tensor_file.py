"""Tensors and texts as a safetensors file in which a digest covers every byte that is read back."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedomc.errors import PayloadError
from fedomc.serialization.atomic_file import replacing

OURS = "fedomc"
"""Begins the names of all metadata entries that fedomc writes for itself; a file that has one must have digests."""

TENSOR_DIGESTS = "fedomc.digests"
"""The entry of the metadata that holds the digests of the tensors, as JSON."""

TEXT_DIGEST = "fedomc.digest"
"""The entry of the metadata that holds the digest of all other entries."""

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""The names of dtypes in safetensors."""

NO_DIGEST = "0" * 16
"""Takes the place of a digest that is not known yet."""


@dataclass(frozen=True)
class Piece:
    """A tensor to write to a file; its bytes are made when it is its turn.

    Attributes:
        key: its name in the file.
        dtype: as safetensors names it.
        shape: its dimensions.
        size: how many bytes ``read`` will return.
        alignment: the number of bytes that its place in the file is a multiple of.
        read: returns the bytes.
    """

    key: str
    dtype: str
    shape: list[int]
    size: int
    alignment: int
    read: Callable[[], Any]

    @property
    def order(self) -> tuple[int, str]:
        """The sort key by which each piece of a file is aligned without gaps."""
        return -self.alignment, self.key


def dense_piece(key: str, tensor: Tensor, read: Callable[[], Any] | None = None) -> Piece:
    """Describe a dense tensor as a piece of a file.

    Args:
        key: its name in the file.
        tensor: of any shape.
        read: returns its bytes; by default they are written whatever the values are.

    Raises:
        PayloadError: a dtype or layout that a file cannot hold.
    """
    if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
        raise PayloadError(f"{key} is {tensor.dtype} with layout {tensor.layout}, which a file cannot hold")
    size, shape = tensor.nbytes, list(tensor.shape)
    return Piece(key, _DTYPES[tensor.dtype], shape, size, tensor.itemsize, read or (lambda: raw_bytes(tensor)))


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a dense tensor's values as little-endian bytes; a contiguous one on the CPU is not copied."""
    if not tensor.numel():  # an empty array of numpy has strides that a view does not take
        return memoryview(b"")
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":
        raw = raw.view(-1, tensor.itemsize).flip(1).reshape(-1)
    return raw.numpy().data


def to_json(content: Any) -> str:
    """Write JSON such that the same content always gives the same text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def write_tensor_file(path: str | os.PathLike[str], texts: Mapping[str, str], pieces: Iterable[Piece]) -> None:
    """Write tensors and texts to a safetensors file, which replaces a former one as a whole.

    Args:
        path: of the file.
        texts: its metadata, besides the digests.
        pieces: its tensors; one at a time is in memory.

    Raises:
        PayloadError: a name or text is not Unicode, or a tensor has the name of the metadata.
        OSError: the file cannot be written.
    """
    ordered = sorted(pieces, key=lambda piece: piece.order)
    digests = {piece.key: NO_DIGEST for piece in ordered}
    room = len(header_of(texts, digests, ordered))  # digests are equally long, so the header's length is known now
    with replacing(path) as file:
        file.write(bytes(room))
        for piece in ordered:
            data = piece.read()
            digests[piece.key] = tensor_digest(piece.dtype, piece.shape, data).hexdigest()
            file.write(data)
            del data
        file.seek(0)
        file.write(header_of(texts, digests, ordered))


def header_of(texts: Mapping[str, str], digests: Mapping[str, str], ordered: list[Piece], room: int = 0) -> bytes:
    """Return what stands before the tensors' bytes: a length, and the JSON that it counts.

    Args:
        texts: the metadata, besides the digests.
        digests: those of the tensors.
        ordered: the tensors, in the order of the file.
        room: the length to which a shorter header is filled with spaces, a multiple of 8.
    """
    texts = {**texts, TENSOR_DIGESTS: to_json(digests)}
    header: dict[str, Any] = {"__metadata__": {**texts, TEXT_DIGEST: _text_digest(texts)}}
    end = 0
    for piece in ordered:
        _utf8(piece.key)
        if piece.key == "__metadata__":
            raise PayloadError("a tensor cannot be called __metadata__ in a safetensors file: rename it")
        begin, end = end, end + piece.size
        header[piece.key] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [begin, end]}
    text = to_json(header).encode()
    text += b" " * max(-len(text) % 8, room - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def tensor_digest(dtype: str, shape: Iterable[int], data: Any = b"") -> Any:
    """Return the XXH3 of a tensor's dtype, shape and bytes, to which further bytes can be added."""
    digest = xxhash.xxh3_64(f"{dtype}[{','.join(map(str, shape))}]".encode())
    digest.update(data)
    return digest


def _text_digest(texts: Mapping[str, str]) -> str:
    """Return the XXH3 of all names and texts, each after its length."""
    digest = xxhash.xxh3_64()
    for pair in sorted(texts.items(), key=lambda pair: _utf8(pair[0])):
        for text in pair:
            data = _utf8(text)
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PayloadError(f"{text!r} cannot be written to a file as UTF-8: {error}") from None


class TensorFile:
    """An open safetensors file.

    What ``write_tensor_file`` wrote is checked against its digests; a file of other programs has none.

    Attributes:
        path: of the file, for errors.
        keys: the names of its tensors.
        texts: its metadata, without the digests.
    """

    def __init__(self, file: Any, raw: BinaryIO, path: str | os.PathLike[str]) -> None:
        self._file, self._raw, self.path = file, raw, path
        self.keys = frozenset(file.keys())
        self.texts: dict[str, str] = dict(file.metadata() or {})
        digest = self.texts.pop(TEXT_DIGEST, None)
        self._digests: dict[str, str] | None = None
        if digest is not None or any(name.startswith(OURS) for name in self.texts):
            if digest != _text_digest(self.texts):
                raise PayloadError(f"{path} is damaged: its metadata do not match their digest")
            self._digests = self._read_digests()

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike[str]) -> Iterator["TensorFile"]:
        """Open a file and check its metadata.

        Raises:
            PayloadError: it is damaged, or no safetensors file.
            OSError: it cannot be read.
        """
        with open(path, "rb") as raw:  # whose errors name the file
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise PayloadError(f"{path} is damaged or not a safetensors file: {error}") from None
            with file:
                yield cls(file, raw, path)

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._raw.fileno()

    def tensor(self, key: str) -> Tensor:
        """Return a tensor, mapped from the file into memory, after its bytes were checked.

        Raises:
            PayloadError: it cannot be read, or does not match its digest.
        """
        try:
            tensor: Tensor = self._file.get_tensor(key)
            stored = self._file.get_slice(key)
            dtype, shape = stored.get_dtype(), stored.get_shape()
        except Exception as error:  # the library passes on whatever torch makes of a forged header
            raise PayloadError(f"{key} cannot be read from {self.path}: {error}") from None
        self._check(key, dtype, shape, tensor)
        return tensor

    def stored(self, key: str) -> tuple[str, tuple[int, ...], Tensor]:
        """Return a tensor as it is stored, which need not be of a dtype that torch has, after its bytes were checked.

        Returns:
            The dtype as safetensors names it, the shape, and the bytes: uint8, flat, in memory of their own.

        Raises:
            PayloadError: it cannot be read, or does not match its digest.
        """
        try:
            begin, entries = self._entries
            dtype, shape = entries[key]["dtype"], entries[key]["shape"]
            first, last = entries[key]["data_offsets"]
            self._raw.seek(begin + first)
            data = torch.from_numpy(np.fromfile(self._raw, np.uint8, last - first))
        except Exception as error:  # of a file that changed since its header was checked
            raise PayloadError(f"{key} cannot be read from {self.path}: {error!r}") from None
        self._check(key, dtype, shape, data)
        return dtype, tuple(shape), data

    def _check(self, key: str, dtype: str, shape: Iterable[int], data: Tensor) -> None:
        if self._digests is None or self._digests[key] == tensor_digest(dtype, shape, raw_bytes(data)).hexdigest():
            return
        raise PayloadError(f"{key} in {self.path} is damaged: its bytes do not match their digest")

    def stored_as(self, key: str) -> tuple[str, tuple[int, ...], int]:
        """Return a tensor's dtype as safetensors names it, its shape and its bytes; the values are not read."""
        entry = self._entries[1][key]
        first, last = entry["data_offsets"]
        return entry["dtype"], tuple(entry["shape"]), last - first

    def place(self, key: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        """Return a tensor's dtype and shape, and the number of bytes of the file before its values.

        Raises:
            PayloadError: ``dense_piece`` could not write this dtype.
        """
        first, _ = self._entries[1][key]["data_offsets"]
        meta = self.skeleton(key)
        return meta.dtype, tuple(meta.shape), self._entries[0] + first

    def skeleton(self, key: str) -> Tensor:
        """Return a tensor on the meta device that has the dtype and shape of a stored one.

        Raises:
            PayloadError: ``dense_piece`` could not write this dtype.
        """
        dtype, shape, _ = self.stored_as(key)
        if dtype not in _DTYPES.values():
            raise PayloadError(f"{key} in {self.path} is {dtype}, which fedomc does not store: leave it out")
        return torch.empty(shape, dtype=next(own for own, name in _DTYPES.items() if name == dtype), device="meta")

    @functools.cached_property
    def _entries(self) -> tuple[int, dict[str, Any]]:
        """Where the tensors' bytes begin, and the header's entry for each tensor."""
        self._raw.seek(0)
        length = int.from_bytes(self._raw.read(8), "little")
        return 8 + length, json.loads(self._raw.read(length))

    def _read_digests(self) -> dict[str, str]:
        try:
            digests = json.loads(self.texts.pop(TENSOR_DIGESTS))
        except (KeyError, ValueError, RecursionError) as error:
            raise PayloadError(f"{self.path}: the tensors' digests cannot be read: {error!r}") from None
        if not isinstance(digests, dict) or digests.keys() != self.keys:
            raise PayloadError(f"{self.path} is damaged: it has digests of other tensors than those that it contains")
        return digests
