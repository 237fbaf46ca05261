"""A counter-based random generator: the bits of a value depend only on the seed and the value's index.

[Note: the stream]
Values are indexed as in the bit layout: value i lies in block ``t = i // 1024``, row ``r = i % 1024 // 32`` and lane
``l = i % 32``. Let ``mix`` be the 32-bit finaliser of MurmurHash3; all sums are modulo 2**32::

    low    = mix(seed mod 2**32)
    high   = mix((seed >> 32) ^ 0x9E3779B9)
    first  = 1024 * t
    lane   = mix(mix(((first mod 2**32) + l) ^ low) + mix((first >> 32) + high))
    row    = mix(mix((32 + r) ^ high) + low)
    x      = (lane ^ row) * 0x9E3779B1
    bits   = (x ^ (x >> 15)) * 0x85EBCA77

Each lane and each row is fully hashed once per block; a value then costs two multiplications. Consumers use the
highest bits: the top 30 for rounding floats, the top 24 for rounding integers and NF4.
"""

import torch
from torch import Tensor

from fedomc.codec.layout import BLOCK, LANES

_MASK = 0xFFFFFFFF


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 32) if value >> 31 else value


def _mix_int(x: int) -> int:
    """Apply the 32-bit finaliser of MurmurHash3 (Appleby, public domain)."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & _MASK
    x ^= x >> 13
    x = x * 0xC2B2AE35 & _MASK
    return x ^ x >> 16


def _mix_(x: Tensor) -> Tensor:
    """Apply ``_mix_int`` in place to int32 values; the masks undo the sign extension of right shifts."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x85EBCA6B)
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed(0xC2B2AE35)
    x ^= (x >> 16) & 0xFFFF
    return x


def keys_of(seed: int) -> tuple[int, int]:
    """Return ``low`` and ``high`` of a seed, as signed 32-bit numbers; see the note on the stream."""
    return _signed(_mix_int(seed & _MASK)), _signed(_mix_int((seed >> 32 & _MASK) ^ 0x9E3779B9))


def random_bits(seed: int, start: int, count: int, device: torch.device) -> Tensor:
    """Draw 32 random bits for each of the values ``start .. start + count - 1``.

    Args:
        seed: a 64-bit seed.
        start: the index of the first value, a multiple of the block size.
        count: how many values; no multiple of 2**32 may lie between the first block and the last.
        device: the device of the result.

    Returns:
        An int32 tensor of shape ``[count]``; the upper bits are of the best quality.
    """
    low, high = keys_of(seed)
    blocks = -(-count // BLOCK)
    first = torch.arange(start & _MASK, (start & _MASK) + blocks * BLOCK, BLOCK, dtype=torch.int64, device=device)
    index = torch.arange(LANES, dtype=torch.int64, device=device)
    lanes = (first[:, None] + index).to(torch.int32)  # [blocks, LANES]
    lanes = _mix_(_mix_(lanes.bitwise_xor_(low)).add_(_signed(_mix_int((start >> 32) + high & _MASK))))
    rows = (index + LANES).to(torch.int32)  # [ROWS]
    rows = _mix_(_mix_(rows.bitwise_xor_(high)).add_(low))
    bits = (lanes[:, None, :] ^ rows[:, None]).view(-1)[:count]
    bits *= _signed(0x9E3779B1)
    bits ^= (bits >> 15) & 0x1FFFF
    return bits.mul_(_signed(0x85EBCA77))
