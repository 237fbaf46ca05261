"""Operators that need no dense copy: aliases, copies, and element-wise in-place operators, chunk by chunk."""

from typing import Any

import torch
from torch import Tensor

from fedomc import codec
from fedomc.methods import Packed
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.dtypes import DTYPES
from fedomc.tensor.handlers import OPERATORS

_aten = torch.ops.aten

_ADDITIVE = {_aten.add_.Tensor, _aten.add_.Scalar, _aten.sub_.Tensor, _aten.sub_.Scalar}
_ELEMENTWISE = _ADDITIVE | {
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
"""In-place operators that modify each value independently, so that they can run chunk by chunk."""


def _share(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].like(args[0].parts)


def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].like([part.to(part.codes.device) for part in args[0].parts])


def _move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dtype = kwargs.get("dtype")
    if dtype not in (None, *DTYPES):
        return NotImplemented
    return args[0].like([part.to(kwargs.get("device") or args[0].device) for part in args[0].parts], dtype)


def _empty(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a compressed tensor of zeros on another device, for ``Module.to_empty``."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if device is None or dtype not in (None, *DTYPES):
        return _new_like(func, args, kwargs)
    return args[0].like([Packed.zeros(part.method, part.numel, device) for part in args[0].parts], dtype)


def _new_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device), *args[1:], **kwargs)


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Decode, modify and encode chunk by chunk; the fallback handles operands that need broadcasting."""
    target, *operands = args
    if not is_compressed(target) or not all(_fits(x, target) for x in operands):
        return NotImplemented
    if func is _aten.copy_.default and _copy_codes(target, operands[0]):
        return target
    if func in (_aten.mul_.Tensor, _aten.mul_.Scalar) and _scale(target, operands[0]):
        return target
    if func in (_aten.add_.Tensor, _aten.sub_.Tensor) and _add(func, target, operands[0], kwargs.get("alpha", 1)):
        return target
    flat = [_flat(x) for x in operands]

    def operand(x: Any, start: int, stop: int) -> Any:
        if is_compressed(x):
            return x.decode_range(start, stop)
        if not isinstance(x, Tensor):
            return x
        part = x[start:stop] if x.dim() else x
        return part.to(torch.float32) if part.dtype in DTYPES else part

    # With two parts, additive operators change only the update, so the base need not be decoded.
    alone = target.update if func in _ADDITIVE else None

    def produce(start: int, stop: int) -> Tensor:
        values: Tensor = (
            target.decode_range(start, stop) if alone is None else alone.decode(target.empty(start, stop), start)
        )
        func(values, *(operand(x, start, stop) for x in flat), **kwargs)
        return values

    rewrite = target.rewrite if alone is None else target.rewrite_part
    rewrite(produce, is_step=func is not _aten.copy_.default)
    return target


def _add(func: Any, target: CompressedTensor, operand: Any, alpha: Any) -> bool:
    """Add a dense operand in one pass, as optimizers do; return False for unsupported operands."""
    if not isinstance(operand, Tensor) or is_compressed(operand):
        return False
    if operand.dim() == 0 or operand.dtype not in DTYPES or operand.device != target.device:
        return False
    factor = float(alpha) if func is _aten.add_.Tensor else -float(alpha)
    target.add_part(operand.reshape(-1), factor)
    return True


def _add_decoded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add a compressed tensor to a dense one, chunk by chunk, as weight decay does with a gradient."""
    dense, x = args
    if is_compressed(dense) or not is_compressed(x) or not _fits(dense, x) or dense.dim() == 0:
        return NotImplemented
    if dense.dtype not in (torch.float32, x.dtype) or dense.device != x.device:
        return NotImplemented
    result = dense.clone(memory_format=torch.contiguous_format)
    flat = result.view(-1)
    for start in range(0, len(flat), codec.CHUNK):
        chunk = flat[start : start + codec.CHUNK]
        chunk.add_(x.decode_range(start, start + len(chunk)).to(x.dtype), **kwargs)
    return result


def _fits(x: Any, target: CompressedTensor) -> bool:
    if not isinstance(x, Tensor):
        return True
    return x.layout is torch.strided and (x.dim() == 0 or x.shape == target.shape)


def _flat(x: Any) -> Any:
    if is_compressed(x):
        return x if x.dim() else x.dequantize()
    return x.reshape(-1) if isinstance(x, Tensor) and x.dim() else x


def _copy_codes(target: CompressedTensor, source: Any) -> bool:
    """Copy codes from a variable with the same encoding and shape; return False for other sources."""
    if not is_compressed(source) or target.encoding != source.encoding or target.shape != source.shape:
        return False
    for mine, other in zip(target.parts, source.parts, strict=True):
        mine.take(other)
    return True


def _scale(target: CompressedTensor, factor: Any) -> bool:
    """Multiply by a scalar by changing only scale and offset; return False where that is not possible."""
    if target.update is not None or target.encoding.transform == "none":
        return False
    if isinstance(factor, Tensor) and factor.dim():
        return False
    return target.base.multiply_(factor.dequantize() if is_compressed(factor) else factor)


OPERATORS.update(dict.fromkeys((_aten.detach.default, _aten.alias.default), _share))
OPERATORS.update(dict.fromkeys(_ELEMENTWISE, _elementwise))
OPERATORS[_aten.add.Tensor] = _add_decoded
OPERATORS[_aten.clone.default] = _clone
OPERATORS[_aten._to_copy.default] = _move
OPERATORS[_aten.empty_like.default] = _empty
for _name in ("zeros_like", "ones_like", "full_like", "rand_like", "randn_like"):
    OPERATORS[getattr(_aten, _name).default] = _new_like
