"""The only module that uses private names of torch; each is wrapped in a function or name of its own.

A change that torch makes without notice can thus break only this module. ``tests/test__torch.py`` tests each name; it
fails first and says what changed. Modules that ``import torch`` does not load are loaded when they are first used.
"""

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointFunction

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "StorageWeakRef",
    "TorchDispatchMode",
    "apply_untransformed",
    "current_node",
    "dispatch_is_watched",
    "forbid_memory_access",
    "has_constant",
    "has_step_hooks",
    "in_reentrant_checkpoint",
    "in_checkpoint",
    "is_called_by",
    "is_called_compiled",
    "is_compiled",
    "is_plain",
    "keep_hooks_in_swap",
    "linear_of_onednn",
    "no_overrides",
    "parameters_by_module",
    "processor_name",
    "run_next_in_backward",
    "running_modules",
    "saved_by_checkpoint",
    "saved_tensors_hooks",
    "schema_of",
    "sparse_parts",
    "steps_plainly",
    "storage_is_shared",
    "storage_key",
    "transforms_are_active",
    "tree_leaves",
    "tree_map",
    "uncompiled",
    "use_count",
    "without_grad",
    "without_overrides",
    "wrapper_tensor",
]

_FAKE = ("DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode")

Function = TypeVar("Function", bound=Callable[..., Any])
AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def __getattr__(name: str) -> Any:
    """Import the fake tensors, which takes time, when one of their names is first used."""
    if name not in _FAKE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch._subclasses import fake_tensor

    return getattr(fake_tensor, name)


without_overrides = torch._C._disabled_torch_function_impl
"""The ``__torch_function__`` for a subclass of ``Tensor`` that leaves all functions to the dispatcher."""


def no_overrides() -> AbstractContextManager[Any]:
    """Return a context in which functions of torch bypass ``__torch_function__`` and go to the dispatcher."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


def without_grad() -> AbstractContextManager[Any]:
    """Return a context without gradients, which costs nothing where there are none anyway."""
    return torch.no_grad() if torch.is_grad_enabled() else _UNCHANGED


_UNCHANGED = nullcontext()


def wrapper_tensor(
    cls: type[AnyTensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> AnyTensor:
    """Make a tensor of a subclass, with a shape, dtype and device but without memory."""
    tensor: AnyTensor = Tensor._make_wrapper_subclass(
        cls, tuple(shape), dtype=dtype, device=device, requires_grad=requires_grad
    )
    return tensor


def forbid_memory_access(tensor: Tensor) -> None:
    """Make access to the address of a tensor without memory an error instead of a crash.

    Kernels that access memory without going through the dispatcher, such as those of collectives on lists of lists,
    then raise RuntimeError.
    """
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def transforms_are_active() -> bool:
    """Return whether a transform of ``torch.func`` or the forward mode of autograd is active."""
    return bool(torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def uncompiled(reason: str) -> Callable[[Function], Function]:
    """Exclude a function, and everything that it calls, from ``torch.compile``.

    The decorator ``torch.compiler.disable`` does the same, but imports the compiler immediately.

    Args:
        reason: the reason to report for the graph break.
    """

    def mark(function: Function) -> Function:
        compiler = torch._C._dynamo.eval_frame
        skip = compiler._FrameAction.SKIP
        compiler.set_code_exec_strategy(function.__code__, compiler._FrameExecStrategy(skip, skip))
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark


def dispatch_is_watched() -> bool:
    """Tell whether a mode of ``__torch_dispatch__`` or a profiler wants to see each operator."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled())


def is_compiled(module: torch.nn.Module) -> bool:
    """Tell whether ``torch.compile`` made a module, or ``Module.compile`` compiled it in place."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def is_plain(x: Any) -> bool:
    """Tell whether a tensor has memory of its own and is of no subclass; a fake one counts as what it stands for."""
    if type(x) in (Tensor, torch.nn.Parameter):
        return True
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(x, fake.FakeTensor)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Iterate over a frame of the stack of calls and those that led to it, the outermost last."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def running_modules() -> Iterator[torch.nn.Module]:
    """Iterate over the modules that are being called in this thread, the innermost first."""
    call = torch.nn.Module._call_impl.__code__
    return (frame.f_locals["self"] for frame in _outwards(sys._getframe()) if frame.f_code is call)


def saved_by_checkpoint() -> bool:
    """Tell, in the hook that calls this, whether a checkpoint saves the tensor, that is an input of its region."""
    modules = (frame.f_globals.get("__name__") for frame in _outwards(sys._getframe(2)))
    return next(name for name in modules if name != "torch.autograd.function") == "torch.utils.checkpoint"


def in_checkpoint() -> bool:
    """Tell whether a non-reentrant checkpoint saves in its own way what is saved now."""
    hooks = saved_tensors_hooks()
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def is_called_compiled() -> bool:
    """Tell whether a compiled function has called this code, which itself runs uncompiled."""
    return any(
        frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame"
        for frame in _outwards(sys._getframe())
    )


def apply_untransformed(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the ``apply`` of an autograd function without its preparations for transforms of ``torch.func``.

    They take as long as a small product. The caller sees to it that no transform is active.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def is_called_by(*packages: str) -> bool:
    """Tell whether the innermost code outside this library that runs is in one of some packages."""
    library = __name__.partition(".")[0] + "."
    modules = (frame.f_globals.get("__name__", "") + "." for frame in _outwards(sys._getframe()))
    caller = next((name for name in modules if not name.startswith(library)), "")
    return caller.startswith(tuple(package + "." for package in packages))


def schema_of(operator: Any) -> Any:
    """Return the schema of an operator: ``name``, ``arguments`` and ``returns``."""
    return operator._schema


def has_constant(tensor: Any) -> bool:
    """Return whether a fake tensor stands for a constant, whose values are known."""
    return tensor.constant is not None


def parameters_by_module(model: torch.nn.Module) -> Iterator[Tensor]:
    """Iterate over the parameters of each module; without names, in half the time of ``parameters``.

    One that several modules share comes several times.
    """
    return (x for module in model.modules() for x in module._parameters.values() if x is not None)


def has_step_hooks(tensor: Tensor) -> bool:
    """Return whether a leaf has hooks that run after its gradient has been accumulated."""
    return bool(tensor._post_accumulate_grad_hooks)


def keep_hooks_in_swap(tensor: Tensor) -> None:
    """Let the hooks of a leaf survive ``torch.utils.swap_tensors``, which asks the tensor for its use count first.

    A swap exchanges what two Python objects stand for, but neither their hooks nor what calls those: the hooks would
    stay with the object and never be called again. The other tensor of the swap, which the stack of calls tells, is
    therefore given the same hooks. Empty dictionaries are removed, as hooks registered after the swap would not be
    called either.

    Raises:
        RuntimeError: torch swaps in a way that is unknown here, and the tensor has hooks.
    """
    hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    if not any(hooks):
        tensor._backward_hooks = tensor._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        return
    swap = next((f for f in _outwards(sys._getframe()) if f.f_code is _SWAP_TENSORS), None)
    if swap is None or not {"t1", "t2"} <= swap.f_locals.keys():
        raise RuntimeError("hooks of a tensor would be lost when it is moved: remove them before, and add them after")
    one, other = swap.f_locals["t1"], swap.f_locals["t2"]
    if tensor is one and other is not one:
        other._backward_hooks, other._post_accumulate_grad_hooks = hooks


def use_count(tensor: Tensor) -> int:
    """Return the number of C++ references to a tensor, which ``torch.utils.swap_tensors`` requires to be one."""
    return int(Tensor._use_count(tensor))  # type: ignore[attr-defined]


def run_next_in_backward(tensor: Tensor) -> None:
    """Make the backward pass run a tensor's graph node before all other nodes that are ready."""
    tensor.grad_fn._set_sequence_nr(2**63 - 1)  # type: ignore[union-attr]


def saved_tensors_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return the innermost active pair of ``torch.autograd.graph.saved_tensors_hooks``, if any."""
    hooks: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks


def current_node() -> Any:
    """Return the graph node whose backward function is running in this thread, or None."""
    return torch._C._current_autograd_node()


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies a storage among all that exist, whether or not it has memory."""
    return int(storage._cdata)


def storage_is_shared(tensor: Tensor) -> bool:
    """Return whether other tensors, known to Python or not, use the memory of a tensor."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) > _OWN_USES


_OWN_USES = 2
"""A storage is used by its tensor, and by the object that stands for it in Python."""


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices and values of a sparse COO tensor, whether or not it is coalesced."""
    return tensor._indices(), tensor._values()


def in_reentrant_checkpoint() -> bool:
    """Return whether the running backward pass was started by the backward pass of a reentrant checkpoint.

    Torch has no query for this, so the call stack is searched for the backward function of the checkpoint.
    """
    frame: FrameType | None = sys._getframe()  # without a generator: each step of each variable comes here
    while frame is not None and frame.f_code is not _CHECKPOINT_BACKWARD:
        frame = frame.f_back
    return frame is not None


_CHECKPOINT_BACKWARD = CheckpointFunction.backward.__code__
_SWAP_TENSORS = torch.utils.swap_tensors.__code__


def linear_of_onednn() -> Any:
    """Return oneDNN's operator for ``x W^T + b``, called with ``(x, weight, bias, "none", [], "")``, if it exists."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


def processor_name() -> str:
    """Return the processor's name, which begins with its maker's, as in ``Intel Xeon``; empty where it is unknown."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    name = "" if capabilities is None else str(capabilities().get("cpu_name", ""))
    return name or platform.processor()


def steps_plainly(optimizer: Optimizer) -> bool:
    """Tell whether nothing but the update itself happens in the steps of an optimizer: neither hooks nor wrappers.

    A scheduler wraps ``step`` too, to see that there was one, which it needs to see only once.
    """
    step = optimizer.__dict__.get("step")
    if step is not None and not (hasattr(step, "_wrapped_by_lr_sched") and getattr(optimizer, "_opt_called", False)):
        return False
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return not (hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)
