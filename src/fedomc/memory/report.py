"""What training a model holds in memory, by kind and by format: predicted from shapes, and measured by a dry run.

The dry run trains a copy of the model, compressed, and tracks what is alive. The prediction trains one copy
without values for all formats, also on a machine that could hold none of them; see ``liveness`` for both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedomc._torch import in_reentrant_checkpoint, tree_map
from fedomc.errors import OMCError, PolicyError
from fedomc.memory.liveness import KINDS, FunctionTracker, MemoryBytes, StorageTracker, VariableTracker
from fedomc.methods import Encoding
from fedomc.tensor.compressed import is_compressed
from fedomc.training.lazy import check_initialized
from fedomc.training.model import compress_, decompress_
from fedomc.training.policy import CompressionPolicy
from fedomc.training.selection import arrived_bytes
from fedomc.training.stepping import step_in_backward
from fedomc.training.trial import Arguments, arguments_of, copied, copy_of, forward, own_loss

FORMATS = ("FP32", "S1E4M14", "S1E3M7", "S1E2M3+S1E2M1")
FP32, AS_IS = "FP32", "as is"

_STEPS = 2  # the second one has the optimizer's state from its beginning


@dataclass(frozen=True)
class MemoryReport:
    """What training a model holds in memory, by format; ``print`` shows a table, with ``arrived`` if there is any.

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
        return [name for name, memory in (self.predicted | self.measured).items() if memory.peak <= budget]

    def __str__(self) -> str:
        found = [*self.predicted.values(), *self.measured.values()]
        kinds = [kind for kind in KINDS if kind != "arrived" or any(memory.arrived for memory in found)]
        head = f"{'MB':16}{'':10}" + "".join(f"{kind:>13}" for kind in (*kinds, "peak"))
        rows = [
            f"{name:16}{source:10}" + "".join(f"{getattr(memory, kind) / 1e6:13.3f}" for kind in (*kinds, "peak"))
            for name in self.predicted or self.measured
            for source in ("predicted", "measured")
            if (memory := getattr(self, source).get(name)) is not None
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
    """Report what training a model on a batch holds in memory, in several formats.

    The model, its gradients and the state of torch's random generators stay as they are. Frozen variables have no
    gradient. Checkpoints in the model are taken into account. With an uplink, as in ``S1E3M7>DRIVE1``, a client also
    keeps what it was sent; both ways to report compute this from shapes.

    Args:
        model: plain or compressed; on the meta device with ``measure=False``.
        batch: for the forward pass: a mapping is passed as keyword arguments, a tuple or list as arguments.
        loss: maps the model's output to a scalar; None takes ``output.loss``, or the output if it is a scalar.
        formats: ``FP32``, formats as ``S1E3M7`` or ``S1E2M3+S1E2M1``, policies, or ``as is`` for the model's own.
        optimizer_class: from ``torch.optim``.
        in_backward: steps as ``step_in_backward`` does; False steps after the backward pass with one optimizer.
        clip_norm: as for ``step_in_backward``.
        predict: predicts from shapes alone; nothing of the model's size is allocated.
        measure: trains a copy of the model for two steps, in each format.
        **kwargs: for the optimizer.

    Raises:
        FormatError: no such format.
        PolicyError: a policy that fits no variable of the model, a lazy module that has not run yet, or two formats of
            one name.
        OMCError: the loss is no scalar; the shapes in the model depend on values; a model on meta cannot be measured.
        RuntimeError: stepping in backward inside a reentrant checkpoint.
    """
    check_initialized(model)
    training = _Training(loss or own_loss, optimizer_class, in_backward, clip_norm, kwargs)
    encodings = {_label(each): _encodings(model, each) for each in formats}
    if len(encodings) < len(formats):
        raise PolicyError(
            f"two of the formats {', '.join(map(_label, formats))} have the same name: report on one at a time"
        )
    inputs = arguments_of(batch)
    if measure and any(parameter.is_meta for parameter in model.parameters()):
        raise OMCError("the model is on the meta device and cannot be measured: pass measure=False, or fill it first")
    cuda = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(cuda)), torch.inference_mode(False), torch.enable_grad():
        return MemoryReport(
            _predicted(model, inputs, training, encodings) if predict else {},
            {name: _measured(model, inputs, training, each) for name, each in encodings.items()} if measure else {},
        )


_Encodings = Mapping[str, Encoding]


def _label(format: str | CompressionPolicy) -> str:
    if isinstance(format, str):
        return format
    return str(format)


def _encodings(model: nn.Module, format: str | CompressionPolicy) -> _Encodings:
    """Return the encodings of the compressed variables, by qualified name."""
    if format == FP32:
        return {}
    if format == AS_IS:
        return {name: p.encoding for name, p in model.named_parameters() if is_compressed(p)}
    return CompressionPolicy.parse(format).select(model)


@dataclass(frozen=True)
class _Training:
    """How a model is trained; see ``memory_report``."""

    loss: Callable[[Any], Tensor]
    optimizer_class: Callable[..., Optimizer]
    in_backward: bool
    clip_norm: float | None
    kwargs: dict[str, Any]

    def run(self, model: nn.Module, batch: Arguments, tracker: StorageTracker, stepping: Callable[..., object]) -> None:
        """Train under a tracker."""
        optimizers: list[Optimizer] = []

        def tag(optimizer: Optimizer, *_: Any) -> None:
            tracker.tag("gradients", [p.grad for group in optimizer.param_groups for p in group["params"]])

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
            loss = self.loss(forward(model, batch))
            tracker.tag_alive("activations")
            if trained:
                loss.backward()  # type: ignore[no-untyped-call]
            del loss
            if trained and not self.in_backward:
                for parameter in trained:
                    if self.clip_norm is not None and parameter.grad is not None:
                        nn.utils.clip_grad_norm_([parameter], self.clip_norm)
                optimizers[0].step()
                optimizers[0].zero_grad()
            tracker.tag("released", [parameter.grad for parameter in trained])  # four bytes each, of no kind
            tracker.follow(model)
            tracker.tag("optimizer", [list(state.values()) for each in optimizers for state in each.state.values()])


def _measured(model: nn.Module, batch: Arguments, training: _Training, encodings: _Encodings) -> MemoryBytes:
    """Train a compressed copy of the model and return what it held."""
    trial = decompress_(copied(model, copy_of))
    compress_(trial, encodings)
    inputs = tree_map(copy_of, batch)
    tracker = StorageTracker(trial, inputs)
    with tracker:
        training.run(trial, inputs, tracker, step_in_backward)
    return tracker.peaks(lambda lifetime: lifetime.nbytes, arrived_bytes(model, encodings))


def _predicted(
    model: nn.Module, batch: Arguments, training: _Training, formats: Mapping[str, _Encodings]
) -> dict[str, MemoryBytes]:
    """Train a plain copy of the model without values, and return what compressed ones would hold."""
    from fedomc._torch import DataDependentOutputException, DynamicOutputShapeException
    from fedomc.memory.shapes import ShapeMode

    shapes = ShapeMode()
    trial = copied(model, shapes.copy)
    inputs = tree_map(shapes.copy, batch)
    tracker = VariableTracker(trial, inputs)
    try:
        with shapes, tracker, FunctionTracker(tracker):
            training.run(trial, inputs, tracker, _step_shapes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise OMCError(
            f"the model's shapes depend on values ({error.func}) and cannot be predicted: pass predict=False"
        ) from error
    return {name: tracker.peaks_with(each, arrived_bytes(model, each)) for name, each in formats.items()}


def _step_shapes(
    model: nn.Module, optimizer_class: Callable[..., Optimizer], *, clip_norm: float | None, **kwargs: Any
) -> None:
    """Step a model without values in its backward pass; of a gradient nothing is left."""

    def complete(optimizer: Optimizer, parameter: Tensor) -> None:
        if in_reentrant_checkpoint():
            raise RuntimeError("a reentrant checkpoint cannot be stepped in backward: pass use_reentrant=False to it")
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([parameter], clip_norm)
        optimizer.step()
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            step = partial(complete, optimizer_class([parameter], **kwargs))
            parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
