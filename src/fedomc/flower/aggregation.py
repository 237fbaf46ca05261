"""From replies to a model: a running mean in bounded memory, or all replies at once for who needs them all.

[Note: what is added up, and how exactly]
The server holds FP32 values V; a client is sent S (V itself or its codes' values Q(V)), trains, and returns R. Plain
averaging (``value``, the paper) makes the mean of the R the new model, and with it the error Q(V) - V, which is the
same for every client and larger than a round's update. ``difference`` takes V + (R - S) for R: the error of the
broadcast cancels, and what remains is the rounding of the client's own steps. With two parts the client returns R - S
itself, the update.

Both are the mean of R - S and something that the server has. So only the R - S are added up, and it is their size,
about a hundredth of a weight's, on which float32 rounds: 4 bytes a parameter give more of the result than float64 sums
of the R would leave in it, since the result is float32. What grows with their number is held down by moving every
``BATCH`` of them into a float64 total, which smaller cohorts never allocate. With u = 2**-24, n replies, positive
weights w, d = R - S, b = min(n, BATCH), and mean|.| weighted, the result differs from the exact one by at most

    (b + 8) u mean|d| + u |result|                for ``difference``, and
    (b + 8) u mean|d| + 8 u (|V| + mean|S|)       for ``value``,

in whatever order they arrive, as long as nothing is subnormal: two orders differ by no more than twice that.
"""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from torch import Tensor

from fedomc import codec
from fedomc.flower.broadcast import Broadcast, Returned, Values, add_changes
from fedomc.methods.packed import Packed

AGGREGATES = ("difference", "value")

BATCH = 64
"""Replies that are summed in float32 before they go into a float64 total."""

_AVERAGING = (FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad)
"""The strategies of Flower whose own ``aggregate_train`` needs no more of the replies than their mean."""

_HEADROOM = 40
"""The first weight may be met by 2**40 like it before all sums have to be scaled down."""


def averages(strategy: Strategy) -> bool:
    """Tell whether a strategy needs no more of the replies' arrays than their weighted mean."""
    if not isinstance(strategy, FedAvg) or "aggregate_train" in vars(strategy):
        return False
    above = type(strategy).__mro__[: type(strategy).__mro__.index(FedAvg)]
    return all(cls in _AVERAGING or "aggregate_train" not in vars(cls) for cls in above)


def is_the_mean(strategy: Strategy) -> bool:
    """Tell whether the mean of the arrays is all that a strategy makes of them: ``FedAvg``, ``FedProx``."""
    return averages(strategy) and type(strategy).aggregate_train is FedAvg.aggregate_train


class Mean:
    """A running weighted mean of replies, in 4 bytes a parameter; in 12 from ``BATCH`` replies on.

    Args:
        broadcast: what was sent.
        value: whether the mean is of the replies' values; otherwise of the server's with what each client changed.
    """

    def __init__(self, broadcast: Broadcast, *, value: bool) -> None:
        self.weight = 0.0
        self._broadcast = broadcast
        self._value = value
        self._unit = math.ulp(0.0)
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._sent: dict[tuple[str, int], tuple[Packed, float]] = {}

    def add(self, replies: Sequence[tuple[Mapping[str, Returned], float]]) -> None:
        """Add replies with their weights, of all of them one variable at a time; nothing of them is kept.

        The fewer times a sum is read and written, the faster it goes: that is most of what there is to move.
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
                self._sums[name] = torch.zeros(values.size, dtype=kind)
            add_changes(self._sums[name], [(reply[name], weight) for reply, weight in replies])
        for reply, weight in replies:
            if self._value:
                self._add_sent(reply, weight)
            self.weight += weight
        self._count += len(replies)

    def result(self) -> ArrayRecord:
        """Give the mean as arrays that each can be asked once for its values, which takes the place of its sum."""
        record = ArrayRecord()
        for name in self._broadcast.arrays:
            values = self._broadcast.dense(name)
            record[name] = LazyArray(values.dtype, values.shape, functools.partial(self._take, name))
        return record

    def arrays(self) -> ArrayRecord:
        """Give the mean as plain arrays, in the dtypes of the model; nothing is left here."""
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
        for start in range(0, values.size, codec.CHUNK):  # which stays in the cache
            stop = min(start + codec.CHUNK, values.size)
            part = values[start:stop]
            part *= factor
            for packed, share in sent:
                packed.add_to(total[start:stop], share, start)
            part += flat[start:stop] if server == 1 else flat[start:stop] * part.dtype.type(server)
        return values.reshape(own.shape)

    def _add_sent(self, reply: Mapping[str, Returned], weight: float) -> None:
        for name, returned in reply.items():
            if isinstance(returned.sent, Packed):
                key = name, id(returned.sent)
                self._sent[key] = returned.sent, weight + self._sent.get(key, (returned.sent, 0.0))[1]

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
        unit = 2.0 ** (math.frexp(self.weight * self._unit + weight)[1] + _HEADROOM)
        for tensor in (*self._sums.values(), *self._totals.values()):
            tensor.mul_(self._unit / unit)
        self.weight *= self._unit / unit
        self._sent = {key: (packed, w * (self._unit / unit)) for key, (packed, w) in self._sent.items()}
        self._unit = unit


class LazyArray(Array):
    """An ``Array`` whose values are made when they are asked for; it is never sent."""

    def __init__(self, dtype: object, shape: tuple[int, ...], values: Callable[[], Values]) -> None:
        super().__init__(str(dtype), tuple(shape), "fedomc.lazy", b"")
        self.__dict__["_values"] = values

    def numpy(self) -> Values:
        """Make the values."""
        values: Values = self.__dict__["_values"]()
        return values


def decoded(broadcast: Broadcast, reply: Mapping[str, Returned], *, value: bool) -> ArrayRecord:
    """Give the arrays of a reply for who needs them all, in the model's order: each is decoded when it is asked for.

    Until then a reply takes no more memory than its bytes. Strategies that look at a variable at a time (``FedMedian``,
    ``FedTrimmedAvg``) hold that one of all replies in FP32, those that stack models (``Krum``, ``MultiKrum``,
    ``Bulyan``) hold all models in FP32, more than once.
    """
    record = ArrayRecord()
    for name in broadcast.arrays:
        returned, server = reply[name], broadcast.dense(name)

        def values(name: str = name, returned: Returned = returned) -> Values:
            return _values(returned, broadcast.dense(name), value)

        record[name] = LazyArray(server.dtype, server.shape, values)
    return record


def _values(returned: Returned, server: Values, value: bool) -> Values:
    """Decode the value of a reply, or the server's value with what the client changed."""
    if not returned.is_update and (value or not isinstance(returned.sent, Packed)):
        values = returned.read()
        if not isinstance(values, Packed):
            return values.copy()
        return values.decode(torch.empty(server.size, dtype=torch.float32)).numpy().reshape(server.shape)
    flat = returned.change(torch.empty(server.size, dtype=torch.float32))
    if value:
        assert isinstance(returned.sent, Packed)
        return returned.sent.add_to(flat).numpy().reshape(server.shape)
    return flat.numpy().reshape(server.shape) + server


def dense_array(values: Values) -> Array:
    """Put values into an ``Array``, with one copy where Flower makes three."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    data = b"".join((header.getvalue(), np.asarray(values, order="C").reshape(-1).view(np.uint8).data))
    return Array(str(values.dtype), tuple(values.shape), "numpy.ndarray", data)


def in_dtype(values: Values, dtype: str) -> Values:
    """Convert values; to whole numbers by rounding."""
    wanted = np.dtype(dtype)
    if values.dtype == wanted:
        return values
    return np.asarray(values if wanted.kind == "f" else np.rint(values)).astype(wanted)
