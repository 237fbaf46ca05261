"""The parts of Flower that are not its public API, and everything that this package does with them.

No other module of ``fedomc.flower`` may reach for a private name of Flower. Each function here has a test of its own,
``tests/flower/test__flower.py``, which says what changed when a new version of Flower breaks it.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Array, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.serverapp.strategy import Strategy

__all__ = [
    "ArrayChunk",
    "find_caller",
    "hold_chunks",
    "is_legacy_content",
    "is_mod_failure",
    "logger",
    "held_chunks",
    "mentions_legacy_content",
    "mentions_secure_aggregation",
    "stand_in",
]

logger = logging.getLogger("flwr")
"""Flower's logger, which Flower configures and shows to its users. This name is public."""

Chunks = list[tuple[str, Any]]
"""The chunks of an array: the object id of each, and the object that Flower sends."""

_CHUNKS = "_chunks"
"""The attribute in which ``Array.slice_array`` keeps the chunks that it made."""

_LEGACY_PREFIXES = ("fitins", "evaluateins", "getparametersins", "getpropertiesins")
"""How the names of all records in a message of the legacy API (``NumPyClient``, ``client_fn``) begin."""


def hold_chunks(array: Array, chunks: Chunks, *, keep_data: bool) -> None:
    """Make an array travel as given chunks, which need not be cut from its data; optionally drop the data."""
    if not keep_data:
        del array.__dict__["data"]
    array.__dict__[_CHUNKS] = chunks  # where Flower keeps them until ``data`` is set


def held_chunks(array: Array) -> Chunks | None:
    """Return the chunks that an array holds already; None if Flower has yet to cut them."""
    return array.__dict__.get(_CHUNKS)


def is_mod_failure(code: int) -> bool:
    """Tell whether the code of a reply's error says that a mod could not do its work."""
    return code == ErrorCode.MOD_FAILED_PRECONDITION


def mentions_secure_aggregation(reason: str) -> bool:
    """Tell whether the reason of a client's error names the record of Flower's secure aggregation."""
    return RECORD_KEY_CONFIGS in reason


def is_legacy_content(content: RecordDict | Iterable[str]) -> bool:
    """Tell whether a message is one of Flower's legacy API, by the names of its records."""
    return any(name.split(".")[0] in _LEGACY_PREFIXES for name in content)


def mentions_legacy_content(reason: str) -> bool:
    """Tell whether the reason of a client's error names a record of Flower's legacy API."""
    return any(f"{prefix}." in reason for prefix in _LEGACY_PREFIXES)


def find_caller(accepts: Callable[[Any], bool]) -> Any:
    """Return the object of the innermost calling method whose object is accepted; None if there is none.

    Flower does not tell a strategy which strategy wraps it, so the only way to find out is to look at who called.
    """
    return next((owner for owner in _callers() if accepts(owner)), None)


def stand_in(strategy: Strategy, methods: Mapping[str, Callable[..., Any]]) -> Strategy:
    """Return an object that is a strategy in everything, its attributes included, but for some methods."""
    kind = type(type(strategy).__name__, (type(strategy),), {name: staticmethod(m) for name, m in methods.items()})
    other: Strategy = object.__new__(kind)
    other.__dict__ = strategy.__dict__  # what one of the two sets, the other finds
    return other


def _callers() -> Iterator[Any]:
    """Give the ``self`` of every method on the stack, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back  # type: ignore[assignment]
