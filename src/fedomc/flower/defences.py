"""Flower's defences together with compression: their right order, and what is refused. The guide: docs/defences.md.

[Note: where to clip]
Differential privacy needs a bound on what one client can change: the norm of its update is clipped to C, and noise in
proportion to C is added to the mean. Whatever happens to an update between the clipping and the sum must not make it
longer. Rounding does: a client that clips and then encodes sends an update whose norm is up to C plus that of the
rounding errors, which grow with the number of parameters and, in one part, with the size of the weights, not with C.
So the update is clipped after it was decoded:

- the strategies that clip on the server are wrapped by ``OMCStrategy``, never the other way round: they get
  V + (R - S), FP32, and clip its difference to V, which is what the client changed of what it was sent, R - S. That is
  ``delta``; with ``weights`` they would clip R - V, in which S - V, the broadcast's error, outweighs the update;
- what a client clipped itself, in FP32, before ``omc_mod`` encoded it, is clipped by the server once more, to the same
  C. This takes away what rounding added, and nothing of an update that is not longer than C.

Noise is added to the FP32 mean, and nothing is rounded between the two. The next round's encoding, like the encoding of
what ``LocalDpMod`` made noisy, sees private values only through the noise: it takes nothing from the guarantee.
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
    "Flower has secure aggregation for its legacy strategies alone, and it sums integers, which packed floats with a "
    "scale of each client's own are not: use OMCStrategy without it, or a legacy strategy with it and compress the "
    f"model in the client's memory alone (compress_, then decompress_); {GUIDE}"
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
"""Squares of shorter updates may vanish in float32, in which Flower takes the norm that it then divides by."""


def layers(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy, the one that it wraps, and so on."""
    inner: object = strategy
    while isinstance(inner, Strategy):
        yield inner
        inner = getattr(inner, "strategy", None)


def innermost(strategy: Strategy) -> Strategy:
    """Return the strategy at the end of ``layers``, which is the one that aggregates."""
    *_, last = layers(strategy)
    return last


def clipping_of(strategy: Strategy) -> Clipping | None:
    """Return the layer that clips, or None."""
    return next((layer for layer in layers(strategy) if isinstance(layer, Clipping)), None)


def adaptive_clipping_of(strategy: Strategy) -> _Adaptive | None:
    """Return the layer that clips to a norm which changes from round to round, or None."""
    return next((layer for layer in layers(strategy) if isinstance(layer, _Adaptive)), None)


def accountant_of(strategy: Strategy) -> PrivacyAccountant | None:
    """Return the accountant of the privacy budget, or None."""
    clipping = clipping_of(strategy)
    return None if clipping is None or isinstance(clipping, _Adaptive) else clipping.accountant


def check_aggregate(inner: Strategy, aggregate: str) -> None:
    """Refuse an aggregation in which something else is clipped than what a client changed.

    Raises:
        PolicyError: the strategy clips, and is to be given the clients' weights.
    """
    if aggregate != "delta" and clipping_of(inner) is not None:
        raise PolicyError(
            f"aggregate={aggregate!r} with {type(clipping_of(inner)).__name__}: the error of the broadcast would be "
            f"clipped along with what the client changed, and outweigh it; use aggregate='delta' ({GUIDE})"
        )


def check_model(inner: Strategy, arrays: ArrayRecord) -> None:
    """Refuse variables that cannot be clipped.

    Raises:
        PolicyError: the strategy clips, and a variable is of whole numbers.
    """
    for name, array in arrays.items():
        if np.dtype(array.dtype).kind != "f" and clipping_of(inner) is not None:
            raise PolicyError(
                f"{name} is {array.dtype}, which {type(clipping_of(inner)).__name__} can neither clip nor add noise "
                f"to: keep it out of the messages, or use a layer without counters, such as GroupNorm ({GUIDE})"
            )


def check_nesting(inner: Strategy) -> None:
    """Refuse to be called by a strategy that clips: it would be given packed replies, the damaged ones among them.

    A strategy is told nothing of what wraps it, so this looks at who called.

    Args:
        inner: the wrapped strategy, which may itself be a caller: if its ``start`` runs.

    Raises:
        PolicyError: ``OMCStrategy`` is inside a strategy that clips.
    """
    outer = find_caller(lambda owner: isinstance(owner, Clipping) and vars(owner) is not vars(inner))
    if outer is not None:
        name = type(outer).__name__
        raise PolicyError(
            f"{name}(OMCStrategy(...)) would clip packed replies: turn it round, "
            f"OMCStrategy({name}(FedAvg(), ...), policy) ({GUIDE})"
        )


def bounded(inner: Strategy, broadcast: Broadcast, arrays: ArrayRecord) -> ArrayRecord:
    """Return a decoded reply whose update the strategy can handle; see the note on where to clip.

    What a client clipped is clipped again. What the server is to clip is left to the strategy, but an update of norm 0
    is changed by next to nothing, because Flower divides by the norm. Nobody is left out for an update of norm 0: then
    who is counted would depend on private data.

    Args:
        inner: the wrapped strategy; if it does not clip, the reply is returned as it is.
        broadcast: what was sent.
        arrays: the server's weights plus what the client changed, decoded when they are asked for.

    Raises:
        PayloadError: the update is so large that it is not finite when it is added.
    """
    clipping = clipping_of(inner)
    if clipping is None:
        return arrays
    with np.errstate(over="ignore"):
        norm = math.hypot(*(float(np.linalg.norm(_change(broadcast, arrays, name))) for name in arrays))
    if not math.isfinite(norm):
        raise PayloadError("what it changed is not finite, or not when it is added to the model")
    if isinstance(clipping, _OnServer):
        return arrays if norm >= _LEAST else _nudged(arrays)
    return arrays if norm <= clipping.clipping_norm else _scaled(broadcast, arrays, clipping.clipping_norm / norm)


def explained(error: Error) -> str:
    """Return the reason of a client's error, with what to do about it if it comes from how the app is put together."""
    reason = str(error.reason)
    if mentions_secure_aggregation(reason):
        return f"{reason} ({NO_SECURE_AGGREGATION})"
    if mentions_legacy_content(reason):
        return (
            f"{reason} (the client is a legacy app, client_fn or NumPyClient, which OMCStrategy cannot send to: write "
            "it with @app.train() of flwr.clientapp.ClientApp)"
        )
    if STYPE in reason:
        return (
            f"{reason} (the client reads compressed arrays as plain ones: fill its model with fedomc.flower.install "
            "and answer with fedomc.flower.collect, or leave its code as it is in ClientApp(mods=[omc_mod, ...]); mods "
            f"that look at arrays come after omc_mod, and not around a client that trains compressed; {GUIDE})"
        )
    if is_mod_failure(error.code):
        return (
            f"{reason} (mods that look at arrays come after omc_mod, ClientApp(mods=[omc_mod, ...]), and not around a "
            f"client that trains compressed; {GUIDE})"
        )
    return reason


def _change(broadcast: Broadcast, arrays: ArrayRecord, name: str) -> Values:
    """Return the difference to the server's values, float64 and flat."""
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

        record[name] = LazyArray(array.dtype, tuple(array.shape), values)
    return record


def _nudged(arrays: ArrayRecord) -> ArrayRecord:
    """Return the arrays with one value changed in its last place."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    name = next(name for name, array in arrays.items() if math.prod(array.shape))
    values = arrays[name].numpy().copy()
    first = values.reshape(-1)[:1]
    first += np.maximum(np.abs(np.spacing(first)), first.dtype.type(_LEAST))
    record[name] = LazyArray(values.dtype, values.shape, lambda: values)
    return record
