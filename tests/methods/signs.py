"""A method that the library does not have: one bit a value, and the largest magnitude of the variable as its scale.

It is registered by the tests alone, to show that a method is one class in one file.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec.random import random_bits
from fedomc.methods.method import Field, Fields, Method, Writing


@dataclass(frozen=True)
class Signs(Method):
    """Plus or minus the largest magnitude of a granule of 1024 values; rounding at random is unbiased."""

    tag: ClassVar[int] = 200

    @classmethod
    def from_name(cls, text: str) -> "Signs | None":
        return cls() if text == "SIGNS" else None

    def __str__(self) -> str:
        return "SIGNS"

    @classmethod
    def from_header(cls, data: bytes) -> "Signs":
        return cls()

    @property
    def code_bits(self) -> int:
        return 1

    def fields(self, numel: int) -> tuple[Field, ...]:
        codes = Field("codes", torch.int32, codec.words_of(numel, 1))
        return codes, Field("scales", torch.float32, -(-numel // codec.BLOCK))

    def validate(self, fields: Fields, numel: int) -> str | None:
        return None if fields[1].isfinite().all() else "a scale is not finite"

    def decode(self, fields: Fields, out: Tensor) -> Tensor:
        signs = codec.unpack(fields[0], len(out), 1) * 2 - 1
        return out.copy_(signs * fields[1].repeat_interleave(codec.BLOCK)[: len(out)])

    def encode_stretch(self, values: Tensor, fields: Fields, start: int, writing: Writing) -> None:
        blocks = torch.nn.functional.pad(values, (0, -len(values) % codec.BLOCK)).view(-1, codec.BLOCK)
        fields[1].copy_(blocks.abs().amax(1))
        threshold: Tensor | float = 0.0
        scales = fields[1].repeat_interleave(codec.BLOCK)[: len(values)]
        if writing.seed is not None:
            uniform = ((random_bits(writing.seed, start, len(values), values.device) >> 8) & 0xFFFFFF) * 2.0**-24
            threshold = (2 * uniform - 1) * scales
        codec.pack((values >= threshold).int(), 1, fields[0])
