"""A model's state, its parameters and persistent buffers: by name, and replaced all together or not at all."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedomc._torch import has_step_hooks
from fedomc.codec import CHUNK
from fedomc.errors import PayloadError, PolicyError
from fedomc.methods.packed import Encoding
from fedomc.tensor.compressed import CompressedTensor, compress, is_compressed
from fedomc.training.model import replace_parameters


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return parameters and persistent buffers by qualified name, and the name of each further name of a tied one.

    Raises:
        PayloadError: a module has extra state, which is not a tensor.
    """
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PayloadError(
                f"{prefix or 'the model'} has extra state, which no tensor holds: keep it beside the model"
            )
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in (module._parameters | buffers).items():
            if tensor is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            first = names.setdefault(id(tensor), name)
            if first == name:
                state[name] = tensor
            else:
                aliases[name] = first
    return state, aliases


def check_names(model: nn.Module, names: Collection[str], tied: Mapping[str, str] | None = None) -> None:
    """Check that there is a value for all of a model's state and nothing else.

    Args:
        model: whose state it is.
        names: of the values; each name of a tied variable will do.
        tied: further names of values.

    Raises:
        PayloadError: a name is missing or unknown.
    """
    state, aliases = state_of(model)
    given = {*names, *(tied or {})}
    reached = {aliases.get(name, name) for name in given}
    missing = [name for name in state if name not in reached]
    unknown = [name for name in given if name not in state and name not in aliases]
    if missing or unknown:
        raise PayloadError(f"not the state of this model: {some(missing)} missing, {some(sorted(unknown))} unknown")


def fill_(
    model: nn.Module,
    values: Iterable[tuple[str, Tensor]],
    selection: Mapping[str, Encoding] | None = None,
    *,
    tied: Mapping[str, str] | None = None,
    widen: bool = False,
) -> None:
    """Replace all of a model's state, compressing the selected variables as they arrive.

    Args:
        model: may lie on the meta device. It stays as it was until the last value has been checked.
        values: by qualified name, drawn one after the other. Compressed ones become the model's own as they are; of
            dense ones the model gets a copy.
        selection: encodings of dense variables by qualified name.
        tied: further names of values; where the model has two parameters or buffers, it has one afterwards.
        widen: whether float16 and bfloat16 may fill float32.

    Raises:
        PayloadError: a value is missing, unknown, not finite, or of another shape or dtype; two values of tied
            variables differ; a buffer that is not part of the state lies on the meta device.
        PolicyError: the selection does not fit the model, or a parameter is stepped in backward.
    """
    state, aliases = state_of(model)
    selection = _canonical(selection or {}, state, aliases)
    _check_replaceable(model, state, aliases)
    _tie(tied or {}, state, aliases)
    new: dict[str, Tensor] = {}
    with torch.inference_mode(False):  # the model may be trained later
        for given, value in values:
            name = aliases.get(given, given)
            if name not in state:
                raise PayloadError(f"{given} is unknown: not a parameter or persistent buffer of this model")
            value = _accepted(name, value, state[name], selection.get(name), widen)
            if name not in new:
                new[name] = value
            elif not _same(value, new[name]):
                raise PayloadError(f"{given} comes twice, or is tied to {name}, and the values differ")
        missing = [name for name in state if name not in new]
        if missing:
            raise PayloadError(f"not the state of this model: {some(missing)} missing")
        _replace(model, new, state, aliases)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite, a chunk at a time."""
    if is_compressed(tensor) and (tensor.update is None or not tensor.update.rewrites):
        return True  # no code of one part decodes to anything else; only a sum of two may leave the range
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor if is_compressed(tensor) else tensor.detach().reshape(-1)
    for start in range(0, tensor.numel(), CHUNK):
        stop = min(start + CHUNK, tensor.numel())
        part = flat.decode_range(start, stop) if is_compressed(flat) else flat[start:stop]
        if not bool(torch.isfinite(part.float() if part.itemsize == 1 else part).all()):
            return False
    return True


def some(names: Collection[str]) -> str:
    """List some names for an error."""
    shown = list(names)
    return f"{', '.join(shown[:3])} and {len(shown) - 3} more" if len(shown) > 3 else ", ".join(shown) or "none"


def _canonical(
    selection: Mapping[str, Encoding], state: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Encoding]:
    for name in selection:
        old = state.get(aliases.get(name, name))
        if not isinstance(old, nn.Parameter):
            raise PolicyError(f"the model has no parameter {name!r}: select from this model")
        if old.dtype is not torch.float32:
            raise PolicyError(f"{name} is {old.dtype}: only float32 is compressed; call model.float() first")
    return {aliases.get(name, name): encoding for name, encoding in selection.items()}


def _check_replaceable(model: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    for name, old in state.items():
        if has_step_hooks(old):
            raise PolicyError(
                f"{name} is stepped in backward and cannot be replaced: call remove() on what step_in_backward "
                "returned, and step_in_backward again afterwards"
            )
    lost = [name for name, b in model.named_buffers() if b.is_meta and name not in state and name not in aliases]
    if lost:
        raise PayloadError(
            f"buffers that are not part of the state_dict lie on the meta device: {some(lost)}. Nothing can fill them: "
            "give each its values first, as in module.name = torch.arange(n, device='cpu')"
        )


def _tie(tied: Mapping[str, str], state: dict[str, Tensor], aliases: dict[str, str]) -> None:
    """Make further names of one variable of what are two in the model so far."""
    order = list(state)
    for further, given in tied.items():
        both = {aliases.get(further, further), aliases.get(given, given)}
        if not both <= state.keys():
            raise PayloadError(f"{further} or {given}, which should be tied, is unknown")
        if len(both) == 1:
            continue
        name, alias = sorted(both, key=order.index)  # a variable goes by its first name in the model
        a, b = state[alias], state[name]
        if isinstance(a, nn.Parameter) != isinstance(b, nn.Parameter) or (a.shape, a.dtype) != (b.shape, b.dtype):
            raise PayloadError(
                f"{further} cannot be tied to {given}: {a.dtype} {tuple(a.shape)}, but {b.dtype} {tuple(b.shape)}"
            )
        del state[alias]
        aliases[alias] = name
        aliases.update({key: name for key, first in aliases.items() if first == alias})


def _accepted(name: str, value: Tensor, old: Tensor, encoding: Encoding | None, widen: bool) -> Tensor:
    """Check a value and bring it into the form in which the model keeps it."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        raise PayloadError(f"{name}: a strided tensor with values expected, not {_kind(value)}")
    if value.shape != old.shape:
        raise PayloadError(f"{name}: shape {tuple(value.shape)}, but the model's is {tuple(old.shape)}")
    wider = widen and old.dtype is torch.float32 and value.dtype in (torch.float16, torch.bfloat16)
    if value.dtype != old.dtype and not wider:
        raise PayloadError(f"{name}: dtype {value.dtype}, but the model's is {old.dtype}")
    if not is_finite(value):
        raise PayloadError(f"{name} has a value that is NaN or infinite")
    if is_compressed(value):
        if encoding is not None:
            raise PolicyError(f"{name} is compressed already: leave it out of the selection")
        if not isinstance(old, nn.Parameter):
            value = value.dequantize()
    elif encoding is not None:
        value = compress(value, encoding, name)
    else:
        value = value.detach().to(old.dtype, copy=True, memory_format=torch.contiguous_format)
    return value if old.is_meta else value.to(old.device)


def _kind(value: object) -> str:
    return f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def _same(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, CompressedTensor) != isinstance(b, CompressedTensor):
        return False
    if is_compressed(a) and is_compressed(b):
        return a.encoding == b.encoding and all(
            torch.equal(x.codes, y.codes) and torch.equal(x.affine, y.affine)
            for x, y in zip(a.parts, b.parts, strict=True)
        )
    return torch.equal(a, b)


def _replace(model: nn.Module, new: dict[str, Tensor], state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    for alias, name in aliases.items():
        module, key = _place(model, alias)
        if isinstance(state[name], nn.Parameter):
            setattr(module, key, state[name])
        else:
            module._buffers[key] = new[name]
    for name, old in state.items():
        if not isinstance(old, nn.Parameter):
            module, key = _place(model, name)
            module._buffers[key] = new.pop(name)
    replace_parameters(model, ((name, new.pop(name)) for name in list(new)))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, key = name.rpartition(".")
    return model.get_submodule(owner), key
