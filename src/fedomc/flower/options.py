"""Checks the options of ``OMCStrategy``."""

import math
from collections.abc import Sequence

from flwr.serverapp.strategy import Strategy

from fedomc.errors import PolicyError
from fedomc.flower.aggregation import AGGREGATES
from fedomc.methods import Encoding, Method
from fedomc.serialization.checkpointing import Checkpoints
from fedomc.serialization.entropy import require

DIRECTIONS = ("none", "down", "up", "both")


def check_options(
    *, inner: object, aggregate: str, entropy_coding: str, weight_cap: float | None, over_selection: float,
    failed_rounds: int | None, checkpoints: object, observers: object,
) -> None:  # fmt: skip
    """Check that options are known and in range, and that what they need is installed.

    Raises:
        PolicyError: one is not.
    """
    if not isinstance(inner, Strategy):
        kind = type(inner)
        raise PolicyError(
            f"{kind.__module__}.{kind.__name__} is not a strategy of flwr.serverapp.strategy: wrap one of these, "
            "such as FedAvg; those of flwr.server are of Flower's legacy API"
        )
    if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
        raise PolicyError(f"checkpoints={checkpoints!r}: pass fedomc.flower.Checkpoints(folder), or None for none")
    if not isinstance(observers, Sequence) or not all(map(callable, observers)):
        raise PolicyError(f"observers={observers!r}: pass a list of functions, as in observers=[TensorBoard(folder)]")
    if failed_rounds is not None and failed_rounds < 1:
        raise PolicyError(f"failed_rounds={failed_rounds}: use 1 or more, or None to continue regardless")
    if aggregate not in AGGREGATES:
        raise PolicyError(f"aggregate={aggregate!r} is unknown: use one of {', '.join(AGGREGATES)}")
    if entropy_coding not in DIRECTIONS:
        raise PolicyError(f"entropy_coding={entropy_coding!r} is unknown: use one of {', '.join(DIRECTIONS)}")
    if weight_cap is not None and not weight_cap >= 1:
        raise PolicyError(f"weight_cap={weight_cap} would cap the median client: use 1 or more, or None for no cap")
    if not 1 <= over_selection < math.inf:
        raise PolicyError(f"over_selection={over_selection} is out of range: use 1.3 for 30% more clients, 1 for none")
    if entropy_coding != "none":
        require()


def read_unquantized(format: str | Method | None) -> Method | None:
    """Return the format of the variables that partial quantization leaves unquantized.

    Raises:
        FormatError: the format does not exist.
        PolicyError: it has several parts, or is only for an uplink.
    """
    if format is None:
        return None
    encoding = Encoding.parse(str(format))
    if str(encoding) != str(encoding.format):
        raise PolicyError(f"unquantized_format={str(format)!r} has more than one format: use {encoding.format}")
    return encoding.format
