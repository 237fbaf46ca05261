"""A model with compressed variables: compress, decompress, and what it holds."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedomc._torch import has_step_hooks
from fedomc.errors import PolicyError
from fedomc.methods.packed import Encoding
from fedomc.tensor.compressed import CompressedTensor, compress
from fedomc.training.lazy import check_initialized


def compress_(model: nn.Module, selection: Mapping[str, Encoding]) -> nn.Module:
    """Replace the selected parameters by compressed ones, one after the other, freeing each dense one.

    Args:
        model: changed in place.
        selection: encodings by qualified name, as from ``CompressionPolicy.select``.

    Returns:
        The model.

    Raises:
        PolicyError: a name that the model does not have, a variable that is compressed already, is not float32, has no
            values (meta device, lazy module), or is stepped in backward: call ``step_in_backward`` after ``compress_``.
        NonFiniteError: a value is NaN or infinite; the variables before it are compressed, none is lost.
    """
    if not isinstance(selection, Mapping):
        raise PolicyError(f"compress_ takes a selection, not a {type(selection).__name__}: pass policy.select(model)")
    check_initialized(model)
    parameters = dict(model.named_parameters())
    for name in selection:
        if name not in parameters:
            raise PolicyError(f"the model has no parameter {name!r}: select from this model")
        if isinstance(parameters[name], CompressedTensor):
            raise PolicyError(f"{name} is compressed already: decompress_ the model first")
        if parameters[name].is_meta:
            raise PolicyError(f"{name} lies on the meta device and has no values: materialize_ fills and compresses")
        if parameters[name].dtype is not torch.float32:
            raise PolicyError(
                f"{name} is {parameters[name].dtype}: only float32 is compressed; call model.float() first"
            )
    replace_parameters(
        model, ((name, compress(parameters.pop(name), encoding, name)) for name, encoding in selection.items())
    )
    return model


def decompress_(model: nn.Module) -> nn.Module:
    """Replace all compressed parameters by dense FP32 ones.

    Args:
        model: changed in place.

    Returns:
        The model.

    Raises:
        PolicyError: a variable is stepped in backward: remove that first.
    """
    compressed = {name: p for name, p in model.named_parameters() if isinstance(p, CompressedTensor)}
    replace_parameters(model, ((name, compressed.pop(name).dequantize()) for name in list(compressed)))
    return model


def replace_parameters(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Put new values in the place of parameters, one after the other.

    Args:
        model: changed in place, wherever the parameter stands, under other names too (tied weights).
        values: by qualified name; each is drawn when the one before has taken its place.

    Raises:
        PolicyError: a parameter is stepped in backward, which would go on with the old one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(names[id(parameter)], []).append((module, key))
    for name, value in values:
        owner, key = places[name][0]
        old = owner._parameters[key]
        assert old is not None
        if has_step_hooks(old):
            raise PolicyError(
                f"{name} is stepped in backward and cannot be replaced: call remove() on what step_in_backward "
                "returned, and step_in_backward again afterwards"
            )
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        new.grad = old.grad
        for module, key in places[name]:
            setattr(module, key, new)
        del old  # not to be held while the next value is made


@dataclass(frozen=True)
class ParameterBytes(Mapping[str, int]):
    """Bytes that the parameters of a model hold, by variable.

    Attributes:
        held: bytes by qualified name; tied parameters count once.
        fp32: what they would be in FP32.
    """

    held: Mapping[str, int]
    fp32: int

    @property
    def total(self) -> int:
        """Bytes held by all."""
        return sum(self.held.values())

    @property
    def ratio(self) -> float:
        """Held bytes / FP32 bytes."""
        return self.total / self.fp32 if self.fp32 else 1.0

    def __getitem__(self, name: str) -> int:
        """Return the bytes of a variable."""
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.held)

    def __len__(self) -> int:
        """Count the variables."""
        return len(self.held)


def parameter_bytes(model: nn.Module) -> ParameterBytes:
    """Measure the bytes that a model's parameters hold: packed codes and their transformation, or dense values.

    Args:
        model: plain or compressed.

    Returns:
        Bytes by variable, their sum, and its ratio to FP32.

    Raises:
        PolicyError: a lazy module has not run yet.
    """
    check_initialized(model)
    parameters = dict(model.named_parameters())
    return ParameterBytes(
        {name: parameter.nbytes for name, parameter in parameters.items()},
        sum(4 * parameter.numel() for parameter in parameters.values()),
    )
