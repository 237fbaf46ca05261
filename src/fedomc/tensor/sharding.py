"""Refuses to split parameters between processes: FSDP and tensor parallelism would keep decoded copies in their place.

Both versions of FSDP and ``distribute_tensor`` take a parameter to pieces with the functions below, and go on with the
pieces, which are dense: memory grows and training is no longer that of the codes, without a word.
"""

from typing import Any

import torch

from fedomc._torch import is_called_by
from fedomc.errors import PolicyError
from fedomc.tensor.compressed import is_compressed
from fedomc.tensor.handlers import FUNCTIONS

_PACKAGES = ("torch.distributed.fsdp", "torch.distributed.tensor")


def _whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function, unless it is to split a parameter between processes."""
    values = args[0] if args else None
    if is_compressed(values) and is_called_by(*_PACKAGES):
        raise PolicyError(
            f"{values.variable} is compressed and cannot be split between processes, as its shards would be dense: "
            "exclude it when you compress the model, decompress_ the model before it is sharded, or use "
            "DistributedDataParallel, which keeps variables whole"
        )
    return func(*args, **kwargs)


FUNCTIONS[torch.chunk] = _whole  # FSDP2 and DTensor
FUNCTIONS[torch.flatten] = _whole  # FSDP1
