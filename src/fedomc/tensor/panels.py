"""How the rows of a weight are split into panels, which are decoded and multiplied one at a time."""

from functools import lru_cache


def panel_rows(rows: int, numel: int, most_bytes: int) -> int:
    """Return how many rows of a float32 matrix of ``numel`` values fit into ``most_bytes``, at least one."""
    return max(1, most_bytes * rows // max(1, 4 * numel))


@lru_cache(maxsize=1024)  # asked for several times in each step of each weight
def panels(rows: int, numel: int, most_bytes: int) -> tuple[tuple[int, int], ...]:
    """Split rows evenly into ranges of at most ``panel_rows``; without rows, return one empty range."""
    height = max(1, -(-rows // max(1, -(-rows // panel_rows(rows, numel, most_bytes)))))
    return tuple((start, min(start + height, rows)) for start in range(0, max(1, rows), height))
