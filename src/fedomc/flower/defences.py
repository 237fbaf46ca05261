"""Combines Flower's defences with compression in the right order, and refuses wrong orders; see docs/defences.md.

[Note: where to clip]
Differential privacy requires a bound on the change that one client can make: the norm of its update is clipped to C,
and noise proportional to C is added to the mean. Between clipping and summation, nothing may increase the norm of an
update. Rounding does: if a client clips and then encodes, the norm of its update is up to C plus that of the rounding
errors. These grow with the number of parameters and, in one part, with the size of the weights, not with C. Updates are
therefore clipped after decoding:

- Strategies that clip on the server must be wrapped by ``OMCStrategy``, never the other way round. They are given
  V + (R - S) in FP32 and clip its difference to V, which is the client's change R - S. This requires ``delta``; with
  ``weights`` they would clip R - V, in which the broadcast's error S - V outweighs the update.
- Updates that a client clipped in FP32, before ``omc_mod`` encoded them, are clipped again by the server, to the same
  C. This removes the part that rounding added, and does not change updates whose norm is at most C.

Noise is added to the FP32 mean, and nothing is rounded in between. The encoding of the next broadcast, and that of
values to which ``LocalDpMod`` has added noise, depends on private values only through the noise, so it does not weaken
the guarantee.
"""

import math
from collections.abc import Iterator

import numpy as np
from flwr.app import ArrayRecord, Error
from flwr.serverapp import PrivacyAccountant
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Strategy

from fedomc.errors import PayloadError, PolicyError
from fedomc.flower._flower import (
    find_caller,
    is_mod_failure,
    mentions_legacy_content,
    mentions_secure_aggregation,
)
from fedomc.flower.arrays import STYPE, LazyArray, Values
from fedomc.flower.downlink import Broadcast

GUIDE = "see docs/defences.md"

NO_SECURE_AGGREGATION = (
    "Flower supports secure aggregation only for its legacy strategies, and it sums integers, not packed codes with a "
    "different scale for each client: use OMCStrategy without it, or use it with a legacy strategy and compress the "
    f"model only in the client's memory (compress_, then decompress_); {GUIDE}"
)

_OnClients = (
    strategies.DifferentialPrivacyClientSideFixedClipping | strategies.DifferentialPrivacyClientSideAdaptiveClipping
)
_OnServer = (
    strategies.DifferentialPrivacyServerSideFixedClipping | strategies.DifferentialPrivacyServerSideAdaptiveClipping
)
_Adaptive = (
    strategies.DifferentialPrivacyClientSideAdaptiveClipping | strategies.DifferentialPrivacyServerSideAdaptiveClipping
)
Clipping = _OnClients | _OnServer

_LEAST = 1e-12
"""The norm below which the squares of an update may underflow in Flower's float32 norm, by which it divides."""


def layers(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy, the strategy that it wraps, and so on."""
    inner: object = strategy
    while isinstance(inner, Strategy):
        yield inner
        inner = getattr(inner, "strategy", None)


def innermost(strategy: Strategy) -> Strategy:
    """Return the last of the ``layers``, which is the strategy that aggregates."""
    *_, last = layers(strategy)
    return last


def clipping_of(strategy: Strategy) -> Clipping | None:
    """Return the layer that clips updates, or None."""
    return next((layer for layer in layers(strategy) if isinstance(layer, Clipping)), None)


def adaptive_clipping_of(strategy: Strategy) -> _Adaptive | None:
    """Return the layer that clips updates to a norm that it adapts in every round, or None."""
    return next((layer for layer in layers(strategy) if isinstance(layer, _Adaptive)), None)


def accountant_of(strategy: Strategy) -> PrivacyAccountant | None:
    """Return the accountant of the privacy budget, or None."""
    clipping = clipping_of(strategy)
    return None if clipping is None or isinstance(clipping, _Adaptive) else clipping.accountant


def check_aggregate(inner: Strategy, aggregate: str) -> None:
    """Check that a strategy that clips is given the clients' changes rather than their weights.

    Raises:
        PolicyError: the strategy clips, and ``aggregate`` is not ``delta``.
    """
    if aggregate != "delta" and clipping_of(inner) is not None:
        raise PolicyError(
            f"aggregate={aggregate!r} with {type(clipping_of(inner)).__name__} would clip the error of the broadcast "
            f"along with the client's change, which it outweighs: use aggregate='delta' ({GUIDE})"
        )


def check_model(inner: Strategy, arrays: ArrayRecord) -> None:
    """Check that all variables can be clipped if the strategy clips.

    Raises:
        PolicyError: the strategy clips, and a variable has an integer dtype.
    """
    for name, array in arrays.items():
        if array.dtype != "bfloat16" and np.dtype(array.dtype).kind != "f" and clipping_of(inner) is not None:
            raise PolicyError(
                f"{name} is {array.dtype}, and {type(clipping_of(inner)).__name__} can neither clip it nor add noise: "
                f"leave it out of the messages, or use a layer without counters, such as GroupNorm ({GUIDE})"
            )


def check_nesting(inner: Strategy) -> None:
    """Check that no strategy that clips wraps ``OMCStrategy``, because it would be given packed, unchecked replies.

    A strategy does not know what wraps it, so the call stack is searched.

    Args:
        inner: the wrapped strategy, which is itself a caller if its own ``start`` is running.

    Raises:
        PolicyError: a strategy that clips wraps ``OMCStrategy``.
    """
    outer = find_caller(lambda owner: isinstance(owner, Clipping) and vars(owner) is not vars(inner))
    if outer is not None:
        name = type(outer).__name__
        raise PolicyError(
            f"{name}(OMCStrategy(...)) would clip packed replies: reverse the order to "
            f"OMCStrategy({name}(FedAvg(), ...), policy) ({GUIDE})"
        )


def bounded(inner: Strategy, broadcast: Broadcast, arrays: ArrayRecord) -> ArrayRecord:
    """Return a decoded reply whose update the strategy can handle; see the note on where to clip.

    If clients clip, the update is clipped again. If the server clips, that is left to the strategy, but an update of
    norm 0 is changed minimally, because Flower divides by the norm. Such a reply is not left out, because the set of
    replies that count would then depend on private data.

    Args:
        inner: the wrapped strategy; if it does not clip, the reply is returned unchanged.
        broadcast: the model as it was sent.
        arrays: the server's weights plus the client's change, as lazy arrays.

    Raises:
        PayloadError: the update, or its sum with the model, is not finite.
    """
    clipping = clipping_of(inner)
    if clipping is None:
        return arrays
    with np.errstate(over="ignore"):
        norm = math.hypot(*(float(np.linalg.norm(_change(broadcast, arrays, name))) for name in arrays))
    if not math.isfinite(norm):
        raise PayloadError("its change, or the sum of its change and the model, is not finite")
    if isinstance(clipping, _OnServer):
        return arrays if norm >= _LEAST else _nudged(arrays)
    return arrays if norm <= clipping.clipping_norm else _scaled(broadcast, arrays, clipping.clipping_norm / norm)


def explained(error: Error) -> str:
    """Return the reason of a client's error, with advice if the cause is the way in which the app is set up."""
    reason = str(error.reason)
    if mentions_secure_aggregation(reason):
        return f"{reason} ({NO_SECURE_AGGREGATION})"
    if mentions_legacy_content(reason):
        return (
            f"{reason} (the client is a legacy app with client_fn or NumPyClient, which OMCStrategy does not support: "
            "write it with @app.train() of flwr.clientapp.ClientApp)"
        )
    if STYPE in reason:
        return (
            f"{reason} (the client reads compressed arrays as plain ones: fill its model with fedomc.flower.install "
            "and reply with fedomc.flower.collect, or leave its code unchanged and use ClientApp(mods=[omc_mod, ...]). "
            "Mods that read arrays must come after omc_mod, and cannot be used with a client that trains compressed; "
            f"{GUIDE})"
        )
    if is_mod_failure(error.code):
        return (
            f"{reason} (mods that read arrays must come after omc_mod, as in ClientApp(mods=[omc_mod, ...]), and "
            f"cannot be used with a client that trains compressed; {GUIDE})"
        )
    return reason


def _change(broadcast: Broadcast, arrays: ArrayRecord, name: str) -> Values:
    """Return the difference to the server's values, as a flat float64 array."""
    change = arrays[name].numpy().astype(np.float64).reshape(-1)
    change -= broadcast.dense(name).reshape(-1)
    return change


def _scaled(broadcast: Broadcast, arrays: ArrayRecord, factor: float) -> ArrayRecord:
    record = ArrayRecord()
    for name, array in arrays.items():

        def values(name: str = name) -> Values:
            own = broadcast.dense(name)
            change = _change(broadcast, arrays, name)
            change *= factor
            change += own.reshape(-1)
            scaled: Values = change.astype(own.dtype).reshape(own.shape)
            return scaled

        record[name] = LazyArray(broadcast.dense(name).dtype, tuple(array.shape), values)
    return record


def _nudged(arrays: ArrayRecord) -> ArrayRecord:
    """Return the arrays with the last bit of a single value changed."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    name = next(name for name, array in arrays.items() if math.prod(array.shape))
    values = arrays[name].numpy().copy()
    first = values.reshape(-1)[:1]
    first += np.maximum(np.abs(np.spacing(first)), first.dtype.type(_LEAST))
    record[name] = LazyArray(values.dtype, values.shape, lambda: values)
    return record
