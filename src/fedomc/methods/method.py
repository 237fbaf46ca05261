"""``Method``: the interface of a compression method. Nothing above this package asks which method it has."""

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import CHUNK, INFINITY_BITS, Outcome
from fedomc.codec.workspace import workspace
from fedomc.methods.interchange import Interchange

ROUNDINGS = ("nearest", "stochastic")

Fields = tuple[Tensor, ...]
"""The tensors of a variable, in the order of ``Method.fields``."""


class Field(NamedTuple):
    """One tensor of a packed variable.

    Attributes:
        name: such as ``codes`` or ``scales``.
        dtype: of the tensor.
        length: how many elements; the tensor is flat.
        by_values: whether a stretch of the values has a stretch of the field; otherwise all values share all of it.
    """

    name: str
    dtype: torch.dtype
    length: int
    by_values: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.length * self.dtype.itemsize


class Writing(NamedTuple):
    """How values are to be encoded this time.

    Attributes:
        transform: one of the method's ``transforms``.
        seed: of this draw of stochastic rounding, 63 bits; None rounds to nearest.
    """

    transform: str
    seed: int | None = None


@dataclass(frozen=True)
class Source:
    """The new values of a variable, in stretches that begin at a multiple of the codec's block.

    Attributes:
        numel: how many values.
        produce: returns the values ``[start, stop)``, float32, flat and contiguous; it may be asked more than once.
        step: how many values are produced at a time.
    """

    numel: int
    produce: Callable[[int, int], Tensor]
    step: int = CHUNK

    @classmethod
    def of(cls, values: Tensor) -> "Source":
        """Take float32 values that are there, flat and contiguous."""
        return cls(values.numel(), lambda start, stop: values, max(1, values.numel()))

    def stretches(self) -> Iterator[tuple[int, Tensor]]:
        """Give the index of the first value and the values of each stretch.

        Raises:
            RuntimeError: other than the values of the stretch were produced.
        """
        for start in range(0, self.numel, self.step):
            stop = min(start + self.step, self.numel)
            values = self.produce(start, stop)
            if values.shape != (stop - start,):
                raise RuntimeError(f"{stop - start} new values expected from {start} on, got {tuple(values.shape)}")
            yield start, values

    def absmax_bits(self) -> int:
        """Return the float32 bits of the largest magnitude."""
        return max((codec.absmax_bits(values) for _, values in self.stretches()), default=0)


class Method(ABC):
    """What the tensors of a packed variable mean.

    A method is immutable and hashable, and equal to another that reads and writes the same bytes. A subclass says how
    it is written, which fields a variable has, and how a stretch of values is encoded and decoded; the other operations
    have defaults made from these, which may be overridden by faster ones. ``registry.register`` makes it known.

    A stretch begins at a multiple of ``codec.BLOCK`` values. Fields are passed as those of the stretch.

    Attributes:
        tag: the number of the method in a frame, 0 to 255.
        transforms: the names of the transformations that the method can apply before it rounds.
        code_order: how the codes of the first field are ordered, for the entropy coding of differences: ``unsigned``,
            ``sign-magnitude`` or ``twos-complement``.
        holds: whether a variable can be held by this method while it trains; otherwise it is for what is sent.
    """

    tag: ClassVar[int]
    transforms: ClassVar[tuple[str, ...]] = ("none",)
    code_order: ClassVar[str] = "unsigned"
    holds: ClassVar[bool] = True

    # ---- how it is written -----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_name(cls, text: str) -> Self | None:
        """Read the method's name; None if the text names another one.

        Raises:
            FormatError: the text means this method, with a size that it does not have.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Return the name that ``from_name`` reads."""

    def header(self) -> bytes:
        """Return what a frame says of the method beside its tag; at most 16 bytes."""
        return b""

    @classmethod
    @abstractmethod
    def from_header(cls, data: bytes) -> Self:
        """Read what ``header`` returned.

        Raises:
            FormatError: the bytes are not that of any method of this kind.
        """

    # ---- what a variable consists of -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """How many bits a code of the first field has, 1 to 32. Codes are packed as ``codec.layout`` says."""

    def code_count(self, numel: int) -> int:
        """Count the codes of a variable of so many values."""
        return numel

    @abstractmethod
    def fields(self, numel: int) -> tuple[Field, ...]:
        """Name the fields of a variable of so many values: first ``codes``, int32 words."""

    def nbytes(self, numel: int) -> int:
        """Count the bytes that a variable of so many values takes."""
        return sum(field.nbytes for field in self.fields(numel))

    def zeros(self, numel: int, device: torch.device | str) -> Fields:
        """Make the fields of a variable of zeros."""
        return tuple(torch.zeros(field.length, dtype=field.dtype, device=device) for field in self.fields(numel))

    def stretch(self, fields: Fields, numel: int, start: int, count: int) -> Fields:
        """View the fields of ``count`` values from ``start`` on, of a variable of ``numel`` values."""
        if start == 0 and count == numel:
            return fields
        begins, lengths = self.fields(start), self.fields(count)
        return tuple(
            tensor[begin.length : begin.length + length.length] if begin.by_values else tensor
            for tensor, begin, length in zip(fields, begins, lengths, strict=True)
        )

    def validate(self, fields: Fields, numel: int) -> str | None:
        """Check fields that came from outside, whose dtypes and lengths are right.

        Returns:
            What is wrong with them; None if every value decodes to a finite float32.
        """
        return None

    @property
    def interchange(self) -> Interchange | None:
        """How a variable is written for other programs; None if they have no dtype for its codes."""
        return None

    # ---- values and fields -----------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, fields: Fields, out: Tensor) -> Tensor:
        """Decode a stretch of values into float32 ``out``, and return it."""

    @abstractmethod
    def encode_stretch(self, values: Tensor, fields: Fields, start: int, writing: Writing) -> None:
        """Encode a stretch of finite float32 values into its fields; ``start`` is the counter of random rounding."""

    def default_transform(self) -> str:
        """Name the transformation that is used where none is asked for."""
        return self.transforms[0]

    def encode(self, source: Source, fields: Fields, writing: Writing, present: Fields | None = None) -> Outcome:
        """Encode a whole variable.

        Args:
            source: the new values.
            fields: written.
            writing: how.
            present: what was held so far, if it is likely to be like the new values.

        Returns:
            What was found; if a value is not finite, what was written means nothing.
        """
        largest = 0
        for start, values in source.stretches():
            largest = max(largest, codec.absmax_bits(values))
            if largest >= INFINITY_BITS:
                break
            self.encode_stretch(values, self.stretch(fields, source.numel, start, len(values)), start, writing)
        return Outcome(largest, True)

    def update(self, present: Fields, gradient: Tensor, alpha: float, out: Fields, writing: Writing) -> Outcome:
        """Encode a variable's present values plus ``alpha`` times a gradient.

        Args:
            present: the fields of the variable.
            gradient: float32 ``[numel]``.
            alpha: its factor.
            out: fields, written; other tensors than the present ones.
            writing: how.

        Returns:
            What was found, and whether any value changed: if none did, the present fields are to be kept.
        """
        numel, changed = gradient.numel(), False

        def updated(start: int, stop: int) -> Tensor:
            nonlocal changed
            former = workspace.empty(stop - start, gradient.device)
            self.decode(self.stretch(present, numel, start, stop - start), former)
            values = former.add(gradient[start:stop], alpha=alpha)
            changed = changed or not torch.equal(values, former)
            return values

        found = self.encode(Source(numel, updated), out, writing, present)
        return Outcome(found.absmax_bits, changed)

    def decode_sum(self, fields: Fields, update: "Method", update_fields: Fields, out: Tensor) -> Tensor:
        """Decode a stretch and add an update, of whatever method, into ``out``."""
        self.decode(fields, out)
        return update.add_to(update_fields, out, 1.0)

    def add_to(self, fields: Fields, out: Tensor, weight: float) -> Tensor:
        """Add ``weight`` times a stretch of values to float32 ``out``."""
        for start, part in _chunks(out):
            values = workspace.empty(len(part), part.device)
            part.add_(self.decode(self.stretch(fields, len(out), start, len(part)), values), alpha=weight)
        return out

    def add_difference_to(
        self, fields: Fields, subtrahend: "Method", subtrahend_fields: Fields, out: Tensor, weight: float
    ) -> Tensor:
        """Add ``weight`` times the difference of a stretch and another one, of whatever method, to ``out``."""
        for start, part in _chunks(out):
            values, others = (workspace.empty(len(part), part.device) for _ in range(2))
            self.decode(self.stretch(fields, len(out), start, len(part)), values)
            subtrahend.decode(subtrahend.stretch(subtrahend_fields, len(out), start, len(part)), others)
            codec.add_difference(values, others, weight, part)
        return out

    def bound(self, fields: Fields, numel: int) -> float:
        """Return a magnitude that no value exceeds."""
        bits = Source(numel, lambda start, stop: self._decoded(fields, numel, start, stop)).absmax_bits()
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])

    def scaled(self, fields: Fields, factor: Tensor | float) -> Fields | None:
        """Return the fields of all values times a number, or None if that takes encoding them again."""
        return None

    def _decoded(self, fields: Fields, numel: int, start: int, stop: int) -> Tensor:
        out = workspace.empty(stop - start, fields[0].device)
        return self.decode(self.stretch(fields, numel, start, stop - start), out)


def _chunks(out: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(out), CHUNK):
        yield start, out[start : start + CHUNK]
