"""The bit layout: where the code of each value lies in the packed words.

A block consists of 1024 values, in 32 rows of 32 lanes; value i of a block is in row ``i // 32`` and lane ``i % 32``.
Each lane packs its 32 codes of W bits, least significant bit first, into W words of 32 bits; word j of lane l is word
``32*j + l`` of the block. The last block stores only the rows that it needs. All lanes shift by the same number of
bits, so a vector instruction processes many lanes without a shuffle (Afroozeh & Boncz, "The FastLanes Compression
Layout", VLDB 2023).
"""

LANES = 32
ROWS = 32
BLOCK = LANES * ROWS
"""Values that are packed together."""
CHUNK = 64 * BLOCK
"""The number of values that one thread processes at a time, chosen so that temporaries stay in the cache."""

SUMS = 5
"""The number of sums that the least-squares fit needs: D, D*D, D*R, R*R and R, with ``R = 2**-k Q``, ``D = V - R``."""


def words_of(numel: int, bits: int) -> int:
    """Return the number of 32-bit words that hold ``numel`` codes of ``bits`` bits each."""
    blocks, rest = divmod(numel, BLOCK)
    rows = -(-rest // LANES)
    return LANES * (blocks * bits + -(-rows * bits // 32))
