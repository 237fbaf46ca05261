"""Queries on operator schemas: which arguments an operator writes to, and whether it returns views.

[Note: collectives]
The schemas of the ``torch.distributed`` operators (``c10d``) do not mark the arguments that they write to. By torch's
naming convention, operators whose name ends with an underscore write to their first argument.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fedomc._torch import schema_of, tree_leaves


def arguments_by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, keyed by their names in the schema."""
    return {**dict(zip((argument.name for argument in schema_of(func).arguments), args, strict=False)), **kwargs}


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operator call writes to."""
    if _is_collective(func):
        return list(tree_leaves(args[0]))
    arguments = schema_of(func).arguments
    mutable = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    named = arguments_by_name(func, args, kwargs) if mutable else {}
    return [x for name in mutable for x in tree_leaves(named.get(name))]


def returns_view(func: Any) -> bool:
    """Tell whether an operator returns views of its arguments."""
    return any(output.alias_info is not None and not output.alias_info.is_write for output in schema_of(func).returns)


def changes_geometry(func: Any) -> bool:
    """Tell whether an operator changes the shape or strides of its argument in place, as ``unsqueeze_`` does."""
    return torch.Tag.inplace_view in func.tags


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], variables: Sequence[str]) -> Any:
    """Run an operator on decoded values and wait until it has finished writing.

    Args:
        func: the operator.
        args: its positional arguments, with dense tensors.
        kwargs: its keyword arguments, with dense tensors.
        variables: names of the compressed variables whose decoded values it writes to.

    Raises:
        RuntimeError: the operator is an asynchronous collective, which writes after the call has returned.
    """
    if not (variables and _is_collective(func)):
        return func(*args, **kwargs)
    if arguments_by_name(func, args, kwargs).get("async_op", True):
        name = schema_of(func).name.removeprefix("c10d::")
        raise RuntimeError(
            f"{variables[0]} is compressed and cannot be written by {name} after the call has returned (recv, irecv "
            "or async_op=True): use a synchronous collective, or receive into a dense tensor and copy_ that into the "
            "variable"
        )
    result = func(*args, **kwargs)
    (result[-1] if isinstance(result, tuple) else result).wait()
    return result


def _is_collective(func: Any) -> bool:
    return bool(func.namespace == "c10d" and schema_of(func).name.endswith("_"))
