"""``NF4``: 16 quantiles of the normal distribution, with a scale by block (QLoRA, arXiv 2305.14314)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedomc.codec.elements import NormalFloat
from fedomc.methods.blockwise import WithBlocks
from fedomc.methods.method import Fields

_ELEMENT = NormalFloat()
_ZEROS = 0x77777777  # code 7, which is zero, in all eight places of a word


@dataclass(frozen=True)
class NF4(WithBlocks):
    """The largest value of a block times one of 16 values between -1 and 1: 4.5 bits a value in blocks of 64."""

    tag: ClassVar[int] = 4
    name: ClassVar[str] = "NF4"

    block: int = 64

    @property
    def element(self) -> NormalFloat:
        """The 16 values."""
        return _ELEMENT

    def zeros(self, numel: int, device: torch.device | str) -> Fields:
        """Make the fields of a variable of zeros, which are not negative."""
        codes, scales = super().zeros(numel, device)
        return codes.fill_(_ZEROS), scales
