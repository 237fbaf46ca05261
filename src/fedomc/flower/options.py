"""Checks the options of ``OMCStrategy``."""

import math

from fedomc.errors import PolicyError
from fedomc.flower.aggregation import AGGREGATES
from fedomc.serialization.entropy import require

DIRECTIONS = ("none", "down", "up", "both")


def check_options(*, aggregate: str, entropy_coding: str, weight_cap: float | None, over_selection: float) -> None:
    """Check that options are known and in range, and that what they need is installed.

    Raises:
        PolicyError: one is not.
    """
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
