"""Converts the state of a run, which is everything that the next round depends on, to checkpoints and back."""

import dataclasses
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fedomc.errors import PayloadError
from fedomc.flower._flower import logger
from fedomc.flower.arrays import array_of, stored_model, view_dense
from fedomc.flower.defences import accountant_of, adaptive_clipping_of, innermost, layers
from fedomc.flower.mapped import parts_of
from fedomc.flower.server_optimizers import MODEL, RoundFiles
from fedomc.flower.traffic import Traffic
from fedomc.serialization.checkpointing import Checkpoint
from fedomc.serialization.mapped_file import REPLACEABLE
from fedomc.training.policy import CompressionPolicy, TieredPolicy

_STORED_AS = {"bfloat16": "float32"}  # a file of arrays has the dtypes of numpy

_DERIVED = "current_arrays"
"""The attribute in which Flower's strategies keep the model itself; they assign it in every round."""

_HISTORIES = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
"""The attributes of a ``Result`` that hold metrics by round."""


@dataclass
class RunState:
    """The state of a run after a round.

    Attributes:
        round: the number of the last finished round.
        arrays: the model.
        initial: the digest of the initial model.
        traffic: the bytes of each round.
        result: the metrics of each round.
        asked: the nodes whose replies were waited for, in an asynchronous run.
    """

    round: int
    arrays: ArrayRecord
    initial: str = ""
    traffic: list[Traffic] = field(default_factory=list)
    result: Result = field(default_factory=Result)
    asked: list[int] = field(default_factory=list)


def digest(arrays: ArrayRecord) -> str:
    """Return a digest of a model's names, dtypes, shapes and values."""
    hasher = xxhash.xxh3_128()
    for name, array in arrays.items():
        hasher.update(json.dumps([name, array.dtype, list(array.shape)]).encode())
        for part in parts_of(array):
            hasher.update(part)
    return hasher.hexdigest()


def to_checkpoint(state: RunState, inner: Strategy, settings: Mapping[str, Any]) -> Checkpoint:
    """Make a checkpoint of a run: model, optimizer state, settings, traffic, metrics and Python's random state.

    The optimizer state consists of all attributes of the innermost strategy that are arrays, or lists or dicts of
    arrays, such as ``m_t``, ``v_t`` and ``momentum_vector``. For differential privacy, the spent budget and the norm of
    an adaptive strategy are stored; the noise is drawn anew. Anything else that changes between rounds, such as a
    learning rate, must be restored by the caller.

    Args:
        state: the state after a round.
        inner: the wrapped strategy.
        settings: the result of ``settings_of``; a run can only be resumed with the same settings.
    """
    kinds = {MODEL: {name: view_dense(array, name) for name, array in state.arrays.items()}, **_optimizer_state(inner)}
    return Checkpoint(progress_of(state, inner, settings), kinds)


def progress_of(state: RunState, inner: Strategy, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all of a checkpoint except its arrays; arguments as in ``to_checkpoint``."""
    version, numbers, gauss = random.getstate()
    clipping, accountant = adaptive_clipping_of(inner), accountant_of(inner)
    return {
        "round": state.round,
        "configured": dict(settings),
        "initial": state.initial,
        "asked": state.asked,
        "traffic": [dataclasses.asdict(row) for row in state.traffic],
        "metrics": {name: _to_rows(getattr(state.result, name)) for name in _HISTORIES},
        "random": [version, list(numbers), gauss],
        "form": {slot: type(getattr(innermost(inner), slot)).__name__ for slot in _optimizer_state(inner)},
        "clipping_norm": None if clipping is None else clipping.clipping_norm,
        "privacy": None if accountant is None else accountant.state_dict(),
    }


def is_written(files: RoundFiles, state: RunState, inner: Strategy) -> bool:
    """Return whether the files of a round have the model and the whole state of the strategy, as they are now."""
    if files.draft is None or any(files.arrays.get(name) is not array for name, array in state.arrays.items()):
        return False
    now = _optimizer_state(inner)
    return now.keys() == files.moments.keys() and all(
        now[slot].keys() == moments.keys() and all(now[slot][key] is moments[key] for key in moments)
        for slot, moments in files.moments.items()
    )


def from_checkpoint(
    checkpoint: Checkpoint, inner: Strategy, settings: Mapping[str, Any], arrays: ArrayRecord
) -> RunState:
    """Read the state of a run, and restore that of the strategy and of Python's random generator.

    Args:
        checkpoint: the checkpoint.
        inner: the wrapped strategy.
        settings: the result of ``settings_of``.
        arrays: a model with the same names, shapes and dtypes as the one in the checkpoint.

    Raises:
        PayloadError: the checkpoint has another model or other settings, or is incomplete.
    """
    stored = checkpoint.arrays.get(MODEL, {})
    described = {name: (array.shape, str(array.dtype)) for name, array in stored.items()}
    if described != {name: (tuple(a.shape), _STORED_AS.get(a.dtype, a.dtype)) for name, a in arrays.items()}:
        raise PayloadError("the checkpoint has another model: use another folder to start a new run")
    try:
        progress = checkpoint.progress
        former = progress["configured"]
        if former != json.loads(json.dumps(dict(settings))):
            raise PayloadError(
                f"the checkpoint was made with {former}, not {settings}: use another folder to start a new run"
            )
        random_state = _random_state(progress["random"])
        state = RunState(
            int(progress["round"]), ArrayRecord(), str(progress["initial"]), [Traffic(**r) for r in progress["traffic"]]
        )
        state.asked = [int(node) for node in progress.get("asked", [])]
        for name in _HISTORIES:
            getattr(state.result, name).update(_from_rows(progress["metrics"][name]))
        optimizer = {
            attribute: _value(kind, checkpoint.arrays[attribute])
            for attribute, kind in progress["form"].items()
            if hasattr(innermost(inner), attribute)
        }
        clipping, accountant = adaptive_clipping_of(inner), accountant_of(inner)
        if clipping is not None:
            clipping.clipping_norm = float(progress["clipping_norm"])
        if accountant is not None:
            accountant.load_state_dict(progress["privacy"])
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, PayloadError):
            raise
        raise PayloadError(f"the checkpoint is incomplete: {error!r}") from None
    random.setstate(random_state)
    for attribute, value in optimizer.items():
        setattr(innermost(inner), attribute, value)
    if checkpoint.file is None or not REPLACEABLE:
        for name, array in arrays.items():
            state.arrays[name] = array_of(stored[name], array.dtype)
    else:
        state.arrays = stored_model(checkpoint.file, MODEL, arrays)
    return state


def checked_resumption(state: RunState, arrays: ArrayRecord, num_rounds: int, folder: Path) -> RunState:
    """Return the state of a run that is resumed or already finished, after logging which of them it is.

    Args:
        state: the state in the folder.
        arrays: the initial model that is given now; a run that goes on does not use it.
        num_rounds: the number of rounds to run in all.
        folder: the folder of the checkpoints.

    Raises:
        PayloadError: the run is finished, and began with another initial model.
    """
    other = state.initial != digest(arrays)
    if state.round >= num_rounds:
        if other:
            raise PayloadError(
                f"the run in {folder} finished after round {state.round}, but began with another initial model: "
                "use another folder for a new run, or pass the initial model of this run"
            )
        logger.info("already finished: %s has the model after round %d of %d", folder, state.round, num_rounds)
        return state
    logger.info("resumed after round %d of %d from %s", state.round, num_rounds, folder)
    if other:
        logger.warning(
            "the run in %s began with another initial model, so the given one is not used: to start a new run with "
            "it, use another folder",
            folder,
        )
    return state


def _random_state(stored: Any) -> tuple[Any, ...]:
    """Return the stored state of Python's generator in the form that ``random.setstate`` takes.

    Raises:
        PayloadError: it is not a valid state.
    """
    try:
        version, numbers, gauss = stored
        if gauss is not None and type(gauss) is not float:
            raise TypeError(f"{gauss!r} is not a number")
        state = version, tuple(numbers), gauss
        generator = random.Random()  # noqa: S311  (not the one that Flower draws from)
        generator.setstate(state)
        if generator.getstate() != state:
            raise ValueError("a number is out of range")
    except (ValueError, TypeError, OverflowError) as error:
        raise PayloadError(f"the checkpoint's random state is damaged: {error}") from None
    return state


def settings_of(inner: Strategy, aggregate: str, policy: CompressionPolicy | TieredPolicy | None) -> dict[str, Any]:
    """Describe the settings that must not change when a run is resumed from a checkpoint."""
    described: Any = None
    if isinstance(policy, TieredPolicy):
        described = {"default": policy.default, **{name: _described(each) for name, each in policy.tiers.items()}}
    else:
        described = _described(policy)
    wrapped = " around ".join(type(layer).__name__ for layer in layers(inner))
    return {"strategy": wrapped, "aggregate": aggregate, "policy": described}


def _described(policy: CompressionPolicy | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    texts = {name: str(fields[name]) for name in ("format", "update_format", "uplink", "downlink")}
    encoding = policy.encoding()  # resolves the defaults that depend on the formats
    texts |= {"transform": encoding.transform, "rounding": encoding.rounding}
    by_name = [[pattern, str(fmt)] for pattern, fmt in dict(policy.format_by_name).items()]  # the first match counts
    return {
        **fields,
        **texts,
        "format_by_name": by_name,
        "include": list(policy.include),
        "exclude": list(policy.exclude),
    }


def _to_rows(history: Mapping[int, MetricRecord]) -> dict[str, dict[str, Any]]:
    return {str(number): dict(metrics.items()) for number, metrics in history.items()}


def _from_rows(rows: Mapping[str, Mapping[str, Any]]) -> dict[int, MetricRecord]:
    return {int(number): MetricRecord(dict(rows[number])) for number in sorted(rows, key=int)}


def _optimizer_state(inner: Strategy) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Return the attributes of the innermost strategy that hold arrays, other than the model itself."""
    found = {slot: _arrays(value) for slot, value in vars(innermost(inner)).items() if slot != _DERIVED}
    return {slot: arrays for slot, arrays in found.items() if arrays is not None}


def _arrays(value: object) -> dict[str, np.ndarray[Any, Any]] | None:
    items = dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, dict) else {"": value}
    known = np.ndarray | np.generic  # numpy turns arrays without dimensions into scalars
    arrays = {str(name): np.asarray(array) for name, array in items.items() if isinstance(array, known)}
    return arrays if arrays and len(arrays) == len(items) else None


def _value(kind: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if kind == "dict":
        return arrays
    return [arrays[str(i)] for i in range(len(arrays))] if kind == "list" else arrays[""]
