"""``CompressedTensor``: a float32 tensor to the outside, held as packed codes.

[Note: who runs an operation]
The class knows how to decode and rewrite itself. What torch does with it is in modules that register their handlers
here. ``ops``: functions such as ``linear`` decode the weight, by panels or as a whole, while they run, and save only
its codes for the backward pass. ``inplace``: element-wise in-place operators decode, change and encode a chunk at a
time, so that the optimizers of ``torch.optim`` work as they are. ``fallback``: everything else runs on a fresh decoded
copy, and what it writes is encoded again. ``views``: views show the values of a decoded copy and write through.
``backward``: backward passes that start from, or differentiate, a compressed tensor.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fedomc import codec
from fedomc._torch import (
    drop_hooks,
    forbid_memory_access,
    has_hooks,
    no_overrides,
    transforms_are_active,
    tree_leaves,
    uncompiled,
    use_count,
    wrapper_tensor,
)
from fedomc.codec.workspace import PANEL_BYTES, workspace
from fedomc.methods import Encoding, Method, Packed, encode, parse_method, registered
from fedomc.methods.packed import State
from fedomc.tensor.arrays import numpy_of
from fedomc.tensor.handlers import BACKWARD, FALLBACK, FUNCTIONS, METHODS, OPERATORS, Handler
from fedomc.tensor.steps import StepRecord

_PARTS = ("base", "update")


class CompressedTensor(Tensor):
    """A tensor that is stored as bit-packed low-precision floats and behaves as a float32 tensor.

    Attributes:
        base: the codes, in one part of all the variable; in two parts as received, never rewritten.
        update: the sum of the local steps, or None for a variable in one part.
        encoding: how the variable is encoded.
        variable: its fully qualified name in the model, for errors.
        steps: what its training steps asked for, and what arrived.
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
    ) -> "CompressedTensor":
        """Wrap packed parts as they are; ``from_dense`` and ``from_packed`` are what users call."""
        self = wrapper_tensor(cls, shape, torch.float32, base.codes.device, requires_grad)
        forbid_memory_access(self)
        self.base, self.update, self.encoding, self.variable = base, update, encoding, name
        self.steps = StepRecord(name, str((update or base).method), encoding.rounding)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``__new__`` made the tensor."""

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
            values: of any shape, finite.
            format: a method, such as ``S1E3M7`` or ``NF4``.
            update_format: holds in-place updates in a part of their own, in this format.
            transform: as ``Encoding`` has it.
            rounding: ``nearest`` or ``stochastic``.
            seed: of stochastic rounding.
            name: for errors.

        Raises:
            FormatError: no such format.
            PolicyError: an unknown transformation or rounding.
            NonFiniteError: a value is NaN or infinite.
        """
        update = None if update_format is None else parse_method(update_format)
        return compress(values, Encoding(parse_method(format), update, transform, rounding, seed), name)

    @classmethod
    def from_packed(
        cls, base: Packed, encoding: Encoding, shape: Sequence[int], name: str = "variable"
    ) -> "CompressedTensor":
        """Take a packed variable as it is; with an ``update_format``, an update of zeros is added.

        Args:
            base: the packed variable.
            encoding: all but the format, which is that of the packed variable.
            shape: of the variable.
            name: of the variable, for errors.
        """
        encoding = encoding.with_format(base.method)
        method = encoding.update_format
        update = None if method is None else Packed.zeros(method, base.numel, base.codes.device)
        return cls(base, update, encoding, shape, name)

    @property
    def format(self) -> Method:
        """The method of the variable, or of its base."""
        return self.encoding.format

    @property
    def parts(self) -> tuple[Packed, ...]:
        """The base, and the update if there is one."""
        return (self.base,) if self.update is None else (self.base, self.update)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held: codes and transformation of all parts."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self) -> Tensor:
        """Decode to a fresh dense float32 tensor, outside of autograd."""
        return self._decoded(torch.empty(self.base.numel, dtype=torch.float32, device=self.base.codes.device))

    def decode(self) -> Tensor:
        """Decode as ``dequantize`` does, but into scratch memory: for a moment."""
        return self._decoded(self.empty(0, self.base.numel))

    def decode_rows(self, start: int, stop: int) -> Tensor:
        """Decode the rows ``[start, stop)`` of a matrix (or of the first dimension) into scratch memory."""
        width = self.base.numel // self.shape[0]
        begin = start * width // codec.BLOCK * codec.BLOCK
        with no_overrides(), torch.no_grad():
            room = self.empty(0, (stop - start) * width + codec.BLOCK)  # as much wherever it begins: to be lent again
            values = self._decode_into(room[: stop * width - begin], begin)
            return values[start * width - begin :].view(-1, *self.shape[1:])

    @property
    def panel_rows(self) -> int:
        """How many rows fit into ``PANEL_BYTES`` when decoded; one at least."""
        return max(1, PANEL_BYTES * len(self) // max(1, 4 * self.base.numel))

    def panels(self) -> list[tuple[int, int]]:
        """Cut the first dimension into even stretches of no more rows; one of none if there are no rows."""
        rows = len(self)
        height = max(1, -(-rows // max(1, -(-rows // self.panel_rows))))
        return [(start, min(start + height, rows)) for start in range(0, max(1, rows), height)]

    def _decoded(self, out: Tensor) -> Tensor:
        with no_overrides(), torch.no_grad():
            return self._decode_into(out, 0).view(self.shape)

    def rewrite(self, produce: Callable[[int, int], Tensor], *, is_step: bool = True) -> None:
        """Encode new values in place, chunk by chunk; two parts rewrite the update alone.

        Args:
            produce: gives the new values ``[start, stop)`` of the flat variable.
            is_step: whether the change is one of training, which is measured, and not other values altogether.

        Raises:
            NonFiniteError: a new value is NaN or infinite; nothing was changed.
        """
        target = produce
        if self.update is not None:

            def target(start: int, stop: int) -> Tensor:
                return produce(start, stop) - self.base.decode(self.empty(start, stop), start)

        self.rewrite_part(target, is_step=is_step)

    def rewrite_part(self, produce: Callable[[int, int], Tensor], *, is_step: bool = True) -> None:
        """Encode new values of the part that in-place operations change."""
        how, part = self.encoding, self.parts[-1]

        def asked(start: int, stop: int) -> Tensor:
            return produce(start, stop) - part.decode(self.empty(start, stop), start)

        sample = self.steps.begin(part, asked) if is_step else None
        part.rewrite(produce, how.transform, how.rounding, how.seed, self.variable, self._sum_is_finite)
        if sample is not None:
            self.steps.end(part, sample)

    def add_part(self, values: Tensor, alpha: float) -> None:
        """Add ``alpha`` times flat float32 values to that part, in one pass."""
        how, part = self.encoding, self.parts[-1]
        sample = self.steps.begin(part, lambda start, stop: values[start:stop] * alpha)
        part.add_(values, alpha, how.transform, how.rounding, how.seed, self.variable, self._sum_is_finite)
        if sample is not None:
            self.steps.end(part, sample)

    def _sum_is_finite(self, update: Packed) -> bool:
        """Tell whether a new update and the base add up to finite values."""
        if self.update is None or self.base.bound + update.bound < 2.0**127:
            return True
        ranges = ((start, min(start + codec.CHUNK, update.numel)) for start in range(0, update.numel, codec.CHUNK))
        return all(
            bool(self.base.decode_with(update, self.empty(start, stop), start).isfinite().all())
            for start, stop in ranges
        )

    def empty(self, start: int, stop: int) -> Tensor:
        """Make room for ``stop - start`` values, in scratch memory."""
        return workspace.empty(stop - start, self.base.codes.device)

    def rewrite_from(self, values: Tensor) -> None:
        """Encode new values in place.

        Raises:
            RuntimeError: they have another shape.
            NonFiniteError: a new value is NaN or infinite; nothing was changed.
        """
        if values.shape != self.shape:
            change = f"{self.variable} of shape {tuple(self.shape)} cannot become {tuple(values.shape)}"
            raise RuntimeError(f"{change}: decompress_ the model, or replace the parameter")
        flat = values.reshape(-1)
        self.rewrite(lambda start, stop: flat[start:stop], is_step=False)

    def decode_range(self, start: int, stop: int) -> Tensor:
        """Decode the values ``[start, stop)`` of the flat variable; start is a multiple of the block."""
        return self._decode_into(self.empty(start, stop), start)

    def _decode_into(self, values: Tensor, start: int) -> Tensor:
        codes = self.base.codes
        if type(codes) is not Tensor:
            codes[:1].tolist()  # the compiler, which has codes without values, breaks its graph here
        if self.update is None or self.update.is_zero:
            return self.base.decode(values, start)
        return self.base.decode_with(self.update, values, start)

    def like(self, parts: Sequence[Packed]) -> "CompressedTensor":
        """Make a tensor of the same kind from other parts."""
        base, *update = parts
        return CompressedTensor(base, update[0] if update else None, self.encoding, self.shape, self.variable)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name shape, format and bytes; the values would need a dense copy."""
        return (
            f"CompressedTensor(shape={tuple(self.shape)}, format={self.encoding}, "
            f"transform={self.encoding.transform}, nbytes={self.nbytes}, requires_grad={self.requires_grad})"
        )

    def _use_count(self) -> int:
        """Answer ``torch.utils.swap_tensors``, by which ``Module.to`` moves a parameter and loses its hooks.

        Raises:
            RuntimeError: it has hooks.
        """
        if has_hooks(self):
            raise RuntimeError(
                f"{self.variable} has hooks that it would lose: move the model first, and call step_in_backward (or "
                "register hooks) afterwards. remove() takes those of step_in_backward away"
            )
        # An empty set of hooks would take new ones after the move, and never call them.
        drop_hooks(self)
        return use_count(self)

    def data_ptr(self) -> int:
        """Return 0, as there is no memory that holds the values."""
        return 0

    def storage(self) -> torch.TypedStorage:
        """Refuse, as there is no storage that holds the values.

        Raises:
            RuntimeError: always; safetensors and ``save_pretrained`` of transformers come here.
        """
        raise RuntimeError(
            f"{self.variable} is compressed and has no storage of its values: save the model with fedomc.save_model, "
            "or decompress_ it (or a deep copy of it) before safetensors or save_pretrained write it"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Decode to a numpy array, which is read-only (what is written to it would be lost) unless with ``force``."""
        return numpy_of(self.dequantize(), force)

    def tolist(self) -> Any:
        """Decode to nested lists."""
        return self.dequantize().tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dequantize().__dlpack__(*args, **kwargs)

    def __dlpack_device__(self) -> Any:
        return self.dequantize().__dlpack_device__()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dequantize().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __format__(self, spec: str) -> str:
        return self.dequantize().__format__(spec) if spec else str(self)  # type: ignore[no-untyped-call]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Name the inner tensors, as torch asks of subclasses that it can trace."""
        names = [
            f"{part}_{field.name}"
            for part, packed in zip(_PARTS, self.parts, strict=False)
            for field in packed.method.fields(packed.numel)
        ]
        counts = tuple((part.draws, part.state.is_zero) for part in self.parts)
        return names, (self.encoding, tuple(self.shape), self.variable, counts)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "CompressedTensor":
        """Build the tensor again from its inner tensors."""
        encoding, shape, name, counts = meta
        numel = torch.Size(shape).numel()
        parts = []
        for part, method, (draws, is_zero) in zip(_PARTS, encoding.methods, counts, strict=False):
            fields = tuple(inner[f"{part}_{field.name}"] for field in method.fields(numel))
            parts.append(Packed(method, numel, fields, draws, is_zero=is_zero))
        return CompressedTensor(parts[0], parts[1] if len(parts) > 1 else None, encoding, shape, name)

    def __getattr__(self, name: str) -> Any:
        """Find an inner tensor by the name that ``__tensor_flatten__`` gives it, such as ``base_codes``."""
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
        """Run the functions that a handler is for; leave the others to the dispatcher."""
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
        """Run an operator on the packed form where a handler can, on decoded copies elsewhere."""
        kwargs = kwargs or {}
        # What is made here may outlive an inference mode, and must then train like any other tensor.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(), torch.no_grad():
            handler = OPERATORS.get(func)
            result = NotImplemented if handler is None else handler(func, args, kwargs)
            return FALLBACK["operator"](func, args, kwargs) if result is NotImplemented else result


@uncompiled("a weight is decoded for a moment")
def _handled(handler: Handler, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with no_overrides():
        return handler(func, args, kwargs)


def compress(values: Tensor, encoding: Encoding, name: str = "variable") -> CompressedTensor:
    """Compress a tensor with a given encoding.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    base = encode(values, encoding.format, encoding.transform, name=name)
    return CompressedTensor.from_packed(base, encoding, values.shape, name)


def is_compressed(x: Any) -> TypeGuard[CompressedTensor]:
    """Tell whether something is a compressed tensor."""
    return isinstance(x, CompressedTensor)


# A state_dict of compressed tensors can be loaded with weights_only=True.
torch.serialization.add_safe_globals([CompressedTensor, Packed, State, StepRecord, Encoding, *registered()])
