"""Compress and decompress the parameters of a model, and count the bytes that they hold."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedomc._torch import has_step_hooks
from fedomc.errors import PolicyError
from fedomc.methods import Encoding
from fedomc.tensor.compressed import CompressedTensor, compress
from fedomc.tensor.dtypes import DTYPES, NAMES
from fedomc.training.fidelity import Distance, measure, warn_of_losses
from fedomc.training.lazy import check_initialized
from fedomc.training.policy import DEFAULT, CompressionPolicy
from fedomc.training.selection import check_patterns, matches


def compress_(model: nn.Module, selection: Mapping[str, Encoding] | CompressionPolicy | str = DEFAULT) -> nn.Module:
    """Replace parameters of a model by compressed ones, one after the other, freeing each dense one.

    Args:
        model: is changed in place.
        selection: which parameters, and how: a format, such as ``"S1E3M7"``, ``"S1E2M3+S1E2M1"`` in two parts or
            ``"S1E3M7@0.9"`` for nine tenths of the parameters; a policy, for choices that a format leaves open; or the
            encodings by qualified name that ``CompressionPolicy.select`` returns for a round and a client. If omitted,
            ``DEFAULT`` formats are used.

    Returns:
        The model.

    Raises:
        FormatError: the text is not a format.
        PolicyError: the selection is of another model; or a selected variable is compressed already, is neither
            float32 nor bfloat16 nor float16, has no values (meta device, lazy module), or is stepped in backward: call
            ``step_in_backward`` after ``compress_``.
        NonFiniteError: a value is NaN or infinite. The variables before it are compressed by then; none is lost.

    Warns:
        UserWarning: the format cannot hold some of the variables, as ``training.fidelity`` explains.

    Example:
        >>> model = fedomc.compress_(torch.nn.Linear(512, 512))
        >>> f"{fedomc.parameter_bytes(model).ratio:.0%}"
        '32%'
    """
    selection = resolve_selection(model, selection)
    check_initialized(model)
    parameters = dict(model.named_parameters())
    for name in selection:
        if name not in parameters:
            raise PolicyError(f"the model has no parameter {name!r}: select from this model")
        if isinstance(parameters[name], CompressedTensor):
            raise PolicyError(f"{name} is compressed already: decompress_ the model first")
        if parameters[name].is_meta:
            raise PolicyError(f"{name} is on the meta device and has no values: materialize_ the model instead")
        check_dtype(name, parameters[name])
    distances = dict[str, Distance]()
    replace_parameters(
        model,
        ((name, compress_measured(parameters.pop(name), how, name, distances)) for name, how in selection.items()),
    )
    warn_of_losses(distances, selection, stacklevel=2)
    return model


def compress_measured(
    values: Tensor, how: Encoding, name: str, distances: dict[str, Distance], dtype: torch.dtype | None = None
) -> CompressedTensor:
    """Compress a variable as ``compress`` does, and enter under its name how far it is from its values."""
    with torch.no_grad():
        compressed = compress(values, how, name, dtype)
        distances[name] = measure(compressed.base, values.reshape(-1))
    return compressed


def resolve_selection(
    variables: nn.Module | Mapping[str, Sequence[int]], selection: Mapping[str, Encoding] | CompressionPolicy | str
) -> Mapping[str, Encoding]:
    """Return the encodings by name that a format, a policy or a selection stands for.

    Raises:
        FormatError: a text is not a format.
        PolicyError: the argument is none of these, or the policy fits no variable.
    """
    if isinstance(selection, str):
        selection = CompressionPolicy.parse(selection)
    if isinstance(selection, CompressionPolicy):
        return selection.select(variables)
    if not isinstance(selection, Mapping):
        raise PolicyError(
            f"a {type(selection).__name__} cannot select variables: pass a format such as 'S1E3M7', a "
            "CompressionPolicy, or the result of its select(model)"
        )
    return selection


def decompress_(model: nn.Module, include: Sequence[str] = ()) -> nn.Module:
    """Replace compressed parameters of a model by dense ones of the same dtype.

    Args:
        model: is changed in place.
        include: name patterns of the parameters, such as ``["*lora_*"]`` to keep the base model packed; empty is all.

    Returns:
        The model.

    Raises:
        PolicyError: a variable is stepped in backward: call ``remove()`` on what ``step_in_backward`` returned; or a
            pattern matches no parameter, or ``include`` is a string.
    """
    parameters = dict(model.named_parameters())
    check_patterns("include", include, parameters)
    compressed = {
        name: parameter
        for name, parameter in parameters.items()
        if isinstance(parameter, CompressedTensor) and (not include or matches(name, include))
    }
    del parameters
    replace_parameters(model, ((name, compressed.pop(name).dequantize()) for name in list(compressed)))
    return model


def replace_parameters(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Replace parameters by new ones, one after the other.

    Args:
        model: is changed in place; tied weights stay tied, as a parameter is replaced under all of its names.
        values: pairs of qualified name and new value. Each is taken from the iterator after the one before has been put
            in place.

    Raises:
        PolicyError: a parameter is stepped in backward.
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
        check_replaceable(name, old)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        new.grad = old.grad
        for module, key in places[name]:
            setattr(module, key, new)
        del old  # not to be held while the next value is made


def check_dtype(name: str, parameter: Tensor) -> None:
    """Refuse to compress a parameter of a dtype that is not for weights.

    Raises:
        PolicyError: the dtype is another than float32, bfloat16 and float16.
    """
    if parameter.dtype not in DTYPES:
        raise PolicyError(
            f"{name} is {parameter.dtype}, but only {', '.join(NAMES)} are compressed: exclude it in the policy, "
            "or call model.float() first"
        )


def check_replaceable(name: str, parameter: Tensor) -> None:
    """Refuse to replace a parameter whose optimizer would go on with the old one.

    Raises:
        PolicyError: the parameter is stepped in backward.
    """
    if has_step_hooks(parameter):
        raise PolicyError(
            f"{name} is stepped in backward and cannot be replaced: call remove() on the result of step_in_backward "
            "first, and step_in_backward again afterwards"
        )


@dataclass(frozen=True)
class ParameterBytes(Mapping[str, int]):
    """The bytes that the parameters of a model hold: a mapping from qualified name to bytes, with totals.

    Attributes:
        held: bytes by qualified name; tied parameters count once.
        fp32: the bytes of all parameters if they were held in FP32.
    """

    held: Mapping[str, int]
    fp32: int

    @property
    def total(self) -> int:
        """The bytes that all parameters hold."""
        return sum(self.held.values())

    @property
    def ratio(self) -> float:
        """The bytes held, as a fraction of those in FP32; 1 for a model without parameters."""
        return self.total / self.fp32 if self.fp32 else 1.0

    def __getitem__(self, name: str) -> int:
        """Return the bytes of a variable."""
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the variables."""
        return iter(self.held)

    def __len__(self) -> int:
        """Count the variables."""
        return len(self.held)


def parameter_bytes(model: nn.Module) -> ParameterBytes:
    """Count the bytes that a model's parameters hold.

    Args:
        model: plain or compressed. A compressed variable holds its codes, and a scale and an offset for each part.

    Returns:
        Bytes by variable, with their total and its ratio to FP32.

    Raises:
        PolicyError: a lazy module has not run yet.
    """
    check_initialized(model)
    parameters = dict(model.named_parameters())
    return ParameterBytes(
        {name: parameter.nbytes for name, parameter in parameters.items()},
        sum(4 * parameter.numel() for parameter in parameters.values()),
    )
