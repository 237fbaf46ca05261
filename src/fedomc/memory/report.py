"""What training a model holds in memory, by kind and by format: predicted from shapes, and measured by a dry run.

The dry run trains a copy of the model, compressed, and tracks what is alive. The prediction trains one copy
without values for all formats, also on a machine that could hold none of them; see ``liveness`` for both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedomc.errors import OMCError, PolicyError
from fedomc.memory.dry_run import Encodings, Training, measured, resized, tracked, undisturbed
from fedomc.memory.liveness import KINDS, MemoryBytes
from fedomc.methods import Method, parse_method
from fedomc.tensor.compressed import is_compressed
from fedomc.training.lazy import check_initialized
from fedomc.training.optimizer_state import checked_state_format
from fedomc.training.policy import DEFAULT, CompressionPolicy
from fedomc.training.selection import arrived_bytes
from fedomc.training.trial import arguments_of, own_loss

FORMATS = ("FP32", "S1E4M14", "S1E3M7", DEFAULT)
FP32, AS_IS = "FP32", "as is"


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
        names = list(self.predicted or self.measured)
        width = max(16, *(len(name) + 1 for name in names)) if names else 16
        head = f"{'MB':{width}}{'':10}" + "".join(f"{kind:>13}" for kind in (*kinds, "peak"))
        rows = [
            f"{name:{width}}{source:10}" + "".join(f"{getattr(memory, kind) / 1e6:13.3f}" for kind in (*kinds, "peak"))
            for name in names
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
    activations: Sequence[str | Method] = (FP32,),
    state_formats: Sequence[str | Method] = (FP32,),
    batch_size: int | None = None,
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
        activations: formats as for ``compress_activations``, each of which makes a row with each of ``formats``; with
            ``FP32`` they stay as they are.
        state_formats: formats as for ``step_in_backward``, likewise.
        batch_size: reports on a batch of this size, made by leaving rows of ``batch`` out or repeating them.
        predict: predicts from shapes alone; nothing of the model's size is allocated.
        measure: trains a copy of the model for two steps, in each format.
        **kwargs: for the optimizer.

    Raises:
        FormatError: no such format.
        PolicyError: a policy that fits no variable of the model, a lazy module that has not run yet, or two formats of
            one name.
        OMCError: the loss is no scalar; the shapes in the model depend on values; a model on meta cannot be measured;
            the tensors of the batch differ in their first dimension, and there is a ``batch_size``.
        RuntimeError: stepping in backward inside a reentrant checkpoint.
    """
    check_initialized(model)
    training = Training(loss or own_loss, optimizer_class, in_backward, clip_norm, kwargs)
    combinations = {
        _name(format, activation, state): (encodings_of(model, format), method_of(activation), state_of(state))
        for format, activation, state in product(formats, activations, state_formats)
    }
    if len(combinations) < len(formats) * len(activations) * len(state_formats):
        raise PolicyError(
            f"two of the formats {', '.join(map(str, formats))} have the same name: report on one at a time"
        )
    inputs = arguments_of(batch)
    if measure and any(parameter.is_meta for parameter in model.parameters()):
        raise OMCError("the model is on the meta device and cannot be measured: pass measure=False, or fill it first")
    predictions: dict[str, MemoryBytes] = {}
    measurements: dict[str, MemoryBytes] = {}
    with undisturbed(model):
        if predict:
            kinds = {(bool(packed), bool(state)) for _, packed, state in combinations.values()}
            runs = {
                (packs, packs_state): tracked(
                    model, inputs, training, packs_activations=packs, packs_state=packs_state, batch_size=batch_size
                )
                for packs, packs_state in kinds
            }
        sized = resized(inputs, batch_size) if measure and batch_size is not None else inputs
        for name, (encodings, packed, state) in combinations.items():
            if predict:
                run, arrived = runs[bool(packed), bool(state)], arrived_bytes(model, encodings)
                predictions[name] = run.peaks_with(encodings, arrived, packed, state)
            if measure:
                measurements[name] = measured(model, sized, training, encodings, packed, state)
    return MemoryReport(predictions, measurements)


def encodings_of(model: nn.Module, format: str | CompressionPolicy) -> Encodings:
    """Return the encodings of the compressed variables, by qualified name."""
    if format == FP32:
        return {}
    if format == AS_IS:
        return {name: p.encoding for name, p in model.named_parameters() if is_compressed(p)}
    return CompressionPolicy.parse(format).select(model)


def _name(format: str | CompressionPolicy, activations: str | Method, state: str | Method) -> str:
    """Name a row, by the format of the parameters alone if everything else is in FP32."""
    others = [(activations, "activations"), (state, "state")]
    return ", ".join([str(format), *(f"{what} {each}" for each, what in others if each != FP32)])


def method_of(format: str | Method) -> Method | None:
    """Return the method of activations; None if they stay in FP32."""
    return None if format == FP32 else parse_method(format)


def state_of(format: str | Method) -> Method | None:
    """Return the method of an optimizer's state; None if it stays in FP32."""
    return None if format == FP32 else checked_state_format(format)
