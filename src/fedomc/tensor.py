"""``CompressedTensor``: a float32 tensor to the outside, held as packed codes.

[Note: what runs without a dense copy]
A few operations know the packed form: detach, clone and moves share or copy the codes; in-place element-wise
operations decode, change and encode a chunk at a time, so that the optimizers of ``torch.optim`` work as they are.
The functions in ``ops`` decode the whole weight for the moment of one operation. Everything else decodes to a fresh
dense tensor; if it writes in place, the result is encoded again. Slower, never wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedomc.formats import FloatFormat
from fedomc.transform import Encoding, Packed, encode

_aten = torch.ops.aten


class CompressedTensor(Tensor):
    """A tensor that is stored as bit-packed low-precision floats and behaves as a float32 tensor.

    Attributes:
        base: the codes, in one part all of the variable; in two parts as received, never rewritten.
        update: the sum of the local steps, or None for a variable in one part.
        encoding: how the variable is encoded.
        variable: its fully qualified name in the model, for errors.
    """

    base: Packed
    update: Packed | None
    encoding: Encoding
    variable: str

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
        self: CompressedTensor = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.float32, device=base.codes.device, requires_grad=requires_grad
        )
        self.base, self.update, self.encoding, self.variable = base, update, encoding, name
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``__new__`` made the tensor."""

    @classmethod
    def from_dense(
        cls,
        values: Tensor,
        format: str | FloatFormat,
        *,
        update_format: str | FloatFormat | None = None,
        transform: str = "scaled-affine",
        rounding: str = "nearest",
        seed: int = 0,
        name: str = "variable",
    ) -> "CompressedTensor":
        """Compress a tensor.

        Args:
            values: of any shape, finite.
            format: such as ``S1E3M7``.
            update_format: keeps in-place updates in a part of their own, in this format.
            transform: ``none``, ``affine`` or ``scaled-affine``.
            rounding: ``nearest`` or ``stochastic``.
            seed: of stochastic rounding.
            name: for errors.

        Raises:
            FormatError: no such format.
            NonFiniteError: a value is NaN or infinite.
        """
        parsed = None if update_format is None else FloatFormat.parse(update_format)
        return compress(values, Encoding(FloatFormat.parse(format), parsed, transform, rounding, seed), name)

    @classmethod
    def from_packed(
        cls, base: Packed, encoding: Encoding, shape: Sequence[int], name: str = "variable"
    ) -> "CompressedTensor":
        """Take packed codes as they are; with an ``update_format``, an update of zeros is added."""
        fmt = encoding.update_format
        update = None if fmt is None else Packed.empty(fmt, base.numel, base.codes.device)
        return cls(base, update, encoding, shape, name)

    @property
    def format(self) -> FloatFormat:
        """The format of the variable, or of its base."""
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
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            return self._decode(0, self.base.numel).view(self.shape)

    def rewrite(self, produce: Callable[[int, int], Tensor]) -> None:
        """Encode new values in place, chunk by chunk; two parts rewrite the update alone.

        Args:
            produce: gives the new values ``[start, stop)`` of the flat variable.

        Raises:
            NonFiniteError: a new value is NaN or infinite; nothing was changed.
        """
        target = produce
        if self.update is not None:

            def target(start: int, stop: int) -> Tensor:
                base = torch.empty(stop - start, device=self.base.codes.device)
                return produce(start, stop) - self.base.decode(base, start)

        how = self.encoding
        self.parts[-1].rewrite(target, how.transform, how.rounding, how.seed, self.variable)

    def rewrite_from(self, values: Tensor) -> None:
        """Encode new values of the same shape in place."""
        flat = values.reshape(-1)
        self.rewrite(lambda start, stop: flat[start:stop])

    def _decode(self, start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start, device=self.base.codes.device)  # [n]
        self.base.decode(values, start)
        if self.update is not None:
            for at in range(start, stop, _CHUNK):
                part = values[at - start : at - start + _CHUNK]
                part += self.update.decode(torch.empty_like(part), at)
        return values

    def _like(self, parts: Sequence[Packed]) -> "CompressedTensor":
        base, *update = parts
        return CompressedTensor(base, update[0] if update else None, self.encoding, self.shape, self.variable)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name shape, format and bytes; the values would need a dense copy."""
        return (
            f"CompressedTensor(shape={tuple(self.shape)}, format={self.encoding}, "
            f"transform={self.encoding.transform}, nbytes={self.nbytes}, requires_grad={self.requires_grad})"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Decode to a numpy array."""
        return self.dequantize().numpy(force=force)

    def tolist(self) -> Any:
        """Decode to nested lists."""
        return self.dequantize().tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dequantize().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Name the inner tensors; see ``torch.utils._python_dispatch``."""
        names = [f"{part}_{tensor}" for part in ("base", "update")[: len(self.parts)] for tensor in ("codes", "affine")]
        return names, (self.encoding, tuple(self.shape), self.variable, tuple(part.rewrites for part in self.parts))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "CompressedTensor":
        """Build the tensor again from its inner tensors."""
        encoding, shape, name, rewrites = meta
        numel = torch.Size(shape).numel()
        formats = (encoding.format, encoding.update_format)
        parts = [
            Packed(inner[f"{part}_codes"], inner[f"{part}_affine"], fmt, numel, count)
            for part, fmt, count in zip(("base", "update"), formats, rewrites, strict=False)
        ]
        return CompressedTensor(parts[0], parts[1] if len(parts) > 1 else None, encoding, shape, name)

    base_codes = property(lambda self: self.base.codes)
    base_affine = property(lambda self: self.base.affine)
    update_codes = property(lambda self: self.update.codes)
    update_affine = property(lambda self: self.update.affine)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the functions that ``ops`` knows; leave the others to the dispatcher."""
        handler = FUNCTIONS.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if handler is not None:
                return handler(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the packed form where that is known, on decoded copies elsewhere."""
        kwargs = kwargs or {}
        if func in _SHARING:
            return args[0]._like(args[0].parts)
        if func in _LIKE:
            return func(torch.empty(args[0].shape, device=args[0].device), *args[1:], **kwargs)
        if func is _aten.clone.default:
            return args[0]._like([_copy(part, part.codes.device) for part in args[0].parts])
        if func is _aten._to_copy.default and kwargs.get("dtype") in (None, torch.float32):
            device = kwargs.get("device") or args[0].device
            return args[0]._like([_copy(part, device) for part in args[0].parts])
        if func is _aten.copy_.default and _copy_codes(args[0], args[1]):
            return args[0]
        if func in _ELEMENTWISE and _rewrite_elementwise(func, args, kwargs):
            return args[0]
        return _on_dense(func, args, kwargs)


FUNCTIONS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}
"""Functions of ``torch`` that ``ops`` runs itself, by the function."""

_CHUNK = 64 * 1024

_SHARING = {_aten.detach.default, _aten.alias.default}
_LIKE = {
    getattr(_aten, name).default
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
}
_ELEMENTWISE = {
    _aten.add_.Tensor,
    _aten.add_.Scalar,
    _aten.sub_.Tensor,
    _aten.sub_.Scalar,
    _aten.mul_.Tensor,
    _aten.mul_.Scalar,
    _aten.div_.Tensor,
    _aten.div_.Scalar,
    _aten.addcmul_.default,
    _aten.addcdiv_.default,
    _aten.lerp_.Scalar,
    _aten.lerp_.Tensor,
    _aten.neg_.default,
    _aten.clamp_.default,
    _aten.copy_.default,
    _aten.fill_.Scalar,
    _aten.zero_.default,
}
"""In-place operators that change each value by itself, so that they can run chunk by chunk."""


def compress(values: Tensor, encoding: Encoding, name: str = "variable") -> CompressedTensor:
    """Compress a tensor with a given encoding.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    rounding = encoding.rounding if encoding.update_format is None else "nearest"
    base = encode(values, encoding.format, encoding.transform, rounding, encoding.seed, name)
    return CompressedTensor.from_packed(base, encoding, values.shape, name)


def _copy(part: Packed, device: torch.device) -> Packed:
    codes, affine = (tensor.to(device, copy=True) for tensor in (part.codes, part.affine))
    return Packed(codes, affine, part.format, part.numel, part.rewrites)


def _copy_codes(target: Any, source: Any) -> bool:
    """Copy between tensors of one encoding as the codes are; False if they are not of one encoding."""
    if not (_packed(target) and _packed(source)):
        return False
    if target.encoding != source.encoding or target.shape != source.shape:
        return False
    for mine, its in zip(target.parts, source.parts, strict=True):
        mine.codes.copy_(its.codes)
        mine.affine.copy_(its.affine)
    return True


def _rewrite_elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Run an in-place operator chunk by chunk; False if an operand would have to be broadcast."""
    target, *operands = args
    if any(isinstance(x, Tensor) and x.dim() and x.shape != target.shape for x in operands):
        return False
    if func in (_aten.mul_.Tensor, _aten.mul_.Scalar) and target.update is None and _scale(target, operands[0]):
        return True
    flat = [x.reshape(-1) if isinstance(x, Tensor) and x.dim() and not _packed(x) else x for x in operands]

    def chunk(x: Any, start: int, stop: int) -> Any:
        if _packed(x):
            return x._decode(start, stop)
        return x[start:stop] if isinstance(x, Tensor) and x.dim() else x

    def produce(start: int, stop: int) -> Tensor:
        values: Tensor = target._decode(start, stop)
        func(values, *(chunk(x, start, stop) for x in flat), **kwargs)
        return values

    target.rewrite(produce)
    return True


def _scale(target: CompressedTensor, factor: Any) -> bool:
    """Multiply by a finite number: the transformation changes, the codes do not."""
    if isinstance(factor, Tensor) and factor.dim():
        return False
    affine: Tensor = target.base.affine * factor
    scale, offset = (abs(value) for value in affine.tolist())
    # A factor near zero would leave the range of normal floats; the general way rounds that rightly.
    if not (2.0**-120 < scale and scale * target.format.max_value + offset <= torch.finfo(torch.float32).max):
        return False
    target.base.affine.copy_(affine)
    return True


def _packed(x: Any) -> TypeGuard[CompressedTensor]:
    return isinstance(x, CompressedTensor)


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on decoded copies; encode again what it wrote; views of a copy write through."""
    decoded: dict[int, tuple[CompressedTensor, Tensor]] = {}

    def dense(x: Any) -> Any:
        return decoded.setdefault(id(x), (x, x.dequantize()))[1] if _packed(x) else x

    result = func(*tree_map(dense, args), **tree_map(dense, kwargs))
    written: dict[int, CompressedTensor] = {}
    for x in _written(func, args, kwargs):
        if _packed(x):
            values = decoded[id(x)][1]
            x.rewrite_from(values)
            written[id(values)] = x
    if _returns_view(func):
        owner, values = next(iter(decoded.values()))
        return tree_map(lambda x: DecodedView(x, owner, values) if _is_plain(x) else x, result)
    return tree_map(lambda x: written.get(id(x), x), result)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what an operator writes to, by its schema."""
    arguments = func._schema.arguments
    named = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    mutable = (a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return [x for name in mutable for x in tree_leaves(named.get(name))]


class DecodedView(Tensor):
    """A view of a compressed tensor's decoded values; what is written into it is encoded again."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _owner: CompressedTensor
    _decoded: Tensor
    _plain: Tensor

    @staticmethod
    def __new__(cls, view: Tensor, owner: CompressedTensor, values: Tensor) -> "DecodedView":
        """Wrap a view of ``values``, the decoded values of ``owner``."""
        self: DecodedView = view.as_subclass(cls)
        self._owner, self._decoded, self._plain = owner, values, view
        return self

    def __init__(self, *args: Any) -> None:
        """Do nothing: ``__new__`` made the tensor."""

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as a numpy array."""
        return self._plain.numpy(force=force)

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self._plain.tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain.__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the plain tensor, then encode what it wrote."""
        kwargs = kwargs or {}
        views = {id(x._plain): x for x in tree_leaves((args, kwargs)) if isinstance(x, DecodedView)}

        def plain(x: Any) -> Any:
            return x._plain if isinstance(x, DecodedView) else x

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        for x in _written(func, args, kwargs):
            if isinstance(x, DecodedView):
                x._owner.rewrite_from(x._decoded)
        if _returns_view(func):
            view = next(iter(views.values()))
            return tree_map(lambda x: DecodedView(x, view._owner, view._decoded) if _is_plain(x) else x, result)
        return tree_map(lambda x: views.get(id(x), x), result)


def _returns_view(func: Any) -> bool:
    return any(output.alias_info is not None and not output.alias_info.is_write for output in func._schema.returns)


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor


# A state_dict of compressed tensors can be loaded with weights_only=True.
torch.serialization.add_safe_globals([CompressedTensor, Packed, Encoding, FloatFormat])
