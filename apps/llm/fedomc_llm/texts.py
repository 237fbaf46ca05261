"""The texts of the clients: a folder with a plain text file for each of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedomc_llm.errors import TextError

PLAYS = Path(__file__).parent / "plays"
HELD_OUT = 0.1
"""The share of each text, at its end, that is not trained with."""


@dataclass(frozen=True)
class ClientText:
    """The text of a client.

    Attributes:
        name: of the client, from its file.
        train: what it trains with.
        held_out: what its loss is measured on.
    """

    name: str
    train: str
    held_out: str


def read(folder: str = "") -> list[ClientText]:
    """Read the texts of all clients, in the order of their names.

    Args:
        folder: its files ``*.txt`` and ``*.md`` are the clients'; empty is what twelve roles of Shakespeare say.

    Raises:
        TextError: the folder has no text, or one is too short to hold something out.
    """
    place = Path(folder).expanduser() if folder else PLAYS / "roles"
    files = sorted(path for suffix in ("*.txt", "*.md") for path in place.glob(suffix))
    if not files:
        raise TextError(f"texts={str(place)!r} has no file *.txt or *.md: name a folder with a text for each client")
    return [_divided(path) for path in files]


def public() -> str:
    """Return the text of no client, with which the embedded model is pretrained."""
    return (PLAYS / "others.md").read_text(encoding="utf-8")


def blocks(text: str, tokenizer: Any, length: int, name: str) -> Tensor:
    """Tokenize a text and cut it into blocks.

    Args:
        text: the text.
        tokenizer: of ``transformers``.
        length: tokens of a block.
        name: of the text, for the error.

    Returns:
        Token numbers ``[N, length]``; the rest at the end is left out.

    Raises:
        TextError: the text has not one block.
    """
    numbers = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(numbers) < length:
        raise TextError(f"the {name} has {len(numbers)} tokens, but a block has {length}: choose a smaller --length")
    return numbers[: len(numbers) // length * length].view(-1, length)


def _divided(path: Path) -> ClientText:
    text = path.read_text(encoding="utf-8")
    at = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1
    if not text[:at].strip() or not text[at:].strip():
        raise TextError(f"{path} has {len(text)} characters in too few lines to hold a tenth out: use more text")
    return ClientText(path.stem, text[:at], text[at:])
