"""The only module that uses private parts of Flower.

``tests/flower/test__flower.py`` tests each function, and says what changed when a new version of Flower breaks one.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Array, Error, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_SIZE
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CHUNK_SIZE",
    "ArrayChunk",
    "client_failure",
    "find_caller",
    "hold_chunks",
    "is_legacy_content",
    "is_mod_failure",
    "logger",
    "held_chunks",
    "holds_replies",
    "identify_process",
    "inflate_by_arrays",
    "inflating_by_arrays",
    "mentions_legacy_content",
    "mentions_secure_aggregation",
    "name_message",
    "stand_in",
]

logger = logging.getLogger("flwr")
"""Flower's logger, which Flower configures and whose output its users see. Its name is public."""

Chunks = list[tuple[str, Any]]
"""The chunks of an array, each as its object ID and the object that Flower sends."""

_CHUNKS = "_chunks"
"""The attribute in which ``Array.slice_array`` caches its chunks."""

_LEGACY_PREFIXES = ("fitins", "evaluateins", "getparametersins", "getpropertiesins")
"""The prefixes of all record names in a message of the legacy API (``NumPyClient``, ``client_fn``)."""


def hold_chunks(array: Array, chunks: Chunks, *, keep_data: bool) -> None:
    """Have an array sent as the given chunks, which need not be slices of its data; optionally drop the data."""
    if not keep_data:
        del array.__dict__["data"]
    array.__dict__[_CHUNKS] = chunks  # where Flower keeps them until ``data`` is set


def held_chunks(array: Array) -> Chunks | None:
    """Return the chunks that an array already holds; None if Flower has not sliced it yet."""
    return array.__dict__.get(_CHUNKS)


def client_failure(message: Message, error: Exception) -> Message:
    """Return the reply that Flower's engines send for a client that raised an exception."""
    reason = f"{type(error).__name__}: {error}"
    return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)


def holds_replies(grid: Grid) -> bool:
    """Return whether replies are in this process before they are pulled from a grid, as in a simulation."""
    module: Any = sys.modules.get(_IN_MEMORY_GRID)
    return module is not None and isinstance(grid, module.InMemoryGrid)


def identify_process() -> None:
    """Give this process an identity if it has none: Flower makes messages only in a process that has one."""
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def name_message(message: Message, message_id: str) -> None:
    """Give a message the ID that an engine gives it when it is pushed."""
    message.metadata.__dict__["_message_id"] = message_id


_IN_MEMORY_GRID = "flwr.superlink.grid.inmemory_grid"
"""The module of the grid of a simulation; to import it takes a second."""

_HTTP_GRID = "flwr.superlink.grid.http_grid"
"""The module of the grid of a deployment, which calls ``inflate_object_from_contents`` for each message."""


@contextmanager
def inflating_by_arrays() -> Iterator[None]:
    """Have the grid of a deployment make messages with ``inflate_by_arrays`` meanwhile."""
    module: Any = sys.modules.get(_HTTP_GRID)
    if module is None:  # then there is no such grid
        yield
        return
    former = module.inflate_object_from_contents
    module.inflate_object_from_contents = inflate_by_arrays
    try:
        yield
    finally:
        module.inflate_object_from_contents = former


def inflate_by_arrays(object_id: str, object_contents: dict[str, bytes]) -> InflatableObject:
    """Make a message of its objects like Flower, but release the chunks of each array when the array is made.

    Flower keeps a copy of every chunk until the message is complete, which takes the size of the message once more.
    """
    heads = {key: get_object_head_values_from_object_content(content) for key, content in object_contents.items()}
    arrays = {key: chunks for key, (kind, chunks, _) in heads.items() if kind == Array.__qualname__}
    uses = Counter(chunk for chunks in arrays.values() for chunk in chunks)
    objects: dict[str, InflatableObject] = {}
    for key, chunks in arrays.items():
        own = {one: object_contents[one] for one in (key, *chunks)}
        objects[key] = inflate_object_from_contents(key, own)
        del own, object_contents[key]
        uses.subtract(chunks)
        for chunk in chunks:
            if not uses[chunk]:
                del object_contents[chunk]
    return inflate_object_from_contents(object_id, object_contents, objects=objects)


def is_mod_failure(code: int) -> bool:
    """Return whether the error code of a reply means that a mod failed."""
    return code == ErrorCode.MOD_FAILED_PRECONDITION


def mentions_secure_aggregation(reason: str) -> bool:
    """Return whether the reason of a client's error mentions the record of Flower's secure aggregation."""
    return RECORD_KEY_CONFIGS in reason


def is_legacy_content(content: RecordDict | Iterable[str]) -> bool:
    """Return whether a message belongs to Flower's legacy API, judging by the names of its records."""
    return any(name.split(".")[0] in _LEGACY_PREFIXES for name in content)


def mentions_legacy_content(reason: str) -> bool:
    """Return whether the reason of a client's error mentions a record of Flower's legacy API."""
    return any(f"{prefix}." in reason for prefix in _LEGACY_PREFIXES)


def find_caller(accepts: Callable[[Any], bool]) -> Any:
    """Search the call stack, innermost first, for the ``self`` of a method that is accepted; None if there is none.

    Flower does not tell a strategy which strategy wraps it, so the call stack is the only way to find out.
    """
    return next((owner for owner in _callers() if accepts(owner)), None)


def stand_in(strategy: Strategy, methods: Mapping[str, Callable[..., Any]]) -> Strategy:
    """Return a copy of a strategy that shares its attributes but has some of its methods replaced."""
    kind = type(type(strategy).__name__, (type(strategy),), {name: staticmethod(m) for name, m in methods.items()})
    other: Strategy = object.__new__(kind)
    other.__dict__ = strategy.__dict__  # an attribute set on one is visible on the other
    return other


def _callers() -> Iterator[Any]:
    """Yield the ``self`` of every method on the call stack, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back  # type: ignore[assignment]
