"""Flags, packed eight to a byte: bit ``k`` of byte ``i`` is flag ``8 * i + k``."""

import numpy as np
import torch
from torch import Tensor


def pack_bits(flags: Tensor) -> Tensor:
    """Pack bool ``[n]`` into uint8 ``[ceil(n / 8)]``."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))
    return _packed(flags)


def unpack_bits(packed: Tensor, out: Tensor) -> Tensor:
    """Write each flag as 1 or 0 into ``out``, float32 ``[n]``, and return it."""
    if packed.device.type == "cpu":
        flags = torch.from_numpy(np.unpackbits(packed.numpy(), count=len(out), bitorder="little"))
    else:
        flags = _unpacked(packed, len(out))
    return out.copy_(flags)


def _packed(flags: Tensor) -> Tensor:
    """Pack on any device."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8))
    return (padded.view(-1, 8) << _places(flags.device)).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """Return flags as uint8 ``[count]``, on any device."""
    return (packed[:, None] >> _places(packed.device) & 1).view(-1)[:count]


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
