"""The per-variable transformation: ``V^ = s * 2**-k * Q(2**k * V) + b``, and a variable in that form.

[Note: the power of two]
The paper fits s and b by least squares after quantization with the format's plain bias. But weights of N(0, 0.05)
are almost all subnormal in S1E3M7, and no linear fit brings back bits that were never stored. ``scaled-affine``
first moves max|V| into the top binade by an integer k, exactly, so that every bit of the format is used. ``scaled``
does that alone: the fit pulls towards the mean what stochastic rounding has made noisy, and so takes away that the
expected value of a code is the value.
"""

import ctypes
import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec.elements import FloatFormat
from fedomc.codec.workspace import workspace
from fedomc.errors import NonFiniteError, PolicyError

TRANSFORMS = ("none", "affine", "scaled", "scaled-affine")
_SCALED = ("scaled", "scaled-affine")
_FITTED = ("affine", "scaled-affine")
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Encoding:
    """How a variable is kept: in one part, or with ``update_format`` in two, a base and the sum of the local steps.

    Attributes:
        format: of the variable, or of its base.
        update_format: of the update part; None keeps the variable in one part.
        transform: ``none``, ``affine``, ``scaled`` or ``scaled-affine``.
        rounding: ``nearest`` or ``stochastic``: of the variable, or of its update part; a base is rounded to nearest.
        seed: of stochastic rounding.

    Raises:
        FormatError: no such format.
        PolicyError: an unknown transformation or rounding.
    """

    format: FloatFormat
    update_format: FloatFormat | None = None
    transform: str = "scaled-affine"
    rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", FloatFormat.parse(self.format))
        if self.update_format is not None:
            object.__setattr__(self, "update_format", FloatFormat.parse(self.update_format))
        for what, value, known in (("transform", self.transform, TRANSFORMS), ("rounding", self.rounding, ROUNDINGS)):
            if value not in known:
                raise PolicyError(f"{what}={value!r} is unknown: use one of {', '.join(known)}")

    @property
    def base_rounding(self) -> str:
        """How a variable is rounded when it is encoded as a whole: a base always to nearest."""
        return self.rounding if self.update_format is None else "nearest"

    def __str__(self) -> str:
        return f"{self.format}+{self.update_format}" if self.update_format else str(self.format)


_Encoded = tuple[Tensor, Tensor, int]
"""Codes, sums and the bits of the largest magnitude, as ``codec.encode`` gives them."""


@dataclass(eq=False)
class Packed:
    """A flat variable as codes and the transformation that gives their values.

    Attributes:
        codes: int32 ``[words_of(numel, bits)]``, laid out as ``codec.layout`` says.
        affine: float32 ``[2]``: the factor ``s * 2**-k`` and the offset ``b``.
        format: what a code means.
        numel: how many values.
        rewrites: how often it was changed in place; also chooses the draw of stochastic rounding.
    """

    codes: Tensor
    affine: Tensor
    format: FloatFormat
    numel: int
    rewrites: int = 0

    @classmethod
    def empty(cls, format: FloatFormat, numel: int, device: torch.device | str) -> "Packed":
        """Allocate a variable of zeros."""
        codes = torch.zeros(codec.words_of(numel, format.bits), dtype=torch.int32, device=device)
        return cls(codes, torch.tensor([1.0, 0.0], dtype=torch.float32, device=device), format, numel)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.affine.nbytes

    @property
    def bound(self) -> float:
        """A magnitude that no value exceeds."""
        scale, offset = self.affine.tolist()
        return float(abs(scale) * self.format.max_value + abs(offset))

    def decode(self, out: Tensor, start: int = 0) -> Tensor:
        """Decode ``len(out)`` values from ``start`` (a multiple of the block) into float32 ``out``."""
        scale, offset = self.affine.tolist()
        return codec.decode(self._words(start, out), self.format, scale, offset, out)

    def decode_with(self, update: "Packed", out: Tensor, start: int = 0) -> Tensor:
        """Decode the sum of this base and its update."""
        scale, offset = self.affine.tolist()
        update_scale, update_offset = update.affine.tolist()
        words, update_words = self._words(start, out), update._words(start, out)
        return codec.decode_sum(
            words, self.format, scale, offset, update_words, update.format, update_scale, update_offset, out
        )

    def add_to(self, out: Tensor, weight: float = 1.0, start: int = 0) -> Tensor:
        """Add ``weight`` times ``len(out)`` values from ``start`` (a multiple of the block) to float32 ``out``."""
        scale, offset = self.affine.tolist()
        return codec.decode_add(self._words(start, out), self.format, scale, offset, weight, out)

    def add_difference_to(self, out: Tensor, less: "Packed", weight: float = 1.0, start: int = 0) -> Tensor:
        """Add ``weight`` times what this variable is more than another to float32 ``out``, in one pass."""
        scale, offset = self.affine.tolist()
        less_scale, less_offset = less.affine.tolist()
        words, less_words = self._words(start, out), less._words(start, out)
        return codec.decode_add_difference(
            words, self.format, scale, offset, less_words, less.format, less_scale, less_offset, weight, out
        )

    def rewrite(
        self,
        produce: Callable[[int, int], Tensor],
        transform: str,
        rounding: str = "nearest",
        seed: int = 0,
        name: str = "variable",
        fits: Callable[["Packed"], bool] | None = None,
    ) -> None:
        """Encode new values in place, chunk by chunk; if one of them is not finite nothing is changed.

        Args:
            produce: gives the new values ``[start, stop)``, float32, flat; called again if the power of two that the
                present values suggest does not fit the new ones.
            transform: which transformation.
            rounding: which rounding.
            seed: of stochastic rounding, drawn afresh at every rewrite.
            name: of the variable, for the error and the seed.
            fits: tells whether the new codes may take the place of the present ones.

        Raises:
            NonFiniteError: a new value is NaN or infinite, or the new codes do not fit.
        """

        def encoded(exponent: int, draw: int | None, sums: bool) -> _Encoded:
            return self._encode_chunks(produce, exponent, draw, sums)

        def needed() -> int:
            starts = range(0, self.numel, codec.CHUNK)
            bits = (codec.magnitude_bits(produce(start, min(start + codec.CHUNK, self.numel))) for start in starts)
            return max(bits, default=0)

        self._rewrite(encoded, needed if not self.rewrites else None, transform, rounding, seed, name, fits)

    def add_(
        self,
        gradient: Tensor,
        alpha: float,
        transform: str,
        rounding: str = "nearest",
        seed: int = 0,
        name: str = "variable",
        fits: Callable[["Packed"], bool] | None = None,
    ) -> None:
        """Add ``alpha`` times a float32 ``[numel]`` in place, in one pass; the rest is as in ``rewrite``."""
        scale, offset = self.affine.tolist()

        def encoded(exponent: int, draw: int | None, sums: bool) -> _Encoded:
            codes = self._room()
            found, largest = codec.update(
                self.codes, self.format, scale, offset, gradient, alpha, exponent, codes, seed=draw, sums=sums
            )
            return codes, found, largest

        def needed() -> int:  # the first step: what is added to is likely to be zero
            bits = torch.tensor([codec.magnitude_bits(gradient)], dtype=torch.int32)
            return int((bits.view(torch.float32) * alpha).abs_().view(torch.int32))

        self._rewrite(encoded, needed if not self.rewrites else None, transform, rounding, seed, name, fits)

    def _rewrite(
        self,
        encoded: Callable[[int, int | None, bool], _Encoded],
        needed: Callable[[], int] | None,
        transform: str,
        rounding: str,
        seed: int,
        name: str,
        fits: Callable[["Packed"], bool] | None = None,
    ) -> None:
        """Encode with the right power of two: tried is that of the present values, or what ``needed`` finds."""
        draw = draw_seed(seed, name, self.rewrites) if rounding == "stochastic" else None
        exponent = 0
        if transform in _SCALED:
            exponent = self._present_exponent() if needed is None else scaling_exponent(needed(), self.format)
        while True:
            codes, sums, largest = encoded(exponent, draw, transform in _FITTED)
            if largest >= codec.INFINITY_BITS:
                raise NonFiniteError(
                    f"{name} has a value that is NaN or infinite; nothing was changed. "
                    "Look for a diverging loss, lower the learning rate or clip the gradient"
                )
            wanted = scaling_exponent(largest, self.format) if transform in _SCALED else 0
            if wanted == exponent:
                break
            exponent = wanted
            del codes  # the next ones take their memory
        s, b = fit(sums, self.numel) if transform in _FITTED else (1.0, 0.0)
        scale = s * 2.0**-exponent
        if not stays_finite(self.format, scale, b):
            scale, b = 2.0**-exponent, 0.0
        new = Packed(codes, torch.tensor([scale, b], dtype=torch.float32), self.format, self.numel)
        if fits is not None and not fits(new):
            raise NonFiniteError(
                f"{name} would have a base and an update whose sum is beyond float32; nothing was changed. "
                "Look for a diverging loss, lower the learning rate or clip the gradient"
            )
        self.codes.copy_(new.codes)
        self.affine.copy_(new.affine)
        self.rewrites += 1

    def _encode_chunks(
        self, produce: Callable[[int, int], Tensor], exponent: int, seed: int | None, sums: bool
    ) -> _Encoded:
        codes, found, largest = self._room(), [], 0
        for start in range(0, self.numel, codec.CHUNK):
            stop = min(start + codec.CHUNK, self.numel)
            values = produce(start, stop)
            if values.shape != (stop - start,):
                raise RuntimeError(f"{stop - start} new values expected from {start} on, got {tuple(values.shape)}")
            begin = codec.words_of(start, self.format.bits)
            words = codes[begin : begin + codec.words_of(stop - start, self.format.bits)]
            part, part_largest = codec.encode(values, self.format, exponent, words, start=start, seed=seed, sums=sums)
            found.append(part)
            largest = max(largest, part_largest)
            if largest >= codec.INFINITY_BITS:
                break
        return codes, torch.cat(found) if found else torch.empty(0, codec.SUMS, dtype=torch.float64), largest

    def _room(self) -> Tensor:
        """Room for other codes: a wrong power of two must not destroy the present ones."""
        return workspace.empty(self.codes.numel(), self.codes.device).view(torch.int32)

    def _words(self, start: int, out: Tensor) -> Tensor:
        if start == 0 and out.numel() == self.numel:
            return self.codes
        begin = codec.words_of(start, self.format.bits)
        return self.codes[begin : begin + codec.words_of(out.numel(), self.format.bits)]

    def _present_exponent(self) -> int:
        scale = abs(float(self.affine[0]))
        if scale == 0:
            return 0
        return _bounded(-round(math.log2(scale)), self.format)


def encode(
    values: Tensor,
    format: FloatFormat,
    transform: str = "scaled-affine",
    rounding: str = "nearest",
    seed: int = 0,
    name: str = "variable",
) -> Packed:
    """Encode the values of a tensor of any shape.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    flat = values.detach().to(torch.float32).contiguous().view(-1)
    packed = Packed.empty(format, flat.numel(), flat.device)

    def encoded(exponent: int, draw: int | None, sums: bool) -> _Encoded:
        # In place: there are no values yet that a failure could lose.
        return packed.codes, *codec.encode(flat, format, exponent, packed.codes, seed=draw, sums=sums)

    packed._rewrite(encoded, lambda: codec.magnitude_bits(flat), transform, rounding, seed, name)
    return packed


def stays_finite(format: FloatFormat, scale: float, offset: float) -> bool:
    """Tell whether every code decodes to a finite value, rounding in float32 as decoding does."""
    return math.isfinite(_float32(_float32(abs(scale) * format.max_value) + abs(offset)))


def scaling_exponent(magnitude_bits: int, format: FloatFormat) -> int:
    """Choose k so that the largest magnitude, given as float32 bits, comes into the format's top binade.

    It is bounded so that every decoded value is zero or a normal float32; for e = 8, where nothing is gained, it is 0.
    """
    if magnitude_bits == 0:
        return 0
    field = magnitude_bits >> 23
    binade = field - 127 if field else magnitude_bits.bit_length() - 150
    return _bounded(format.top_exponent - binade, format)


def _bounded(exponent: int, format: FloatFormat) -> int:
    least = min(0, format.top_exponent - 127)
    most = max(0, 120 - format.bias - format.mantissa_bits)
    return max(least, min(exponent, most))


def fit(sums: Tensor, numel: int) -> tuple[float, float]:
    """Fit s and b so that ``s * R + b`` is closest to V by least squares (paper, per-variable transformation).

    Args:
        sums: float64 ``[chunks, 5]``: of D, D*D, D*R, R*R and R by chunk, where ``D = V - R``. With D instead of V
            nothing cancels: the fit is of what the codes miss. Each is good to 2**-19 of the sum of its terms'
            magnitudes, as 32 of them are added in float32.
        numel: how many values.

    Returns:
        s and b, rounded to float32. (1, 0) where that is as good; (1, mean error) where R hardly varies.
    """
    d, dd, dr, rr, r = (_total(column) for column in sums.T.tolist())
    if dd == 0 or not math.isfinite(d + dd + dr + rr + r):
        return 1.0, 0.0
    spread = numel * rr - r * r
    gain = (numel * dr - d * r) / spread if spread > 2.0**-12 * numel * rr else 0.0
    s, b = _float32(1 + gain), _float32((d - gain * r) / numel)
    if abs(b) < 2.0**-126:  # a subnormal, which flush-to-zero modes would not add
        b = 0.0
    gained = 2 * (s - 1) * dr + 2 * b * d - (s - 1) ** 2 * rr - numel * b * b - 2 * (s - 1) * b * r
    # What the sums are uncertain by must not be what is gained, ...
    change = abs(s - 1) * math.sqrt(rr) + abs(b) * math.sqrt(numel)
    doubt = 2.0**-19 * change * (2 * math.sqrt(dd) + change)
    # ... nor what rounding in float32 costs when s and b are applied: at most 2**-24 of each R, in the worst case all
    # in the direction of D.
    cost = 2.0**-22 * math.sqrt(dd * rr) + 2.0**-46 * rr
    return (s, b) if gained > doubt + cost else (1.0, 0.0)


def _total(values: list[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def draw_seed(seed: int, name: str, count: int) -> int:
    """Derive the 63-bit seed of one draw from the encoding's seed, the variable and the count of its rewrites."""
    key = struct.pack("<Qq", seed & (2**64 - 1), count) + name.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def _float32(value: float) -> float:
    return ctypes.c_float(value).value  # a tensor takes twenty times as long
