"""Chooses what serves a CUDA device: the Triton kernels, or the reference where Triton is not installed.

Triton is imported when the first CUDA tensor arrives, because importing it takes longer than importing all of fedomc.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

MODULES = {
    "decode": "triton_decode",
    "decode_sum": "triton_decode",
    "decode_add": "triton_decode",
    "decode_add_difference": "triton_decode",
    "add_difference": "triton_decode",
    "absmax": "triton_encode",
    "encode": "triton_encode",
    "choose_exponent": "triton_settle",
    "encode_scaled": "triton_encode",
    "keep": "triton_settle",
    "update": "triton_update",
    "block_decode": "triton_blocks",
    "block_decode_sum": "triton_blocks",
    "block_encode": "triton_blocks",
    "block_update": "triton_blocks",
}
"""The operators that have Triton kernels, and their modules; the reference serves all others.

The blockwise ones hand integers and NF4 on to the reference.
"""


@functools.cache
def is_installed() -> bool:
    """Tell whether Triton can be imported, warning once if it cannot."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}), so fedomc runs on the GPU with the much slower reference; "
            "install triton, which torch's CUDA wheels for Linux bring along",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fedomc.codec.{name}")


def operator(name: str, reference: Callable[..., None]) -> Callable[..., None]:
    """Return an operator that chooses between its kernel and the reference when it is called."""

    def call(*arguments: Any) -> None:
        if is_installed():
            getattr(_module(MODULES[name]), name)(*arguments)
        else:
            reference(*arguments)

    return call
