"""``CompressedTensor``: a tensor that behaves as a dense one and is stored as packed codes.

[Note: who runs an operation]
The class knows how to decode and re-encode itself. How torch operates on it is defined in other modules, which register
their handlers. ``ops``: functions such as ``linear`` decode the weight while they run, in panels or as a whole, and
save only its codes for the backward pass. ``inplace``: element-wise in-place operators decode, modify and encode one
chunk at a time, so the optimizers of ``torch.optim`` work unmodified. ``fallback``: every other operator runs on a
fresh decoded copy, and its writes are encoded again. ``views``: views read from a decoded copy and write through to the
codes. ``backward``: backward passes that start from a compressed tensor or differentiate with respect to one.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fedomc import codec
from fedomc._torch import (
    forbid_memory_access,
    keep_hooks_in_swap,
    no_overrides,
    transforms_are_active,
    tree_leaves,
    uncompiled,
    use_count,
    without_grad,
    wrapper_tensor,
)
from fedomc.codec import CHUNK
from fedomc.codec.workspace import PANEL_BYTES, workspace
from fedomc.errors import NonFiniteError
from fedomc.methods import Encoding, Method, Packed, encode, parse_method, registered
from fedomc.methods.packed import State
from fedomc.tensor.arrays import DecodedArrays
from fedomc.tensor.dtypes import DTYPES, LIMITS
from fedomc.tensor.handlers import BACKWARD, FALLBACK, FUNCTIONS, METHODS, OPERATORS, Handler
from fedomc.tensor.panels import panel_rows, panels
from fedomc.tensor.steps import StepRecord

_PARTS = ("base", "update")


class CompressedTensor(DecodedArrays, Tensor):
    """A tensor that is stored as bit-packed low-precision floats and behaves as a dense tensor of its dtype.

    The codes know nothing of the dtype, one of ``DTYPES``: their float32 values are rounded to it where they are used.
    Changes in place are computed from the float32 values.

    Attributes:
        base: the codes of the whole variable; with an update part, the codes as received, which are never rewritten.
        update: the sum of the local steps, or None for a variable held in one part.
        encoding: how the variable is encoded.
        variable: the fully qualified name in the model, used in error messages.
        steps: measures how much of each requested training step the codes actually took.
    """

    base: Packed
    update: Packed | None
    encoding: Encoding
    variable: str
    steps: StepRecord

    @staticmethod
    def __new__(
        cls,
        base: Packed,
        update: Packed | None,
        encoding: Encoding,
        shape: Sequence[int],
        name: str = "variable",
        requires_grad: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> "CompressedTensor":
        """Wrap packed parts without copying; users call ``from_dense`` or ``from_packed`` instead."""
        self = wrapper_tensor(cls, shape, dtype, base.codes.device, requires_grad)
        forbid_memory_access(self)
        self.base, self.update, self.encoding, self.variable = base, update, encoding, name
        self.steps = StepRecord(name, str((update or base).method), encoding.rounding, encoding.seed)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``__new__`` has already built the tensor."""

    @classmethod
    def from_dense(
        cls,
        values: Tensor,
        format: str | Method,
        *,
        update_format: str | Method | None = None,
        transform: str = "",
        rounding: str = "nearest",
        seed: int = 0,
        name: str = "variable",
    ) -> "CompressedTensor":
        """Compress a tensor.

        Args:
            values: a tensor of any shape with finite values. Its dtype is that of the result; other dtypes than
                ``DTYPES`` become float32.
            format: the compression method, such as ``S1E3M7`` or ``NF4``.
            update_format: if given, in-place updates accumulate in a separate part of this format.
            transform: the transformation before rounding; see ``Encoding``.
            rounding: ``nearest`` or ``stochastic``.
            seed: the seed of stochastic rounding.
            name: the variable's name in error messages.

        Raises:
            FormatError: the format does not exist.
            PolicyError: the transformation or rounding is unknown.
            NonFiniteError: a value is NaN or infinite.
        """
        update = None if update_format is None else parse_method(update_format)
        return compress(values, Encoding(parse_method(format), update, transform, rounding, seed), name)

    @classmethod
    def from_packed(
        cls,
        base: Packed,
        encoding: Encoding,
        shape: Sequence[int],
        name: str = "variable",
        dtype: torch.dtype = torch.float32,
    ) -> "CompressedTensor":
        """Wrap a packed variable; if the encoding has an ``update_format``, start with an update of zeros.

        Args:
            base: the packed variable.
            encoding: how the variable is encoded; its format is replaced by that of the packed variable.
            shape: the shape of the variable.
            name: the variable's name in error messages.
            dtype: of the tensor, one of ``DTYPES``.
        """
        encoding = encoding.with_format(base.method)
        method = encoding.update_format
        update = None if method is None else Packed.zeros(method, base.numel, base.codes.device)
        return cls(base, update, encoding, shape, name, dtype=dtype)

    @property
    def format(self) -> Method:
        """The compression method of the variable, or of its base if it has two parts."""
        return self.encoding.format

    @property
    def parts(self) -> tuple[Packed, ...]:
        """The base, and the update if there is one."""
        return (self.base,) if self.update is None else (self.base, self.update)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes held by all parts: codes, scales and offsets."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self) -> Tensor:
        """Decode to a new dense tensor of the same dtype that is detached from autograd."""
        return self._decoded(torch.empty(self.base.numel, dtype=self.dtype, device=self.base.codes.device))

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode to one of ``DTYPES`` in scratch memory, for short-lived use."""
        return self._decoded(self.empty(0, self.base.numel, dtype))

    def decode_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode rows ``[start, stop)`` of the first dimension, as ``decode`` does."""
        width = self.base.numel // self.shape[0]
        begin = start * width // codec.BLOCK * codec.BLOCK
        with no_overrides():
            most = (stop - start) * width + codec.BLOCK  # same size for any start, for buffer reuse
            room = self.empty(0, most, dtype)
            values = self._decode_into(room[: stop * width - begin], begin)
            return values[start * width - begin :].view(-1, *self.shape[1:])

    @property
    def panel_rows(self) -> int:
        """The number of decoded rows that fit into ``PANEL_BYTES``, at least one."""
        return panel_rows(self.shape[0], self.base.numel, PANEL_BYTES)

    def panels(self) -> tuple[tuple[int, int], ...]:
        """Split the rows evenly into ranges of at most ``panel_rows``; without rows, return one empty range."""
        return panels(self.shape[0], self.base.numel, PANEL_BYTES)

    def _decoded(self, out: Tensor) -> Tensor:
        with no_overrides():
            values, shape = self._decode_into(out, 0), self.shape
            return values.view(*shape) if shape else values.view(shape)  # torch parses numbers faster than a list

    def rewrite(self, produce: Callable[[int, int], Tensor], *, is_step: bool = True) -> None:
        """Encode new values in place, chunk by chunk; with two parts, only the update is rewritten.

        Args:
            produce: returns the new values ``[start, stop)`` of the flattened variable.
            is_step: whether this is a training step, which is measured, rather than a replacement of the values.

        Raises:
            NonFiniteError: a new value is NaN or infinite; nothing was changed.
        """
        target = produce
        if self.update is not None:

            def target(start: int, stop: int) -> Tensor:
                return produce(start, stop) - self.base.decode(self.empty(start, stop), start)

        self.rewrite_part(target, is_step=is_step)

    def rewrite_part(self, produce: Callable[[int, int], Tensor], *, is_step: bool = True) -> None:
        """Encode new values of the part that in-place operations modify: the update if there is one, else the base."""
        how, part = self.encoding, self.parts[-1]

        def asked(start: int, stop: int) -> Tensor:
            return produce(start, stop) - part.decode(self.empty(start, stop), start)

        sample = self.steps.begin(part, asked, self.decode_range) if is_step else None
        part.rewrite(produce, how.transform, how.rounding, how.seed, self.variable, self._accepts)
        if sample is not None:
            self.steps.end(part, sample)

    def add_part(self, values: Tensor, alpha: float) -> None:
        """Add ``alpha`` times flat values, of any of ``DTYPES``, to the part that steps modify, in one pass."""
        how, part = self.encoding, self.parts[-1]
        sample = self.steps.begin(part, lambda start, stop: values[start:stop].float() * alpha, self.decode_range)
        part.add_(values, alpha, how.transform, how.rounding, how.seed, self.variable, self._accepts)
        if sample is not None:
            self.steps.end(part, sample)

    @property
    def _accepts(self) -> Callable[[Packed], bool] | None:
        """What tells whether a new part may replace the last one; None where every one may whose codes are finite."""
        return None if self.dtype is torch.float32 and self.update is None else self._is_finite

    def is_finite(self) -> bool:
        """Tell whether all values are finite: no code is infinite in float32, but other dtypes end sooner."""
        return self._is_finite(self.parts[-1])

    def _is_finite(self, new: Packed) -> bool:
        """Tell whether all values are finite in this dtype once a new part replaces the last one."""
        parts, dtype = (*self.parts[:-1], new), self.dtype
        if self._accepts is None or sum(part.bound for part in parts) < LIMITS[dtype]:
            return True
        ranges = ((start, min(start + CHUNK, new.numel)) for start in range(0, new.numel, CHUNK))
        return all(bool(_decode(parts, self.empty(*each, dtype), each[0]).isfinite().all()) for each in ranges)

    def empty(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate ``stop - start`` values in scratch memory."""
        return workspace.empty(stop - start, self.base.codes.device, dtype)

    def rewrite_from(self, values: Tensor) -> None:
        """Replace all values, encoding them in place.

        Raises:
            RuntimeError: the shapes differ.
            NonFiniteError: a new value is NaN or infinite; nothing was changed.
        """
        if values.shape != self.shape:
            change = f"{self.variable} of shape {tuple(self.shape)} cannot become {tuple(values.shape)}"
            raise RuntimeError(f"{change}: decompress_ the model, or replace the parameter")
        flat = values.reshape(-1)
        self.rewrite(lambda start, stop: flat[start:stop].to(torch.float32), is_step=False)

    def decode_range(self, start: int, stop: int) -> Tensor:
        """Decode float32 values ``[start, stop)`` of the flattened variable; ``start`` is a multiple of a block."""
        return self._decode_into(self.empty(start, stop), start)

    def _decode_into(self, values: Tensor, start: int) -> Tensor:
        codes = self.base.codes
        if type(codes) is not Tensor:
            codes[:1].tolist()  # under torch.compile the codes are fake tensors: this forces a graph break
        return _decode(self.parts, values, start)

    def like(self, parts: Sequence[Packed], dtype: torch.dtype | None = None) -> "CompressedTensor":
        """Wrap other parts with this tensor's encoding, shape and name, and its dtype unless another is given."""
        base, *update = parts
        kind = self.dtype if dtype is None else dtype
        return CompressedTensor(
            base, update[0] if update else None, self.encoding, self.shape, self.variable, dtype=kind
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show shape, format and size; showing values would need a dense copy."""
        return (
            f"CompressedTensor(shape={tuple(self.shape)}, format={self.encoding}, "
            f"transform={self.encoding.transform}, nbytes={self.nbytes}, requires_grad={self.requires_grad})"
        )

    def _use_count(self) -> int:
        """Return the use count for ``torch.utils.swap_tensors``, with which ``Module.to`` moves a parameter."""
        keep_hooks_in_swap(self)
        return use_count(self)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the inner tensors and the metadata, as required of traceable tensor subclasses."""
        names = [
            f"{part}_{field.name}"
            for part, packed in zip(_PARTS, self.parts, strict=False)
            for field in packed.method.fields(packed.numel)
        ]
        counts = tuple((part.draws, part.state.is_zero) for part in self.parts)
        return names, (self.encoding, tuple(self.shape), self.variable, counts, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "CompressedTensor":
        """Rebuild the tensor from its inner tensors and the metadata."""
        encoding, shape, name, counts, dtype = meta
        numel = torch.Size(shape).numel()
        parts = []
        for part, method, (draws, is_zero) in zip(_PARTS, encoding.methods, counts, strict=False):
            fields = tuple(inner[f"{part}_{field.name}"] for field in method.fields(numel))
            parts.append(Packed(method, numel, fields, draws, is_zero=is_zero))
        return CompressedTensor(parts[0], parts[1] if len(parts) > 1 else None, encoding, shape, name, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        """Look up an inner tensor by its ``__tensor_flatten__`` name, such as ``base_codes``."""
        part, _, field_name = name.partition("_")
        if part in _PARTS and field_name:
            packed = getattr(self, part)
            for field, tensor in zip(packed.method.fields(packed.numel), packed.fields, strict=True):
                if field.name == field_name:
                    return tensor
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the registered handler of a function; pass other functions on to the dispatcher."""
        if torch.compiler.is_exporting():
            variables = (x.variable for x in tree_leaves((args, kwargs)) if is_compressed(x))
            raise RuntimeError(
                f"{next(variables, 'a parameter')} is compressed and cannot be exported: decompress_ the model (or a "
                "deep copy of it) first"
            )
        if kwargs and kwargs.get("out") is not None:
            return _handled(FALLBACK["out"], func, args, kwargs)
        if func in BACKWARD:
            return BACKWARD[func](func, args, kwargs or {})
        handler = METHODS.get(func) or FUNCTIONS.get(func)
        if handler is not None and (func in METHODS or not transforms_are_active()):
            return _handled(handler, func, args, kwargs or {})
        with no_overrides():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator through its registered handler if possible, otherwise on decoded copies."""
        kwargs = kwargs or {}
        # Tensors created here may outlive inference mode and must remain trainable.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(), without_grad():
            handler = OPERATORS.get(func)
            result = NotImplemented if handler is None else handler(func, args, kwargs)
            return FALLBACK["operator"](func, args, kwargs) if result is NotImplemented else result


@uncompiled("a weight is decoded for a moment")
def _handled(handler: Handler, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with no_overrides():
        return handler(func, args, kwargs)


def _decode(parts: Sequence[Packed], values: Tensor, start: int) -> Tensor:
    """Decode the sum of parts, of which an update may be known to be zero."""
    base, *update = parts
    if not update or update[0].is_zero:
        return base.decode(values, start)
    return base.decode_with(update[0], values, start)


def compress(
    values: Tensor, encoding: Encoding, name: str = "variable", dtype: torch.dtype | None = None
) -> CompressedTensor:
    """Compress a tensor with the given encoding, rounding to nearest.

    Args:
        values: of any shape.
        encoding: how the variable is encoded.
        name: the name of the variable, for error messages.
        dtype: of the result, one of ``DTYPES``; by default that of the values.

    Raises:
        NonFiniteError: a value is NaN or infinite, or is rounded to one that is infinite in float16 or bfloat16.
    """
    dtype = dtype or (values.dtype if values.dtype in DTYPES else torch.float32)
    base = encode(values, encoding.format, encoding.transform, name=name)
    compressed = CompressedTensor.from_packed(base, encoding, values.shape, name, dtype)
    if not compressed.is_finite():
        raise NonFiniteError(f"{name} has values that {encoding.format} rounds beyond {dtype}: keep it dense")
    return compressed


def is_compressed(x: Any) -> TypeGuard[CompressedTensor]:
    """Tell whether an object is a ``CompressedTensor``."""
    return isinstance(x, CompressedTensor)


# Allows torch.load(weights_only=True) to load a state_dict with compressed tensors.
torch.serialization.add_safe_globals([CompressedTensor, Packed, State, StepRecord, Encoding, *registered()])
