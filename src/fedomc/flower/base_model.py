"""Messages with a part of a model: the server names the base model, and a client checks that it has the same.

The record that names it travels beside that of the model, also where nothing is compressed. It is only read by
``install``: a client with ``omc_mod`` fills its model itself, and can compare ``fedomc.base_digest`` with it.
"""

import re
from collections.abc import Collection, Sequence

from flwr.app import ConfigRecord, Message, RecordDict

from fedomc.errors import BaseModelError, PayloadError, PolicyError
from fedomc.flower.arrays import records_of
from fedomc.training.base_model import digest_without, trainable
from fedomc.training.module_state import ModuleState, some

RECORD = "fedomc.base"
"""The name of the ``ConfigRecord`` in a message."""

_DIGESTS = "digests"


def read_digests(base: str | Sequence[str]) -> tuple[str, ...]:
    """Return the digests of the base models that clients may have.

    Raises:
        PolicyError: one is not a digest.
    """
    digests = (base,) if isinstance(base, str) else tuple(base)
    for digest in digests:
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{32}", digest):
            raise PolicyError(f"base={digest!r} is not a digest: pass fedomc.base_digest(model)")
    return digests


def name_base(message: Message, digests: Sequence[str]) -> None:
    """Add the record of the base model to a message, if there is a base model."""
    if digests:
        message.content = RecordDict({**dict(message.content.items()), RECORD: ConfigRecord({_DIGESTS: [*digests]})})


def part_to_fill(
    state: ModuleState, names: Collection[str], message: Message | RecordDict, *, check_base: bool
) -> ModuleState:
    """Return the part of a model's state that a message has the values of, after checking the rest.

    Args:
        state: of the model.
        names: of the variables in the message.
        message: the message, or its content.
        check_base: whether the message must name the base model if it has only a part of the variables.

    Raises:
        BaseModelError: the rest is not the base model that the message names.
        PayloadError: a variable is unknown; one of the rest is trainable or has no values; or the message has a part of
            the variables, but does not name the base model.
    """
    rest = [name for name in state.tensors if name not in names]
    content = message.content if isinstance(message, Message) else message
    record = records_of(content, ConfigRecord).get(RECORD)
    if not rest and record is None:
        state.check_names(names)
        return state
    part = state.part(names)
    learning = set(trainable(state)).difference(names)
    if any(name not in state.tensors for name in names) or learning or (record is None and check_base):
        _explain(state, names, learning)
    if not check_base:
        return part
    given = record.get(_DIGESTS) if record is not None else None
    expected = [one for one in given if isinstance(one, str)] if isinstance(given, list) else []
    if not expected:
        raise PayloadError(f"the message's {RECORD!r} record has {given!r}, but no list of digests")
    own = digest_without(state, names)
    if own not in expected:
        raise BaseModelError(
            f"the message is for the base model {' or '.join(expected)}, but this client has {own} "
            f"({some(rest)}): load the model that the server names, in the same format, or have the server accept this "
            "one too, as in OMCStrategy(..., base=[...]). A batch normalization in training mode changes the base, too"
        )
    return part


def _explain(state: ModuleState, names: Collection[str], learning: Collection[str]) -> None:
    """Raise the error of a message that does not fit the model."""
    try:
        state.check_names(names)
    except PayloadError as error:
        if any(name not in state.tensors for name in names):
            raise
        if learning:
            raise PayloadError(
                f"{error}. What the server does not send must be frozen, because it never returns, but "
                f"{some(sorted(learning))} is trained: call requires_grad_(False) on it, or have the server send it"
            ) from None
        raise PayloadError(
            f"{error}. A message with what is trained alone must name the base model: on the server, pass "
            "base=fedomc.base_digest(model) to OMCStrategy, or send all with collect(model, variables='all'); to fill "
            "a model on the server, call install(..., check_base=False)"
        ) from None
