"""Replies as strategies of Flower read them: arrays that are decoded when their values are read.

[Note: stretches]
The median and the trimmed mean work value by value, and Flower computes them a variable at a time, for which it stacks
this variable of all replies in FP32. The largest variable of a language model, its embedding, is a third of the model
or more. These strategies are therefore given stretches of variables, as if each was a variable of its own, and their
results are joined: the values are the same, and only a stretch of all replies is decoded at a time.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg

from fedomc.flower.arrays import STRETCH, LazyArray, Values, dense_array
from fedomc.flower.downlink import Broadcast
from fedomc.flower.variables import ReplyVariable
from fedomc.methods import Packed

VALUE_BY_VALUE = (FedMedian, FedTrimmedAvg)
"""The classes of Flower whose ``aggregate_train`` treats each value of the model by itself."""

Variables = Mapping[str, ReplyVariable]


def decoded(broadcast: Broadcast, reply: Variables, *, of_weights: bool) -> ArrayRecord:
    """Return the arrays of a reply in the order of the model; each is decoded when its values are read.

    Until then, a reply takes no more memory than its bytes. Strategies that stack models, such as ``Bulyan``, hold
    several FP32 copies of all models.
    """
    record = ArrayRecord()
    for name in broadcast.arrays:
        record[name] = _array(broadcast, name, reply[name], of_weights)
    return record


class Stretches:
    """The replies of a round as models whose variables are stretches of the variables; see the note in this module.

    Args:
        broadcast: the model as it was sent.
        replies: the variables of all replies. One that is entropy-coded in a reply can only be decoded as a whole, and
            stays whole.
    """

    def __init__(self, broadcast: Broadcast, replies: Iterable[Variables]) -> None:
        self._broadcast = broadcast
        self._whole = {name for reply in replies for name, variable in reply.items() if callable(variable.held)}
        self._keys = {
            name: [f"{name}[{start}:{stop}]" for start, stop in self._ranges(name)] for name in broadcast.arrays
        }

    def decoded(self, reply: Variables, *, of_weights: bool) -> ArrayRecord:
        """Return the stretches of a reply, as the function ``decoded`` returns its variables."""
        record = ArrayRecord()
        for name, keys in self._keys.items():
            for key, part in zip(keys, self._ranges(name), strict=True):
                record[key] = _array(self._broadcast, name, reply[name], of_weights, part)
        return record

    def server(self) -> dict[str, Values]:
        """Return the stretches of the server's model, as views."""
        return {
            key: self._broadcast.dense(name).reshape(-1)[start:stop]
            for name, keys in self._keys.items()
            for key, (start, stop) in zip(keys, self._ranges(name), strict=True)
        }

    def joined(self, stretches: ArrayRecord) -> ArrayRecord:
        """Return the variables of a model, given its stretches, which are taken from the record."""
        record = ArrayRecord()
        for name, keys in self._keys.items():
            parts = [stretches.pop(key).numpy().reshape(-1) for key in keys]
            record[name] = dense_array(np.concatenate(parts).reshape(self._broadcast.dense(name).shape))
        return record

    def _ranges(self, name: str) -> list[tuple[int, int]]:
        """Split the values of a variable; the last range takes the rest, as numpy sums a single column differently."""
        numel = self._broadcast.dense(name).size
        count = 1 if name in self._whole else max(1, numel // STRETCH)
        return [(i * STRETCH, numel if i == count - 1 else (i + 1) * STRETCH) for i in range(count)]


def _array(
    broadcast: Broadcast, name: str, variable: ReplyVariable, of_weights: bool, part: tuple[int, int] | None = None
) -> LazyArray:
    """Return a variable of a reply, or its values from one index to another as a flat array."""
    server = broadcast.dense(name)
    shape = server.shape if part is None else (part[1] - part[0],)

    def values() -> Values:
        start, stop = part or (0, server.size)
        return _values(variable, broadcast.dense(name).reshape(-1), of_weights, start, stop).reshape(shape)

    return LazyArray(server.dtype, shape, values)


def _values(variable: ReplyVariable, server: Values, of_weights: bool, start: int, stop: int) -> Values:
    """Decode the weights of a reply, or the server's flat weights plus the client's change, between two indices."""
    held, room = variable.read(), torch.empty(stop - start, dtype=torch.float32, device="cpu")
    if not variable.is_update and (of_weights or not isinstance(variable.sent, Packed)):
        if not isinstance(held, Packed):
            return held.reshape(-1)[start:stop].copy()
        return held.decode(room, start).numpy()
    change = variable.change(held, room, start)
    if of_weights and isinstance(variable.sent, Packed):
        return variable.sent.add_to(change, 1.0, start).numpy()
    return change.numpy() + server[start:stop]
