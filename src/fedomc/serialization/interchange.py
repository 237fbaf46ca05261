"""Compressed variables as the tensors of a safetensors file that other programs read."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any

from torch import Tensor

from fedomc.errors import PayloadError
from fedomc.methods import Interchange, Method, Packed
from fedomc.serialization.tensor_file import Piece, TensorFile, raw_bytes
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.training.module_state import some


def check_exchangeable(tensors: Mapping[str, Tensor], names: Set[str]) -> None:
    """Check that other programs can read each compressed variable.

    Args:
        tensors: the variables by name, dense ones among them.
        names: all names of the model.

    Raises:
        PayloadError: a variable's method has no dtype in safetensors, it has an update beside its base, or another
            variable has the name of its scales.
    """
    compressed = {name: tensor for name, tensor in tensors.items() if is_compressed(tensor)}
    unknown: dict[Method, list[str]] = {}
    for name, tensor in compressed.items():
        if tensor.base.method.interchange is None:
            unknown.setdefault(tensor.base.method, []).append(name)
    if unknown:
        held = "; ".join(f"{method}: {some(variables)}" for method, variables in unknown.items())
        raise PayloadError(
            f"safetensors has no dtype for the formats of these variables ({held}): compress them in an MX format, "
            "such as MXFP8, or decompress_ the model, or save it without interchange=True"
        )
    moved = [name for name, tensor in compressed.items() if tensor.update is not None and not tensor.update.is_zero]
    if moved:
        raise PayloadError(
            f"other programs would not add the base and the update of {some(moved)}: decompress_ the model and "
            "compress_ it in one part, or save it without interchange=True"
        )
    for name, tensor in compressed.items():
        taken = names & {*interchange_keys(name, tensor.base.method, tensor.shape)[1:]}
        if taken:
            raise PayloadError(
                f"{some(sorted(taken))} is a variable of the model, but the scales of {name} need that name: rename it"
            )


def interchange_pieces(name: str, tensor: CompressedTensor) -> Iterator[Piece]:
    """Describe a variable in one part as pieces of a file, whose bytes are made when it is their turn."""
    packed = tensor.base
    packed.check()
    for described, make in _interchange(name, packed.method).writers(packed.fields, tensor.shape):
        suffix, dtype, shape, nbytes = described
        yield Piece(name + suffix, dtype, list(shape), nbytes, 1, partial(_made, make))


def interchange_keys(name: str, method: Method, shape: Sequence[int]) -> list[str]:
    """List the names of the tensors of a variable; the first is its own.

    Raises:
        PayloadError: safetensors has no dtype for the method.
    """
    return [name + described.suffix for described in _interchange(name, method).tensors(shape)]


def read_interchange(file: TensorFile, name: str, method: Method, shape: tuple[int, ...]) -> Packed:
    """Read a variable from its tensors.

    Raises:
        PayloadError: they are damaged, have other dtypes or shapes than such a variable's, or hold a value that is not
            finite.
    """
    interchange, numel, data = _interchange(name, method), math.prod(shape), []
    for suffix, *expected, _ in interchange.tensors(shape):
        *found, stored = file.stored(name + suffix)
        if found != expected:
            raise PayloadError(
                f"{name + suffix}: {_form(found)}, but {method} of shape {shape} makes {_form(expected)}"
            )
        data.append(stored)
    try:
        fields = interchange.read(data, shape)
    except PayloadError as error:
        raise PayloadError(f"{name}: {error}") from None
    wrong = method.validate(fields, numel)
    if wrong is not None:
        raise PayloadError(f"{name}: {wrong}")
    return Packed(method, numel, fields)


def _interchange(name: str, method: Method) -> Interchange:
    if method.interchange is None:
        raise PayloadError(f"{name}: safetensors has no dtype for {method}")
    return method.interchange


def _made(make: Callable[[], Tensor]) -> memoryview:
    return raw_bytes(make())


def _form(dtype_and_shape: Sequence[Any]) -> str:
    return "{}{}".format(*dtype_and_shape)
