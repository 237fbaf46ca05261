"""``Method``: the interface of compression methods; code outside this package does not depend on specific ones."""

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fedomc import codec
from fedomc.codec import CHUNK, INFINITY_BITS, Deferred, Outcome
from fedomc.codec.workspace import workspace
from fedomc.methods.interchange import Interchange

ROUNDINGS = ("nearest", "stochastic")

Fields = tuple[Tensor, ...]
"""The tensors of a variable, in the order of ``Method.fields``."""


class Field(NamedTuple):
    """One tensor of a packed variable.

    Attributes:
        name: the name of the field, such as ``codes`` or ``scales``.
        dtype: the dtype of the tensor.
        length: the number of elements; the tensor is flat.
        by_values: whether each stretch of values has its own stretch of the field; otherwise all values share the
            whole field.
    """

    name: str
    dtype: torch.dtype
    length: int
    by_values: bool = True

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.length * self.dtype.itemsize


class Writing(NamedTuple):
    """The settings of one encoding pass.

    Attributes:
        transform: one of the method's ``transforms``.
        seed: the 63-bit seed for this pass of stochastic rounding; None rounds to nearest.
    """

    transform: str
    seed: int | None = None


@dataclass(frozen=True)
class Source:
    """The new values of a variable, produced in stretches that begin at multiples of the codec's block size.

    Attributes:
        numel: how many values.
        produce: returns the values ``[start, stop)`` as a flat float32 tensor. It may be called more than once for the
            same range.
        step: how many values to produce at a time.
    """

    numel: int
    produce: Callable[[int, int], Tensor]
    step: int = CHUNK

    @classmethod
    def of(cls, values: Tensor) -> "Source":
        """Make a source from an existing flat, contiguous float32 tensor."""
        return cls(values.numel(), lambda start, stop: values, max(1, values.numel()))

    def stretches(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each stretch as the index of its first value and its values, contiguous.

        Raises:
            RuntimeError: ``produce`` returned a tensor of the wrong shape.
        """
        for start in range(0, self.numel, self.step):
            stop = min(start + self.step, self.numel)
            values = self.produce(start, stop)
            if values.shape != (stop - start,):
                raise RuntimeError(f"expected {stop - start} new values from {start} on, but got {tuple(values.shape)}")
            yield start, values.contiguous()

    def absmax_bits(self) -> int:
        """Return the float32 bits of the largest magnitude."""
        return max((codec.absmax_bits(values) for _, values in self.stretches()), default=0)


class Method(ABC):
    """A compression method: defines how values are represented by the tensors of a packed variable.

    Methods are immutable and hashable, and two methods are equal if they read and write the same bytes. A subclass
    defines the method's name and header, the fields of a variable, and how a stretch of values is encoded and decoded.
    All other operations have default implementations in terms of these, which faster ones may override. New methods
    are registered with ``registry.register``.

    A stretch is a range of values that begins at a multiple of ``codec.BLOCK``. Operations on a stretch receive the
    fields of that stretch.

    Attributes:
        tag: the number that identifies the method in a frame, 0 to 255.
        transforms: the names of the transformations that the method can apply before rounding.
        code_order: the ordering of the codes of the first field, for the entropy coding of differences: ``unsigned``,
            ``sign-magnitude`` or ``twos-complement``.
        least_error: the transformation and the rounding with the least squared error, as error feedback needs them; an
            empty transformation is the default one.
        holds: whether the method can hold variables during training; otherwise it is only for sending.
    """

    tag: ClassVar[int]
    transforms: ClassVar[tuple[str, ...]] = ("none",)
    code_order: ClassVar[str] = "unsigned"
    least_error: ClassVar[tuple[str, str]] = ("", "nearest")
    holds: ClassVar[bool] = True

    # ---- name and header -------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_name(cls, text: str) -> Self | None:
        """Parse the method's name; return None if the text names another method.

        Raises:
            FormatError: the text names this method, but with unsupported parameters.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Return the name that ``from_name`` parses."""

    def header(self) -> bytes:
        """Return the method's parameters as stored in a frame after the tag, at most 16 bytes."""
        return b""

    @classmethod
    @abstractmethod
    def from_header(cls, data: bytes) -> Self:
        """Reconstruct a method from the bytes that ``header`` returned.

        Raises:
            FormatError: the bytes do not describe a method of this class.
        """

    # ---- fields of a variable --------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """The number of bits of a code in the first field, 1 to 32; ``codec.layout`` describes their packing."""

    def code_count(self, numel: int) -> int:
        """Return the number of codes for a variable of ``numel`` values."""
        return numel

    @abstractmethod
    def fields(self, numel: int) -> tuple[Field, ...]:
        """Describe the fields of a variable of ``numel`` values; the first is ``codes``, in int32 words."""

    def nbytes(self, numel: int) -> int:
        """Return the number of bytes for a variable of ``numel`` values."""
        return sum(field.nbytes for field in self.fields(numel))

    def zeros(self, numel: int, device: torch.device | str) -> Fields:
        """Make the fields of a variable of zeros."""
        return tuple(torch.zeros(field.length, dtype=field.dtype, device=device) for field in self.fields(numel))

    def stretch(self, fields: Fields, numel: int, start: int, count: int) -> Fields:
        """View the fields of ``count`` values starting at ``start``, in a variable of ``numel`` values."""
        if start == 0 and count == numel:
            return fields
        begins, lengths = self.fields(start), self.fields(count)
        return tuple(
            tensor[begin.length : begin.length + length.length] if begin.by_values else tensor
            for tensor, begin, length in zip(fields, begins, lengths, strict=True)
        )

    def validate(self, fields: Fields, numel: int) -> str | None:
        """Validate fields from an untrusted source, whose dtypes and lengths have already been checked.

        Returns:
            A description of the problem, or None if every value decodes to a finite float32.
        """
        return None

    @property
    def interchange(self) -> Interchange | None:
        """How a variable is written for other programs; None if no standard dtype fits its codes."""
        return None

    # ---- encoding and decoding -------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, fields: Fields, out: Tensor) -> Tensor:
        """Decode a stretch of values into ``out``, and return it.

        The values are those of float32 arithmetic; ``out`` may be float32, bfloat16 or float16, as in ``Tensor.copy_``.
        """

    @abstractmethod
    def encode_stretch(self, values: Tensor, fields: Fields, start: int, writing: Writing) -> None:
        """Encode a stretch of finite float32 values into its fields; ``start`` is the counter for random numbers."""

    def default_transform(self) -> str:
        """Return the transformation to use if none is specified."""
        return self.transforms[0]

    def encode(
        self, source: Source, fields: Fields, writing: Writing, present: Fields | None = None
    ) -> Outcome | Deferred:
        """Encode a whole variable.

        Args:
            source: the new values.
            fields: the fields to write.
            writing: the settings of this pass.
            present: the current fields of the variable, as a hint if they are likely to be similar to the new ones.

        Returns:
            The outcome; if it reports a value that is not finite, the written fields are invalid. Methods may defer
            it where ``codec.defers`` says so.
        """
        absmax = 0
        for start, values in source.stretches():
            absmax = max(absmax, codec.absmax_bits(values))
            if absmax >= INFINITY_BITS:
                break
            self.encode_stretch(values, self.stretch(fields, source.numel, start, len(values)), start, writing)
        return Outcome(absmax, True)

    def update(
        self, present: Fields, gradient: Tensor, alpha: float, out: Fields, writing: Writing
    ) -> Outcome | Deferred:
        """Encode a variable's current values plus ``alpha`` times a gradient.

        Args:
            present: the current fields of the variable.
            gradient: float32, bfloat16 or float16 ``[numel]``.
            alpha: the factor of the gradient.
            out: the fields to write, which must not share memory with the current ones.
            writing: the settings of this pass.

        Returns:
            The outcome, including whether any value changed; if none did, the caller must keep the current fields.
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
        return found if isinstance(found, Deferred) else Outcome(found.absmax_bits, changed)

    def decode_sum(self, fields: Fields, update: "Method", update_fields: Fields, out: Tensor) -> Tensor:
        """Decode the sum of a stretch and an update of any method into ``out``, rounded once as in ``decode``."""
        if out.dtype is torch.float32:
            self.decode(fields, out)
            return update.add_to(update_fields, out, 1.0)
        for start, part in _chunks(out):
            base = self.stretch(fields, len(out), start, len(part))
            change = update.stretch(update_fields, len(out), start, len(part))
            part.copy_(self.decode_sum(base, update, change, workspace.empty(len(part), part.device)))
        return out

    def add_to(self, fields: Fields, out: Tensor, weight: float) -> Tensor:
        """Add ``weight`` times a stretch of values to ``out``, a float32 tensor."""
        for start, part in _chunks(out):
            values = workspace.empty(len(part), part.device)
            part.add_(self.decode(self.stretch(fields, len(out), start, len(part)), values), alpha=weight)
        return out

    def add_difference_to(
        self, fields: Fields, subtrahend: "Method", subtrahend_fields: Fields, out: Tensor, weight: float
    ) -> Tensor:
        """Add ``weight`` times the difference between this stretch and one of any method to ``out``."""
        for start, part in _chunks(out):
            values, others = (workspace.empty(len(part), part.device) for _ in range(2))
            self.decode(self.stretch(fields, len(out), start, len(part)), values)
            subtrahend.decode(subtrahend.stretch(subtrahend_fields, len(out), start, len(part)), others)
            codec.add_difference(values, others, weight, part)
        return out

    def bound(self, fields: Fields, numel: int) -> float:
        """Return an upper bound on the magnitude of the values."""
        bits = Source(numel, lambda start, stop: self._decoded(fields, numel, start, stop)).absmax_bits()
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])

    def scaled(self, fields: Fields, factor: Tensor | float) -> Fields | None:
        """Return the fields of the values multiplied by a number, or None if that requires encoding again."""
        return None

    def _decoded(self, fields: Fields, numel: int, start: int, stop: int) -> Tensor:
        out = workspace.empty(stop - start, fields[0].device)
        return self.decode(self.stretch(fields, numel, start, stop - start), out)


def _chunks(out: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(out), CHUNK):
        yield start, out[start : start + CHUNK]
