"""What a round took."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of the arrays in a round's training messages.

    Attributes:
        round: number of the round.
        sent: how many messages went down.
        received: how many valid ones came up.
        down_bytes: of all messages down.
        up_bytes: of all valid messages up.
    """

    round: int
    sent: int
    received: int = 0
    down_bytes: int = 0
    up_bytes: int = 0
