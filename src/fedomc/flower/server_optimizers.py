"""The steps of Flower's server optimizers, computed a stretch of a variable at a time, in memory or from file to file.

[Note: the same bits as Flower's]
Each step is that of the strategy's own ``aggregate_train``, given the mean of the replies in the variable's dtype: the
same elementwise operations of numpy in the same order, on stretches that stay in the processor's cache rather than on
copies of whole models. The results are therefore bitwise those of Flower: float32 throughout, except that with numpy 2
the learning rate of ``FedAdam`` is a float64, in which its last line is computed before it is rounded. The formulas are
those of Reddi et al., Adaptive Federated Optimization (arXiv 2003.00295), and of momentum in torch's SGD. A result
that is not finite is discarded with the new moments, where Flower would keep these. The other difference is ``FedAvgM``
with variables of bfloat16, float16 or integers: Flower goes on from its last result as it was before it was rounded,
this module from the model that was sent, as Flower does after a restart.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from fedomc import codec
from fedomc.errors import NonFiniteError
from fedomc.flower.aggregation import Mean, averages
from fedomc.flower.arrays import Values, array_of, in_dtype, stored_model
from fedomc.flower.downlink import Broadcast
from fedomc.serialization.checkpointing import CheckpointDraft
from fedomc.serialization.mapped_file import Scratch, Zeros

MODEL = "model"
"""The kind of a checkpoint's arrays that are the model; the others have the names of the strategy's attributes."""

Step = Callable[[Any, int, Values, Values, list[Values | None]], tuple[Values, list[Values]]]
"""Returns new values and moments, given the strategy, the round, the values, the mean, and the moments (None at first).

All arrays are stretches ``[n]``; none is modified.
"""


@dataclass
class RoundFiles:
    """The files to which the result of a round is written.

    Attributes:
        folder: of the checkpoints.
        zeros: gives the sums of the replies.
        progress: that of the checkpoint before, or one like it.
        draft: the checkpoint to which the model and the moments have been written.
        arrays: the model in it.
        moments: the moments in it, by attribute of the strategy and by name in the checkpoint.
    """

    folder: Path
    zeros: Zeros
    progress: Mapping[str, Any] = field(default_factory=dict)
    draft: CheckpointDraft | None = None
    arrays: Mapping[str, Array] = field(default_factory=dict)
    moments: dict[str, dict[str, Values]] = field(default_factory=dict)

    @functools.cached_property
    def scratch(self) -> Scratch:
        """Where the broadcasts of the round are."""
        return Scratch(self.folder)

    def discard(self) -> None:
        """Remove what has been written, unless the checkpoint is complete."""
        if self.draft is not None:
            self.draft.discard()
            self.draft = None


class _MemoryDraft:
    """New arrays in memory, which are written a stretch at a time like those of a ``CheckpointDraft``."""

    def __init__(self, kinds: Mapping[str, Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]]) -> None:
        self._arrays = {
            kind: {name: np.empty(shape, dtype) for name, (dtype, shape) in each.items()}
            for kind, each in kinds.items()
        }
        self._written = Counter[tuple[str, str]]()

    def write(self, kind: str, name: str, values: Values) -> None:
        """Write the next values of an array."""
        begin = self._written[kind, name]
        self._arrays[kind][name].reshape(-1)[begin : begin + values.size] = values
        self._written[kind, name] += values.size

    def array(self, kind: str, name: str) -> Values:
        """Return an array that has been written."""
        return self._arrays[kind][name]

    def model(self, like: ArrayRecord) -> ArrayRecord:
        """Return the model, with the dtypes of one like it, and release it here."""
        record = ArrayRecord()
        for name, array in like.items():
            record[name] = array_of(self._arrays[MODEL].pop(name), array.dtype)
        return record


class ServerOptimizer:
    """The optimizer of one of Flower's strategies, in a round.

    The moments are attributes of the strategy, in the form in which Flower keeps them.

    Args:
        inner: the strategy.
        number: the number of the round.
    """

    def __init__(self, inner: Strategy, number: int) -> None:
        self._inner, self._number = inner, number
        self._step, self._slots = _rule(inner)

    def update(self, broadcast: Broadcast, mean: Mean, files: RoundFiles | None) -> ArrayRecord:
        """Compute a new model, and replace the strategy's moments.

        Args:
            broadcast: the model as it was sent.
            mean: of the replies, whose sums are consumed.
            files: where the model and the moments are written; None keeps them in memory.

        Raises:
            NonFiniteError: a new value is NaN or infinite; the moments are as they were.
            OSError: a file cannot be written.
        """
        shapes = {name: broadcast.dense(name).shape for name in broadcast.arrays}
        kinds = {MODEL: {name: (broadcast.dense(name).dtype, shape) for name, shape in shapes.items()}}
        keys = {slot: self._keys(slot, broadcast) for slot in self._slots}
        for slot in self._slots:
            dtypes = {name: self._dtypes(broadcast, mean, name)[slot] for name in shapes}
            kinds[slot] = {keys[slot][name]: (dtypes[name], shape) for name, shape in shapes.items()}
        draft: CheckpointDraft | _MemoryDraft = _MemoryDraft(kinds)
        if files is not None:
            files.draft = draft = CheckpointDraft(files.folder, kinds, files.progress)
        for name in shapes:
            for _, new, moments in self._stretches(broadcast, mean, name):
                draft.write(MODEL, name, new)
                for slot, moment in zip(self._slots, moments, strict=True):
                    draft.write(slot, keys[slot][name], moment)
            mean.release(name)
        mean.close()
        written = {slot: {name: draft.array(slot, keys[slot][name]) for name in shapes} for slot in self._slots}
        self._assign(written)
        if isinstance(draft, _MemoryDraft):
            return draft.model(broadcast.arrays)
        assert files is not None
        files.moments = {slot: {keys[slot][n]: v for n, v in each.items()} for slot, each in written.items()}
        arrays = stored_model(draft.file, MODEL, broadcast.arrays)
        files.arrays = dict(arrays.items())  # the record may be changed by a subclass of the strategy
        return arrays

    def _stretches(self, broadcast: Broadcast, mean: Mean, name: str) -> Iterator[tuple[int, Values, list[Values]]]:
        """Yield the first index of each stretch of a variable, its new values in the dtype of the model, and moments.

        Raises:
            NonFiniteError: a new value is NaN or infinite.
        """
        current = broadcast.dense(name).reshape(-1)
        moments = [self._moments(slot, broadcast).get(name) for slot in self._slots]
        flat = [None if moment is None else moment.reshape(-1) for moment in moments]
        for start in range(0, current.size, codec.CHUNK):
            stop = min(start + codec.CHUNK, current.size)
            now = [None if moment is None else moment[start:stop] for moment in flat]
            with np.errstate(over="ignore", invalid="ignore"):  # the result is checked
                new, after = self._step(
                    self._inner, self._number, current[start:stop], mean.stretch(name, start, stop), now
                )
                new = in_dtype(new, broadcast.arrays[name].dtype)
            if not all(np.isfinite(values).all() for values in (new, *after)):
                raise NonFiniteError(f"{name} would become NaN or infinite")
            yield start, new, after

    def _dtypes(self, broadcast: Broadcast, mean: Mean, name: str) -> dict[str, np.dtype[Any]]:
        """Return the dtypes of a variable's moments."""
        none: list[Values | None] = [None] * len(self._slots)
        current = broadcast.dense(name).reshape(-1)[:0]
        _, after = self._step(self._inner, self._number, current, np.empty(0, mean.dtype(name)), none)
        return {slot: moment.dtype for slot, moment in zip(self._slots, after, strict=True)}

    # ---- moments, as Flower keeps them: a dict by name, or a list in the order of the model -------------------------

    def _moments(self, slot: str, broadcast: Broadcast) -> Mapping[str, Values]:
        stored = getattr(self._inner, slot) or {}
        return stored if isinstance(stored, dict) else dict(zip(broadcast.arrays, stored, strict=True))

    def _keys(self, slot: str, broadcast: Broadcast) -> dict[str, str]:
        """Return the names of a slot's arrays in a checkpoint."""
        return {name: str(i) if slot in _LISTS else name for i, name in enumerate(broadcast.arrays)}

    def _assign(self, slots: Mapping[str, Mapping[str, Values]]) -> None:
        for slot, moments in slots.items():
            setattr(self._inner, slot, list(moments.values()) if slot in _LISTS else dict(moments))


def has_optimizer(inner: Strategy) -> bool:
    """Return whether a strategy's ``aggregate_train`` is Flower's own, and one that this module computes."""
    changed = "_compute_deltat_and_mt"  # a part of Flower's method, which a subclass may have replaced
    own = changed in vars(inner) or any(changed in vars(cls) for cls in type(inner).__mro__ if cls not in _FLOWERS)
    return averages(inner) and owner_of(inner) in _STEPS and not own


def release_current(inner: Strategy) -> None:
    """Release the copy of the model that Flower's optimizers keep, and that this module does not need."""
    if has_optimizer(inner) and hasattr(inner, "current_arrays"):
        inner.current_arrays = None


# ---- the steps ------------------------------------------------------------------------------------------------------


def _average(inner: Any, number: int, current: Values, mean: Values, _: list[Any]) -> tuple[Values, list[Values]]:
    return mean, []


def _momentum(
    inner: FedAvgM, number: int, current: Values, mean: Values, moments: list[Values | None]
) -> tuple[Values, list[Values]]:
    descent = current - mean
    after = []
    if moments:
        (former,) = moments
        descent = descent if former is None else inner.server_momentum * former + descent
        after = [descent]
    return current - inner.server_learning_rate * descent, after


def _adaptive(second: Callable[[Any, Values, Values], Values], rate: Callable[[Any, int], Any]) -> Step:
    """Return the step of a strategy whose update is ``rate * m / (sqrt(v) + tau)``, with the given ``v`` and rate."""

    def step(
        inner: Any, number: int, current: Values, mean: Values, moments: list[Values | None]
    ) -> tuple[Values, list[Values]]:
        change = mean - current
        m, v = (np.zeros_like(mean) if moment is None else moment for moment in moments)
        m = inner.beta_1 * m + (1 - inner.beta_1) * change
        v = second(inner, v, change**2)
        return current + rate(inner, number) * m / (np.sqrt(v) + inner.tau), [m, v]

    return step


def _corrected_rate(inner: FedAdam, number: int) -> Any:
    """Return Adam's learning rate with the correction of both moments' bias; a float64 of numpy, as Flower's."""
    second = np.sqrt(1 - np.power(inner.beta_2, number + 1.0))
    return inner.eta * second / (1 - np.power(inner.beta_1, number + 1.0))


def _yogi(inner: FedYogi, v: Values, square: Values) -> Values:
    result: Values = v - (1.0 - inner.beta_2) * square * np.sign(v - square)
    return result


_STEPS: dict[type, Step] = {
    FedAvg: _average,
    FedAvgM: _momentum,
    FedAdam: _adaptive(lambda inner, v, square: inner.beta_2 * v + (1 - inner.beta_2) * square, _corrected_rate),
    FedYogi: _adaptive(_yogi, lambda inner, number: inner.eta),
    FedAdagrad: _adaptive(lambda inner, v, square: v + square, lambda inner, number: inner.eta),
}

_FLOWERS = {cls for strategy in _STEPS for cls in strategy.__mro__}

_LISTS = ("momentum_vector",)
"""The attributes that are lists."""


def _rule(inner: Strategy) -> tuple[Step, tuple[str, ...]]:
    """Return the step of a strategy and the names of its moments."""
    owner = owner_of(inner)
    if owner is FedAvgM:
        assert isinstance(inner, FedAvgM)
        if not inner.server_opt:
            return _average, ()
        return _momentum, ("momentum_vector",) if inner.server_momentum > 0.0 else ()
    return _STEPS[owner], () if owner is FedAvg else ("m_t", "v_t")


def owner_of(inner: Strategy) -> type:
    """Return the class that defines a strategy's ``aggregate_train``."""
    return next(cls for cls in type(inner).__mro__ if "aggregate_train" in vars(cls))
