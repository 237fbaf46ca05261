"""``NF4``: 16 quantiles of the normal distribution, with one scale per block (QLoRA, arXiv 2305.14314)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedomc.codec.elements import NormalFloat
from fedomc.methods.blockwise import WithBlocks
from fedomc.methods.method import Fields

_ELEMENT = NormalFloat()
_ZEROS = 0x77777777  # code 7, which decodes to zero, in all eight positions of a word


@dataclass(frozen=True)
class NF4(WithBlocks):
    """One of 16 levels from -1 to 1 times the largest magnitude of the block: 4.5 bits per value with blocks of 64."""

    tag: ClassVar[int] = 4
    name: ClassVar[str] = "NF4"

    block: int = 64

    @property
    def element(self) -> NormalFloat:
        """The element type with the 16 levels."""
        return _ELEMENT

    def zeros(self, numel: int, device: torch.device | str) -> Fields:
        """Make the fields of a variable of positive zeros."""
        codes, scales = super().zeros(numel, device)
        return codes.fill_(_ZEROS), scales
