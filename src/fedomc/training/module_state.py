"""The state of a module: its parameters and persistent buffers by name, replaced all together or not at all."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedomc import codec
from fedomc.errors import PayloadError, PolicyError
from fedomc.methods import Encoding
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.training.fidelity import Distance
from fedomc.training.model import check_dtype, check_replaceable, compress_measured, replace_parameters


@dataclass(frozen=True)
class OwnedValue:
    """A dense tensor whose memory nobody else uses, so that a module can keep it without a copy."""

    tensor: Tensor


@dataclass(frozen=True)
class ModuleState:
    """The parameters and persistent buffers of a module.

    Attributes:
        module: whose state it is.
        tensors: parameters and buffers by qualified name; one that has several names goes by the first.
        aliases: for each further name of a tied parameter or buffer, the first one.
    """

    module: nn.Module
    tensors: dict[str, Tensor]
    aliases: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleState":
        """List the state of a module.

        Raises:
            PayloadError: a submodule has extra state, which is not a tensor.
        """
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        names: dict[int, str] = {}
        for prefix, owner in module.named_modules(remove_duplicate=False):
            if type(owner).get_extra_state is not nn.Module.get_extra_state:
                raise PayloadError(
                    f"{prefix or 'the model'} has extra state, which is not a tensor and would be lost: store it "
                    "separately"
                )
            buffers = {k: v for k, v in owner._buffers.items() if k not in owner._non_persistent_buffers_set}
            for key, tensor in (owner._parameters | buffers).items():
                if tensor is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                first = names.setdefault(id(tensor), name)
                if first == name:
                    tensors[name] = tensor
                else:
                    aliases[name] = first
        return cls(module, tensors, aliases)

    def part(self, names: Collection[str]) -> "ModuleState":
        """Return the part of the state that has the given first names, with their aliases."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in names}
        return ModuleState(self.module, tensors, {k: name for k, name in self.aliases.items() if name in tensors})

    def check_names(self, names: Collection[str], tied: Mapping[str, str] | None = None) -> None:
        """Check that values with these names are the whole state and nothing else.

        Args:
            names: of the values. A tied variable may come under any of its names.
            tied: further names that the values have.

        Raises:
            PayloadError: a name is missing or unknown.
        """
        given = {*names, *(tied or {})}
        covered = {self.aliases.get(name, name) for name in given}
        missing = [name for name in self.tensors if name not in covered]
        unknown = [name for name in given if name not in self.tensors and name not in self.aliases]
        if missing or unknown:
            raise PayloadError(
                f"the state does not belong to this model: {some(missing)} missing, {some(sorted(unknown))} unknown. "
                "Build the model with the class and the arguments that the state was made with"
            )

    def fill(
        self,
        values: Iterable[tuple[str, Tensor | OwnedValue]],
        selection: Mapping[str, Encoding] | None = None,
        *,
        tied: Mapping[str, str] | None = None,
        widen: bool = False,
    ) -> dict[str, Distance]:
        """Replace the whole state of the module, compressing the selected variables as their values arrive.

        The module, which may lie on the meta device, is unchanged until the last value has been checked. This object
        describes the former state and is of no use afterwards.

        Args:
            values: pairs of qualified name and value, taken one by one. The module keeps compressed tensors and an
                ``OwnedValue`` as they are; other dense tensors are copied.
            selection: encodings of dense variables by qualified name.
            tied: further names of the values. Parameters or buffers that the module has twice become one.
            widen: whether float16 and bfloat16 values may fill float32 variables.

        Returns:
            How far each variable that was compressed is from its values, by qualified name.

        Raises:
            PayloadError: a value is missing, unknown, not finite, or has another shape or dtype; two values of tied
                variables differ; a buffer that is not part of the state lies on the meta device.
            PolicyError: the selection does not fit the module, or a parameter is stepped in backward.
        """
        encodings = self._encodings(selection or {})
        self._check_replaceable()
        state = self._with_ties(tied or {})
        new: dict[str, Tensor] = {}
        distances: dict[str, Distance] = {}
        with torch.inference_mode(False):  # the module may be trained later
            for given, value in values:
                name = state.aliases.get(given, given)
                if name not in state.tensors:
                    raise PayloadError(f"{given} is not a parameter or persistent buffer of this model")
                tensor = _accepted(name, value, state.tensors[name], encodings.get(name), widen, distances)
                del value  # not to be held while the next value is made
                if name not in new:
                    new[name] = tensor
                elif not _same(tensor, new[name]):
                    raise PayloadError(f"{given} occurs twice, or is tied to {name}, with different values")
            missing = [name for name in state.tensors if name not in new]
            if missing:
                raise PayloadError(f"the state does not belong to this model: {some(missing)} missing")
            state._replace(new)
        return distances

    def _encodings(self, selection: Mapping[str, Encoding]) -> dict[str, Encoding]:
        """Return a selection by the first name of each variable."""
        for name in selection:
            old = self.tensors.get(self.aliases.get(name, name))
            if not isinstance(old, nn.Parameter):
                raise PolicyError(f"the model has no parameter {name!r}: select from this model")
            check_dtype(name, old)
        return {self.aliases.get(name, name): encoding for name, encoding in selection.items()}

    def _check_replaceable(self) -> None:
        for name, old in self.tensors.items():
            check_replaceable(name, old)
        known = self.tensors.keys() | self.aliases.keys()
        empty = [name for name, buffer in self.module.named_buffers() if buffer.is_meta and name not in known]
        if empty:
            raise PayloadError(
                f"buffers that are not in the state_dict are on the meta device: {some(empty)}. Nothing can fill them: "
                "assign their values first, as in module.name = torch.arange(n, device='cpu')"
            )

    def _with_ties(self, tied: Mapping[str, str]) -> "ModuleState":
        """Return the state in which the given names are names of one variable, whatever they are in the module."""
        tensors, aliases = dict(self.tensors), dict(self.aliases)
        order = list(tensors)
        for further, given in tied.items():
            both = {aliases.get(further, further), aliases.get(given, given)}
            if not both <= tensors.keys():
                raise PayloadError(f"{further} or {given}, which should be tied, is unknown")
            if len(both) == 1:
                continue
            name, alias = sorted(both, key=order.index)  # a variable goes by its first name in the module
            a, b = tensors[alias], tensors[name]
            if isinstance(a, nn.Parameter) != isinstance(b, nn.Parameter) or (a.shape, a.dtype) != (b.shape, b.dtype):
                raise PayloadError(
                    f"{further} cannot be tied to {given}: {a.dtype} {tuple(a.shape)}, but {b.dtype} {tuple(b.shape)}"
                )
            del tensors[alias]
            aliases[alias] = name
            aliases.update({key: name for key, first in aliases.items() if first == alias})
        return ModuleState(self.module, tensors, aliases)

    def _replace(self, new: dict[str, Tensor]) -> None:
        for alias, name in self.aliases.items():
            owner, key = self._place(alias)
            if isinstance(self.tensors[name], nn.Parameter):
                setattr(owner, key, self.tensors[name])
            else:
                owner._buffers[key] = new[name]
        for name, old in self.tensors.items():
            if not isinstance(old, nn.Parameter):
                owner, key = self._place(name)
                owner._buffers[key] = new.pop(name)
        replace_parameters(self.module, ((name, new.pop(name)) for name in list(new)))

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return the submodule that a name is in, and the last part of the name."""
        owner, _, key = name.rpartition(".")
        return self.module.get_submodule(owner), key


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a tensor, dense or compressed, are finite; little memory is taken."""
    if is_compressed(tensor):
        return tensor.is_finite()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor.detach().reshape(-1)
    if flat.dtype is torch.float32:
        return codec.absmax_bits(flat) < codec.INFINITY_BITS  # one pass, where torch would make a tensor of truths
    for start in range(0, tensor.numel(), codec.CHUNK):
        stop = min(start + codec.CHUNK, tensor.numel())
        part = flat[start:stop]
        if not bool(torch.isfinite(part.float() if part.itemsize == 1 else part).all()):
            return False
    return True


def some(names: Collection[str]) -> str:
    """List the first few of some names, for an error message."""
    shown = list(names)
    return f"{', '.join(shown[:3])} and {len(shown) - 3} more" if len(shown) > 3 else ", ".join(shown) or "none"


def _accepted(
    name: str,
    given: Tensor | OwnedValue,
    old: Tensor,
    encoding: Encoding | None,
    widen: bool,
    distances: dict[str, Distance],
) -> Tensor:
    """Check a value, and return it in the form and on the device in which the module keeps it."""
    value = given.tensor if isinstance(given, OwnedValue) else given
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        raise PayloadError(f"{name} is {_kind(value)}, but must be a strided tensor with values")
    if value.shape != old.shape:
        raise PayloadError(f"{name} has shape {tuple(value.shape)}, but {tuple(old.shape)} in the model")
    widened = widen and old.dtype is torch.float32 and value.dtype in (torch.float16, torch.bfloat16)
    if value.dtype != old.dtype and not widened:
        raise PayloadError(f"{name} has dtype {value.dtype}, but {old.dtype} in the model")
    if not is_finite(value):
        raise PayloadError(f"{name} has a value that is NaN or infinite")
    if is_compressed(value):
        if encoding is not None:
            raise PolicyError(f"{name} is compressed already: leave it out of the selection")
        if not isinstance(old, nn.Parameter):
            value = value.dequantize()
    elif encoding is not None:
        value = compress_measured(value, encoding, name, distances, old.dtype)
    else:
        copy = not isinstance(given, OwnedValue)
        value = value.detach().to(old.dtype, copy=copy, memory_format=torch.contiguous_format)
    return value if old.is_meta else value.to(old.device)


def _kind(value: object) -> str:
    return f"a {value.layout} tensor on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two values of a tied variable are the same, in the same encoding."""
    if isinstance(a, CompressedTensor) != isinstance(b, CompressedTensor):
        return False
    if is_compressed(a) and is_compressed(b):
        return a.encoding == b.encoding and all(
            torch.equal(x, y)
            for one, other in zip(a.parts, b.parts, strict=True)
            for x, y in zip(one.fields, other.fields, strict=True)
        )
    return torch.equal(a, b)
