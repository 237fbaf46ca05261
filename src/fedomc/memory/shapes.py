"""Runs a model on shapes alone, without values. Loading this module takes time: it is imported at its first use."""

from typing import Any

import torch
from torch import Tensor, nn

from fedomc._torch import FakeTensor, FakeTensorMode, has_constant, tree_leaves, tree_map

_aten = torch.ops.aten
_RUN_ON_ZEROS = {_aten._ctc_loss.default, _aten._ctc_loss.Tensor, _aten.mkldnn_rnn_layer.default}
"""Operators with outputs whose shapes only the kernel knows: they depend on target lengths, or are a workspace."""


class ShapeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A context in which floating-point tensors have no values. Integers and booleans have: tokens, lengths, masks.

    Where a model reads the value of a float all the same, it gets 1; comparisons of floats are False.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor) and not has_constant(args[0]):
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func in _RUN_ON_ZEROS:
            outputs = func(*tree_map(_zeros, args), **tree_map(_zeros, kwargs or {}))
            return tree_map(lambda x: self.from_tensor(x) if isinstance(x, Tensor) else x, outputs)
        if tensors and all(_has_values(x) for x in tensors):
            return tree_map(self._without_values, func(*args, **(kwargs or {})))
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if not tensors and isinstance(result, FakeTensor) and not _is_float(result):
            return func(*args, **(kwargs or {}))
        return result

    def copy(self, x: Any) -> Any:
        """Copy a tensor, without its values if its dtype is floating-point."""
        if not isinstance(x, Tensor):
            return x
        device = "cpu" if x.is_meta else x.device
        if not _is_float(x):
            return torch.zeros_like(x, device=device) if x.is_meta else x.clone()
        with self:
            values = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return nn.Parameter(values, x.requires_grad) if isinstance(x, nn.Parameter) else values

    def _without_values(self, x: Any) -> Any:
        return self.from_tensor(x) if isinstance(x, Tensor) and _is_float(x) else x


def _zeros(x: Any) -> Any:
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, FakeTensor) else x


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _has_values(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) and not _is_float(x)
