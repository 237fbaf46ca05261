"""Stepping in the backward pass: a variable is updated and its gradient dropped as soon as the gradient is complete.

[Note: one optimizer, a variable at a time]
There is one optimizer of torch for the whole model, so that schedulers and state_dict are torch's own. It has a group
for each variable, and when a gradient is complete it steps with that group alone: all other gradients are gone.

[Note: gone, and not None]
For torch, a gradient that is None does not exist: ``clip_grad_norm_`` would return 0, an optimizer or a ``GradScaler``
skip the variable, a distributed wrapper average zeros, all silently. So what is left in ``.grad`` is a tensor
without values that raises when it is used, and that makes room when the next gradient comes.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import unserializable_hook

from fedomc._torch import (
    has_step_hooks,
    in_reentrant_checkpoint,
    no_overrides,
    parameters_by_module,
    tree_leaves,
    without_grad,
    without_overrides,
)
from fedomc.codec.heap import heap
from fedomc.errors import PolicyError
from fedomc.methods import Method
from fedomc.tensor.compressed import is_compressed
from fedomc.training.lazy import check_initialized
from fedomc.training.optimizer_state import with_packed_state
from fedomc.training.updates import update_of


class StepInBackward:
    """An optimizer that steps each variable of a model as soon as its gradient is complete.

    Attributes:
        optimizer: the optimizer of all variables, with a group for each (``group["param_names"]`` is its name). Give it
            to a scheduler of ``torch.optim.lr_scheduler``, change its groups, save and load its ``state_dict``; its
            ``step`` is called by the backward pass.
    """

    def __init__(
        self, model: nn.Module, variables: list[tuple[str, nn.Parameter]], optimizer: Optimizer, clip_norm: float | None
    ) -> None:
        """Hook an optimizer with a group for each variable; ``step_in_backward`` is what users call."""
        self.optimizer = optimizer
        self._variables = variables
        self._clip_norm = clip_norm
        self._accumulating = False
        self._lock = threading.RLock()  # the backward pass has a thread for each device
        self._gradient_bytes = [4 * parameter.numel() for _, parameter in variables]
        self._released = [ReleasedGradient(parameter, name) for name, parameter in variables]
        # Optimizers that compile their step, as torchao's do, cannot trace how a variable is encoded.
        self._compiling = not type(optimizer).__module__.startswith(("torch.optim.", "fedomc."))
        self._handles = [handle for index in range(len(variables)) for handle in self._hook(index)]
        self._handles.append(model.register_forward_pre_hook(_check_all_stepped))
        self._model = weakref.ref(model)
        _stepping[model] = self

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate the gradients of all backward passes inside, and step once at the end.

        The gradients of the whole model are held until then, as in training without ``step_in_backward``. After an
        exception they are dropped, and no step is made.
        """
        self._accumulating = True
        try:
            yield
            for index, (_, parameter) in enumerate(self._variables):
                if parameter.grad is not None and not isinstance(parameter.grad, ReleasedGradient):
                    self._step(index)
        finally:
            self._accumulating = False
            for index, (_, parameter) in enumerate(self._variables):
                if parameter.grad is not None:
                    self._release(index)

    def remove(self) -> None:
        """Stop stepping: gradients accumulate again as usual."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        model = self._model()
        if model is not None and _stepping.get(model) is self:
            del _stepping[model]
        for _, parameter in self._variables:
            _make_room(parameter)

    def _hook(self, index: int) -> tuple[Any, Any]:
        name, parameter = self._variables[index]
        reference = weakref.ref(self)  # the garbage collector does not see through the hooks of a tensor

        def stepping() -> StepInBackward:
            owner = reference()
            if owner is None:
                raise RuntimeError(
                    f"{name} is no longer stepped, because the module that was passed to step_in_backward has been "
                    "deleted: keep a reference to the module, or to the result of step_in_backward"
                )
            return owner

        def before(gradient: Tensor) -> None:
            _make_room(stepping()._variables[index][1])

        def complete(parameter: Tensor) -> None:
            stepping()._complete(index)

        return (
            parameter.register_hook(unserializable_hook(before)),  # type: ignore[no-untyped-call]
            parameter.register_post_accumulate_grad_hook(complete),  # type: ignore[no-untyped-call]
        )

    def _complete(self, index: int) -> None:
        if self._accumulating:
            return
        if in_reentrant_checkpoint():
            name = self._variables[index][0]
            self._release(index)
            raise RuntimeError(
                f"{name} would be stepped inside a reentrant checkpoint, before other uses of it were "
                "differentiated: pass use_reentrant=False to torch.utils.checkpoint, or run the backward pass in "
                "accumulate()"
            )
        self._step(index)

    def _step(self, index: int) -> None:
        with self._lock:
            try:
                if self._clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_([self._variables[index][1]], self._clip_norm)
                if not self._update(index):
                    self._step_in_full(index)
            finally:
                self._release(index)
                heap.count(self._gradient_bytes[index])

    def _update(self, index: int) -> bool:
        """Update one variable without ``Optimizer.step``; return False if only that can."""
        parameter, group = self._variables[index][1], self.optimizer.param_groups[index]
        # Handlers of a compressed variable's functions, down to its attributes, would take longer than a small step.
        with no_overrides(), without_grad():
            update = update_of(self.optimizer, group, parameter)
            if update is not None:
                update(self.optimizer, group, parameter)
        return update is not None

    def _step_in_full(self, index: int) -> None:
        """Call the optimizer's ``step`` with the group of one variable."""
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [groups[index]]
        try:
            eager = self._compiling and is_compressed(self._variables[index][1])
            with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups

    def _release(self, index: int) -> None:
        """Replace a gradient by its placeholder."""
        name, parameter = self._variables[index]
        released = self._released[index]
        with no_overrides():
            if released.dtype is not parameter.dtype or released.device != parameter.device:  # it was moved
                released = self._released[index] = ReleasedGradient(parameter, name)
            parameter.grad = released


def step_in_backward(
    model: nn.Module,
    optimizer_class: Callable[..., Optimizer],
    *,
    clip_norm: float | None = None,
    state_format: str | Method | None = None,
    **kwargs: Any,
) -> StepInBackward:
    """Make every backward pass train the model: no gradient outlives the moment in which it is complete.

    Two backward passes are two steps; ``accumulate`` makes them one. What is left in ``.grad`` raises RuntimeError
    when it is used, as by ``torch.nn.utils.clip_grad_norm_`` or another optimizer.

    Args:
        model: plain or compressed; its parameters that require a gradient are trained. Compress, install or move it
            first: new parameters need a new call.
        optimizer_class: from ``torch.optim`` or ``torchao.optim``, one that works parameter by parameter.
        clip_norm: scales the gradient of each variable down to this Euclidean norm. (A norm over all variables does
            not exist in the backward pass: when the last gradient is complete the first is gone.)
        state_format: holds the state of SGD, Adam or AdamW as codes, such as ``"S1E4M3/64"``, for variables of at least
            4096 values. The memory of a gradient is then used for the step.
        **kwargs: for the optimizer.

    Returns:
        The optimizer, a way to accumulate gradients and a way to stop.

    Raises:
        FormatError: the state's format does not exist.
        PolicyError: there is nothing to train, a lazy module has not run yet, a parameter is stepped already, or the
            state cannot be held as codes: another optimizer, ``amsgrad`` or a format without scales by block. In a
            forward pass of the model: a parameter that requires a gradient is not stepped, because it was replaced,
            moved or unfrozen.

    A backward pass inside a reentrant checkpoint raises RuntimeError: it cannot know whether a gradient is complete. A
    loss that a ``GradScaler`` multiplied is stepped with as it is.
    """
    check_initialized(model)
    variables = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if has_step_hooks(parameter):
            raise PolicyError(f"{name} is stepped in backward already: call remove() on the result of the first call")
        variables.append((name, parameter))
    if not variables:
        raise PolicyError("no parameter of the model requires a gradient: there is nothing to step")
    if state_format is not None:
        optimizer_class, kwargs = with_packed_state(optimizer_class), {**kwargs, "state_format": state_format}
    optimizer = optimizer_class([{"params": [variable]} for variable in variables], **kwargs)
    return StepInBackward(model, variables, optimizer, clip_norm)


_aten = torch.ops.aten


class ReleasedGradient(Tensor):
    """What is left of a gradient after the step: its shape, dtype and device. Using its values is an error."""

    __torch_function__ = without_overrides  # type: ignore[assignment]
    variable: str

    @staticmethod
    def __new__(cls, like: Tensor, name: str) -> "ReleasedGradient":
        """Make the placeholder of a parameter's gradient."""
        one = torch.full((), torch.nan, dtype=like.dtype, device=like.device)  # memory, for what looks there unasked
        self: ReleasedGradient = one.expand(like.shape).as_subclass(cls)
        self.variable = name
        return self

    def __init__(self, *args: Any) -> None:
        """Do nothing: ``__new__`` made the tensor."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name the variable."""
        return f"ReleasedGradient({self.variable}, shape={tuple(self.shape)})"

    def __deepcopy__(self, memo: Any) -> None:
        """Copy to None: the copy of a parameter has had no gradient yet."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Move with the model and let itself be set to zero; raise for everything else."""
        kwargs = kwargs or {}
        if func in (_aten.zero_.default, _aten._foreach_zero_.default):
            return args[0] if func is _aten.zero_.default else None
        released = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, ReleasedGradient))
        if func in (_aten._to_copy.default, _aten.empty_like.default, _aten.detach.default, _aten.alias.default):
            like = torch.empty((), dtype=released.dtype, device=released.device)
            return ReleasedGradient(func(like, **kwargs).expand(released.shape), released.variable)
        raise RuntimeError(
            f"the gradient of {released.variable} has been released: step_in_backward has already stepped with it. "
            "Instead of clip_grad_norm_, pass clip_norm= to step_in_backward. Whatever steps, scales or averages "
            "gradients itself (another optimizer, GradScaler, DistributedDataParallel) needs training without "
            "step_in_backward, or backward passes in accumulate(). zero_grad() removes this placeholder"
        )


def _make_room(parameter: Tensor) -> None:
    """Let the next gradient take the place of what is left of the last one."""
    with no_overrides():
        if type(parameter.grad) is ReleasedGradient:
            parameter.grad = None


_stepping: "weakref.WeakKeyDictionary[nn.Module, StepInBackward]" = weakref.WeakKeyDictionary()
"""The optimizer of each model that is stepped in backward, kept alive as long as the model. It is not an attribute of
the model, which can so be copied and pickled; a copy is not stepped."""


def _check_all_stepped(model: nn.Module, args: Any) -> None:
    """Refuse, before a forward pass, a parameter that would silently not be trained."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or model not in _stepping:
        return

    def is_missed(parameter: Tensor) -> bool:
        return parameter.requires_grad and not has_step_hooks(parameter)

    with no_overrides():
        if not any(map(is_missed, parameters_by_module(model))):  # each forward pass; names are looked up only to raise
            return
        missed = next(name for name, parameter in model.named_parameters() if is_missed(parameter))
        raise PolicyError(
            f"{missed} requires a gradient but is not stepped in backward, because it was replaced, moved or "
            "unfrozen after step_in_backward: call remove() on the result of that call, and step_in_backward again"
        )
