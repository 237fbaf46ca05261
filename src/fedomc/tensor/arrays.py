"""Conversion of decoded values to numpy arrays."""

from typing import Any

from torch import Tensor


def numpy_of(values: Tensor, force: bool) -> Any:
    """Return decoded values as a numpy array, read-only unless ``force`` is set."""
    array = values.numpy(force=force)
    if not force:
        array.flags.writeable = False
    return array
