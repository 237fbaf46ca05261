"""``Packed``: a flat variable in packed form, with in-place updates."""

import hashlib
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedomc.codec import CHUNK, INFINITY_BITS, Deferred, Outcome, keep_present
from fedomc.codec.workspace import workspace
from fedomc.errors import NonFiniteError
from fedomc.methods.method import Fields, Method, Source, Writing

_STRETCH = 64 * CHUNK
"""How many values a device encodes at a time, for which chunks would be too small."""


class State(NamedTuple):
    """The contents of a packed variable at one time; every change replaces the whole state with one assignment.

    [Note: one assignment]
    Codes are meaningless without their scale. If the two were written one after the other, an interrupt in between
    would leave new codes with the old scale, and a reader in another thread could see such a mismatch. New fields are
    therefore created separately from the current ones and installed with one assignment, which is atomic in Python: a
    reader sees either the complete old state or the complete new one. The memory of the old fields returns to the
    workspace when the last reference to it is gone, and is reused for the next new fields. Memory shared between
    processes is the exception: its address must not change, so the new fields are copied into it.

    Attributes:
        fields: the tensors, in the order of the method's ``fields``.
        draws: how often the values have been rounded, which selects the next draw of stochastic rounding.
        is_zero: whether all values are known to be zero, as in an update before the first step.
    """

    fields: Fields
    draws: int
    is_zero: bool


class Packed:
    """A flat variable in packed form: codes, and whatever else the method needs to decode them.

    Attributes:
        method: the compression method, which interprets the fields.
        numel: how many values.
        state: the fields and counters; every change installs a new object, so its identity reveals changes.
    """

    __slots__ = ("__weakref__", "_bounded", "_fault", "method", "numel", "state")

    def __init__(self, method: Method, numel: int, fields: Fields, draws: int = 0, *, is_zero: bool = False) -> None:
        self.method = method
        self.numel = numel
        self.state = State(fields, draws, is_zero)
        self._bounded: tuple[State, float] | None = None
        self._fault: tuple[str, Tensor] | None = None

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        """Return what is pickled: all but the cached bound."""
        self.check()
        return None, {"method": self.method, "numel": self.numel, "state": self.state}

    def __setstate__(self, state: tuple[None, dict[str, object]]) -> None:
        """Restore what ``__getstate__`` returned."""
        self._bounded = self._fault = None
        for name, value in state[1].items():
            setattr(self, name, value)

    @classmethod
    def zeros(cls, method: Method, numel: int, device: torch.device | str) -> "Packed":
        """Make a variable of zeros."""
        return cls(method, numel, method.zeros(numel, device), is_zero=True)

    @property
    def fields(self) -> Fields:
        """The tensors of the packed form."""
        return self.state.fields

    @property
    def codes(self) -> Tensor:
        """The first field: int32 words in the layout of ``codec.layout``."""
        return self.state.fields[0]

    @property
    def draws(self) -> int:
        """How often the values have been rounded."""
        return self.state.draws

    @property
    def is_zero(self) -> bool:
        """Whether all values are known to be zero; False for shared memory, which another process may write."""
        return self.state.is_zero and not self.codes.untyped_storage().is_shared()

    @property
    def nbytes(self) -> int:
        """The size of all fields in bytes."""
        return sum(field.nbytes for field in self.state.fields)

    @property
    def bound(self) -> float:
        """An upper bound on the magnitude of the values, found once for each state."""
        state, bounded = self.state, self._bounded
        if bounded is not None and bounded[0] is state and not self.codes.untyped_storage().is_shared():
            return bounded[1]  # each step of an update part asks for that of the base, which never changes
        bound = self.method.bound(state.fields, self.numel)
        self._bounded = state, bound
        return bound

    def to(self, device: torch.device | str) -> "Packed":
        """Return a copy on a device; one for the CPU is checked, as the host waits for it in any case."""
        if torch.device(device).type == "cpu":
            self.check()
        state = self.state
        fields = tuple(field.to(device, copy=True) for field in state.fields)
        copy = Packed(self.method, self.numel, fields, state.draws, is_zero=state.is_zero)
        copy._fault = self._fault
        return copy

    def check(self) -> None:
        """Report what a device refused to write since the last check; waits for the device only if it wrote anything.

        Raises:
            NonFiniteError: a value was NaN or infinite.
        """
        fault, self._fault = self._fault, None
        if fault is not None and int(fault[1][0]) >= INFINITY_BITS:
            raise NonFiniteError(
                f"{fault[0]} had a value that was NaN or infinite in an earlier step, or one beyond the range of its "
                "scale; the variable was left as it was before that step. "
                "Look for a diverging loss, lower the learning rate or clip the gradient"
            )

    def take(self, other: "Packed") -> None:
        """Copy the state of another variable of the same method and size, including its count of random draws."""
        copy = other.to(self.codes.device)
        self._replace(copy.state)

    def decode(self, out: Tensor, start: int = 0) -> Tensor:
        """Decode ``len(out)`` values from ``start``, a multiple of the block size, into ``out``.

        ``out`` is float32, bfloat16 or float16; values are rounded to it once, to nearest.
        """
        return self.method.decode(self._stretch(start, out), out)

    def decode_with(self, update: "Packed", out: Tensor, start: int = 0) -> Tensor:
        """Decode the sum of this variable, as the base, and its update into ``out``, as ``decode`` does."""
        return self.method.decode_sum(self._stretch(start, out), update.method, update._stretch(start, out), out)

    def add_to(self, out: Tensor, weight: float = 1.0, start: int = 0) -> Tensor:
        """Add ``weight`` times ``len(out)`` values from ``start``, a multiple of the block size, to float32 ``out``."""
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
        """Encode new values in place, chunk by chunk; if any of them is not finite, nothing changes.

        Args:
            produce: returns the new values ``[start, stop)`` as a flat float32 tensor. It may be called more than
                once for the same range.
            transform: the transformation, if the method supports it; otherwise the method's default is used.
            rounding: ``nearest`` or ``stochastic``.
            seed: the seed of stochastic rounding; every rewrite derives a new draw from it.
            name: the name of the variable, for error messages and for deriving the seed.
            accepts: tells whether the new variable may replace the current one.

        Raises:
            NonFiniteError: a new value is NaN or infinite, or the new variable is not accepted.
        """
        state, out = self.state, self._room()
        present = state.fields if state.draws else None
        source = Source(self.numel, produce, CHUNK if self.codes.device.type == "cpu" else _STRETCH)
        found = self.method.encode(source, out, self._writing(transform, rounding, seed, name), present)
        if isinstance(found, Deferred) and accepts is None:
            self._finish_there(out, found, name)
        else:
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
        """Add ``alpha`` times a gradient ``[numel]`` in place, in one pass; otherwise as in ``rewrite``.

        The gradient is float32, bfloat16 or float16, and added as its float32 values.

        If no value changes, as with a gradient of zeros, the variable is left untouched, because encoding its values
        again might change them.
        """
        state, out = self.state, self._room()
        writing = self._writing(transform, rounding, seed, name)
        found = self.method.update(state.fields, gradient.contiguous(), alpha, out, writing)
        if isinstance(found, Deferred):
            if accepts is None:
                self._finish_there(out, found, name)
                return
            found = found.outcome()
        if found.changed or found.absmax_bits >= INFINITY_BITS:
            self._finish(out, found, name, accepts)

    def multiply_(self, factor: Tensor | float) -> bool:
        """Multiply by a number if only the scale must change; otherwise do nothing and return False."""
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

    def _finish_there(self, fields: Fields, found: Deferred, name: str) -> None:
        """Install new fields that the device checks; the host learns of it from ``check``."""
        keep_present(self.state.fields, fields, found)
        worst = found.status if self._fault is None else torch.maximum(self._fault[1], found.status)
        self._fault = name, worst
        self._replace(State(fields, self.state.draws + 1, is_zero=False))

    def _finish(
        self, fields: Fields, found: Outcome | Deferred, name: str, accepts: Callable[["Packed"], bool] | None = None
    ) -> None:
        """Check new fields and install them in place of the current ones."""
        if isinstance(found, Deferred):
            found = found.outcome()
        if found.absmax_bits >= INFINITY_BITS:
            raise NonFiniteError(
                f"{name} has a value that is NaN or infinite; nothing was changed. "
                "Look for a diverging loss, lower the learning rate or clip the gradient"
            )
        new = State(fields, self.state.draws + 1, is_zero=False)
        if accepts is not None and not accepts(Packed(self.method, self.numel, fields)):
            raise NonFiniteError(
                f"{name} would have a value beyond its dtype; nothing was changed. "
                "Look for a diverging loss, lower the learning rate or clip the gradient"
            )
        self._replace(new)

    def _replace(self, state: State) -> None:
        """Install a new state; see the note on one assignment."""
        if self.codes.untyped_storage().is_shared():
            for mine, new in zip(self.fields, state.fields, strict=True):
                mine.copy_(new)
            state = state._replace(fields=self.fields)
        self.state, self._bounded = state, None

    def _room(self) -> Fields:
        """Allocate new fields, so that a failure while writing them leaves the current ones intact."""
        codes, *others = self.state.fields
        room = workspace.empty(codes.numel(), codes.device, codes.dtype, exact=True)
        return (room, *[torch.empty_like(field) for field in others])

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
    room: Callable[[int, torch.dtype, torch.device], Tensor] | None = None,
) -> Packed:
    """Encode the values of a tensor of any shape.

    Args:
        values: finite values, which are converted to float32.
        method: the compression method.
        transform: the transformation, if the method supports it; otherwise the method's default is used.
        rounding: ``nearest`` or ``stochastic``.
        seed: the seed of stochastic rounding.
        name: the name of the variable, for error messages and for deriving the seed.
        room: allocates a flat tensor of a length, dtype and device; None for torch's allocator.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    flat = values.detach().contiguous().view(-1)
    if flat.dtype not in (torch.bfloat16, torch.float16):
        flat = flat.to(torch.float32)
    fields = tuple(
        torch.empty(field.length, dtype=field.dtype, device=flat.device)
        if room is None
        else room(field.length, field.dtype, flat.device)
        for field in method.fields(flat.numel())
    )
    packed = Packed(method, flat.numel(), fields)
    wide = flat.dtype is torch.float32
    source = Source.of(flat) if wide else Source(flat.numel(), lambda start, stop: flat[start:stop].float())
    found = method.encode(source, fields, packed._writing(transform, rounding, seed, name))
    packed._finish(fields, found, name)
    return packed


def draw_seed(seed: int, name: str, count: int) -> int:
    """Derive the 63-bit seed of one draw from the encoding's seed, the variable's name and its draw count."""
    key = struct.pack("<Qq", seed & (2**64 - 1), count) + name.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
