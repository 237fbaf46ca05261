"""What a round took: bytes, seconds and errors, in all and by variable."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord

from fedomc.flower.arrays import records_of


@dataclass(frozen=True)
class Traffic:
    """Bytes of the arrays in a round's training messages.

    Attributes:
        round: number of the round.
        sent: how many messages went down.
        received: how many valid ones came up.
        down_bytes: of all messages down.
        up_bytes: of all valid messages up.
    """

    round: int
    sent: int
    received: int = 0
    down_bytes: int = 0
    up_bytes: int = 0


@dataclass
class RoundReport:
    """What a round of training took of the network and the server, and what compression cost in precision.

    Attributes:
        round: number of the round.
        down_bytes: of all messages down, by variable.
        up_bytes: of all valid messages up, by variable.
        encode_seconds: for the payloads.
        decode_seconds: for checking replies, and for decoding them into the mean as they come.
        aggregate_seconds: for the rest of the aggregation. Strategies that get all replies decode them in it.
        errors: sums of squares by variable: of what compression missed, and of the server's values; of the format that
            missed most, if there are several.
    """

    round: int
    down_bytes: Counter[str] = field(default_factory=Counter)
    up_bytes: Counter[str] = field(default_factory=Counter)
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def compression_error(self) -> float:
        """The error of the compressed variables that were sent, root mean square, relative to their size."""
        return _relative(sum(missed for missed, _ in self.errors.values()), sum(of for _, of in self.errors.values()))

    def totals(self) -> dict[str, int | float]:
        """Return what concerns the whole model."""
        return {
            "down-bytes": self.down_bytes.total(),
            "up-bytes": self.up_bytes.total(),
            "encode-seconds": self.encode_seconds,
            "decode-seconds": self.decode_seconds,
            "aggregate-seconds": self.aggregate_seconds,
            "compression-error": self.compression_error,
        }

    def by_variable(self) -> dict[str, dict[str, int | float]]:
        """Return bytes down and up of each variable, and the compression error of those that were compressed."""
        found: dict[str, dict[str, int | float]] = {}
        for name in self.down_bytes:
            found[name] = {"down-bytes": self.down_bytes[name], "up-bytes": self.up_bytes[name]}
            if name in self.errors:
                found[name]["compression-error"] = _relative(*self.errors[name])
        return found

    def metrics(self, *, variables: bool = True) -> MetricRecord:
        """Return Flower metrics, named ``fedomc.up-bytes`` in all and ``fedomc.up-bytes/layer.weight`` by variable."""
        record = MetricRecord({f"fedomc.{key}": value for key, value in self.totals().items()})
        if variables:
            for name, row in self.by_variable().items():
                record.update({f"fedomc.{key}/{name}": value for key, value in row.items()})
        return record

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time of a block to ``encode_seconds`` and the like."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, f"{what}_seconds", getattr(self, f"{what}_seconds") + time.perf_counter() - began)

    def count(self, direction: str, message: Message) -> None:
        """Add the bytes of a message's arrays to those ``down`` or ``up``."""
        counter: Counter[str] = getattr(self, f"{direction}_bytes")
        for record in records_of(message.content, ArrayRecord).values():
            for name, array in record.items():
                counter[name] += len(array.data)


Observer = Callable[[RoundReport], Any]
"""Who is told of each round."""


def _relative(missed: float, of: float) -> float:
    return math.sqrt(missed / of) if of else 0.0
