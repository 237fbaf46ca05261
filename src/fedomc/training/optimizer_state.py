"""Optimizers of torch whose state is held as codes: momentum, and the moments of Adam and AdamW.

[Note: a stretch at a time]
The moments of a stretch of values are decoded, updated by its gradient and encoded in place, and the step takes the
place of the gradient, which nobody needs any more. The whole variable is then stepped in one pass. Nothing dense is
allocated but stretches, and no second set of codes. Hence each stretch must have scales of its own: formats with one
scale for a whole variable are refused. An interrupt in between leaves moments of which some stretches have seen the
gradient and others not; each of them decodes to what it should.

[Note: the second moment]
What is held is its square root, whose range is half as wide in bits, and by which Adam divides. Rounding to nearest
would freeze it: with ``beta2 = 0.999`` it changes by a thousandth of itself in a step, and neighbouring codes of eight
bits are far more apart. So rounding is stochastic. Scales are powers of two, so that a code stays where it is when the
scale of its block changes, and only the change has noise. A root may all the same be rounded down, even to zero, where
dividing by it would make an enormous step. By the inequality of Cauchy and Schwarz the first moment is at most
``bound`` times the root of the second, so the root is raised to what the first moment demands.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedomc import codec
from fedomc._torch import no_overrides, storage_is_shared, without_grad
from fedomc.errors import NonFiniteError, PolicyError
from fedomc.methods import Encoding, Method, Packed, parse_method
from fedomc.methods.method import Writing
from fedomc.methods.packed import State, draw_seed
from fedomc.tensor.compressed import CompressedTensor, is_compressed

SMALLEST = 4096
"""The least number of values of a variable whose state is held as codes."""

_ROOTS = {"exp_avg_sq": "exp_avg_sq_root"}
"""Second moments, with the name under which the square root is held."""
_UNSUPPORTED = ("amsgrad", "fused", "differentiable", "capturable")


class PackedStateOptimizer(Optimizer, ABC):
    """An optimizer with the groups and options of torch's, whose state is held as codes.

    ``group["state_format"]`` is the format in which state is made; None keeps that of a variable in FP32. In ``state``,
    ``momentum_buffer`` and ``exp_avg`` are compressed tensors, and so is ``exp_avg_sq_root``, the square root of what
    torch calls ``exp_avg_sq``. The state of a variable with fewer than ``SMALLEST`` values is that of torch.
    """

    def __init__(self, params: Any, *, state_format: str | Method, **kwargs: Any) -> None:
        name = str(checked_state_format(state_format))
        for option in _UNSUPPORTED:
            if kwargs.get(option):
                raise PolicyError(
                    f"{option}={kwargs[option]!r} is not supported with state_format={name!r}: leave one of them out"
                )
        super().__init__(params, **kwargs)
        self.defaults["state_format"] = name
        for group in self.param_groups:
            group.setdefault("state_format", name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; one in FP32, as that of torch's own optimizer, is encoded."""
        formats = [group["state_format"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, former in zip(self.param_groups, formats, strict=True):
            group.setdefault("state_format", former)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, (group, parameter) in zip(numbers, self._variables(), strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                state = self.state[parameter]
                if is_compressed(value):  # torch has converted it to the dtype of the variable
                    state[key] = value.to(parameter.device, copy=True)
                elif _is_packed(group, parameter) and isinstance(value, Tensor) and value.shape == parameter.shape:
                    del state[key]
                    values = value.detach().to(parameter.device, torch.float32)
                    state[_ROOTS.get(key, key)] = _encoded(
                        group, parameter, values.sqrt() if key in _ROOTS else values, key
                    )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every variable that has a gradient, whose memory is used for the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with no_overrides(), without_grad():
            for group, parameter in self._variables():
                if parameter.grad is not None:
                    self.update(group, parameter)
        return loss

    def update(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Update a variable by its gradient, whose memory is used for the step.

        Raises:
            NonFiniteError: the gradient is NaN or infinite somewhere; nothing was changed.
            RuntimeError: the gradient is sparse.
        """
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"{_name(group, parameter)} has a sparse gradient, and its optimizer's state is held as codes: use "
                "sparse=False in the embedding, or no state_format"
            )
        is_shared = storage_is_shared(gradient)  # with the gradient of another variable
        step = gradient.reshape(-1).contiguous()
        if codec.absmax_bits(step) >= codec.INFINITY_BITS:
            raise NonFiniteError(
                f"{_name(group, parameter)} has a gradient that is NaN or infinite; nothing was changed. Look for a "
                "diverging loss, lower the learning rate or clip the gradient"
            )
        if is_shared and step.data_ptr() == gradient.data_ptr():
            step = step.clone()
        factor = self._replace_by_step(group, parameter, step)
        if is_compressed(parameter):
            parameter.add_part(step, factor)
            torch.autograd.graph.increment_version(parameter)
        else:
            parameter.add_(step.view(parameter.shape), alpha=factor)

    @abstractmethod
    def _replace_by_step(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> float:
        """Update the state, and replace a flat gradient by a step; return the factor with which it is to be added."""

    def _variables(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter


class PackedSGD(PackedStateOptimizer, SGD):
    """SGD whose momentum is held as codes."""

    def _replace_by_step(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> float:
        momentum, nesterov, state = group["momentum"], group["nesterov"], self.state[parameter]
        damping = 1 - group["dampening"] if state.get("momentum_buffer") is not None else 1.0  # not in the first step
        if momentum and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = _zeros(group, parameter, "momentum_buffer")
        buffer = _Moment(state["momentum_buffer"]) if momentum else None
        for start, stretch in _stretches(gradient):
            if group["maximize"]:
                stretch.neg_()
            _add_decay(group["weight_decay"], parameter, start, stretch)
            if buffer is not None:
                values = buffer.read(start, stretch).mul_(momentum).add_(stretch, alpha=damping)
                stretch.add_(values, alpha=momentum) if nesterov else stretch.copy_(values)
                buffer.write(start, values)
        if buffer is not None:
            buffer.end()
        return -float(group["lr"])


class PackedAdam(PackedStateOptimizer, Adam):
    """Adam whose moments are held as codes."""

    def _replace_by_step(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> float:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        state, is_packed = self.state[parameter], _is_packed(group, parameter)
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = _zeros(group, parameter, "exp_avg")
            key = "exp_avg_sq_root" if is_packed else "exp_avg_sq"
            state[key] = _zeros(group, parameter, key)
        state["step"] += 1
        taken = float(state["step"])
        corrections = 1 - beta1**taken, math.sqrt(1 - beta2**taken)
        bound = moment_bound(beta1, beta2, taken)
        first = _Moment(state["exp_avg"])
        has_root = "exp_avg_sq_root" in state
        second = _Moment(state["exp_avg_sq_root" if has_root else "exp_avg_sq"])
        decay, is_decoupled = group["weight_decay"], group["decoupled_weight_decay"]
        for start, stretch in _stretches(gradient):
            if group["maximize"]:
                stretch.neg_()
            if not is_decoupled:
                _add_decay(decay, parameter, start, stretch)
            mean = first.read(start, stretch).lerp_(stretch, 1 - beta1)
            square = second.read(start, stretch)
            square = square.square_() if has_root else square
            square.mul_(beta2).addcmul_(stretch, stretch, value=1 - beta2)
            root = square.sqrt_() if has_root else square.sqrt()
            if has_root:
                torch.maximum(root, torch.mul(mean, 1 / bound, out=stretch).abs_(), out=root)
            first.write(start, mean)
            second.write(start, root if has_root else square)
            root.div_(corrections[1]).add_(group["eps"])
            torch.div(mean, root, out=stretch)
            if is_decoupled:
                _add_decay(decay * corrections[0], parameter, start, stretch)
        first.end()
        second.end()
        return float(-group["lr"] / corrections[0])


class PackedAdamW(PackedAdam, AdamW):
    """AdamW whose moments are held as codes."""


_PACKED: dict[Any, type[PackedStateOptimizer]] = {SGD: PackedSGD, Adam: PackedAdam, AdamW: PackedAdamW}


def with_packed_state(optimizer_class: Callable[..., Optimizer]) -> type[PackedStateOptimizer]:
    """Return the optimizer that does what one of torch does, with its state held as codes.

    Raises:
        PolicyError: there is none.
    """
    packed = _PACKED.get(optimizer_class)
    if packed is None:
        name = getattr(optimizer_class, "__name__", repr(optimizer_class))
        raise PolicyError(
            f"the state of {name} cannot be held as codes: state_format is for torch.optim.SGD, Adam and AdamW; use "
            "one of them, or leave state_format out"
        )
    return packed


def checked_state_format(state_format: str | Method) -> Method:
    """Return the method of a format for the state of optimizers.

    Raises:
        FormatError: the format does not exist.
        PolicyError: the format cannot hold state.
    """
    method = parse_method(state_format)
    if not method.holds or not all(field.by_values for field in method.fields(codec.BLOCK)):
        raise PolicyError(
            f"state_format={str(method)!r} cannot hold an optimizer's state, which is rewritten in chunks that "
            "each need a scale: use a format with a scale for each block, such as S1E4M3/64"
        )
    return method


def moment_bound(beta1: float, beta2: float, steps: float) -> float:
    """Return how many times the root of the second moment the first one can be after so many steps of Adam.

    With the weights ``w`` and ``u`` of the gradients in the moments, ``sum(w g)**2 <= sum(w**2 / u) sum(u g**2)``.
    """
    ratio = beta1**2 / beta2 if beta2 else math.inf
    if ratio >= 1:
        return math.inf
    return (1 - beta1) * math.sqrt((1 - ratio**steps) / (1 - ratio) / (1 - beta2))


class _Moment:
    """A part of a variable's state, read and written a stretch at a time."""

    def __init__(self, held: Tensor) -> None:
        self._held = held
        if is_compressed(held):
            part = held.base
            self._writing = Writing("none", draw_seed(held.encoding.seed, held.variable, part.draws))

    def read(self, start: int, like: Tensor) -> Tensor:
        """Return the values from ``start`` on, in scratch memory, or the memory itself of what is not packed."""
        held, stop = self._held, start + len(like)
        return held.decode_range(start, stop) if is_compressed(held) else held.view(-1)[start:stop]

    def write(self, start: int, values: Tensor) -> None:
        """Replace the values from ``start`` on by float32 ones; what is not packed has them already."""
        if is_compressed(self._held):
            part = self._held.base
            fields = part.method.stretch(part.fields, part.numel, start, len(values))
            part.method.encode_stretch(values, fields, start, self._writing)

    def end(self) -> None:
        """Count a draw of stochastic rounding."""
        if is_compressed(self._held):
            part = self._held.base
            part.state = State(part.fields, part.draws + 1, is_zero=False)


def _stretches(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the stretches of a flat tensor as float32, with their places; what is written there reaches the tensor."""
    for start in range(0, flat.numel(), codec.CHUNK):
        stretch = flat[start : start + codec.CHUNK]
        values = stretch.float()
        yield start, values
        if values is not stretch:
            stretch.copy_(values)


def _add_decay(decay: float, parameter: Tensor, start: int, stretch: Tensor) -> None:
    """Add weight decay to a stretch of a gradient or step."""
    if decay:
        stop = start + len(stretch)
        values = parameter.decode_range(start, stop) if is_compressed(parameter) else parameter.reshape(-1)[start:stop]
        stretch.add_(values, alpha=decay)


def _is_packed(group: dict[str, Any], parameter: Tensor) -> bool:
    return group["state_format"] is not None and parameter.numel() >= SMALLEST


def _name(group: dict[str, Any], parameter: Tensor) -> str:
    """Return the qualified name of a variable, as far as the optimizer knows it."""
    names = group.get("param_names")
    if names is None:
        return parameter.variable if is_compressed(parameter) else f"a variable of shape {tuple(parameter.shape)}"
    return str(next(name for name, x in zip(names, group["params"], strict=True) if x is parameter))


def _zeros(group: dict[str, Any], parameter: Tensor, key: str) -> Tensor:
    """Make a part of the state of a variable."""
    if not _is_packed(group, parameter):
        return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    method = checked_state_format(group["state_format"])
    return _wrapped(group, parameter, Packed.zeros(method, parameter.numel(), parameter.device), key)


def _encoded(group: dict[str, Any], parameter: Tensor, values: Tensor, key: str) -> CompressedTensor:
    method = checked_state_format(group["state_format"])
    moment = _Moment(_wrapped(group, parameter, Packed.zeros(method, values.numel(), values.device), key))
    flat = values.reshape(-1)
    for start in range(0, len(flat), codec.CHUNK):
        moment.write(start, flat[start : start + codec.CHUNK])
    moment.end()
    assert is_compressed(moment._held)
    return moment._held


def _wrapped(group: dict[str, Any], parameter: Tensor, packed: Packed, key: str) -> CompressedTensor:
    seed = parameter.encoding.seed if is_compressed(parameter) else 0
    encoding = Encoding(packed.method, rounding="stochastic", seed=seed)
    return CompressedTensor(packed, None, encoding, parameter.shape, f"{_name(group, parameter)} {key}")
