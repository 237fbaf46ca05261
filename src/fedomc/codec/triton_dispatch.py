"""Chooses what decodes on a CUDA device: the Triton kernels, or the reference where Triton is not installed.

Triton is imported when the first CUDA tensor arrives, because importing it takes longer than importing all of fedomc.
"""

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fedomc.codec import reference

OPERATORS = ("decode", "decode_sum", "decode_add", "decode_add_difference")
"""The operators that have Triton kernels; the reference serves all others on every device but the CPU."""


@functools.cache
def implementation() -> ModuleType:
    """Return the module with the operators for CUDA tensors, warning once if it has to be the reference."""
    try:
        from fedomc.codec import triton_kernels
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}), so fedomc decodes on the GPU with the much slower reference; "
            "install triton, which torch's CUDA wheels for Linux bring along",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference
    return triton_kernels


def operator(name: str) -> Callable[..., None]:
    """Return an operator that looks up its implementation when it is called."""

    def call(*arguments: Any) -> None:
        getattr(implementation(), name)(*arguments)

    return call
