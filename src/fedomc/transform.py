"""The per-variable transformation: ``V^ = s * 2**-k * Q(2**k * V) + b``, and a variable in that form.

[Note: the power of two]
The paper fits s and b by least squares after quantization with the format's plain bias. But weights of N(0, 0.05)
are almost all subnormal in S1E3M7, and no linear fit brings back bits that were never stored. ``scaled-affine``
first moves max|V| into the top binade by an integer k, exactly, so that every bit of the format is used.
"""

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedomc import codec
from fedomc.errors import NonFiniteError, PolicyError
from fedomc.formats import FloatFormat

TRANSFORMS = ("none", "affine", "scaled-affine")
ROUNDINGS = ("nearest", "stochastic")

_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Encoding:
    """How a variable is kept: in one part, or with ``update_format`` in two, a base and the sum of the local steps.

    Attributes:
        format: of the variable, or of its base.
        update_format: of the update part; None keeps the variable in one part.
        transform: ``none``, ``affine`` or ``scaled-affine``.
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
        return cls(codes, torch.tensor([1.0, 0.0], device=device), format, numel)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.affine.nbytes

    def decode(self, out: Tensor, start: int = 0) -> Tensor:
        """Decode ``len(out)`` values from ``start`` (a multiple of the block) into float32 ``out``."""
        scale, offset = self.affine.tolist()
        return codec.decode(self.codes, self.format, scale, offset, out, start=start)

    def rewrite(
        self,
        produce: Callable[[int, int], Tensor],
        transform: str,
        rounding: str = "nearest",
        seed: int = 0,
        name: str = "variable",
        exponent: int | None = None,
    ) -> None:
        """Encode new values in place, chunk by chunk; if one of them is not finite nothing is changed.

        Args:
            produce: gives the new values ``[start, stop)``, float32, flat; called again if the power of two that the
                present values suggest does not fit the new ones.
            transform: which transformation.
            rounding: which rounding.
            seed: of stochastic rounding, drawn afresh at every rewrite.
            name: of the variable, for the error and the seed.
            exponent: the power of two to try first; None takes it from the present values.

        Raises:
            NonFiniteError: a new value is NaN or infinite.
        """
        draw = draw_seed(seed, name, self.rewrites) if rounding == "stochastic" else None
        scaled = transform == "scaled-affine"
        if not scaled:
            exponent = 0
        elif exponent is None:
            exponent = self._present_exponent() if self.rewrites else self._needed_exponent(produce)
        while True:
            codes, sums, largest = self._encode(produce, exponent, draw, transform != "none")
            if largest >= codec.INFINITY_BITS:
                raise NonFiniteError(
                    f"{name} has a value that is NaN or infinite; nothing was changed. "
                    "Look for a diverging loss, lower the learning rate or clip the gradient"
                )
            wanted = scaling_exponent(largest, self.format) if scaled else 0
            if wanted == exponent:
                break
            exponent = wanted
        s, b = (1.0, 0.0) if transform == "none" else fit(sums, self.numel)
        scale = s * 2.0**-exponent
        if abs(scale) * self.format.max_value + abs(b) > _FLOAT32_MAX:
            scale, b = 2.0**-exponent, 0.0
        self.codes.copy_(codes)
        self.affine.copy_(torch.tensor([scale, b]))
        self.rewrites += 1

    def _encode(
        self, produce: Callable[[int, int], Tensor], exponent: int, seed: int | None, sums: bool
    ) -> tuple[Tensor, Tensor, int]:
        codes, found, largest, at = torch.empty_like(self.codes), [], 0, 0
        for start in range(0, self.numel, codec.CHUNK):
            stop = min(start + codec.CHUNK, self.numel)
            values = produce(start, stop)
            if values.shape != (stop - start,):
                raise RuntimeError(f"{stop - start} new values expected from {start} on, got {tuple(values.shape)}")
            words = codes[at : at + codec.words_of(values.numel(), self.format.bits)]
            at += words.numel()
            part, part_largest = codec.encode(values, self.format, exponent, words, start=start, seed=seed, sums=sums)
            found.append(part)
            largest = max(largest, part_largest)
            if largest >= codec.INFINITY_BITS:
                break
        return codes, torch.cat(found) if found else torch.empty(0, 5), largest

    def _needed_exponent(self, produce: Callable[[int, int], Tensor]) -> int:
        starts = range(0, self.numel, codec.CHUNK)
        bits = (codec.magnitude_bits(produce(start, min(start + codec.CHUNK, self.numel))) for start in starts)
        return scaling_exponent(max(bits, default=0), self.format)

    def _present_exponent(self) -> int:
        scale = abs(float(self.affine[0]))
        return -round(math.log2(scale)) if scale > 0 else 0


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
    exponent = scaling_exponent(codec.magnitude_bits(flat), format)
    packed.rewrite(lambda start, stop: flat[start:stop], transform, rounding, seed, name, exponent)
    return packed


def scaling_exponent(magnitude_bits: int, format: FloatFormat) -> int:
    """Choose k so that the largest magnitude, given as float32 bits, comes into the format's top binade.

    It is bounded so that every decoded value is zero or a normal float32; for e = 8, where nothing is gained, it is 0.
    """
    if magnitude_bits == 0:
        return 0
    field = magnitude_bits >> 23
    binade = field - 127 if field else magnitude_bits.bit_length() - 150
    return min(format.top_exponent - binade, max(0, 120 - format.bias - format.mantissa_bits))


def fit(sums: Tensor, numel: int) -> tuple[float, float]:
    """Fit s and b so that ``s * R + b`` is closest to V by least squares (paper, per-variable transformation).

    Args:
        sums: float64 ``[blocks, 5]``: of D, D*D, D*R, R*R and R by block, where ``D = V - R``. With D instead of V
            nothing cancels: the fit is of what the codes miss.
        numel: how many values.

    Returns:
        s and b, rounded to float32. (1, 0) where that is as good; (1, mean error) where R is constant.
    """
    d, dd, dr, rr, r = (math.fsum(column) for column in sums.T.tolist())
    if dd == 0:
        return 1.0, 0.0
    spread = numel * rr - r * r
    gain = (numel * dr - d * r) / spread if spread > 1e-12 * numel * rr else 0.0
    s, b = _float32(1 + gain), _float32((d - gain * r) / numel)
    if abs(b) < 2.0**-126:  # a subnormal, which flush-to-zero modes would not add
        b = 0.0
    error = dd + (s - 1) ** 2 * rr + numel * b * b - 2 * (s - 1) * dr - 2 * b * d + 2 * (s - 1) * b * r
    # What rounding in float32 costs when s and b are applied must not eat what they gain: at most 2**-24 of each R,
    # in the worst case all in the direction of D.
    cost = 2.0**-22 * math.sqrt(dd * rr) + 2.0**-46 * rr
    return (s, b) if error + cost < dd else (1.0, 0.0)


def draw_seed(seed: int, name: str, count: int) -> int:
    """Derive the 64-bit seed of one draw from the encoding's seed, the variable and the count of its rewrites."""
    key = struct.pack("<Qq", seed & (2**64 - 1), count) + name.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))
