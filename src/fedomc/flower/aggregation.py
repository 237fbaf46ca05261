"""From replies to a model: a running mean in bounded memory, or all replies at once for strategies that need them all.

[Note: what is added up, and how exactly]
The server holds FP32 values V; a client is sent S (V itself or its codes' values Q(V)), trains, and returns R. Plain
averaging (``weights``, the paper) makes the mean of the R the new model, and with it the error Q(V) - V, which is the
same for every client and larger than a round's update. ``delta`` takes V + (R - S) for R: the error of the broadcast
cancels, and what remains is the rounding of the client's own steps. With two parts the client returns R - S itself, the
update.

Both are the mean of R - S plus something that the server has. So only the R - S are added up, and float32 rounds on
their scale, about a hundredth of a weight's: 4 bytes a parameter keep more of the result than float64 sums of the R
would, since the result is float32. The part of the error that grows with the number of replies is held down by moving
every ``BATCH`` of them into a float64 total, which smaller cohorts never allocate. With u = 2**-24, n replies, positive
weights w, d = R - S, b = min(n, BATCH), and mean|.| weighted, the result differs from the exact one by at most

    (b + 8) u mean|d| + u |result|                for ``delta``, and
    (b + 8) u mean|d| + 8 u (|V| + mean|S|)       for ``weights``,

in whatever order they arrive, as long as nothing is subnormal: two orders differ by no more than twice that.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from torch import Tensor

from fedomc import codec
from fedomc.flower.arrays import LazyArray, Values, dense_array, in_dtype
from fedomc.flower.downlink import Broadcast
from fedomc.flower.variables import ReplyVariable, add_changes
from fedomc.methods import Packed

AGGREGATES = ("delta", "weights")

BATCH = 64
"""How many replies are summed in float32 before they go into a float64 total."""

_AVERAGING = (FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad)
"""The strategies of Flower whose own ``aggregate_train`` needs only the mean of the replies."""

_HEADROOM = 40
"""The weights may add up to 2**40 times the first one before all sums have to be scaled down."""


def averages(strategy: Strategy) -> bool:
    """Tell whether a strategy needs only the weighted mean of the replies' arrays."""
    if not isinstance(strategy, FedAvg) or "aggregate_train" in vars(strategy):
        return False
    above = type(strategy).__mro__[: type(strategy).__mro__.index(FedAvg)]
    return all(cls in _AVERAGING or "aggregate_train" not in vars(cls) for cls in above)


def is_the_mean(strategy: Strategy) -> bool:
    """Tell whether the mean is a strategy's result, as with ``FedAvg`` and ``FedProx``."""
    return averages(strategy) and type(strategy).aggregate_train is FedAvg.aggregate_train


class Mean:
    """A running weighted mean of replies, which takes 4 bytes a parameter, or 12 from ``BATCH`` replies on.

    Args:
        broadcast: what was sent.
        of_weights: whether the mean is of the weights that the clients returned; otherwise it is the server's weights
            plus the mean of what the clients changed.
    """

    def __init__(self, broadcast: Broadcast, *, of_weights: bool) -> None:
        self.weight = 0.0
        self._broadcast = broadcast
        self._of_weights = of_weights
        self._unit = math.ulp(0.0)
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._sent: dict[tuple[str, int], tuple[Packed, float]] = {}

    def add(self, replies: Sequence[tuple[Mapping[str, ReplyVariable], float]]) -> None:
        """Add replies with their weights, one variable of all of them after the other; nothing of them is kept.

        Adding several at a time is faster: the sums, which are most of the memory traffic, are read and written once.
        """
        replies = [(reply, weight) for reply, weight in replies if weight > 0]
        if not replies:
            return
        together = math.fsum(weight for _, weight in replies)
        if self.weight + together / self._unit > 1:
            self._choose_unit(together)
        if self._count + len(replies) > BATCH:
            self._move()
        # The kernels take float32: the weight that counts is the one that they see.
        replies = [(reply, float(np.float32(weight / self._unit))) for reply, weight in replies]
        for name in replies[0][0]:
            if name not in self._sums:
                values = self._broadcast.dense(name)
                kind = torch.float32 if values.dtype == np.float32 else torch.float64
                self._sums[name] = torch.zeros(values.size, dtype=kind, device="cpu")
            add_changes(self._sums[name], [(reply[name], weight) for reply, weight in replies])
        for reply, weight in replies:
            if self._of_weights:
                self._add_sent(reply, weight)
            self.weight += weight
        self._count += len(replies)

    def scale(self, factor: float) -> None:
        """Multiply the weight of everything that was added by a factor from 0 to 1."""
        self._rescale(factor, 2.0 ** (math.frexp(self.weight * self._unit * factor)[1] + _HEADROOM))

    def result(self) -> ArrayRecord:
        """Return the mean as arrays each of which gives its values once; computing them uses up its sum."""
        record = ArrayRecord()
        for name in self._broadcast.arrays:
            values = self._broadcast.dense(name)
            record[name] = LazyArray(values.dtype, values.shape, functools.partial(self._take, name))
        return record

    def arrays(self) -> ArrayRecord:
        """Return the mean as plain arrays, in the dtypes of the model; this uses up all sums."""
        record = ArrayRecord()
        for name, array in self._broadcast.arrays.items():
            record[name] = dense_array(in_dtype(self._take(name), array.dtype))
        return record

    def _take(self, name: str) -> Values:
        total, own = self._sums.pop(name), self._broadcast.dense(name)
        factor = 1 / self.weight
        if name in self._totals:
            total.copy_(self._totals.pop(name).add_(total).mul_(factor))
            factor = 1.0
        sent = [(packed, weight / self.weight) for (key, _), (packed, weight) in self._sent.items() if key == name]
        server = 1 - sum(share for _, share in sent)
        values, flat = total.numpy(), own.reshape(-1)
        for start in range(0, values.size, codec.CHUNK):  # a chunk stays in the processor's cache
            stop = min(start + codec.CHUNK, values.size)
            part = values[start:stop]
            part *= factor
            for packed, share in sent:
                packed.add_to(total[start:stop], share, start)
            part += flat[start:stop] if server == 1 else flat[start:stop] * part.dtype.type(server)
        return values.reshape(own.shape)

    def _add_sent(self, reply: Mapping[str, ReplyVariable], weight: float) -> None:
        for name, variable in reply.items():
            if isinstance(variable.sent, Packed):
                key = name, id(variable.sent)
                self._sent[key] = variable.sent, weight + self._sent.get(key, (variable.sent, 0.0))[1]

    def _move(self) -> None:
        for name, total in self._sums.items():
            if name not in self._totals:
                self._totals[name] = total.double()
            else:
                self._totals[name].add_(total)
            total.zero_()
        self._count = 0

    def _choose_unit(self, weight: float) -> None:
        """Choose a power of two that all weights together stay below: then no sum leaves the range of float32."""
        self._rescale(1.0, 2.0 ** (math.frexp(self.weight * self._unit + weight)[1] + _HEADROOM))

    def _rescale(self, factor: float, unit: float) -> None:
        """Multiply all weights by a factor and count them in another unit, in one step that no sum underflows in."""
        ratio = factor * self._unit / unit
        for tensor in (*self._sums.values(), *self._totals.values()):
            tensor.mul_(ratio)
        self.weight *= ratio
        self._sent = {key: (packed, weight * ratio) for key, (packed, weight) in self._sent.items()}
        self._unit = unit


def decoded(broadcast: Broadcast, reply: Mapping[str, ReplyVariable], *, of_weights: bool) -> ArrayRecord:
    """Return the arrays of a reply in the model's order; each is decoded when it is asked for its values.

    Until then a reply takes no more memory than its bytes. Strategies that look at one variable at a time
    (``FedMedian``, ``FedTrimmedAvg``) hold that variable of all replies in FP32; those that stack models (``Krum``,
    ``MultiKrum``, ``Bulyan``) hold all models in FP32, more than once.
    """
    record = ArrayRecord()
    for name in broadcast.arrays:
        variable, server = reply[name], broadcast.dense(name)

        def values(name: str = name, variable: ReplyVariable = variable) -> Values:
            return _values(variable, broadcast.dense(name), of_weights)

        record[name] = LazyArray(server.dtype, server.shape, values)
    return record


def _values(variable: ReplyVariable, server: Values, of_weights: bool) -> Values:
    """Decode the weights of a reply, or the server's weights plus what the client changed."""
    if not variable.is_update and (of_weights or not isinstance(variable.sent, Packed)):
        values = variable.read()
        if not isinstance(values, Packed):
            return values.copy()
        return values.decode(torch.empty(server.size, dtype=torch.float32, device="cpu")).numpy().reshape(server.shape)
    flat = variable.change(torch.empty(server.size, dtype=torch.float32, device="cpu"))
    if of_weights and isinstance(variable.sent, Packed):
        return variable.sent.add_to(flat).numpy().reshape(server.shape)
    return flat.numpy().reshape(server.shape) + server
