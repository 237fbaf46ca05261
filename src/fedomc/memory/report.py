"""What training a model holds in memory, by kind and by format: predicted from shapes, and measured by a dry run.

The dry run trains a copy of the model, compressed, and watches what lives. The prediction trains a copy without values,
once for all formats, on a machine that could hold none of them; see ``liveness`` for both.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedomc._torch import tree_map
from fedomc.errors import OMCError, PolicyError
from fedomc.memory.liveness import KINDS, FunctionTracker, MemoryBytes, StorageTracker, VariableTracker
from fedomc.methods.packed import Encoding
from fedomc.tensor.compressed import is_compressed
from fedomc.training.lazy import check_initialized
from fedomc.training.model import compress_, decompress_
from fedomc.training.policy import CompressionPolicy
from fedomc.training.stepping import _in_reentrant_checkpoint, step_in_backward

FORMATS = ("FP32", "S1E4M14", "S1E3M7", "S1E2M3+S1E2M1")
FP32, AS_IS = "FP32", "as is"

_STEPS = 2  # the second one has the optimizer's state from its beginning


@dataclass(frozen=True)
class MemoryReport:
    """What training a model holds in memory, by format; ``print`` shows a table.

    Attributes:
        predicted: from shapes, by format; empty if it was not asked for.
        measured: in a dry run, by format; empty if it was not asked for.
    """

    predicted: dict[str, MemoryBytes]
    measured: dict[str, MemoryBytes]

    def fits(self, budget: int) -> list[str]:
        """Return the formats, in the order given, with which training stays within a budget.

        Args:
            budget: bytes, for all that is counted here. Leave room for what is not: the batch, the program itself,
                what an operator allocates inside itself, and idle workspace memory (at most 24 MB, see
                ``codec.workspace``).
        """
        return [name for name, found in (self.predicted | self.measured).items() if found.peak <= budget]

    def __str__(self) -> str:
        head = f"{'MB':16}{'':10}" + "".join(f"{kind:>13}" for kind in (*KINDS, "peak"))
        rows = [
            f"{name:16}{source:10}" + "".join(f"{getattr(found, kind) / 1e6:13.3f}" for kind in (*KINDS, "peak"))
            for name in self.predicted or self.measured
            for source in ("predicted", "measured")
            if (found := getattr(self, source).get(name)) is not None
        ]
        return "\n".join([head, *rows])


def memory_report(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    formats: Sequence[str | CompressionPolicy] = FORMATS,
    optimizer_class: Callable[..., Optimizer] = torch.optim.SGD,
    in_backward: bool = True,
    clip_norm: float | None = None,
    predict: bool = True,
    measure: bool = True,
    **kwargs: Any,
) -> MemoryReport:
    """Tell what training a model on a batch holds in memory, in several formats.

    The model stays as it is, also its gradients, and so do torch's random numbers. Frozen variables have no gradient.
    Checkpoints in the model count as what they are: they keep little and compute it again.

    Args:
        model: plain or compressed; on the meta device with ``measure=False``.
        batch: for the forward pass: a mapping is passed as keyword arguments, a tuple or list as arguments.
        loss: makes a scalar of the model's output; None takes its ``loss``, or the output if it is a scalar.
        formats: ``FP32``, formats as ``S1E3M7`` or ``S1E2M3+S1E2M1``, policies, or ``as is`` for the model's own.
        optimizer_class: from ``torch.optim``.
        in_backward: as ``step_in_backward`` does it; False steps after the backward pass with one optimizer.
        clip_norm: as for ``step_in_backward``.
        predict: look at shapes alone; nothing of the model's size is allocated.
        measure: train a copy of the model for two steps, in each format.
        **kwargs: for the optimizer.

    Raises:
        FormatError: no such format.
        PolicyError: a policy that fits no variable of the model, a lazy module that has not run yet, or two formats of
            one name.
        OMCError: the loss is no scalar; the shapes in the model depend on values; a model on meta cannot be measured.
        RuntimeError: stepping in backward inside a reentrant checkpoint.
    """
    check_initialized(model)
    training = _Training(loss or _own_loss, optimizer_class, in_backward, clip_norm, kwargs)
    encodings = {_label(each): _encodings(model, each) for each in formats}
    if len(encodings) < len(formats):
        raise PolicyError(f"two formats of {', '.join(map(_label, formats))} have one name: report on one at a time")
    inputs = (
        dict(batch) if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    )
    if measure and any(parameter.is_meta for parameter in model.parameters()):
        raise OMCError("the model is on the meta device and cannot be measured: pass measure=False, or fill it first")
    cuda = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(cuda)), torch.inference_mode(False), torch.enable_grad():
        return MemoryReport(
            _predicted(model, inputs, training, encodings) if predict else {},
            {name: _measured(model, inputs, training, each) for name, each in encodings.items()} if measure else {},
        )


_Encodings = Mapping[str, Encoding]
_Batch = dict[Any, Any] | tuple[Any, ...]


def _label(format: str | CompressionPolicy) -> str:
    if isinstance(format, str):
        return format
    names = "/".join(str(format.encoding(each)) for each in format.formats)
    return names + (f"@{format.fraction:g}" if format.fraction < 1 else "")


def _encodings(model: nn.Module, format: str | CompressionPolicy) -> _Encodings:
    """Return what is compressed, by qualified name."""
    if format == FP32:
        return {}
    if format == AS_IS:
        return {name: p.encoding for name, p in model.named_parameters() if is_compressed(p)}
    if isinstance(format, str):
        base, plus, update = format.partition("+")
        format = CompressionPolicy(base, update_format=update if plus else None)
    return format.select(model)


def _own_loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    result = output if found is None else found
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise OMCError(f"a {type(output).__name__} has no scalar loss: pass loss=, which makes one of the output")
    return result


@dataclass(frozen=True)
class _Training:
    """How a model is trained; see ``memory_report``."""

    loss: Callable[[Any], Tensor]
    optimizer_class: Callable[..., Optimizer]
    in_backward: bool
    clip_norm: float | None
    kwargs: dict[str, Any]

    def run(self, model: nn.Module, batch: _Batch, lives: StorageTracker, stepping: Callable[..., object]) -> None:
        """Train while what lives is watched."""
        optimizers: list[Optimizer] = []

        def tag(optimizer: Optimizer, *_: Any) -> None:
            lives.tag("gradients", [p.grad for group in optimizer.param_groups for p in group["params"]])

        def watched(parameters: Any, **kwargs: Any) -> Optimizer:
            optimizer = self.optimizer_class(parameters, **kwargs)
            optimizer.register_step_pre_hook(tag)
            optimizers.append(optimizer)
            return optimizer

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if trained and self.in_backward:
            stepping(model, watched, clip_norm=self.clip_norm, **self.kwargs)
        elif trained:
            watched(trained, **self.kwargs)
        for _ in range(_STEPS):
            loss = self.loss(model(**batch) if isinstance(batch, dict) else model(*batch))
            lives.tag_alive("activations")
            if trained:
                loss.backward()  # type: ignore[no-untyped-call]
            del loss
            if trained and not self.in_backward:
                for parameter in trained:
                    if self.clip_norm is not None and parameter.grad is not None:
                        nn.utils.clip_grad_norm_([parameter], self.clip_norm)
                optimizers[0].step()
                optimizers[0].zero_grad()
            lives.tag("released", [parameter.grad for parameter in trained])  # four bytes each, of no kind
            lives.tag("optimizer", [list(state.values()) for each in optimizers for state in each.state.values()])


def _measured(model: nn.Module, batch: _Batch, training: _Training, encodings: _Encodings) -> MemoryBytes:
    """Train a compressed copy of the model."""
    trial = decompress_(_copied(model, _copy))
    compress_(trial, encodings)
    inputs = tree_map(_copy, batch)
    lives = StorageTracker(trial, inputs)
    with lives:
        training.run(trial, inputs, lives, step_in_backward)
    return lives.most(lambda life: life.nbytes)


def _predicted(
    model: nn.Module, batch: _Batch, training: _Training, formats: Mapping[str, _Encodings]
) -> dict[str, MemoryBytes]:
    """Train a plain copy of the model that has no values, and see what compressed ones would hold."""
    from fedomc._torch import DataDependentOutputException, DynamicOutputShapeException
    from fedomc.memory.shapes import ShapeMode

    shapes = ShapeMode()
    trial = _copied(model, shapes.copy)
    inputs = tree_map(shapes.copy, batch)
    lives = VariableTracker(trial, inputs)
    try:
        with shapes, lives, FunctionTracker(lives):
            training.run(trial, inputs, lives, _step_shapes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise OMCError(
            f"the model's shapes depend on values ({error.func}) and cannot be predicted: pass predict=False"
        ) from error
    return {name: lives.most_in(encodings) for name, encodings in formats.items()}


def _step_shapes(
    model: nn.Module, optimizer_class: Callable[..., Optimizer], *, clip_norm: float | None, **kwargs: Any
) -> None:
    """Step in backward a model without values, which has nothing that could be left of a gradient."""

    def complete(optimizer: Optimizer, parameter: Tensor) -> None:
        if _in_reentrant_checkpoint():
            raise RuntimeError("no step can be made inside a reentrant checkpoint: pass use_reentrant=False to it")
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([parameter], clip_norm)
        optimizer.step()
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            step = partial(complete, optimizer_class([parameter], **kwargs))
            parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


def _copied(model: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a model without its gradients and hooks of variables; each of its tensors as a function copies it."""
    memo = {id(x): copied(x) for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _copy(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    values = x.detach().clone()
    return nn.Parameter(values, x.requires_grad) if isinstance(x, nn.Parameter) else values
