"""Registries of the handlers that run torch functions and operators on compressed tensors.

The modules that define the handlers fill them.
"""

from collections.abc import Callable
from typing import Any

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

FUNCTIONS: dict[Any, Handler] = {}
"""Handlers of torch functions, called above autograd. They are not used under the transforms of ``torch.func`` or in
forward-mode differentiation, which differentiate the underlying operators instead."""

METHODS: dict[Any, Handler] = {}
"""Handlers of tensor methods, used in every context."""

BACKWARD: dict[Any, Handler] = {}
"""Handlers of functions that run a backward pass."""

OPERATORS: dict[Any, Handler] = {}
"""Handlers of operators, called below autograd. They return NotImplemented for arguments that they do not support."""

FALLBACK: dict[str, Handler] = {}
"""Handlers of every other ``operator``, and of every function called with an ``out`` argument."""
