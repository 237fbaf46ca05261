"""``Selection``: the variables that are compressed, the encoding of each, and the bytes held; patterns of names."""

import fnmatch
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fedomc.errors import PolicyError
from fedomc.methods import Encoding


class Selection(Mapping[str, Encoding]):
    """The variables to compress, by qualified name, with the encoding of each.

    Attributes:
        unquantized: the variables that stay in FP32 in this round, but could be compressed, or whose change could be.
    """

    def __init__(self, encodings: Mapping[str, Encoding], unquantized: Sequence[str] = ()) -> None:
        """Keep a copy of the mapping."""
        self._encodings = dict(encodings)
        self.unquantized = tuple(unquantized)

    def __getitem__(self, name: str) -> Encoding:
        """Return the encoding of a variable."""
        return self._encodings[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._encodings)

    def __len__(self) -> int:
        """Count the variables."""
        return len(self._encodings)

    def __repr__(self) -> str:
        """List the names."""
        return f"Selection({', '.join(self)})"


def held_bytes(variables: nn.Module | Mapping[str, Sequence[int]], selection: Mapping[str, Encoding] | None) -> int:
    """Count the bytes that parameters hold under a selection, in training; None holds them all in FP32.

    With an uplink this includes what ``arrived_bytes`` counts.
    """
    total = arrived_bytes(variables, selection)
    for name, shape in shapes_of(variables).items():
        numel, encoding = math.prod(shape), (selection or {}).get(name)
        total += 4 * numel if encoding is None else encoding.nbytes(numel)
    return total


def arrived_bytes(variables: nn.Module | Mapping[str, Sequence[int]], selection: Mapping[str, Encoding] | None) -> int:
    """Count the bytes of what a client was sent and keeps until it replies, as the change is taken against it.

    With an uplink these are the variables in one part, and those that a ``Selection`` leaves in FP32; without one there
    are none.
    """
    left = frozenset(selection.unquantized if isinstance(selection, Selection) else ())
    if not any(encoding.uplink is not None for encoding in (selection or {}).values()):
        return 0
    total = 0
    for name, shape in shapes_of(variables).items():
        numel, encoding = math.prod(shape), (selection or {}).get(name)
        if encoding is None:
            total += 4 * numel * (name in left)
        elif encoding.update_format is None:
            total += encoding.sent.nbytes(numel)
    return total


def shapes_of(variables: nn.Module | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by qualified name; a mapping of shapes passes through."""
    named: Mapping[str, Any] = (
        {name: parameter.shape for name, parameter in variables.named_parameters()}
        if isinstance(variables, nn.Module)
        else variables
    )
    return {name: tuple(shape) for name, shape in named.items()}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name matches a pattern of ``fnmatch``, with upper and lower case distinguished."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(field_name: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Check that each pattern matches a name.

    Raises:
        PolicyError: one matches none, or the patterns are a single string.
    """
    if isinstance(patterns, str):
        raise PolicyError(f"{field_name}={patterns!r} must be a list of patterns, not a string")
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            raise PolicyError(
                f"{field_name}: {pattern!r} matches none of {len(names)} variables, "
                f"such as {next(iter(names), '')!r}: correct or remove the pattern"
            )
