"""Between a strategy and its checkpoints: everything that the next round depends on."""

import dataclasses
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedomc.errors import PayloadError
from fedomc.flower.arrays import view_dense
from fedomc.flower.defences import accountant_of, adaptive_clipping_of, layers
from fedomc.flower.traffic import Traffic
from fedomc.serialization.checkpointing import Checkpoint
from fedomc.training.policy import CompressionPolicy, TieredPolicy

if TYPE_CHECKING:
    from fedomc.flower.strategy import OMCStrategy

_DERIVED = "current_arrays"
"""The attribute in which Flower's strategies keep the model itself; it is set anew in each round."""


def state_of(strategy: "OMCStrategy", server_round: int, arrays: ArrayRecord) -> Checkpoint:
    """Collect the state after a round: model, optimizer state, policy with its seed, traffic, random state.

    The optimizer state is each attribute of the innermost strategy that is an array, or a list or dict of arrays by
    name: ``m_t``, ``v_t``, ``momentum_vector``. Of differential privacy it is what was spent and where an adaptive norm
    has got to; the noise is not repeated. What else changes between rounds, such as a learning rate, is the caller's.
    """
    kinds: dict[str, dict[str, np.ndarray[Any, Any]]] = {
        "model": {name: view_dense(array, name) for name, array in arrays.items()}
    }
    form: dict[str, str] = {}
    for attribute, value in vars(_innermost(strategy)).items():
        found = _arrays(value)
        if found is not None and attribute != _DERIVED:
            kinds[attribute], form[attribute] = found, type(value).__name__
    version, state, gauss = random.getstate()
    clipping, accountant = adaptive_clipping_of(strategy.inner), accountant_of(strategy.inner)
    progress = {
        "round": server_round,
        "configured": _configured(strategy),
        "traffic": [dataclasses.asdict(row) for row in strategy.traffic],
        "random": [version, list(state), gauss],
        "form": form,
        "clipping_norm": None if clipping is None else clipping.clipping_norm,
        "privacy": None if accountant is None else accountant.state_dict(),
    }
    return Checkpoint(progress, kinds)


def restore(strategy: "OMCStrategy", checkpoint: Checkpoint, arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
    """Give a strategy the state of a checkpoint; return the model and the round.

    Raises:
        PayloadError: it is of another model or configuration, or misses something.
    """
    stored = checkpoint.arrays.get("model", {})
    described = {name: (array.shape, str(array.dtype)) for name, array in stored.items()}
    if described != {name: (tuple(array.shape), array.dtype) for name, array in arrays.items()}:
        raise PayloadError("the checkpoint is of another model: start again in another folder")
    try:
        configured, server_round = checkpoint.progress["configured"], int(checkpoint.progress["round"])
        if configured != json.loads(json.dumps(_configured(strategy))):
            raise PayloadError(
                f"the checkpoint was made with {configured}, not {_configured(strategy)}: start again in another folder"
            )
        random_state = _random_state(checkpoint.progress["random"])
        traffic = [Traffic(**row) for row in checkpoint.progress["traffic"]]
        optimizer = {
            attribute: _value(kind, checkpoint.arrays[attribute])
            for attribute, kind in checkpoint.progress["form"].items()
            if hasattr(_innermost(strategy), attribute)
        }
        clipping, accountant = adaptive_clipping_of(strategy.inner), accountant_of(strategy.inner)
        if clipping is not None:
            clipping.clipping_norm = float(checkpoint.progress["clipping_norm"])
        if accountant is not None:
            accountant.load_state_dict(checkpoint.progress["privacy"])
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, PayloadError):
            raise
        raise PayloadError(f"the checkpoint misses something: {error!r}") from None
    random.setstate(random_state)
    for attribute, value in optimizer.items():
        setattr(_innermost(strategy), attribute, value)
    strategy.traffic[:] = traffic
    record = ArrayRecord()
    for name in arrays:
        record[name] = Array(np.asarray(stored[name], order="C"))
    return record, server_round


def _random_state(stored: Any) -> tuple[Any, ...]:
    """Return the state of Python's generator as ``random.setstate`` takes it.

    Raises:
        PayloadError: it is not such a state.
    """
    try:
        version, numbers, gauss = stored
        if gauss is not None and type(gauss) is not float:
            raise TypeError(f"{gauss!r} is no number")
        state = version, tuple(numbers), gauss
        generator = random.Random()  # noqa: S311  (another than the one that Flower draws from)
        generator.setstate(state)
        if generator.getstate() != state:
            raise ValueError("a number is out of range")
    except (ValueError, TypeError, OverflowError) as error:
        raise PayloadError(f"the checkpoint's random state is damaged: {error}") from None
    return state


def _innermost(strategy: "OMCStrategy") -> Strategy:
    *_, innermost = layers(strategy.inner)
    return innermost


def _configured(strategy: "OMCStrategy") -> dict[str, Any]:
    policy = strategy.policy
    described: Any = None
    if isinstance(policy, TieredPolicy):
        described = {"default": policy.default, **{name: _described(each) for name, each in policy.tiers.items()}}
    else:
        described = _described(policy)
    wrapped = " around ".join(type(layer).__name__ for layer in layers(strategy.inner))
    return {"strategy": wrapped, "aggregate": strategy.aggregate, "policy": described}


def _described(policy: CompressionPolicy | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    texts = {name: str(fields[name]) for name in ("format", "update_format")}
    how = policy.encoding()  # which says what the formats chose
    texts |= {"transform": how.transform, "rounding": how.rounding}
    by_name = [[pattern, str(fmt)] for pattern, fmt in dict(policy.format_by_name).items()]  # the first match counts
    return {
        **fields,
        **texts,
        "format_by_name": by_name,
        "include": list(policy.include),
        "exclude": list(policy.exclude),
    }


def _arrays(value: object) -> dict[str, np.ndarray[Any, Any]] | None:
    items = dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, dict) else {"": value}
    known = np.ndarray | np.generic  # numpy makes scalars of arrays without dimensions
    arrays = {str(name): np.asarray(array) for name, array in items.items() if isinstance(array, known)}
    return arrays if arrays and len(arrays) == len(items) else None


def _value(kind: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if kind == "dict":
        return arrays
    return [arrays[str(i)] for i in range(len(arrays))] if kind == "list" else arrays[""]
