"""``advise``: which formats can hold a model's function and its training steps, measured on a batch.

[Note: function and steps]
A format must hold two things. The *function*: with all selected variables encoded, the model's output on a batch may
not be far from that in FP32. The *steps*: the noise of rounding them may not move the weights too far; the criterion is
that of the warning during training, see ``tensor.steps``.

Noise is measured on one real step of the optimizer, for whole variables. In one part it depends on the distance between
the codes of the weights. In an update part it depends on the size of the sum of the steps, which grows: it is measured
where the update is as large as after the steps asked about, if these are independent and as large as the first. In 100
steps of AdamW in training two small models the real drift was 0.9 of this in one part, and 0.3 to 1.1 in two.

[Note: exceptions]
Often a few variables make most of the error. Errors of variables encoded one at a time add up as energies, nearly, so
that the ones to leave in FP32 are found from a pass for each variable, and what remains is then measured. This is done
for formats cheaper than the cheapest that holds.
"""

import copy
import glob
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedomc._torch import tree_leaves, tree_map
from fedomc.errors import NonFiniteError, OMCError, PolicyError
from fedomc.methods import Encoding
from fedomc.tensor.compressed import compress, is_compressed
from fedomc.tensor.steps import KEPT_ENOUGH, StepRecord, is_too_noisy, total
from fedomc.training.advice import Advice, FormatAdvice, VariableAdvice, name_of
from fedomc.training.lazy import check_initialized
from fedomc.training.model import check_dtype
from fedomc.training.policy import CompressionPolicy
from fedomc.training.selection import held_bytes
from fedomc.training.trial import arguments_of, copied, copy_of, forward, own_loss

FORMATS = (
    "S1E2M1", "S1E2M1/64", "NF4", "S1E2M3", "S1E2M3/64", "S1E3M4", "INT8", "S1E3M4/64", "S1E3M7",
    "S1E2M1/64+S1E3M0", "S1E2M3/64+S1E3M0", "S1E2M3/64+S1E2M1/64", "S1E2M3/64+S1E2M3", "S1E4M3+S1E2M1",
    "S1E3M7+S1E3M0", "S1E4M14",
)  # fmt: skip
"""The formats that are compared by default."""

_MOST_EXCLUDED = 0.25  # of the values
_MARGIN = 0.8  # of the error limit, for exceptions


def advise(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
    optimizer: Optimizer,
    *,
    formats: Sequence[str | CompressionPolicy] = FORMATS,
    exclude: Sequence[str] = (),
    steps: int = 100,
    error_limit: float = 0.2,
    seed: int = 0,
    progress: bool = False,
) -> Advice:
    """Tell which formats can hold the function and the training steps of a plain model, by measuring both on a batch.

    The model runs in the mode that it is in. It, its buffers, its gradients, the optimizer and the state of torch's
    random generators stay exactly as they are: everything happens in one copy of the model and one of the optimizer's
    state, and in the gradients of one backward pass. There is one forward pass for each format, and further ones, one
    for each variable, for formats that may hold the model if some variables are excluded.

    Args:
        model: a plain model with the values that training is to begin with.
        batch: for the forward pass: a mapping is passed as keyword arguments, a tuple or list as arguments.
        loss: maps the model's output to a scalar; None takes ``output.loss``, or the output if it is a scalar.
        optimizer: of the model's parameters, with the learning rate that training will have. What is measured is its
            next step.
        formats: as ``S1E3M7`` or ``S1E2M3+S1E3M4``, or policies. Rounding is stochastic unless a policy says otherwise.
        exclude: name patterns of variables that stay in FP32, for formats that are no policies.
        steps: the number of steps whose rounding noise a format must bear. For formats in one part, these are the steps
            of the whole run. In a federation, for formats in two parts, they are the local steps of one round, as a
            client then begins with an update of zeros. The first step of Adam is larger than later ones, so the
            estimate for Adam is too high.
        error_limit: how far the output may be from that in FP32, relative to how much that varies over the batch.
        seed: the seed of everything random: dropout in the model, and stochastic rounding.
        progress: print a line for each format on the standard error output.

    Raises:
        FormatError: there is no such format.
        PolicyError: a variable is compressed already or has no values, a policy fits no variable, the optimizer has
            none of the selected variables, a lazy module has not run yet, or a limit is not positive.
        NonFiniteError: the loss or a step is NaN or infinite in FP32.
        OMCError: the loss is no scalar or depends on no parameter; or the output has no floating-point tensor, or one
            whose shape depends on the weights.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> batch = torch.randn(32, 64)
        >>> advice = fedomc.advise(model, batch, lambda y: (y - batch).square().mean(), optimizer)
        >>> {str(row.policy): row.holds for row in advice.formats if str(row.policy) in ("S1E2M1", "S1E3M7")}
        {'S1E2M1': False, 'S1E3M7': True}
        >>> model = fedomc.compress_(model, advice.policy)
    """
    if steps < 1 or not error_limit > 0:
        raise PolicyError(f"steps={steps} and error_limit={error_limit} must be positive")
    policies = [CompressionPolicy.parse(each) for each in formats]
    policies = [
        replace(policy, seed=seed, exclude=exclude) if isinstance(each, str) else policy
        for each, policy in zip(formats, policies, strict=True)
    ]
    _check(model, optimizer, policies)
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(cuda)), torch.inference_mode(False), torch.enable_grad():
        trial = _Trial(model, batch, loss or own_loss, seed, error_limit)
        trial.step(optimizer)
        for number, policy in enumerate(policies, 1):
            _say(progress, f"{number}/{len(policies)} {policy}: the noise of a step")
            trial.add_steps(policy, steps)
        trial.restore()
        rows = []
        for number, policy in enumerate(policies, 1):
            _say(progress, f"{number}/{len(policies)} {policy}: the output")
            rows.append(trial.row(policy))
        rows.sort(key=lambda row: row.ratio)
        bound = next((row.ratio for row in rows if row.holds), 1.0)
        for position, row in enumerate(list(rows)):
            if row.ratio < bound and not row.steps_reason and row.policy.fraction == 1:
                _say(progress, f"{row.policy}: which variables to exclude")
                rows[position], better = trial.exceptions(row)
                if better is not None and better.holds and better.ratio < bound:
                    rows.append(better)
                    bound = better.ratio
    return Advice(trial.loss, tuple(sorted(rows, key=lambda row: row.ratio)))


def _check(model: nn.Module, optimizer: Optimizer, policies: Sequence[CompressionPolicy]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise PolicyError(
            f"optimizer={optimizer!r} is not an optimizer: pass one of the model's parameters, such as "
            "torch.optim.AdamW(model.parameters(), lr=1e-4)"
        )
    check_initialized(model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if is_compressed(parameter):
            raise PolicyError(
                f"{name} is compressed already: ask for advice on the plain model, before compress_, or on "
                "decompress_(copy.deepcopy(model))"
            )
        if parameter.is_meta:
            raise PolicyError(f"{name} lies on the meta device and has no values to measure: fill the model first")
    if not policies:
        raise PolicyError("there is no format to advise on: pass at least one")
    if len(set(map(name_of, policies))) < len(policies):
        raise PolicyError(
            f"two of the formats {', '.join(map(name_of, policies))} have the same name: ask about one at a time"
        )
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    selected = {name for policy in policies for name in policy.select(model)}
    for name in sorted(selected):
        check_dtype(name, parameters[name])
    if not any(id(parameters[name]) in stepped for name in selected):
        raise PolicyError(
            f"the optimizer steps none of {len(selected)} variables, such as {min(selected)!r}: pass one that was made "
            "of this model's parameters"
        )


class _Trial:
    """A copy of a model, whose parameters are overwritten with what formats make of those of the model.

    Attributes:
        loss: in FP32.
    """

    def __init__(
        self, model: nn.Module, batch: Any, loss: Callable[[Any], Tensor], seed: int, error_limit: float
    ) -> None:
        self._model = model
        self._values = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._copy = copied(model, copy_of)
        self._parameters = dict(self._copy.named_parameters())
        self._batch = batch
        self._loss_of = loss
        self._seed = seed
        self._error_limit = error_limit
        self._steps: dict[CompressionPolicy, dict[str, StepRecord]] = {}
        self._output: list[Tensor] = []
        self.loss = math.nan

    def step(self, optimizer: Optimizer) -> None:
        """Step the copy once: its parameters now differ from the model's by the change of one step."""
        memo: dict[int, Any] = {id(p): self._parameters[name] for name, p in self._model.named_parameters()}
        stepping = copy.deepcopy(optimizer, memo)
        loss = self._run()[1]
        self.loss = loss.item()
        if not math.isfinite(self.loss):
            raise NonFiniteError(
                f"the loss on the batch is {self.loss} in FP32: look for a bad batch or diverged weights"
            )
        if not loss.requires_grad:
            raise OMCError("the loss depends on no parameter that requires a gradient: there is no step to measure")
        loss.backward()  # type: ignore[no-untyped-call]
        stepping.step()
        for name, parameter in self._parameters.items():
            parameter.grad = None
            if not parameter.isfinite().all():
                raise NonFiniteError(f"a step makes {name} NaN or infinite in FP32: lower the learning rate")

    def add_steps(self, policy: CompressionPolicy, steps: int) -> None:
        """Measure what a format makes of the step, after ``step`` and before ``restore``."""
        found = self._steps[policy] = {}
        for name, encoding in policy.select(self._model).items():
            value = self._values[name]
            change = (self._parameters[name].detach() - value).view(-1)
            found[name] = _stepped(name, encoding, value, change, steps)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the copy the model's values again, and keep what it makes of the batch."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._values[name])
        self._output = _tensors(self._run()[0])
        if not self._output:
            raise OMCError("the model's output has no floating-point tensor whose error could be measured")

    @torch.no_grad()
    def row(self, policy: CompressionPolicy) -> FormatAdvice:
        """Measure what the copy makes of the batch with a policy's variables encoded."""
        selection = policy.select(self._model)
        for name, encoding in selection.items():
            self._encode(name, encoding)
        output, loss = self._run()
        for name in selection:
            self._parameters[name].copy_(self._values[name])
        error = self._error(output)
        kept, noise, drift = total(self._steps[policy][name] for name in selection)
        ratio = held_bytes(self._model, selection) / held_bytes(self._model, None)
        variables = {
            name: VariableAdvice(record.kept, record.relative_noise, record.drift)
            for name, record in self._steps[policy].items()
            if name in selection
        }
        function = f"output: {error:.0%} off" if not error <= self._error_limit else ""
        return FormatAdvice(
            *(policy, ratio, error, float(loss), kept, noise, drift, function),
            *(_steps_reason(policy.rounding, kept, noise, drift), variables),
        )

    @torch.no_grad()
    def exceptions(self, row: FormatAdvice) -> tuple[FormatAdvice, FormatAdvice | None]:
        """Measure the output's error by variable, and what the format does without the worst variables.

        Returns:
            The row with these errors, and a row of the format with exceptions; None if too many would be needed.
        """
        selection, errors = row.policy.select(self._model), {}
        for name, encoding in selection.items():
            self._encode(name, encoding)
            errors[name] = self._error(self._run()[0])
            self._parameters[name].copy_(self._values[name])
        row = replace(
            row, variables={name: replace(each, output_error=errors[name]) for name, each in row.variables.items()}
        )
        excluded = self._worst(errors, row.output_error)
        if not excluded:
            return row, None
        policy = replace(row.policy, exclude=(*row.policy.exclude, *map(glob.escape, excluded)))
        self._steps[policy] = {n: record for n, record in self._steps[row.policy].items() if n not in excluded}
        return row, self.row(policy)

    def _worst(self, errors: Mapping[str, float], together: float) -> list[str]:
        """Choose the variables without which the error is within the limit; none if these would be too many."""
        energies = {name: error**2 for name, error in errors.items()}
        summed = math.fsum(energies.values())
        if not (math.isfinite(summed) and math.isfinite(together)) or summed == 0:
            return []
        allowed = (_MARGIN * self._error_limit) ** 2 * min(1.0, summed / together**2)
        room = _MOST_EXCLUDED * sum(self._values[name].numel() for name in errors)
        chosen: list[str] = []
        for name in sorted(energies, key=lambda name: energies[name] / self._values[name].numel(), reverse=True):
            if math.fsum(energies[each] for each in energies if each not in chosen) <= allowed:
                return chosen
            if self._values[name].numel() <= room:
                room -= self._values[name].numel()
                chosen.append(name)
        return []

    def _encode(self, name: str, encoding: Encoding) -> None:
        self._parameters[name].copy_(compress(self._values[name], encoding, name).decode())

    def _run(self) -> tuple[Any, Tensor]:
        """Return output and loss; what is random is the same each time, and so is what buffers begin with."""
        with torch.no_grad():
            for buffer, original in zip(self._copy.buffers(), self._model.buffers(), strict=True):
                buffer.copy_(original)
        torch.manual_seed(self._seed)
        output = forward(self._copy, arguments_of(tree_map(copy_of, self._batch)))
        loss = self._loss_of(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise OMCError(f"the loss must be a scalar tensor, got {shape}: reduce it, for instance with .mean()")
        return output, loss

    def _error(self, output: Any) -> float:
        """Return the distance of an output from that in FP32, relative to how much that varies over the batch."""
        found = _tensors(output)
        if [x.shape for x in found] != [x.shape for x in self._output]:
            raise OMCError("the shape of the model's output depends on the weights, so that its error is undefined")
        distance = math.fsum(float((x - y).square().sum()) for x, y in zip(found, self._output, strict=True))
        varies = math.fsum(float((y - y.mean(0)).square().sum()) for y in self._output if y.dim() and len(y) > 1)
        size = varies or math.fsum(float(y.square().sum()) for y in self._output)
        return math.sqrt(distance / size) if size else math.inf if distance else 0.0


def _stepped(name: str, encoding: Encoding, value: Tensor, change: Tensor, steps: int) -> StepRecord:
    """Return the record of a number of steps that all have the noise of this one."""
    held = compress(value, encoding, name)
    if held.update is not None:
        held.add_part(change, math.sqrt(steps))
    before = held.dequantize().view(-1)
    held.add_part(change, 1.0)
    moved = held.dequantize().view(-1).sub_(before)
    record = StepRecord(name, str(encoding.methods[-1]), encoding.rounding)
    record.steps, record.samples = steps, 1
    record.asked, record.moved = float(change.square().sum()), float((moved * change).sum())
    record.noise, record.size = float(moved.sub_(change).square().sum()), float(value.square().sum())
    return record


def _steps_reason(rounding: str, kept: float, noise: float, drift: float) -> str:
    if rounding == "nearest":
        return f"steps: {max(kept, 0):.0%} arrive" if kept < KEPT_ENOUGH else ""
    if is_too_noisy(noise, drift):
        return f"steps: their noise moves the weights by {drift:.0%}"
    return ""


def _tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a model's output, in float32."""
    return [x.detach().float() for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)
