"""The bit layout: where the code of a value lies in the packed words.

A block is 1024 values, 32 rows of 32 lanes; value i of a block is in row ``i // 32``, lane ``i % 32``. Each lane packs
its 32 codes of W bits, least significant bit first, into W words of 32 bits; word j of lane l is word ``32*j + l`` of
the block. The last block holds only the rows that it needs. All lanes shift alike, so a vector instruction serves
many lanes without a shuffle (Afroozeh & Boncz, "The FastLanes Compression Layout", VLDB 2023).
"""

LANES = 32
ROWS = 32
BLOCK = LANES * ROWS
CHUNK = 64 * BLOCK
"""Values that are worked on at a time: their temporaries stay in the cache, and one thread takes them."""

SUMS = 5
"""How many sums the least-squares fit takes: D, D*D, D*R, R*R, R with ``R = 2**-k Q`` and ``D = V - R``."""


def words_of(numel: int, bits: int) -> int:
    """Count the 32-bit words that hold ``numel`` codes of ``bits`` bits."""
    blocks, rest = divmod(numel, BLOCK)
    rows = -(-rest // LANES)
    return LANES * (blocks * bits + -(-rows * bits // 32))
