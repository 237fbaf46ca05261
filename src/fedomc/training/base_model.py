"""The variables of a model that travel, and the digest of its base model: the frozen rest, which stays where it is.

[Note: what a digest covers]
Two clients may hold the same base model in memory in different ways: packed or decompressed, in bfloat16 or widened to
FP32. Training is the same where the values are. The digest therefore covers the values as float32, with the qualified
names and shapes. A model that was compressed has other values than before, so it has another digest; compression rounds
a model the same way on every machine, so every client that compresses the same model in the same format gets the same
one.
"""

import json
from collections.abc import Iterable, Sequence

import torch
import xxhash
from torch import Tensor, nn

from fedomc import codec
from fedomc.errors import PayloadError, PolicyError
from fedomc.tensor.compressed import is_compressed
from fedomc.training.module_state import ModuleState
from fedomc.training.selection import check_patterns, matches

ALL, TRAINABLE = "all", "trainable"


def travelling(state: ModuleState, variables: str | Sequence[str] = TRAINABLE) -> list[str]:
    """Return the names of the variables that travel, in the model's order.

    Args:
        state: of the model.
        variables: ``trainable``: parameters that require gradients, and the persistent buffers of modules that have
            such a parameter of their own, such as the running statistics of a batch normalization, or everything if no
            parameter is frozen; ``all``; or name patterns, such as ``["*lora_*"]``.

    Raises:
        PolicyError: no variable travels, a pattern matches none, or the text is neither of the two.
    """
    if isinstance(variables, str):
        if variables not in (ALL, TRAINABLE):
            raise PolicyError(f"variables={variables!r} is unknown: use 'trainable', 'all' or a list of name patterns")
        names = list(state.tensors) if variables == ALL else trainable(state)
    else:
        check_patterns("variables", variables, state.tensors)
        names = [name for name in state.tensors if matches(name, variables)]
    if not names and state.tensors:
        raise PolicyError(f"variables={variables!r}: nothing of the model travels; unfreeze or name what is trained")
    return names


def trainable(state: ModuleState) -> list[str]:
    """Return the names of what training changes: parameters that require gradients, and buffers beside them.

    Where no parameter is frozen, this is the whole state.
    """
    if all(tensor.requires_grad for tensor in state.tensors.values() if isinstance(tensor, nn.Parameter)):
        return list(state.tensors)
    learning = {name for name, tensor in state.tensors.items() if tensor.requires_grad}
    learning |= {alias for alias, name in state.aliases.items() if name in learning}
    owners = {name.rpartition(".")[0] for name in learning}
    return [
        name
        for name, tensor in state.tensors.items()
        if name in learning or (not isinstance(tensor, nn.Parameter) and name.rpartition(".")[0] in owners)
    ]


def base_digest(model: nn.Module, variables: str | Sequence[str] = TRAINABLE) -> str:
    """Return the digest of a model's base model, which are all parameters and persistent buffers that do not travel.

    It is the same for a packed model and for its decompressed values, and for bfloat16 or float16 values and the same
    values in FP32; it depends on the names, so wrap a model with ``peft`` before. Computing it decodes a stretch at a
    time, at about four gigabytes of FP32 values a second.

    Args:
        model: plain or compressed.
        variables: those that travel, as for ``fedomc.flower.collect``.

    Returns:
        32 hexadecimal digits: XXH3 (128 bits) of, for each variable in the order of the names, the JSON text of
        ``[name, dtype, shape]`` and the values, little-endian, those in bfloat16 and float16 as float32.

    Raises:
        PayloadError: a variable lies on the meta device and has no values.
        PolicyError: as for ``fedomc.flower.collect``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> model[0].requires_grad_(False)
        Linear(in_features=64, out_features=64, bias=True)
        >>> packed = fedomc.base_digest(fedomc.compress_(model, "S1E3M7"))
        >>> packed == fedomc.base_digest(fedomc.decompress_(model))
        True
    """
    state = ModuleState.of(model)
    return digest_without(state, travelling(state, variables))


def digest_without(state: ModuleState, names: Iterable[str]) -> str:
    """Return the digest of all variables but those with the given names; see ``base_digest``."""
    hasher, left_out = xxhash.xxh3_128(), frozenset(names)
    scratch = torch.empty(codec.CHUNK, dtype=torch.float32, device="cpu")
    for name in sorted(state.tensors.keys() - left_out):
        tensor = state.tensors[name]
        if tensor.is_meta:
            raise PayloadError(
                f"{name} is frozen and does not travel, but lies on the meta device and has no values: load the base "
                "model first, with load_model or materialize_"
            )
        as_float32 = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        kind = "float32" if as_float32 else str(tensor.dtype).removeprefix("torch.")
        hasher.update(json.dumps([name, kind, list(tensor.shape)]).encode())
        _hash_values(hasher, tensor.detach(), scratch if as_float32 else None)
    return hasher.hexdigest()


def _hash_values(hasher: "xxhash.xxh3_128", tensor: Tensor, scratch: Tensor | None) -> None:
    flat = tensor if is_compressed(tensor) else tensor.reshape(-1)
    for start in range(0, tensor.numel(), codec.CHUNK):
        stop = min(start + codec.CHUNK, tensor.numel())
        part = flat.decode_range(start, stop) if is_compressed(flat) else flat[start:stop]
        if scratch is not None:
            part = scratch[: stop - start].copy_(part)
        hasher.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
