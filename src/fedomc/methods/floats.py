"""``FloatFormat``: low-precision floats SxEyMz with one scale and one offset, ``V^ = s * 2**-k * Q(2**k * V) + b``.

[Note: the power of two]
The paper fits s and b by least squares after quantization with the format's plain bias. However, weights from
N(0, 0.05) are almost all subnormal in S1E3M7, and a linear fit cannot recover bits that were never stored.
``scaled-affine`` therefore first moves max|V| into the top binade with an exact power of two, so that every bit of the
format is used. ``scaled`` does only that. It omits the fit because a fit shrinks stochastically rounded values towards
the mean, so that the expected value of a code would no longer equal the original value.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import INFINITY_BITS, Deferred, Outcome
from fedomc.codec.elements import FloatElement
from fedomc.codec.scaling import float32
from fedomc.errors import FormatError
from fedomc.methods.method import Field, Fields, Method, Source, Writing

_SCALED = ("scaled", "scaled-affine")
_FITTED = ("affine", "scaled-affine")

_NAME = re.compile(r"S1E([0-9])M(0|[1-9][0-9]?)")


@dataclass(frozen=True)
class FloatFormat(FloatElement, Method):
    """The method S1EyMz: codes are floats of ``codec.elements.FloatElement``, with one scale and offset per variable.

    Example:
        >>> FloatFormat.parse("S1E3M7").bits
        11
    """

    tag: ClassVar[int] = 1
    transforms: ClassVar[tuple[str, ...]] = ("none", "affine", "scaled", "scaled-affine")
    code_order: ClassVar[str] = "sign-magnitude"

    @classmethod
    def parse(cls, text: "str | FloatFormat") -> "FloatFormat":
        """Parse a name such as ``S1E3M7``; a ``FloatFormat`` is returned unchanged.

        Raises:
            FormatError: the text is not the name of a float format.
        """
        if isinstance(text, FloatFormat):
            return text
        found = cls.from_name(text) if isinstance(text, str) else None
        if found is None:
            raise FormatError(
                f"{text!r} is not a number format: write S1E<exponent bits>M<mantissa bits>, as in S1E3M7"
            )
        return found

    @classmethod
    def from_name(cls, text: str) -> "FloatFormat | None":
        """Parse a name such as ``S1E3M7``; return None if the text does not have that form.

        Raises:
            FormatError: the number of exponent or mantissa bits is not supported.
        """
        match = _NAME.fullmatch(text)
        return None if match is None else _format(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"S1E{self.exponent_bits}M{self.mantissa_bits}"

    def header(self) -> bytes:
        """Return the numbers of exponent and mantissa bits, one byte each."""
        return bytes((self.exponent_bits, self.mantissa_bits))

    @classmethod
    def from_header(cls, data: bytes) -> "FloatFormat":
        """Read the numbers of exponent and mantissa bits from a header.

        Raises:
            FormatError: the format does not exist.
        """
        if len(data) != 2:
            raise FormatError(f"a float format is described by 2 bytes, not {len(data)}")
        return _format(*data)

    @property
    def code_bits(self) -> int:
        """The number of bits of a code including the sign, 2 to 32."""
        return self.bits

    def fields(self, numel: int) -> tuple[Field, ...]:
        """Describe the fields: the codes, and the factor ``s * 2**-k`` and offset ``b`` that all of them share."""
        codes = Field("codes", torch.int32, codec.words_of(numel, self.bits))
        return codes, Field("scale_offset", torch.float32, 2, by_values=False)

    def zeros(self, numel: int, device: torch.device | str) -> Fields:
        """Make the fields of a variable of zeros, with scale 1 and offset 0."""
        codes = torch.zeros(codec.words_of(numel, self.bits), dtype=torch.int32, device=device)
        return codes, torch.tensor([1.0, 0.0], dtype=torch.float32, device=device)

    def validate(self, fields: Fields, numel: int) -> str | None:
        """Check that every code decodes to a finite value."""
        scale, offset = fields[1].tolist()
        if not (math.isfinite(scale) and math.isfinite(offset)):
            return f"scale {scale} or offset {offset} is not finite"
        if not self.stays_finite(scale, offset):
            return f"scale {scale} and offset {offset} leave the range of float32"
        return None

    def stays_finite(self, scale: float, offset: float) -> bool:
        """Tell whether every code decodes to a finite value, using the same float32 rounding as decoding."""
        return math.isfinite(float32(float32(abs(scale) * self.max_value) + abs(offset)))

    def default_transform(self) -> str:
        """Return ``scaled``; see the module's note on the power of two."""
        return "scaled"

    def decode(self, fields: Fields, out: Tensor) -> Tensor:
        """Decode a stretch of values into ``out``."""
        return codec.decode(fields[0], fields[1], self, out)

    def encode_stretch(self, values: Tensor, fields: Fields, start: int, writing: Writing) -> None:
        """Encode a stretch with a scale of its own; ``encode`` uses one scale for a whole variable."""
        self.encode(Source.of(values), fields, writing)

    def encode(
        self, source: Source, fields: Fields, writing: Writing, present: Fields | None = None
    ) -> Outcome | Deferred:
        """Encode a whole variable; see the module's note on the power of two. Only a fit is never deferred."""
        if codec.defers(fields[0].device) and writing.transform not in _FITTED:
            return self._encode_there(source, fields, writing)

        def encoded(exponent: int) -> tuple[Tensor, Outcome]:
            tables, absmax = [], 0
            for start, values in source.stretches():
                words, _ = self.stretch(fields, source.numel, start, len(values))
                table, outcome = codec.encode(
                    values, self, exponent, words, start=start, seed=writing.seed, sums=writing.transform in _FITTED
                )
                tables.append(table)
                absmax = max(absmax, outcome.absmax_bits)
                if absmax >= INFINITY_BITS:
                    break
            sums = torch.cat(tables) if tables else torch.empty(0, codec.SUMS, dtype=torch.float64)
            return sums, Outcome(absmax, True)

        def expected() -> int:
            if present is not None:
                return self._present_exponent(present)
            return fitting(source.absmax_bits())

        def fitting(absmax_bits: int) -> int:
            return scaling_exponent(absmax_bits, self, stochastic=writing.seed is not None)

        scaled = writing.transform in _SCALED
        exponent = expected() if scaled else 0
        while True:
            sums, outcome = encoded(exponent)
            if outcome.absmax_bits >= INFINITY_BITS:
                return outcome
            fitted = fitting(outcome.absmax_bits) if scaled else 0
            if fitted == exponent:
                break
            exponent = fitted
        s, b = fit(sums, source.numel) if writing.transform in _FITTED else (1.0, 0.0)
        scale = s * 2.0**-exponent
        if not self.stays_finite(scale, b):
            scale, b = 2.0**-exponent, 0.0
        fields[1].copy_(torch.tensor([scale, b], dtype=torch.float32, device="cpu"))
        return outcome

    def _encode_there(self, source: Source, fields: Fields, writing: Writing) -> Deferred:
        def stretches() -> Iterator[tuple[int, Tensor, Tensor]]:
            for start, values in source.stretches():
                yield start, values, self.stretch(fields, source.numel, start, len(values))[0]

        return codec.encode_there(stretches, self, writing.transform in _SCALED, writing.seed, fields[1])

    def update(
        self, present: Fields, gradient: Tensor, alpha: float, out: Fields, writing: Writing
    ) -> Outcome | Deferred:
        """Add ``alpha`` times a gradient in one pass, without a dense copy of the values and without a new fit."""
        outcome = codec.update(
            present[0],
            present[1],
            self,
            gradient,
            alpha,
            out[0],
            out[1],
            rescale=writing.transform in _SCALED,
            seed=writing.seed,
        )
        if isinstance(outcome, Deferred) or outcome.absmax_bits < INFINITY_BITS:
            return outcome
        # The result is not finite, or the scale is unsuitable, which occurs only in foreign data.
        return super().update(present, gradient, alpha, out, writing)

    def decode_sum(self, fields: Fields, update: Method, update_fields: Fields, out: Tensor) -> Tensor:
        """Decode a base and add an update, in one pass if the update is a float format too."""
        if isinstance(update, FloatFormat):
            return codec.decode_sum(fields[0], fields[1], self, update_fields[0], update_fields[1], update, out)
        return super().decode_sum(fields, update, update_fields, out)

    def add_to(self, fields: Fields, out: Tensor, weight: float) -> Tensor:
        """Add ``weight`` times a stretch of values to ``out``, in one pass."""
        return codec.decode_add(fields[0], fields[1], self, weight, out)

    def add_difference_to(
        self, fields: Fields, subtrahend: Method, subtrahend_fields: Fields, out: Tensor, weight: float
    ) -> Tensor:
        """Add ``weight`` times the difference to another stretch, in one pass if that has a float format too."""
        if isinstance(subtrahend, FloatFormat):
            return codec.decode_add_difference(
                fields[0], fields[1], self, subtrahend_fields[0], subtrahend_fields[1], subtrahend, weight, out
            )
        return super().add_difference_to(fields, subtrahend, subtrahend_fields, out, weight)

    def bound(self, fields: Fields, numel: int) -> float:
        """Return an upper bound on the magnitude of the values."""
        scale, offset = fields[1].tolist()
        return float(abs(scale) * self.max_value + abs(offset))

    def scaled(self, fields: Fields, factor: Tensor | float) -> Fields | None:
        """Multiply scale and offset; return None if the result would leave the range of normal floats."""
        scaling: Tensor = fields[1] * factor
        scale, offset = scaling.tolist()
        return (fields[0], scaling) if 2.0**-120 < abs(scale) and self.stays_finite(scale, offset) else None

    def _present_exponent(self, present: Fields) -> int:
        scale: float = present[1].tolist()[0]
        return 0 if scale == 0 else codec.bounded_exponent(-round(math.log2(abs(scale))), self)


def scaling_exponent(magnitude_bits: int, element: FloatElement, *, stochastic: bool = False) -> int:
    """Choose the exponent k for the largest magnitude, given as float32 bits; see the note in ``codec.scaling``.

    The exponent is bounded so that every decoded value is zero or a normal float32. For e = 8, scaling gains nothing
    and the exponent is 0.
    """
    exponent = codec.fitting_exponent(magnitude_bits, element, stochastic=stochastic, growing=True)
    return codec.bounded_exponent(exponent, element)


def fit(sums: Tensor, numel: int) -> tuple[float, float]:
    """Fit s and b so that ``s * R + b`` is closest to V by least squares (paper, per-variable transformation).

    Args:
        sums: float64 ``[chunks, 5]``, the sums of D, D*D, D*R, R*R and R for each chunk, where ``D = V - R``. Fitting
            the error D instead of V avoids cancellation. Each sum is accurate to 2**-19 of the sum of its terms'
            magnitudes, because runs of 32 terms are added in float32.
        numel: how many values.

    Returns:
        s and b, rounded to float32; (1, 0) if the fit gains nothing, or (1, mean error) if R hardly varies.
    """
    d, dd, dr, rr, r = sums.tolist()[0] if sums.numel() == codec.SUMS else map(_total, sums.T.tolist())
    if dd == 0 or not math.isfinite(d + dd + dr + rr + r):
        return 1.0, 0.0
    spread = numel * rr - r * r
    gain = (numel * dr - d * r) / spread if spread > 2.0**-12 * numel * rr else 0.0
    s, b = float32(1 + gain), float32((d - gain * r) / numel)
    if abs(b) < 2.0**-126:  # a subnormal, which flush-to-zero modes would ignore
        b = 0.0
    gained = 2 * (s - 1) * dr + 2 * b * d - (s - 1) ** 2 * rr - numel * b * b - 2 * (s - 1) * b * r
    # The gain must exceed the uncertainty of the sums ...
    change = abs(s - 1) * math.sqrt(rr) + abs(b) * math.sqrt(numel)
    doubt = 2.0**-19 * change * (2 * math.sqrt(dd) + change)
    # ... plus the cost of rounding to float32 when s and b are applied: at most 2**-24 of each R, in the worst case
    # always in the direction of D.
    cost = 2.0**-22 * math.sqrt(dd * rr) + 2.0**-46 * rr
    return (s, b) if gained > doubt + cost else (1.0, 0.0)


def _total(values: list[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


_format = functools.cache(FloatFormat)  # few formats exist, and a reply has hundreds of frames
