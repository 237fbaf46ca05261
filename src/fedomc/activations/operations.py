"""Which tensors of which operation are held as codes, as bits or exactly.

[Note: what must be exact]
A backward formula that is linear in a saved tensor maps unbiased codes to an unbiased gradient, and a smooth activation
function nearly does. A formula that takes an exponential or a quotient of it does not: the result of ``log_softmax`` is
exponentiated, as are the inputs of CTC and of fused attention (see ``attention``). Hence an operation is listed here,
or all that it saves is exact. In every operation the following is exact as well: parameters, buffers and their views
and casts, tensors that are not floats of 16 or 32 bits, tensors of fewer than ``SMALLEST`` values, and whatever codes
would not make smaller. A tensor that has no other values than 0 and c, such as a mask that is a factor, takes a bit a
value and stays exact.

============================  ========================================================================================
operation                     what is held, and how
============================  ========================================================================================
linear, convolutions          the input as codes; the weight exactly, also if it was computed
matmul, bmm, einsum, mul ...  the operands as codes
pow with an exponent >= 2     the base as codes
attention                     query, key, value and a floating-point mask as codes, and nothing else: the backward
                              pass computes attention again. With dropout, all that a fused kernel saves exactly, or
                              else the factors of its products as codes and the dropout mask as bits.
                              ``multi_head_attention_forward``: query, key and value as they are passed, as codes
normalizations                the input as codes; means, variances and other statistics exactly
gelu, silu, tanh, glu ...     the input or the result, whichever torch saves, as codes
relu, leaky_relu              a bit a value, whether it is positive: the gradient is exact
dropout                       the mask as a bit a value: exact
checkpoints                   the inputs of the checkpointed region as codes
all others                    exactly: softmax, log_softmax, losses, CTC, exp, log, div, cumulative sums, recurrent
                              layers, ``autograd.Function`` of other libraries
============================  ========================================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from fedomc._torch import is_plain, storage_key
from fedomc.tensor.compressed import is_compressed

SMALLEST = 4096
"""The least number of values of a tensor that is held as codes or bits."""


class Keeping(Enum):
    """How a saved tensor is held: as codes, as two values (a mask), by its signs, or exactly."""

    CODES = "codes"
    MASK = "mask"
    SIGNS = "signs"
    EXACT = "exact"


@dataclass
class Operation:
    """A torch function that runs, with its arguments.

    Attributes:
        name: the name of the function, without underscores around it.
        arguments: the positional and keyword arguments.
        rule: how what it saves is held.
        is_fused: whether it turned out to be an attention kernel whose backward pass needs exact tensors.
    """

    name: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    rule: "Rule"
    is_fused: bool = False

    def keeping(self, saved: Tensor) -> Keeping:
        """Tell how a tensor that the operation saves is held."""
        return self.rule(self, saved)

    def argument(self, index: int, name: str) -> Any:
        """Return an argument by position or name; None if it was not given."""
        args, kwargs = self.arguments
        return args[index] if len(args) > index else kwargs.get(name)

    def tensors(self) -> list[Tensor]:
        """List the tensors among the arguments, also those in sequences."""
        args, kwargs = self.arguments
        found: list[Tensor] = []
        for x in (*args, *kwargs.values()):
            found += [y for y in (x if isinstance(x, list | tuple) else (x,)) if isinstance(y, Tensor)]
        return found


Rule = Callable[[Operation, Tensor], Keeping]


def operation_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """Describe a call of a torch function; None if all that it saves is exact."""
    name = getattr(function, "__name__", "").strip("_")
    rule = _RULES.get(name)
    return None if rule is None else Operation(name, (args, kwargs), rule)


def _operands(operation: Operation, saved: Tensor) -> Keeping:
    """Codes, unless the tensor is or was made of a parameter."""
    tensors = operation.tensors()
    return _unless_of([x for x in tensors if _is_parameter(x)], tensors, saved)


def _input(operation: Operation, saved: Tensor) -> Keeping:
    """Codes, unless the tensor is or was made of the weight."""
    weight = operation.argument(1, "weight")
    return _unless_of([weight] if isinstance(weight, Tensor) else [], operation.tensors(), saved)


def _power(operation: Operation, saved: Tensor) -> Keeping:
    exponent = operation.argument(1, "exponent")
    return Keeping.CODES if isinstance(exponent, int | float) and exponent >= 2 else Keeping.EXACT


def _normalized(operation: Operation, saved: Tensor) -> Keeping:
    """Codes for what has the size of the input: statistics are smaller."""
    x = operation.argument(0, "input")
    return Keeping.CODES if isinstance(x, Tensor) and saved.numel() == x.numel() else Keeping.EXACT


def _attention(operation: Operation, saved: Tensor) -> Keeping:
    """Codes; with dropout, nothing of a fused kernel, which saves the query itself before all else."""
    query = operation.argument(0, "query")
    if operation.argument(4, "dropout_p"):
        operation.is_fused = operation.is_fused or _is_of(saved, [query])
    return Keeping.EXACT if operation.is_fused else Keeping.CODES


def _multi_head_attention(operation: Operation, saved: Tensor) -> Keeping:
    passed = [operation.argument(index, name) for index, name in enumerate(("query", "key", "value"))]
    return Keeping.CODES if _is_of(saved, passed) else Keeping.EXACT


def _always(keeping: Keeping) -> Rule:
    return lambda operation, saved: keeping


def _unless_of(weights: list[Tensor], tensors: list[Tensor], saved: Tensor) -> Keeping:
    """Return codes, unless a tensor is one of the weights or has the shape of one that was cast or copied."""
    if _is_of(saved, weights):
        return Keeping.EXACT
    if _is_of(saved, tensors):
        return Keeping.CODES
    return Keeping.EXACT if any(_sizes(saved) == _sizes(weight) for weight in weights) else Keeping.CODES


def _is_of(saved: Tensor, tensors: list[Tensor]) -> bool:
    """Tell whether a tensor shares the memory of one of the others."""
    key = storage_key(saved.untyped_storage())
    return any(_has_memory(x) and storage_key(x.untyped_storage()) == key for x in tensors)


def _has_memory(x: Tensor) -> bool:
    return is_plain(x) and x.layout is torch.strided


def _is_parameter(x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or is_compressed(x)


def _sizes(x: Tensor) -> list[int]:
    return sorted(size for size in x.shape if size > 1)


_NAMES: dict[Rule, str] = {
    _input: "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    _operands: "matmul rmatmul mm bmm mv addmm addbmm baddbmm einsum bilinear mul rmul imul multiply",
    _power: "pow square",
    _attention: "scaled_dot_product_attention",
    _multi_head_attention: "multi_head_attention_forward",
    _normalized: "layer_norm group_norm batch_norm instance_norm rms_norm",
    _always(Keeping.CODES): "gelu silu tanh sigmoid elu selu celu softplus mish hardswish glu",
    _always(Keeping.SIGNS): "relu leaky_relu",
    _always(Keeping.MASK): "dropout feature_dropout dropout1d dropout2d dropout3d",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}

CHECKPOINT = Operation("checkpoint", ((), {}), _always(Keeping.CODES))
"""A checkpoint, which saves the inputs of its region."""
