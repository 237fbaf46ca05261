"""Decoded values as numpy arrays."""

from typing import Any

from torch import Tensor


def numpy_of(values: Tensor, force: bool) -> Any:
    """Return decoded values as a numpy array, read-only unless with ``force``."""
    array = values.numpy(force=force)
    if not force:
        array.flags.writeable = False
    return array
