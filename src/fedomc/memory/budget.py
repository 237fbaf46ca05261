"""Budgets of memory, as people write them."""

import re
from decimal import Decimal

from fedomc.errors import PolicyError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_budget(text: str | int) -> int:
    """Return a budget in bytes.

    Args:
        text: a number of bytes, or a text such as ``1 GB``, ``512 MiB`` or ``1.5gb``: units of 1000 or of 1024.

    Raises:
        PolicyError: it is not a number of bytes from 1 to below 2**63.

    Example:
        >>> parse_budget("1.5 GB"), parse_budget("512 MiB")
        (1500000000, 536870912)
    """
    found = _BUDGET.fullmatch(str(text)) if not isinstance(text, bool) else None
    factor = None if found is None else _UNITS.get(found[2].lower())
    nbytes = 0 if found is None or factor is None else int(Decimal(found[1]) * factor)
    if not 1 <= nbytes < 2**63:
        raise PolicyError(
            f"budget={text!r} is not an amount of memory: pass bytes, or a number and a unit, as in '1 GB' or '512 MiB'"
        )
    return nbytes
