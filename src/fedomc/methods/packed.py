"""``Packed``: a flat variable as the tensors that a method makes of it, and its changes in place."""

import hashlib
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedomc.codec import INFINITY_BITS, Outcome
from fedomc.codec.workspace import workspace
from fedomc.errors import NonFiniteError
from fedomc.methods.method import Fields, Method, Source, Writing


class State(NamedTuple):
    """What a packed variable holds at one time; a change replaces all of it by one assignment.

    [Note: one assignment]
    Codes mean nothing without their scale. Were they written one after the other, an interrupt between the two would
    leave new codes with the old scale, and a reader in another thread could see such a pair. So new fields are made
    beside the present ones, and take their place by one assignment, which Python never does by halves: who reads sees
    all of the former state or all of the new one. The memory of the former fields goes back to the workspace when
    nobody looks at it any more, and is that of the next new fields. The exception is memory that processes share:
    there the place must stay, and the fields are copied into it.

    Attributes:
        fields: the tensors, in the order of the method's ``fields``.
        draws: how often values were rounded, which chooses the next draw of stochastic rounding.
        is_zero: whether all values are known to be zero, as those of an update before the first step.
    """

    fields: Fields
    draws: int
    is_zero: bool


class Packed:
    """A flat variable as codes and whatever gives them their values.

    Attributes:
        method: what the fields mean.
        numel: how many values.
        state: the fields; its identity tells whether the variable was changed.
    """

    __slots__ = ("__weakref__", "method", "numel", "state")

    def __init__(self, method: Method, numel: int, fields: Fields, draws: int = 0, *, is_zero: bool = False) -> None:
        self.method = method
        self.numel = numel
        self.state = State(fields, draws, is_zero)

    @classmethod
    def zeros(cls, method: Method, numel: int, device: torch.device | str) -> "Packed":
        """Make a variable of zeros."""
        return cls(method, numel, method.zeros(numel, device), is_zero=True)

    @property
    def fields(self) -> Fields:
        """The tensors."""
        return self.state.fields

    @property
    def codes(self) -> Tensor:
        """The first field: int32 words, laid out as ``codec.layout`` says."""
        return self.state.fields[0]

    @property
    def draws(self) -> int:
        """How often values were rounded."""
        return self.state.draws

    @property
    def is_zero(self) -> bool:
        """Whether all values are known to be zero; never of memory that another process may write."""
        return self.state.is_zero and not self.codes.untyped_storage().is_shared()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(field.nbytes for field in self.state.fields)

    @property
    def bound(self) -> float:
        """A magnitude that no value exceeds."""
        return self.method.bound(self.state.fields, self.numel)

    def to(self, device: torch.device | str) -> "Packed":
        """Copy to a device."""
        state = self.state
        fields = tuple(field.to(device, copy=True) for field in state.fields)
        return Packed(self.method, self.numel, fields, state.draws, is_zero=state.is_zero)

    def take(self, other: "Packed") -> None:
        """Become a copy of another variable of the same method and size; its random draws go on here."""
        copy = other.to(self.codes.device)
        self._replace(copy.state)

    def decode(self, out: Tensor, start: int = 0) -> Tensor:
        """Decode ``len(out)`` values from ``start`` (a multiple of the block) into float32 ``out``."""
        return self.method.decode(self._stretch(start, out), out)

    def decode_with(self, update: "Packed", out: Tensor, start: int = 0) -> Tensor:
        """Decode the sum of this base and its update."""
        return self.method.decode_sum(self._stretch(start, out), update.method, update._stretch(start, out), out)

    def add_to(self, out: Tensor, weight: float = 1.0, start: int = 0) -> Tensor:
        """Add ``weight`` times ``len(out)`` values from ``start`` (a multiple of the block) to float32 ``out``."""
        return self.method.add_to(self._stretch(start, out), out, weight)

    def add_difference_to(self, out: Tensor, subtrahend: "Packed", weight: float = 1.0, start: int = 0) -> Tensor:
        """Add ``weight`` times the difference between this variable and another to float32 ``out``."""
        fields, others = self._stretch(start, out), subtrahend._stretch(start, out)
        return self.method.add_difference_to(fields, subtrahend.method, others, out, weight)

    def rewrite(
        self,
        produce: Callable[[int, int], Tensor],
        transform: str,
        rounding: str = "nearest",
        seed: int = 0,
        name: str = "variable",
        accepts: Callable[["Packed"], bool] | None = None,
    ) -> None:
        """Encode new values in place, chunk by chunk; if one of them is not finite nothing is changed.

        Args:
            produce: returns the new values ``[start, stop)``, float32, flat; it may be asked more than once.
            transform: the transformation, if the method has it; otherwise the method's own.
            rounding: ``nearest`` or ``stochastic``.
            seed: of stochastic rounding, drawn afresh at every rewrite.
            name: of the variable, for the error and the seed.
            accepts: tells whether the new variable may take the place of the present one.

        Raises:
            NonFiniteError: a new value is NaN or infinite, or the new variable is not accepted.
        """
        state, out = self.state, self._room()
        present = state.fields if state.draws else None
        source = Source(self.numel, produce)
        found = self.method.encode(source, out, self._writing(transform, rounding, seed, name), present)
        self._finish(out, found, name, accepts)

    def add_(
        self,
        gradient: Tensor,
        alpha: float,
        transform: str,
        rounding: str = "nearest",
        seed: int = 0,
        name: str = "variable",
        accepts: Callable[["Packed"], bool] | None = None,
    ) -> None:
        """Add ``alpha`` times a float32 ``[numel]`` in place, in one pass; the rest is as in ``rewrite``.

        If no value changes, as with a gradient of zeros, the variable is kept as it is: encoding its values again might
        move them.
        """
        state, out = self.state, self._room()
        writing = self._writing(transform, rounding, seed, name)
        found = self.method.update(state.fields, gradient, alpha, out, writing)
        if found.changed or found.absmax_bits >= INFINITY_BITS:
            self._finish(out, found, name, accepts)

    def multiply_(self, factor: Tensor | float) -> bool:
        """Multiply by a number where that changes the scale alone; False, and nothing done, where it does not."""
        state = self.state
        fields = self.method.scaled(state.fields, factor)
        if fields is not None:
            self._replace(State(fields, state.draws + 1, state.is_zero))
        return fields is not None

    def _writing(self, transform: str, rounding: str, seed: int, name: str) -> Writing:
        if transform not in self.method.transforms:
            transform = self.method.default_transform()
        draw = draw_seed(seed, name, self.state.draws) if rounding == "stochastic" else None
        return Writing(transform, draw)

    def _finish(
        self, fields: Fields, found: Outcome, name: str, accepts: Callable[["Packed"], bool] | None = None
    ) -> None:
        """Check new fields, and let them take the place of the present ones."""
        if found.absmax_bits >= INFINITY_BITS:
            raise NonFiniteError(
                f"{name} has a value that is NaN or infinite; nothing was changed. "
                "Look for a diverging loss, lower the learning rate or clip the gradient"
            )
        new = Packed(self.method, self.numel, fields, self.state.draws + 1)
        if accepts is not None and not accepts(new):
            raise NonFiniteError(
                f"{name} would have a base and an update whose sum is beyond float32; nothing was changed. "
                "Look for a diverging loss, lower the learning rate or clip the gradient"
            )
        self._replace(new.state)

    def _replace(self, state: State) -> None:
        """Take a new state; see the note on one assignment."""
        if self.codes.untyped_storage().is_shared():
            for mine, new in zip(self.fields, state.fields, strict=True):
                mine.copy_(new)
            state = state._replace(fields=self.fields)
        self.state = state

    def _room(self) -> Fields:
        """Make room for new fields; what a failure leaves in it must not destroy the present ones."""
        return tuple(
            workspace.empty(field.numel(), field.device, exact=True).view(torch.int32)
            if field.dtype is torch.int32
            else torch.empty_like(field)
            for field in self.state.fields
        )

    def _stretch(self, start: int, out: Tensor) -> Fields:
        fields, count = self.state.fields, out.numel()
        if start == 0 and count == self.numel:
            return fields
        return self.method.stretch(fields, self.numel, start, count)


def encode(
    values: Tensor,
    method: Method,
    transform: str = "",
    rounding: str = "nearest",
    seed: int = 0,
    name: str = "variable",
) -> Packed:
    """Encode the values of a tensor of any shape.

    Args:
        values: finite; encoded as float32.
        method: how.
        transform: the transformation, if the method has it; otherwise the method's own, as when it is empty.
        rounding: ``nearest`` or ``stochastic``.
        seed: of stochastic rounding.
        name: of the variable, for the error and the seed.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    flat = values.detach().to(torch.float32).contiguous().view(-1)
    fields = tuple(
        torch.empty(field.length, dtype=field.dtype, device=flat.device) for field in method.fields(flat.numel())
    )
    packed = Packed(method, flat.numel(), fields)
    found = method.encode(Source.of(flat), fields, packed._writing(transform, rounding, seed, name))
    packed._finish(fields, found, name)
    return packed


def draw_seed(seed: int, name: str, count: int) -> int:
    """Derive the 63-bit seed of one draw from the encoding's seed, the variable and the count of its draws."""
    key = struct.pack("<Qq", seed & (2**64 - 1), count) + name.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
