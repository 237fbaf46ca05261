"""A model as a file: safetensors, whose compressed variables are frames; see ``docs/format.md``."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedomc.errors import NonFiniteError, PayloadError
from fedomc.methods import Encoding, Method, Packed
from fedomc.serialization import frame
from fedomc.serialization.atomic_file import replacing
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.training.module_state import check_names, fill_, is_finite, some, state_of

KEY = "fedomc"
"""The entry of a file's metadata that describes its compressed variables."""

VERSION = 1

_UPDATE = ".update"
"""Ends the key of an update's frame. No variable has such a name: a module cannot be in the place of a parameter."""

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


def save_model(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a model's parameters, packed as they are, and its persistent buffers to a file.

    The same model always gives the same bytes. The file is replaced whole: after a failure the former one is there.

    Args:
        model: plain or compressed.
        path: of the file.
        metadata: texts to keep with it; ``safetensors.safe_open(path, "pt").metadata()`` gives them back.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        PayloadError: a variable lies on the meta device, or is of a dtype or layout that a file cannot hold; the
            metadata are not texts.
        OSError: the file cannot be written.
    """
    state, aliases = state_of(model)
    texts = dict(metadata or {})
    if KEY in texts or not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise PayloadError(f"metadata must be texts, under other names than {KEY!r}: {some(list(map(str, texts)))}")
    described = {name: _describe(tensor) for name, tensor in state.items() if is_compressed(tensor)}
    texts[KEY] = to_json({"version": VERSION, "variables": described, "tied": aliases})
    write_pieces(path, texts, (piece for item in state.items() for piece in _pieces(*item)))


def load_model(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Make a model what ``save_model`` wrote: its parameters and persistent buffers are replaced.

    Args:
        model: plain, compressed or on the meta device; until all is checked there is memory for the old state and the
            new one. Weights that were tied in the file are tied afterwards.
        path: of the file.

    Returns:
        The model.

    Raises:
        PayloadError: the file is damaged, is of another model or was not written by ``save_model``; the model is as
            it was.
        PolicyError: a parameter is stepped in backward: load first, then call ``step_in_backward``.
        OSError: the file cannot be read.
    """
    with _open(path) as file:
        if not file.described:
            raise PayloadError(f"{path} was not written by save_model: fill the model with materialize_(model, path)")
        file.fill(model)
    return model


def materialize_(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    selection: Mapping[str, Encoding] | None = None,
) -> nn.Module:
    """Fill a model that lies on the meta device, compressing as the values arrive: the FP32 model never exists.

    Args:
        model: parameters and persistent buffers are replaced. Buffers that are not part of the state_dict must be
            real already: no source holds them.
        source: a file of ``save_model``, any other safetensors file of dense values, a state_dict, or pairs of name and
            value, which are drawn one by one. float16 and bfloat16 values may fill float32 variables. Tied weights
            may come under any of their names, or under all.
        selection: encodings of the variables to compress, as from ``CompressionPolicy.select``; the others stay as
            they come.

    Returns:
        The model.

    Raises:
        PayloadError: something is missing, unknown, damaged, not finite, or of another shape or dtype; the model is
            as it was.
        PolicyError: the selection does not fit the model, or names a variable that is compressed in the source.
        OSError: the file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        with _open(source) as file:
            file.fill(model, selection, widen=True)
        return model
    if isinstance(source, Mapping):
        check_names(model, source.keys())
        source = source.items()
    fill_(model, map(_copied, source), selection, widen=True)
    return model


def _copied(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    name, value = item
    return name, value.detach().clone() if is_compressed(value) else value


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, read when it is written."""

    key: str
    dtype: str
    shape: list[int]
    size: int
    alignment: int
    read: Callable[[], Any]

    @property
    def order(self) -> tuple[int, str]:
        """Sort by alignment, so that every piece lies on a multiple of its own."""
        return -self.alignment, self.key


def write_pieces(path: str | os.PathLike[str], texts: Mapping[str, str], pieces: Iterable[Piece]) -> None:
    """Write tensors, one after the other, and texts as a safetensors file, which replaces the former one whole."""
    ordered = sorted(pieces, key=lambda piece: piece.order)
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    end = 0
    for piece in ordered:
        begin, end = end, end + piece.size
        header[piece.key] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [begin, end]}
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(os.path.realpath(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in ordered:
            file.write(piece.read())


def dense_piece(key: str, tensor: Tensor, read: Callable[[], Any] | None = None) -> Piece:
    """Describe a dense tensor; by default its values are written whatever they are."""
    if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
        raise PayloadError(f"{key} is {tensor.dtype}, {tensor.layout}, which a file cannot hold")
    size, shape = tensor.nbytes, list(tensor.shape)
    return Piece(key, _DTYPES[tensor.dtype], shape, size, tensor.itemsize, read or (lambda: _raw(tensor)))


def _pieces(name: str, tensor: Tensor) -> Iterator[Piece]:
    if tensor.is_meta:
        raise PayloadError(f"{name} lies on the meta device and has no values: materialize_ the model first")
    if not is_compressed(tensor):
        yield dense_piece(name, tensor, lambda: _dense(name, tensor))
        return
    yield _framed(name, name, tensor, tensor.base, frame.VARIABLE)
    if tensor.update is not None and not tensor.update.is_zero:
        yield _framed(name + _UPDATE, name, tensor, tensor.update, frame.UPDATE)


def _framed(key: str, name: str, tensor: CompressedTensor, packed: Packed, kind: int) -> Piece:
    def read() -> bytes:
        if kind == frame.VARIABLE:
            _check_finite(name, tensor)
        return frame.to_bytes(packed, tensor.shape, kind, name)

    size = frame.size_of(packed, tensor.shape)
    return Piece(key, "U8", [size], size, 4, read)


def _dense(name: str, tensor: Tensor) -> memoryview:
    _check_finite(name, tensor)
    return _raw(tensor)


def _raw(tensor: Tensor) -> memoryview:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":
        raw = raw.view(-1, tensor.itemsize).flip(1).reshape(-1)
    return raw.numpy().data


def _check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise NonFiniteError(f"{name} has a value that is NaN or infinite; nothing was written")


def _describe(tensor: CompressedTensor) -> dict[str, Any]:
    fields = frame.encoding_fields(tensor.encoding)
    draws = [part.draws for part in tensor.parts]
    if tensor.update is not None and not tensor.update.is_zero:
        draws[1] = max(1, draws[1])  # 0 says that there is no frame, but another process may have written to it
    return {**fields, "shape": list(tensor.shape), "draws": draws}


def to_json(content: Any) -> str:
    """Write JSON, the same content always as the same text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Described:
    """What a file's metadata say of a compressed variable."""

    encoding: Encoding
    shape: tuple[int, ...]
    draws: list[int]

    @property
    def updated(self) -> bool:
        """Whether there is a frame of its update."""
        return self.draws[-1] > 0 and self.encoding.update_format is not None


class _File:
    """An open safetensors file, with or without compressed variables."""

    def __init__(self, file: Any, path: str | os.PathLike[str]) -> None:
        self._file, self._path = file, path
        self._keys = frozenset(file.keys())
        text = (file.metadata() or {}).get(KEY)
        self.described = text is not None
        self._variables, self._tied = ({}, {}) if text is None else _read_description(text, path)
        self._updates = {name + _UPDATE for name, how in self._variables.items() if how.updated}
        lost = (self._variables.keys() | self._updates) - self._keys
        if lost:
            raise PayloadError(f"{path}: {some(sorted(lost))} missing, which its metadata describe")

    def fill(self, model: nn.Module, selection: Mapping[str, Encoding] | None = None, *, widen: bool = False) -> None:
        """Replace a model's state, one variable after the other."""
        names = sorted(self._keys - self._updates)
        check_names(model, names, self._tied)
        fill_(model, ((name, self._read(name)) for name in names), selection, tied=self._tied, widen=widen)

    def _read(self, name: str) -> Tensor:
        how = self._variables.get(name)
        if how is None:
            return self._tensor(name, name)
        base = self._packed(name, name, how, frame.VARIABLE, how.encoding.format)
        base.state = base.state._replace(draws=how.draws[0])
        if not how.updated:
            return CompressedTensor.from_packed(base, how.encoding, how.shape, name)
        assert how.encoding.update_format is not None
        update = self._packed(name + _UPDATE, name, how, frame.UPDATE, how.encoding.update_format)
        update.state = update.state._replace(draws=how.draws[1])
        return CompressedTensor(base, update, how.encoding, how.shape, name)

    def _packed(self, key: str, name: str, how: _Described, kind: int, format: Method) -> Packed:
        data = self._tensor(key, name)
        if data.dtype is not torch.uint8 or data.dim() != 1:
            raise PayloadError(f"{name}: the bytes of a frame expected, not {data.dtype} {tuple(data.shape)}")
        found = frame.from_bytes(data.numpy().data, name)
        if (found.kind, found.shape, found.packed.method) != (kind, how.shape, format):
            raise PayloadError(
                f"{name}: a frame of kind {found.kind}, shape {found.shape} and format {found.packed.method}, "
                f"but the metadata say {kind}, {how.shape} and {format}"
            )
        return found.packed

    def _tensor(self, key: str, name: str) -> Tensor:
        """Map a tensor of the file into memory; nothing is copied."""
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except Exception as error:  # the library passes on whatever torch makes of a forged header
            raise PayloadError(f"{name}: cannot be read from {self._path}: {error}") from None
        return tensor


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[_File]:
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise PayloadError(f"{path}: {error}") from None
    with file:
        yield _File(file, path)


def _read_description(text: str, path: str | os.PathLike[str]) -> tuple[dict[str, _Described], dict[str, str]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"{path}: the {KEY!r} metadata are not JSON: {error}") from None
    content = content if isinstance(content, dict) else {}
    if content.get("version") != VERSION:
        raise PayloadError(f"{path}: version {content.get('version')!r} is unknown, {VERSION} expected: update fedomc")
    variables, tied = content.get("variables"), content.get("tied")
    if not isinstance(variables, dict) or not isinstance(tied, dict):
        raise PayloadError(f"{path}: the {KEY!r} metadata have no variables or no tied names")
    if not all(isinstance(name, str) for name in tied.values()):
        raise PayloadError(f"{path}: tied names that are not texts")
    return {name: _described(name, fields) for name, fields in variables.items()}, tied


def _described(name: str, fields: Any) -> _Described:
    if not isinstance(fields, dict):
        raise PayloadError(f"{name}: the metadata give no fields")
    try:
        encoding = frame.read_encoding(fields)
    except PayloadError as error:
        raise PayloadError(f"{name}: {error}") from None
    shape, draws = fields.get("shape"), fields.get("draws")
    if not _counts(shape) or not _counts(draws) or len(draws) != 1 + (encoding.update_format is not None):
        raise PayloadError(f"{name}: the metadata give shape {shape!r} and draws {draws!r}")
    return _Described(encoding, tuple(shape), draws)


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(count) is int and 0 <= count < 2**53 for count in value)
