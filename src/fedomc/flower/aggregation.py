"""Aggregates replies into a model: as a running mean in bounded memory, or all at once if a strategy needs them all.

[Note: sums of changes]
The server holds FP32 values V. A client is sent S, which is either V or its rounded values Q(V), trains and returns R.
Plain averaging (``weights``, as in the paper) takes the mean of all R as the new model. This includes the broadcast's
error Q(V) - V, which is the same for all clients and larger than the update of a round. ``delta`` averages V + (R - S)
instead: the broadcast's error cancels, and only the rounding of the client's own steps remains. With two parts, the
client returns the update R - S itself.

In both cases the result is the mean of R - S plus something that the server already has. Only R - S is therefore
summed, so float32 rounds on the scale of the changes, about a hundredth of that of the weights. With 4 bytes per
parameter this is more accurate than float64 sums of R would be, because the result is float32 anyway. To bound the part
of the error that grows with the number of replies, the sum is moved to a float64 total after every ``BATCH`` replies;
smaller cohorts never allocate this total. Let u = 2**-24, n the number of replies, w their positive weights, d = R - S,
b = min(n, BATCH), and mean|.| the weighted mean. The result then differs from the exact one by at most

    (b + 8) u mean|d| + u |result|                for ``delta``, and
    (b + 8) u mean|d| + 8 u (|V| + mean|S|)       for ``weights``,

for any order of the replies, as long as no value is subnormal. Two orders differ by at most twice that.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from torch import Tensor

from fedomc import codec
from fedomc.flower.arrays import LazyArray, Values
from fedomc.flower.downlink import Broadcast
from fedomc.flower.variables import ReplyVariable, add_changes
from fedomc.methods import Packed
from fedomc.serialization.mapped_file import Zeros, dtype_of

AGGREGATES = ("delta", "weights")

BATCH = 64
"""The number of replies that are summed in float32 before the sum is moved to a float64 total."""

_AVERAGING = (FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad)
"""The strategies of Flower whose ``aggregate_train`` needs only the mean of the replies."""

_HEADROOM = 40
"""The weights may sum to 2**40 times the first one before all sums have to be scaled down."""


def averages(strategy: Strategy) -> bool:
    """Return whether a strategy needs only the weighted mean of the replies' arrays."""
    if not isinstance(strategy, FedAvg) or "aggregate_train" in vars(strategy):
        return False
    above = type(strategy).__mro__[: type(strategy).__mro__.index(FedAvg)]
    return all(cls in _AVERAGING or "aggregate_train" not in vars(cls) for cls in above)


class Mean:
    """A running weighted mean of replies, with 4 bytes per parameter, or 12 if there are more than ``BATCH`` replies.

    Args:
        broadcast: the model as it was sent to the clients.
        of_weights: whether to average the weights that the clients returned; otherwise, the mean change of the clients
            is added to the server's weights.
        zeros: gives the sums, in files without names; None keeps them in memory.
    """

    def __init__(self, broadcast: Broadcast, *, of_weights: bool, zeros: Zeros | None = None) -> None:
        self.weight = 0.0
        self._broadcast = broadcast
        self._of_weights = of_weights
        self._given = zeros
        self._whole: list[Tensor] = []
        self._unit = math.ulp(0.0)
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._sent: dict[str, dict[int, tuple[Packed, float]]] = {}

    def add(self, replies: Sequence[tuple[Mapping[str, ReplyVariable], float]], *, unchanged: float = 0.0) -> None:
        """Add replies with their weights, one variable at a time; no reference to the replies is kept.

        Adding several replies together is faster, because the sums, which dominate the memory traffic, are read and
        written only once.

        Args:
            replies: the variables and the weight of each reply.
            unchanged: the weight of clients that changed nothing, which brings the mean closer to the server's weights.
        """
        replies = [(reply, weight) for reply, weight in replies if weight > 0]
        together = math.fsum([unchanged, *(weight for _, weight in replies)])
        if not together:
            return
        if self.weight + together / self._unit > 1:
            self._choose_unit(together)
        if self._count + len(replies) > BATCH:
            self._move()
        # The kernels take float32 weights, so the total must contain the rounded weights.
        replies = [(reply, float(np.float32(weight / self._unit))) for reply, weight in replies]
        if not self._sums:
            self._sums = self._zeros({name: self.dtype(name) for name in self._broadcast.arrays})
        for name, total in self._sums.items():
            add_changes(total, [(reply[name], weight) for reply, weight in replies])
        for reply, weight in replies:
            if self._of_weights:
                self._add_sent(reply, weight)
            self.weight += weight
        self.weight += unchanged / self._unit
        self._count += len(replies)

    def scale(self, factor: float) -> None:
        """Multiply the weight of all replies added so far by a factor from 0 to 1."""
        self._rescale(factor, 2.0 ** (math.frexp(self.weight * self._unit * factor)[1] + _HEADROOM))

    def result(self) -> ArrayRecord:
        """Return the mean as lazy arrays; the values of each can be read only once, because this consumes its sum."""
        record = ArrayRecord()
        for name in self._broadcast.arrays:
            values = self._broadcast.dense(name)
            record[name] = LazyArray(values.dtype, values.shape, functools.partial(self._take, name))
        return record

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the dtype in which a variable is summed."""
        return np.dtype(np.float32 if self._broadcast.dense(name).dtype in (np.float32, np.float16) else np.float64)

    def stretch(self, name: str, start: int, stop: int) -> Values:
        """Return the mean's values between two indices, the first of which is a multiple of ``BLOCK``."""
        values, factor = self._sums[name][start:stop].numpy(), 1 / self.weight
        if name in self._totals:
            values = ((self._totals[name][start:stop].numpy() + values) * factor).astype(values.dtype)
        else:
            values = values * factor
        server, part = 1.0, torch.from_numpy(values)
        if name in self._sent:
            sent = [(packed, weight / self.weight) for packed, weight in self._sent[name].values()]
            server = 1 - sum(share for _, share in sent)
            for packed, share in sent:
                packed.add_to(part, share, start)
        own = self._broadcast.dense(name).reshape(-1)[start:stop]
        values += own if server == 1 else own * values.dtype.type(server)
        return values

    def release(self, name: str) -> None:
        """Release the sum of a variable."""
        del self._sums[name]
        self._totals.pop(name, None)

    def close(self) -> None:
        """Give the files of the sums back, for another mean; nothing may use this one any more."""
        self._sums, self._totals = {}, {}
        for whole in self._whole:
            assert self._given is not None
            self._given.give_back(whole)
        self._whole = []

    def _take(self, name: str) -> Values:
        values, shape = self._sums[name].numpy(), self._broadcast.dense(name).shape
        for start in range(0, values.size, codec.CHUNK):  # a chunk stays in the processor's cache
            stop = min(start + codec.CHUNK, values.size)
            values[start:stop] = self.stretch(name, start, stop)
        self.release(name)
        return values.reshape(shape)

    def _zeros(self, dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, Tensor]:
        """Return flat zeros for the variables; in a file, all of a dtype are one tensor."""
        sizes = {name: self._broadcast.dense(name).size for name in dtypes}
        zeros = dict[str, Tensor]()
        for dtype in set(dtypes.values()):
            names, kind = [name for name in dtypes if dtypes[name] == dtype], dtype_of(dtype)
            if self._given is None:
                zeros |= {name: torch.zeros(sizes[name], dtype=kind, device="cpu") for name in names}
                continue
            whole, begin = self._given.take(sum(_aligned(sizes[name]) for name in names), kind), 0
            self._whole.append(whole)
            for name in names:
                zeros[name] = whole[begin : begin + sizes[name]]
                begin += _aligned(sizes[name])
        return zeros

    def _add_sent(self, reply: Mapping[str, ReplyVariable], weight: float) -> None:
        for name, variable in reply.items():
            if isinstance(variable.sent, Packed):
                parts, key = self._sent.setdefault(name, {}), id(variable.sent)
                parts[key] = variable.sent, weight + parts.get(key, (variable.sent, 0.0))[1]

    def _move(self) -> None:
        if not self._totals:
            self._totals = self._zeros(dict.fromkeys(self._sums, np.dtype(np.float64)))
        for name, total in self._sums.items():
            self._totals[name].add_(total)
            total.zero_()
        self._count = 0

    def _choose_unit(self, weight: float) -> None:
        """Choose a unit of the weights, a power of two above their sum, so that no sum exceeds the range of float32."""
        self._rescale(1.0, 2.0 ** (math.frexp(self.weight * self._unit + weight)[1] + _HEADROOM))

    def _rescale(self, factor: float, unit: float) -> None:
        """Multiply all weights by a factor and change their unit, in a single step so that no sum underflows."""
        ratio = factor * self._unit / unit
        for tensor in (*self._sums.values(), *self._totals.values()):
            tensor.mul_(ratio)
        self.weight *= ratio
        for parts in self._sent.values():
            for key, (packed, weight) in parts.items():
                parts[key] = packed, weight * ratio
        self._unit = unit


def _aligned(numel: int) -> int:
    return -(-numel // 16) * 16
