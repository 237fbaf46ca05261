"""The registries of what runs a function or operator of torch on compressed tensors; other modules fill them."""

from collections.abc import Callable
from typing import Any

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

FUNCTIONS: dict[Any, Handler] = {}
"""Functions of ``torch`` that are run by a handler, above autograd; but not under the transforms of ``torch.func`` and
in forward mode, which differentiate the operators that torch makes of them."""

METHODS: dict[Any, Handler] = {}
"""Methods of tensors that are run by a handler wherever they are called."""

BACKWARD: dict[Any, Handler] = {}
"""Functions that run a backward pass."""

OPERATORS: dict[Any, Handler] = {}
"""Operators that are run by a handler, below autograd; it returns NotImplemented for arguments that it leaves."""

FALLBACK: dict[str, Handler] = {}
"""What runs every other ``operator``, and every function that is given an ``out``."""
