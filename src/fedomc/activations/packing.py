"""``compress_activations``: what a model's forward pass keeps for the backward pass is held as codes."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedomc._torch import in_checkpoint, is_called_compiled, is_compiled, running_modules, uncompiled
from fedomc.activations.forward_pass import ForwardPass
from fedomc.errors import PolicyError
from fedomc.methods import Method, parse_method
from fedomc.methods.method import ROUNDINGS


@dataclass(frozen=True)
class ActivationBytes:
    """The bytes of the activations that the last forward pass packed.

    Attributes:
        saved: what they would take if they were not packed.
        held: what is held in their place.
    """

    saved: int
    held: int

    @property
    def ratio(self) -> float:
        """The bytes held, as a fraction of those saved; 1 if nothing was packed."""
        return self.held / self.saved if self.saved else 1.0


class PackedActivations:
    """The packing of a model's activations, until ``remove`` is called or its ``with`` block ends.

    Attributes:
        method: the compression method.
        rounding: ``nearest`` or ``stochastic``.
        seed: the seed of stochastic rounding.
        last: the bytes of the last forward pass.
    """

    def __init__(self, model: nn.Module, method: Method, rounding: str, seed: int) -> None:
        """Hook a model; ``compress_activations`` is what users call."""
        self.method, self.rounding, self.seed = method, rounding, seed
        self.last = ActivationBytes(0, 0)
        self._model = weakref.ref(model)
        self._count = 0
        self._running = threading.local()
        self._hooks = (
            model.register_forward_pre_hook(_begin, prepend=True),
            model.register_forward_hook(_end, always_call=True),
        )
        _packing[model] = self

    def __enter__(self) -> "PackedActivations":
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop packing; what has been packed can still be used by its backward pass."""
        for hook in self._hooks:
            hook.remove()
        while self._passes():
            self._end()
        model = self._model()
        if model is not None and _packing.get(model) is self:
            del _packing[model]

    def _passes(self) -> list[ForwardPass | None]:
        """The forward passes that run in this thread, the innermost last; None for one that packs nothing."""
        if not hasattr(self._running, "passes"):
            self._running.passes = []
        passes: list[ForwardPass | None] = self._running.passes
        return passes

    def _begin(self, model: nn.Module) -> None:
        passes = self._passes()
        calls = sum(module is model for module in running_modules()) if passes else 1
        while passes and passes[-1] is not None and passes[-1].is_innermost and len(passes) >= calls:
            self._end()  # an interrupt ended a forward pass without calling the hook
        passes.append(None)  # _end is called also if what follows fails
        if torch.is_grad_enabled() and not in_checkpoint():
            running = ForwardPass(model, self.method, self.rounding, self.seed, self._count)
            running.__enter__()
            passes[-1] = running

    def _end(self) -> None:
        running = self._passes().pop() if self._passes() else None
        if running is not None:
            running.__exit__(None, None, None)
            self._count = running.count
            self.last = ActivationBytes(running.saved_bytes, running.held_bytes)


def compress_activations(
    model: nn.Module, format: str | Method = "S1E4M3", *, rounding: str = "stochastic", seed: int = 0
) -> PackedActivations:
    """Pack the activations that the forward passes of a model keep for the backward pass.

    A tensor that linear layers, convolutions, matrix products, attention, normalizations or activation functions keep
    is encoded when it is saved, once for all operations that save it, and decoded by the backward function that needs
    it. ReLU and dropout keep one bit a value, which is exact. ``fedomc.activations.operations`` has a table of all
    operations, and says what stays exact. The loss of a forward pass is unchanged; its gradient has the noise of the
    rounding. A loss that is computed outside of the model keeps exact tensors only.

    This works for plain and compressed models, with autocast, checkpoints (whose inputs are packed), several backward
    passes, and double backward, which differentiates the formulas at the decoded values. Models that
    ``torch.compile`` compiled are refused, and transforms of ``torch.func`` that differentiate raise torch's own error.
    A deep copy of the model packs nothing.

    Args:
        model: is called as ``model(...)``; calls of its submodules alone pack nothing.
        format: the compression method, such as ``"S1E4M3"`` or, with a power of two for each block of values,
            ``"S1E4M3/64"``.
        rounding: ``stochastic``, which makes the codes unbiased, or ``nearest``.
        seed: the seed of stochastic rounding; the same seed, model and batches give the same codes.

    Returns:
        A handle to remove it, which is a context manager too.

    Raises:
        FormatError: the format does not exist.
        PolicyError: the rounding is unknown, the method cannot hold variables, or the model is compiled or packs its
            activations already. In a forward pass, NonFiniteError: an activation is NaN or infinite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
        >>> with fedomc.compress_activations(model, "S1E4M3") as packed:
        ...     loss = model(torch.randn(1024, 64)).square().mean()
        >>> loss.backward()
        >>> f"{packed.last.ratio:.0%}"
        '25%'
    """
    method = parse_method(format)
    if not method.holds:
        raise PolicyError(f"{method} is only for what clients send: hold activations in a format such as S1E4M3")
    if rounding not in ROUNDINGS:
        raise PolicyError(f"rounding={rounding!r} is unknown: use one of {', '.join(ROUNDINGS)}")
    if model in _packing:
        raise PolicyError(
            f"this {type(model).__name__} packs its activations already, in {_packing[model].method}: call remove() on "
            "what compress_activations returned"
        )
    _check_not_compiled(model)
    return PackedActivations(model, method, rounding, seed)


_packing: "weakref.WeakKeyDictionary[nn.Module, PackedActivations]" = weakref.WeakKeyDictionary()
"""The packing by model; not an attribute, so that a model can be copied and pickled and its copy packs nothing."""


@uncompiled("activations are packed in Python")
def _begin(model: nn.Module, args: Any) -> None:
    """Begin a forward pass."""
    packing = _packing.get(model)
    if packing is not None:
        _check_not_compiled(model)
        packing._begin(model)


@uncompiled("activations are packed in Python")
def _end(model: nn.Module, args: Any, output: Any) -> None:
    """End a forward pass, also one that failed."""
    packing = _packing.get(model)
    if packing is not None:
        packing._end()


def _check_not_compiled(model: nn.Module) -> None:
    """Refuse a compiled model: compiled code saves its tensors without a hook that could tell what they are.

    Raises:
        PolicyError: the model or a module in it is compiled.
    """
    if is_called_compiled() or any(map(is_compiled, model.modules())):
        raise PolicyError(
            f"{type(model).__name__} is compiled with torch.compile, which decides itself what is saved for the "
            "backward pass: compress the activations of a model that is not compiled"
        )
