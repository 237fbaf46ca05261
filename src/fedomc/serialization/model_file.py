"""Save a model to a safetensors file and load it again; ``docs/format.md`` specifies the bytes."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fedomc.errors import NonFiniteError, PayloadError
from fedomc.methods import Encoding, Method, Packed
from fedomc.serialization import frame
from fedomc.serialization.interchange import (
    check_exchangeable,
    interchange_keys,
    interchange_pieces,
    read_interchange,
)
from fedomc.serialization.tensor_file import (
    OURS,
    Piece,
    TensorFile,
    dense_piece,
    raw_bytes,
    to_json,
    write_tensor_file,
)
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.dtypes import NAMES
from fedomc.training.fidelity import Distance, warn_of_losses
from fedomc.training.model import resolve_selection
from fedomc.training.module_state import ModuleState, is_finite, some
from fedomc.training.policy import CompressionPolicy

KEY = "fedomc"
"""The entry of a file's metadata that describes its compressed variables and tied names."""

VERSION = 2

_UPDATE = ".update"
"""Ends the key of an update's frame. No variable has such a name, as no module can stand in a parameter's place."""


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    interchange: bool = False,
) -> None:
    """Write a model's parameters and persistent buffers to a file; compressed parameters stay packed.

    The same model always gives the same bytes. The file is replaced as a whole and keeps its permissions; if saving
    fails, the former file is still there.

    Args:
        model: plain or compressed.
        path: of the file.
        metadata: texts to store in the file. ``safetensors.safe_open(path, "pt").metadata()`` returns them.
        interchange: whether compressed variables are written as tensors that programs without fedomc read: ``name`` in
            a dtype of safetensors (``F8_E4M3``, ``F8_E5M2``, ``F6_E2M3``, ``F6_E3M2`` or ``F4``) and ``name_scale`` in
            ``F8_E8M0``, with a scale for each 32 elements. All compressed variables must be in MX formats, and in one
            part; ``load_model`` gives them the same codes and scales again.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        PayloadError: a variable lies on the meta device, or has a dtype or layout that a file cannot hold; or the
            metadata are not strings, or use a name that begins with ``fedomc``; or, for interchange, a variable has
            another method or an update, or the name of the scales of another one. Nothing was written.
        OSError: the file cannot be written.
    """
    state = ModuleState.of(model)
    texts = dict(metadata or {})
    for name, text in texts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise PayloadError(f"metadata {name!r}: {text!r} cannot be stored: name and value must be strings")
        if name.startswith(OURS):
            raise PayloadError(f"metadata {name!r} cannot be stored: names that begin with {OURS!r} are reserved")
    if interchange:
        check_exchangeable(state.tensors, state.tensors.keys() | state.aliases.keys())
    described = {name: describe(tensor) for name, tensor in state.tensors.items() if is_compressed(tensor)}
    content = {"version": VERSION, "variables": described, "tied": state.aliases}
    texts[KEY] = to_json({**content, "interchange": True} if interchange else content)
    write_tensor_file(path, texts, (piece for item in state.tensors.items() for piece in _pieces(*item, interchange)))


def load_model(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Replace a model's parameters and persistent buffers by those that ``save_model`` wrote.

    Everything is checked against the digests in the file before the model is changed.

    Args:
        model: plain, compressed or on the meta device. Its old state is freed when the new one is complete. Weights
            that were tied when they were saved are tied again.
        path: of the file.

    Returns:
        The model.

    Raises:
        PayloadError: the file is damaged, holds another model, or was not written by ``save_model``; the model is
            unchanged.
        PolicyError: a parameter is stepped in backward: load first, then call ``step_in_backward``.
        OSError: the file cannot be read.
    """
    with open_model_file(path) as file:
        if not file.described:
            raise PayloadError(f"{path} was not written by save_model: use materialize_(model, path)")
        file.fill(model)
    return model


def materialize_(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    selection: Mapping[str, Encoding] | CompressionPolicy | str | None = None,
) -> nn.Module:
    """Fill a model on the meta device and compress each variable as it arrives, so that no FP32 model ever exists.

    Args:
        model: its parameters and persistent buffers are replaced. Buffers that are not in the state_dict must hold
            their values already, as no source has them.
        source: a file of ``save_model``; any other safetensors file; a state_dict; or pairs of name and tensor, which
            are taken one by one. float16 and bfloat16 values may fill float32 variables. Tied weights may come under
            one of their names or under several.
        selection: a format, a policy or encodings by name, as ``compress_`` takes them; None compresses nothing. The
            other variables keep the form in which they come.

    Returns:
        The model.

    Raises:
        FormatError: the selection is a text that is not a format.
        PayloadError: a variable is missing, unknown, damaged, not finite, or has another shape or dtype; the model is
            unchanged.
        PolicyError: the selection does not fit the model, or names a variable that is compressed in the source.
        OSError: the file cannot be read.

    Warns:
        UserWarning: the format cannot hold some of the variables, as ``training.fidelity`` explains.
    """
    selection = None if selection is None else resolve_selection(model, selection)
    if isinstance(source, str | os.PathLike):
        with open_model_file(source) as file:
            distances = file.fill(model, selection, widen=True)
    else:
        state = ModuleState.of(model)
        if isinstance(source, Mapping):
            state.check_names(source.keys())
            source = source.items()
        distances = state.fill(map(_copied, source), selection, widen=True)
    warn_of_losses(distances, selection or {}, stacklevel=2)
    return model


def _copied(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    name, value = item
    return name, value.detach().clone() if is_compressed(value) else value


# ---- writing --------------------------------------------------------------------------------------------------------


def _pieces(name: str, tensor: Tensor, interchange: bool) -> Iterator[Piece]:
    if tensor.is_meta:
        raise PayloadError(f"{name} is on the meta device and has no values: materialize_ the model first")
    if not is_compressed(tensor):
        yield dense_piece(name, tensor, lambda: _dense(name, tensor))
        return
    if interchange:
        yield from interchange_pieces(name, tensor)
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
    return raw_bytes(tensor)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise NonFiniteError(f"{name} has a value that is NaN or infinite; nothing was written")


def describe(tensor: CompressedTensor) -> dict[str, Any]:
    """Return what a file's metadata say about a compressed variable; on the meta device, one yet to be encoded."""
    fields = frame.encoding_fields(tensor.encoding)
    draws = [part.draws for part in tensor.parts]
    if tensor.update is not None and not tensor.update.is_zero:
        draws[1] = max(1, draws[1])  # 0 says that there is no frame, but another process may have written to it
    dtype = {} if tensor.dtype is torch.float32 else {"dtype": str(tensor.dtype).removeprefix("torch.")}
    return {**fields, **dtype, "shape": list(tensor.shape), "draws": draws}


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Description:
    """What a file's metadata say about a compressed variable."""

    encoding: Encoding
    shape: tuple[int, ...]
    draws: list[int]
    dtype: torch.dtype

    @property
    def has_update(self) -> bool:
        """Whether the file has a frame of its update."""
        return self.draws[-1] > 0 and self.encoding.update_format is not None


@dataclass(frozen=True)
class _Content:
    """What a file's metadata say.

    Attributes:
        variables: the compressed variables by name.
        tied: of each further name of a tied variable the first.
        interchange: whether the variables are written for other programs, and not as frames.
    """

    variables: dict[str, _Description]
    tied: dict[str, str]
    interchange: bool = False

    def keys_of(self, name: str) -> list[str]:
        """List the names of a compressed variable's tensors."""
        variable = self.variables[name]
        if self.interchange:
            return interchange_keys(name, variable.encoding.format, variable.shape)
        return [name, name + _UPDATE] if variable.has_update else [name]


class ModelFile:
    """An open safetensors file, with or without compressed variables.

    Attributes:
        file: the tensors as they are stored.
        described: whether the file has fedomc's description of its variables.
        content: that description; empty if there is none.
    """

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        text = file.texts.get(KEY)
        self.described = text is not None
        self.content = _Content({}, {}) if text is None else _read_content(text, file.path)
        keys = {key for name in self.content.variables for key in self.content.keys_of(name)}
        self._companions = keys - self.content.variables.keys()
        missing = keys - file.keys
        if missing:
            raise PayloadError(f"{file.path} lacks {some(sorted(missing))}, described by its metadata")

    def fill(
        self, model: nn.Module, selection: Mapping[str, Encoding] | None = None, *, widen: bool = False
    ) -> dict[str, Distance]:
        """Replace a model's state, one variable after the other; return how far those it compressed are from theirs."""
        state, names, tied = ModuleState.of(model), self.names, self.content.tied
        state.check_names(names, tied)
        return state.fill(((name, self.read(name)) for name in names), selection, tied=tied, widen=widen)

    @property
    def names(self) -> list[str]:
        """The names of the variables, in order; some have more than one tensor in the file."""
        return sorted(self.file.keys - self._companions)

    def read(self, name: str) -> Tensor:
        """Return a variable, compressed or dense, after its bytes were checked.

        Raises:
            PayloadError: it cannot be read, or is damaged.
        """
        variable = self.content.variables.get(name)
        if variable is None:
            return self.file.tensor(name)
        if self.content.interchange:
            base = read_interchange(self.file, name, variable.encoding.format, variable.shape)
        else:
            base = self._packed(name, name, variable, frame.VARIABLE, variable.encoding.format)
        base.state = base.state._replace(draws=variable.draws[0])
        if not variable.has_update:
            return CompressedTensor.from_packed(base, variable.encoding, variable.shape, name, variable.dtype)
        assert variable.encoding.update_format is not None
        update = self._packed(name + _UPDATE, name, variable, frame.UPDATE, variable.encoding.update_format)
        update.state = update.state._replace(draws=variable.draws[1])
        return CompressedTensor(base, update, variable.encoding, variable.shape, name, dtype=variable.dtype)

    def _packed(self, key: str, name: str, variable: _Description, kind: int, format: Method) -> Packed:
        data = self.file.tensor(key)
        if data.dtype is not torch.uint8 or data.dim() != 1:
            raise PayloadError(f"{name} is {data.dtype} {tuple(data.shape)}, but must be the bytes of a frame")
        read = frame.from_bytes(data.numpy().data, name)
        if (read.kind, read.shape, read.packed.method) != (kind, variable.shape, format):
            raise PayloadError(
                f"{name}: a frame of kind {read.kind}, shape {read.shape} and format {read.packed.method}, "
                f"but the metadata say {kind}, {variable.shape} and {format}"
            )
        return read.packed


@contextmanager
def open_model_file(path: str | os.PathLike[str]) -> Iterator[ModelFile]:
    """Open a file and check its metadata.

    Raises:
        PayloadError: it is damaged, or no safetensors file.
        OSError: it cannot be read.
    """
    with TensorFile.open(path) as file:
        yield ModelFile(file)


def _read_content(text: str, path: str | os.PathLike[str]) -> _Content:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"{path}: the {KEY!r} metadata are not JSON: {error}") from None
    content = content if isinstance(content, dict) else {}
    if content.get("version") != VERSION:
        raise PayloadError(
            f"{path}: model file version {content.get('version')!r}, but this fedomc reads {VERSION}: "
            "use the fedomc that wrote it"
        )
    variables, tied, interchange = content.get("variables"), content.get("tied"), content.get("interchange", False)
    if not isinstance(variables, dict) or not isinstance(tied, dict):
        raise PayloadError(f"{path}: the {KEY!r} metadata have no variables or no tied names")
    if not all(isinstance(name, str) for name in tied.values()):
        raise PayloadError(f"{path}: a tied name is not a string")
    if not isinstance(interchange, bool):
        raise PayloadError(f"{path}: interchange={interchange!r} is neither true nor false")
    described = {name: _read_fields(name, fields) for name, fields in variables.items()}
    updated = [name for name, variable in described.items() if variable.has_update]
    if interchange and updated:
        raise PayloadError(f"{path}: an interchange file cannot contain the updates of {some(updated)}")
    return _Content(described, tied, interchange)


def _read_fields(name: str, fields: Any) -> _Description:
    if not isinstance(fields, dict):
        raise PayloadError(f"{name}: its description in the metadata is not a mapping of fields")
    try:
        encoding = frame.read_encoding(fields)
    except PayloadError as error:
        raise PayloadError(f"{name}: {error}") from None
    shape, draws = fields.get("shape"), fields.get("draws")
    if not _counts(shape) or not _counts(draws) or len(draws) != 1 + (encoding.update_format is not None):
        raise PayloadError(f"{name}: the metadata have an invalid shape {shape!r} or number of draws {draws!r}")
    if frame.is_too_large(shape):
        raise PayloadError(f"{name}: shape {tuple(shape)} is too large")
    dtype = fields.get("dtype", "float32")
    if dtype not in NAMES:
        raise PayloadError(f"{name}: the metadata have dtype {dtype!r}, but only {', '.join(NAMES)} are compressed")
    return _Description(encoding, tuple(shape), draws, getattr(torch, dtype))


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(count) is int and 0 <= count < 2**53 for count in value)
