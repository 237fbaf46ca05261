"""The cost of a round: bytes, seconds and compression errors, in total and by variable."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord

from fedomc.flower.arrays import records_of
from fedomc.flower.mapped import nbytes_of


@dataclass(frozen=True)
class Traffic:
    """The bytes of the arrays in a round's training messages.

    Attributes:
        round: the number of the round.
        sent: the number of messages that were sent to clients.
        received: the number of replies that were used.
        down_bytes: the bytes of all messages to clients.
        up_bytes: the bytes of all replies that were used.
    """

    round: int
    sent: int
    received: int = 0
    down_bytes: int = 0
    up_bytes: int = 0


@dataclass
class RoundReport:
    """The cost of a round of training: network bytes, server time and compression errors.

    Attributes:
        round: the number of the round.
        down_bytes: the bytes of all messages to clients, by variable.
        up_bytes: the bytes of all replies that were used, by variable.
        encode_seconds: the time for encoding the payloads.
        decode_seconds: the time for checking replies and, with a streaming mean, for decoding them into it.
        aggregate_seconds: the time for the rest of the aggregation, including decoding in strategies that need all
            replies.
        staleness: in an asynchronous run, the mean number of steps that the server made between sending a model and
            using the reply to it.
        errors: for each compressed variable, the sums of squares of the compression error and of the server's values;
            if it was sent in several formats, those of the format with the largest error.
    """

    round: int
    down_bytes: Counter[str] = field(default_factory=Counter)
    up_bytes: Counter[str] = field(default_factory=Counter)
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    staleness: float | None = None

    @property
    def compression_error(self) -> float:
        """The root mean square of the broadcast's compression error, relative to that of the values."""
        return _relative(sum(error for error, _ in self.errors.values()), sum(size for _, size in self.errors.values()))

    def totals(self) -> dict[str, int | float]:
        """Return the figures of the whole model."""
        return {
            "down-bytes": self.down_bytes.total(),
            "up-bytes": self.up_bytes.total(),
            "encode-seconds": self.encode_seconds,
            "decode-seconds": self.decode_seconds,
            "aggregate-seconds": self.aggregate_seconds,
            "compression-error": self.compression_error,
            **({} if self.staleness is None else {"staleness": self.staleness}),
        }

    def by_variable(self) -> dict[str, dict[str, int | float]]:
        """Return the bytes of each variable in both directions, and the compression error if it was compressed."""
        rows: dict[str, dict[str, int | float]] = {}
        for name in self.down_bytes:
            rows[name] = {"down-bytes": self.down_bytes[name], "up-bytes": self.up_bytes[name]}
            if name in self.errors:
                rows[name]["compression-error"] = _relative(*self.errors[name])
        return rows

    def metrics(self, *, variables: bool = True) -> MetricRecord:
        """Return Flower metrics, such as ``fedomc.up-bytes`` and, for a variable, ``fedomc.up-bytes/layer.weight``."""
        record = MetricRecord({f"fedomc.{key}": value for key, value in self.totals().items()})
        if variables:
            for name, row in self.by_variable().items():
                record.update({f"fedomc.{key}/{name}": value for key, value in row.items()})
        return record

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that a block takes to ``encode_seconds``, ``decode_seconds`` or ``aggregate_seconds``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, f"{what}_seconds", getattr(self, f"{what}_seconds") + time.perf_counter() - began)

    def count(self, direction: str, message: Message) -> None:
        """Add the bytes of a message's arrays to ``down_bytes`` or ``up_bytes``."""
        counter: Counter[str] = getattr(self, f"{direction}_bytes")
        for record in records_of(message.content, ArrayRecord).values():
            for name, array in record.items():
                counter[name] += nbytes_of(array)


Observer = Callable[[RoundReport], Any]
"""A function that is called with the report of each round."""


def _relative(error: float, size: float) -> float:
    return math.sqrt(error / size) if size else 0.0
