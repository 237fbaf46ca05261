"""The dtypes that a compressed tensor may have."""

import torch

LIMITS = {torch.float32: 2.0**127, torch.bfloat16: 2.0**127, torch.float16: torch.finfo(torch.float16).max}
"""For each dtype, a bound below which float32 values stay finite in it."""

DTYPES = tuple(LIMITS)
"""The dtypes of the variables that can be compressed."""

NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
"""Their names, which are the same for numpy and torch."""
