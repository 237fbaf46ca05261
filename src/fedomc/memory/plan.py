"""``plan``: the most precise way of training a model that fits into a budget of memory.

[Note: what is most precise]
A combination of formats is as precise as a value that was rounded in all of them: the error of a format is that of
values with a normal distribution, relative to their norm, rounded to nearest; that of parameters counts for the share
of them that is compressed, and squares add up. This orders combinations; it does not say what they do to a model, which
``advise`` measures. Checkpoints are exact. Of equally precise combinations that fit, the one with the least time of a
step is chosen.

[Note: times are rough]
Nothing is timed. The factors are those that ``docs/performance.md`` reports for the Conformer, rounded: a client may
find others. They put the combinations in an order, and say what a choice costs, to a tenth or two.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedomc.activations.packing import PackedActivations, compress_activations
from fedomc.errors import BudgetError, PolicyError
from fedomc.memory.budget import parse_budget
from fedomc.memory.dry_run import Encodings, Training, tracked, undisturbed
from fedomc.memory.report import FP32, method_of, state_of
from fedomc.methods import Method, encode
from fedomc.training.lazy import check_initialized
from fedomc.training.model import compress_, resolve_selection
from fedomc.training.optimizer_state import with_packed_state
from fedomc.training.policy import DEFAULT, CompressionPolicy
from fedomc.training.selection import arrived_bytes
from fedomc.training.stepping import StepInBackward, step_in_backward
from fedomc.training.trial import arguments_of, own_loss

PARAMETERS = (FP32, "S1E4M14", "S1E3M7", "S1E4M3/64", DEFAULT, "S1E2M3/64")
ACTIVATIONS = (FP32, "S1E4M3", "INT4")
STATES = (FP32, "S1E4M3/64")

_PARAMETER_TIME, _ACTIVATION_TIME, _STATE_TIME, _CHECKPOINT_TIME = 1.1, 1.3, 1.1, 1.35
"""Rough factors of the time of a step, for each that is used; see the note."""


@dataclass(frozen=True)
class Combination:
    """One way of training a model.

    Attributes:
        policy: of the parameters; None leaves them in FP32.
        activations: the format of activations; None keeps them as they are.
        state_format: the format of the optimizer's state; None keeps it in FP32.
        checkpointing: whether the model's checkpoints are enabled.
        peak_bytes: by how much the process is predicted to grow, from before the model is built.
        step_time: the time of a step relative to FP32 without checkpoints, roughly.
        error: the relative error of a value that is rounded in all formats.
    """

    policy: CompressionPolicy | None
    activations: Method | None
    state_format: Method | None
    checkpointing: bool
    peak_bytes: int
    step_time: float
    error: float

    def __str__(self) -> str:
        parts = [str(self.policy or FP32)]
        parts += [] if self.activations is None else [f"activations {self.activations}"]
        parts += [] if self.state_format is None else [f"state {self.state_format}"]
        return ", ".join(parts + ["checkpointing"] * self.checkpointing)


@dataclass(frozen=True)
class Applied:
    """What ``MemoryPlan.apply`` did to a model.

    Attributes:
        stepping: steps the model in its backward passes.
        packing: packs its activations; None if the plan leaves them as they are.
    """

    stepping: StepInBackward
    packing: PackedActivations | None

    def remove(self) -> None:
        """Stop stepping and packing; parameters stay compressed, and checkpoints enabled."""
        self.stepping.remove()
        if self.packing is not None:
            self.packing.remove()


@dataclass(frozen=True)
class MemoryPlan:
    """The combination that ``plan`` chose, which ``apply`` puts into practice; ``print`` shows a table.

    Attributes:
        chosen: the combination.
        budget: bytes.
        considered: all combinations, the most precise first.
    """

    chosen: Combination
    budget: int
    considered: tuple[Combination, ...]
    _training: Training = dataclasses.field(repr=False)
    _checkpoint: Callable[[nn.Module], object] = dataclasses.field(repr=False)

    @property
    def policy(self) -> CompressionPolicy | None:
        """The policy of the parameters; None leaves them in FP32."""
        return self.chosen.policy

    @property
    def activations(self) -> Method | None:
        """The format of activations; None keeps them as they are."""
        return self.chosen.activations

    @property
    def state_format(self) -> Method | None:
        """The format of the optimizer's state; None keeps it in FP32."""
        return self.chosen.state_format

    @property
    def checkpointing(self) -> bool:
        """Whether the model's checkpoints are enabled."""
        return self.chosen.checkpointing

    @property
    def peak_bytes(self) -> int:
        """By how much the process is predicted to grow."""
        return self.chosen.peak_bytes

    @property
    def step_time(self) -> float:
        """The time of a step relative to FP32 without checkpoints, roughly."""
        return self.chosen.step_time

    def apply(self, model: nn.Module) -> Applied:
        """Compress a model, enable its checkpoints, pack its activations and step it in backward, as planned.

        Args:
            model: is changed in place; plain, and on the device where it is to be trained. Every backward pass is a
                step of the optimizer that the plan was made for.

        Returns:
            The handles of what was done.

        Raises:
            PolicyError: the model has no such variables, is compressed already, or is stepped in backward already.
        """
        if self.policy is not None:
            compress_(model, self.policy)
        if self.checkpointing:
            self._checkpoint(model)
        stepping = step_in_backward(
            model,
            self._training.optimizer_class,
            clip_norm=self._training.clip_norm,
            state_format=self.state_format,
            **self._training.kwargs,
        )
        packed = None if self.activations is None else compress_activations(model, self.activations)
        return Applied(stepping, packed)

    def table(self, rows: int = 8) -> str:
        """Return the chosen combination, and the more precise ones that do not fit, as a table of 80 columns.

        Args:
            rows: the largest number of combinations; of those that do not fit, the ones nearest to the budget.
        """
        place = self.considered.index(self.chosen)
        larger = sorted(self.considered[:place], key=lambda each: each.peak_bytes)[: rows - 1]
        larger.sort(key=self.considered.index)
        lines = [f"  {'peak':>9} {'step':>6} {'error':>6} activations {'state':<9} checkpoints parameters"]
        for each in [*larger, self.chosen]:
            mark = ">" if each is self.chosen else " "
            numbers = f"{each.peak_bytes / 1e6:>6.0f} MB {each.step_time:>5.2f}x {each.error:>6.2%}"
            held, state = (str(method or FP32) for method in (each.activations, each.state_format))
            checkpoints = "yes" if each.checkpointing else "no"
            lines.append(f"{mark} {numbers} {held:<11} {state:<9} {checkpoints:<11} {each.policy or FP32}")
        left = place + 1 - len(lines) + 1
        if left > 0:
            lines.append(f"  and {left} more that are as precise or more, and do not fit")
        lines.append(f"budget {self.budget / 1e6:.0f} MB; step times are rough, peaks predicted from shapes")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def plan(
    model: nn.Module,
    example: Any,
    budget: str | int,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer_class: Callable[..., Optimizer] = torch.optim.SGD,
    clip_norm: float | None = None,
    batch_size: int | None = None,
    parameters: Sequence[str | CompressionPolicy] = PARAMETERS,
    activations: Sequence[str] = ACTIVATIONS,
    state_formats: Sequence[str] = STATES,
    checkpointing: bool | Callable[[nn.Module], object] = True,
    max_step_time: float = math.inf,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **kwargs: Any,
) -> MemoryPlan:
    """Plan how to train a model within a budget of memory: as precisely as fits, stepping in the backward pass.

    The model is trained on shapes alone, once for each way of holding activations and state, with and without
    checkpoints; nothing of its size is allocated. The same arguments give the same plan. Every peak includes the code
    that a first step loads, and not the batch and the imports.

    Args:
        model: plain or compressed, and in training mode; also on the meta device.
        example: a batch for the forward pass: a mapping is passed as keyword arguments, a tuple or list as arguments.
        budget: bytes, or a text such as ``1 GB`` or ``512 MiB``.
        loss: maps the model's output to a scalar; None takes ``output.loss``, or the output if it is a scalar.
        optimizer_class: from ``torch.optim``.
        clip_norm: as for ``step_in_backward``.
        batch_size: plans for a batch of this size, made by leaving rows of ``example`` out or repeating them.
        parameters: formats and policies that may be chosen, or ``FP32``.
        activations: formats as for ``compress_activations``, or ``FP32``.
        state_formats: formats as for ``step_in_backward``, or ``FP32``; ignored where the optimizer has no state that
            can be held as codes.
        checkpointing: whether checkpoints may be chosen, as models of ``transformers`` have them; or a function that
            enables those of a model.
        max_step_time: the largest time of a step, relative to FP32.
        progress: is called after each pass over the model, with the number of passes so far and of all.
        **kwargs: for the optimizer.

    Returns:
        A plan with the chosen combination, which ``apply`` puts into practice.

    Raises:
        BudgetError: nothing fits; ``smallest`` is the combination with the smallest peak.
        FormatError: no such format.
        PolicyError: the budget is no amount of memory; a policy fits no variable; there is nothing to choose from.
        OMCError: the loss is no scalar, or the shapes in the model depend on values.

    Example:
        >>> layers = [torch.nn.Linear(512, 512) for _ in range(16)]
        >>> model = torch.nn.Sequential(*layers)
        >>> found = fedomc.plan(model, torch.randn(64, 512), "45 MB", loss=lambda y: y.square().mean(), lr=0.1)
        >>> str(found.policy)
        'S1E4M14'
    """
    nbytes = parse_budget(budget)
    check_initialized(model)
    training = Training(loss or own_loss, optimizer_class, True, clip_norm, kwargs)
    states = list(map(state_of, state_formats)) if _has_state(optimizer_class, kwargs) else [None]
    enable = checkpointing if callable(checkpointing) else enable_checkpointing
    can_checkpoint = callable(checkpointing) or (checkpointing and checkpoints_of(model) is not None)
    found = _combinations(
        model, arguments_of(example), training, batch_size, [_policy(each) for each in parameters],
        list(map(method_of, activations)), states, enable, bool(can_checkpoint), progress,
    )  # fmt: skip
    allowed = [each for each in found if each.step_time <= max_step_time]
    if not allowed:
        raise PolicyError(
            f"max_step_time={max_step_time} leaves none of {len(found)} combinations: raise it, or give more formats"
        )
    chosen = next((each for each in allowed if each.peak_bytes <= nbytes), None)
    if chosen is None:
        raise BudgetError(*_nothing_fits(nbytes, allowed, bool(can_checkpoint)))
    return MemoryPlan(chosen, nbytes, tuple(allowed), training, enable)


def _combinations(
    model: nn.Module,
    inputs: Any,
    training: Training,
    batch_size: int | None,
    policies: Sequence[CompressionPolicy | None],
    activations: Sequence[Method | None],
    states: Sequence[Method | None],
    enable: Callable[[nn.Module], object],
    can_checkpoint: bool,
    progress: Callable[[int, int], object],
) -> list[Combination]:
    """Predict all combinations, the most precise first."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    held: list[tuple[CompressionPolicy | None, Encodings, int, float]] = []  # with bytes that arrive, and the error
    for policy in policies:
        selection = {} if policy is None else resolve_selection(model, policy)
        share = sum(sizes[name] for name in selection) / max(1, sum(sizes.values()))
        errors = [] if policy is None else [relative_error(method) * share**0.5 for method in policy.formats]
        held.append((policy, selection, arrived_bytes(model, selection), math.hypot(*errors)))
    found = []
    ways = list(
        product(
            (False, True) if can_checkpoint else (False,),
            dict.fromkeys(each is not None for each in activations),
            dict.fromkeys(each is not None for each in states),
        )
    )
    for done, (checkpointing, packs, packs_state) in enumerate(ways, 1):

        def prepare(trial: nn.Module, enabled: bool = checkpointing) -> None:
            trial.train()
            if enabled:
                enable(trial)

        with undisturbed(model):
            run = tracked(
                model, inputs, training, packs_activations=packs, packs_state=packs_state, batch_size=batch_size,
                change=prepare,
            )  # fmt: skip
        progress(done, len(ways))
        packed = [each for each in activations if (each is not None) == packs]
        kept = [each for each in states if (each is not None) == packs_state]
        for (policy, selection, arrived, error), activation, state in product(held, packed, kept):
            others = [0.0 if each is None else relative_error(each) for each in (activation, state)]
            time = (
                (1 if policy is None else _PARAMETER_TIME) * (1 if activation is None else _ACTIVATION_TIME)
                * (1 if state is None else _STATE_TIME) * (_CHECKPOINT_TIME if checkpointing else 1)
            )  # fmt: skip
            peak = run.resident_with(selection, arrived, activation, state)
            whole = math.hypot(error, *others)
            found.append(Combination(policy, activation, state, checkpointing, peak, time, whole))
    return sorted(found, key=lambda each: (round(each.error, 6), each.step_time, -each.peak_bytes, str(each)))


@lru_cache
def relative_error(method: Method) -> float:
    """Return the norm of the errors of 2**16 normally distributed values, relative to theirs."""
    values = torch.randn(2**16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    decoded = encode(values, method).decode(torch.empty_like(values))
    return float((decoded - values).norm() / values.norm())


def checkpoints_of(model: nn.Module) -> nn.Module | None:
    """Return the outermost module that can enable checkpoints, as models of ``transformers`` do; or None."""
    return next(
        (each for each in model.modules() if getattr(each, "supports_gradient_checkpointing", False)),
        None,
    )


def enable_checkpointing(model: nn.Module) -> None:
    """Enable the checkpoints of the outermost module that has them."""
    module: Any = checkpoints_of(model)
    module.gradient_checkpointing_enable({"use_reentrant": False})


def _nothing_fits(budget: int, found: list[Combination], has_checkpoints: bool) -> tuple[str, Combination]:
    smallest = min(found, key=lambda each: each.peak_bytes)
    ways = ["a smaller batch or shorter inputs"]
    if not has_checkpoints:
        ways.append("checkpoints (checkpointing= takes a function that enables them)")
    ways.append("frozen variables, as with adapters")
    return (
        f"nothing fits into {budget / 1e6:.1f} MB: the smallest peak is {smallest.peak_bytes / 1e6:.1f} MB, with "
        f"{smallest}. Raise the budget; or what reduces it further: {', '.join(ways)}"
    ), smallest


def _has_state(optimizer_class: Callable[..., Optimizer], kwargs: dict[str, Any]) -> bool:
    try:
        with_packed_state(optimizer_class)
    except PolicyError:
        return False
    return optimizer_class is not torch.optim.SGD or bool(kwargs.get("momentum"))


def _policy(each: str | CompressionPolicy) -> CompressionPolicy | None:
    return None if each == FP32 else CompressionPolicy.parse(each)
