"""A counter-based generator: bit i depends on the seed and i alone, not on threads, chunks or the backend."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 32) if value >> 31 else value


def _mix_int(x: int) -> int:
    """Finalise a 32-bit word as MurmurHash3 does (Appleby, public domain)."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & _MASK
    x ^= x >> 13
    x = x * 0xC2B2AE35 & _MASK
    return x ^ x >> 16


def _mix_(x: Tensor) -> Tensor:
    """The same in place on int32, whose right shift copies the sign: hence the masks."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x85EBCA6B)
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed(0xC2B2AE35)
    x ^= (x >> 16) & 0xFFFF
    return x


def random_bits(seed: int, start: int, count: int, device: torch.device) -> Tensor:
    """Draw 32 random bits for each of the counters ``start .. start + count - 1``.

    Args:
        seed: 64 bits.
        start: the first counter; a chunk must not cross a multiple of 2**32.
        count: how many.
        device: where the result lies.

    Returns:
        int32 ``[count]``.
    """
    low, high = _mix_int(seed & _MASK), _mix_int((seed >> 32 & _MASK) ^ 0x9E3779B9 ^ (start >> 32))
    first = _signed(start)
    bits = torch.arange(first, first + count, dtype=torch.int64, device=device).to(torch.int32)
    bits ^= _signed(low)
    _mix_(bits)
    bits += _signed(high)
    return _mix_(bits)
