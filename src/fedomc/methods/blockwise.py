"""``Blockwise``: low-bit codes with one scale for each block of neighbouring values, which confines outliers."""

import math
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import INFINITY_BITS, Deferred, Outcome
from fedomc.codec.elements import BlockElement, FloatElement
from fedomc.errors import FormatError
from fedomc.methods.method import Field, Fields, Method, Source, Writing

_NAN_SCALE = 255

BLOCKS = (32, 64, 128, 256)
"""The permitted numbers of values per scale, all multiples of the 32 values in a row of the bit layout."""


@dataclass(frozen=True)
class Blockwise(Method):
    """A method whose values are ``scale * Q(V / scale)``, with a scale for each block of neighbouring values.

    Blocks are formed over the flattened variable; the last one may be shorter. ``codec.reference_blocks`` describes
    how the scales are chosen.

    Attributes:
        block: the number of values that share a scale: 32, 64, 128 or 256.

    Raises:
        FormatError: the block size is not one of these.
    """

    scale_dtype: ClassVar[torch.dtype] = torch.float32

    block: int

    def __post_init__(self) -> None:
        if self.block not in BLOCKS or type(self.block) is not int:
            raise FormatError(f"{self}: blocks have {', '.join(map(str, BLOCKS))} values: {self.block} is none of them")

    @property
    @abstractmethod
    def element(self) -> BlockElement:
        """The element type of the codes."""

    @property
    def code_bits(self) -> int:
        """The number of bits of a code."""
        return self.element.bits

    def fields(self, numel: int) -> tuple[Field, ...]:
        """Describe the fields: the codes, and a scale for each block."""
        codes = Field("codes", torch.int32, codec.words_of(numel, self.code_bits))
        return codes, Field("scales", self.scale_dtype, -(-numel // self.block))

    def header(self) -> bytes:
        """Return the base-2 logarithm of the block size, as one byte."""
        return bytes((self.block.bit_length() - 1,))

    def decode(self, fields: Fields, out: Tensor) -> Tensor:
        """Decode a stretch of values into ``out``."""
        return codec.block_decode(fields[0], fields[1], self.element, self.block, out)

    def encode_stretch(self, values: Tensor, fields: Fields, start: int, writing: Writing) -> None:
        """Encode a stretch of float32 values into its fields."""
        codec.block_encode(values, self.element, self.block, fields[0], fields[1], start=start, seed=writing.seed)

    def encode(
        self, source: Source, fields: Fields, writing: Writing, present: Fields | None = None
    ) -> Outcome | Deferred:
        """Encode a whole variable in a single pass over its values."""
        absmax, device = 0, fields[0].device
        status = torch.zeros(2, dtype=torch.int64, device=device) if codec.defers(device) else None
        for start, values in source.stretches():
            part = self.stretch(fields, source.numel, start, len(values))
            outcome = codec.block_encode(
                values, self.element, self.block, part[0], part[1], start=start, seed=writing.seed
            )
            if isinstance(outcome, Deferred):
                assert status is not None
                torch.maximum(status, outcome.status, out=status)
                continue
            absmax = max(absmax, outcome.absmax_bits)
            if absmax >= INFINITY_BITS:
                break
        return Outcome(absmax, True) if status is None else Deferred(status)

    def update(
        self, present: Fields, gradient: Tensor, alpha: float, out: Fields, writing: Writing
    ) -> Outcome | Deferred:
        """Add ``alpha`` times a gradient in one pass, without a dense copy of the values."""
        return codec.block_update(
            present[0], present[1], self.element, self.block, gradient, alpha, out[0], out[1], seed=writing.seed
        )

    def decode_sum(self, fields: Fields, update: Method, update_fields: Fields, out: Tensor) -> Tensor:
        """Decode a base and add an update, in one pass if the update is blockwise too."""
        if isinstance(update, Blockwise):
            base = (fields[0], fields[1], self.element, self.block)
            change = (update_fields[0], update_fields[1], update.element, update.block)
            return codec.block_decode_sum(base, change, out)
        return super().decode_sum(fields, update, update_fields, out)

    @property
    def largest_magnitude(self) -> float:
        """The largest magnitude of any code, including codes that are never written."""
        return self.element.max_value

    def validate(self, fields: Fields, numel: int) -> str | None:
        """Check that every value decodes to a finite float32."""
        if not bool(torch.isfinite(fields[1]).all()):
            return "a scale is not finite"
        # Decode the values only if the scales are so large that finiteness depends on the codes.
        if not (math.isfinite(self.bound(fields, numel)) or math.isfinite(super().bound(fields, numel))):
            return "values are beyond the range of float32"
        return None

    def bound(self, fields: Fields, numel: int) -> float:
        """Return an upper bound on the magnitude of the values."""
        return float(fields[1].abs().max() * self.largest_magnitude) if numel else 0.0


class SharedExponent(Blockwise):
    """Floats with a power of two for each block: an exponent with a bias of 127, in one byte (E8M0)."""

    code_order: ClassVar[str] = "sign-magnitude"
    scale_dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    @abstractmethod
    def element(self) -> FloatElement:
        """The float format of the elements."""

    def zeros(self, numel: int, device: torch.device | str) -> Fields:
        """Make the fields of a variable of zeros, with scales of 1."""
        codes, scales = super().zeros(numel, device)
        return codes, scales.fill_(127)

    def validate(self, fields: Fields, numel: int) -> str | None:
        """Check that no scale is NaN or so large that a code could decode to infinity."""
        scales = fields[1]
        if not len(scales):
            return None
        largest = int(scales.max())
        if largest == _NAN_SCALE:
            return "a scale is NaN"
        if largest - 127 + self.element.top_exponent > 127:
            return f"a scale of 2**{largest - 127} takes values beyond the range of float32"
        return None

    def bound(self, fields: Fields, numel: int) -> float:
        """Return an upper bound on the magnitude of the values."""
        return 2.0 ** (int(fields[1].max()) - 127) * self.element.max_value if numel else 0.0


class WithBlocks(Blockwise):
    """A blockwise method whose only parameter is the block size, written as ``NAME/block``."""

    name: ClassVar[str]
    default_block: ClassVar[int] = 64

    @classmethod
    def from_name(cls, text: str) -> Self | None:
        """Read a name such as ``INT8`` or ``INT8/128``.

        Raises:
            FormatError: the block size is not supported.
        """
        match = re.fullmatch(re.escape(cls.name) + r"(?:/(\d{1,6}))?", text)
        return None if match is None else cls(int(match[1] or cls.default_block))

    @classmethod
    def from_header(cls, data: bytes) -> Self:
        """Read the block size from a header.

        Raises:
            FormatError: the block size is not supported.
        """
        if len(data) != 1 or not 5 <= data[0] <= 8:
            raise FormatError(f"{data.hex() or 'nothing'} is not the size of a block")
        return cls(2 ** data[0])

    def __str__(self) -> str:
        return self.name if self.block == self.default_block else f"{self.name}/{self.block}"
