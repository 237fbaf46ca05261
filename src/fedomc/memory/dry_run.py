"""Dry runs: training for two steps under a tracker, with values on a copy of the model, or on shapes alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fedomc._torch import in_reentrant_checkpoint, tree_leaves, tree_map
from fedomc.activations.packing import compress_activations
from fedomc.codec import CHUNK
from fedomc.errors import OMCError
from fedomc.memory.liveness import FunctionTracker, MemoryBytes, StorageTracker, VariableTracker
from fedomc.methods import Encoding, Method
from fedomc.training.model import compress_, decompress_
from fedomc.training.optimizer_state import SMALLEST, with_packed_state
from fedomc.training.selection import arrived_bytes
from fedomc.training.stepping import step_in_backward
from fedomc.training.trial import Arguments, copied, copy_of, forward

_STEPS = 2  # the second one has the optimizer's state from its beginning

Encodings = Mapping[str, Encoding]
Change = Callable[[nn.Module], object]
"""Prepares a copy of the model, such as by enabling its checkpoints."""


@dataclass(frozen=True)
class Training:
    """How a model is trained; see ``memory_report``."""

    loss: Callable[[Any], Tensor]
    optimizer_class: Callable[..., Optimizer]
    in_backward: bool
    clip_norm: float | None
    kwargs: dict[str, Any]

    def run(
        self,
        model: nn.Module,
        batch: Arguments,
        tracker: StorageTracker,
        stepping: Callable[..., object],
        packing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Train under a tracker.

        Args:
            model: is trained.
            batch: for the forward pass.
            tracker: is told the kinds of tensors.
            stepping: what ``step_in_backward`` does.
            packing: makes the context of a forward pass.
        """
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
            with packing():
                output = forward(model, batch)
            loss = self.loss(output)
            del output
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

    def packed(self, state: Method) -> "Training":
        """Return the same training with the optimizer's state held as codes."""
        packed = partial(with_packed_state(self.optimizer_class), state_format=state)
        return Training(self.loss, packed, self.in_backward, self.clip_norm, self.kwargs)

    def on_shapes_packed(self) -> "Training":
        """Return the same training on shapes, with as many values in the optimizer's state as there would be codes."""
        with_packed_state(self.optimizer_class)  # or an error
        tensors = int(bool(self.kwargs.get("momentum"))) if self.optimizer_class is SGD else 2
        return Training(self.loss, _StateShapes, self.in_backward, self.clip_norm, {"tensors": tensors})


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Make dry runs possible in any mode of autograd, and leave the random state as it is."""
    cuda = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(cuda)), torch.inference_mode(False), torch.enable_grad():
        yield


def measured(
    model: nn.Module,
    batch: Arguments,
    training: Training,
    encodings: Encodings,
    activations: Method | None = None,
    state: Method | None = None,
) -> MemoryBytes:
    """Train a compressed copy of the model and return what it held."""
    trial = decompress_(copied(model, copy_of))
    compress_(trial, encodings)
    inputs = tree_map(copy_of, batch)
    tracker = StorageTracker(trial, inputs)
    training = training if state is None else training.packed(state)
    with tracker, nullcontext() if activations is None else compress_activations(trial, activations):
        training.run(trial, inputs, tracker, step_in_backward)
    return tracker.peaks(lambda lifetime: lifetime.nbytes, arrived_bytes(model, encodings))


def tracked(
    model: nn.Module,
    batch: Arguments,
    training: Training,
    *,
    packs_activations: bool = False,
    packs_state: bool = False,
    batch_size: int | None = None,
    change: Change | None = None,
) -> VariableTracker:
    """Train a plain copy of the model without values; what it returns tells what compressed ones would hold.

    Args:
        model: plain or compressed, also on the meta device.
        batch: for the forward pass.
        training: how it is trained.
        packs_activations: whether activations are held as codes, of any format.
        packs_state: whether the optimizer's state is.
        batch_size: the size to which the first dimension of each tensor in the batch is changed; None keeps it.
        change: is called with the copy before it is trained.

    Raises:
        OMCError: the shapes in the model depend on values; or tensors of the batch differ in their first dimension, and
            there is a ``batch_size``.
    """
    from fedomc._torch import DataDependentOutputException, DynamicOutputShapeException
    from fedomc.memory.shape_pass import ShapePass
    from fedomc.memory.shapes import ShapeMode

    shapes = ShapeMode()
    trial = copied(model, shapes.copy)
    if change is not None:
        change(trial)
    inputs = tree_map(shapes.copy, batch)
    if batch_size is not None:
        with shapes:
            inputs = resized(inputs, batch_size)
    tracker = VariableTracker(trial, inputs)
    packing = partial(ShapePass, trial, tracker) if packs_activations else nullcontext
    try:
        with shapes, tracker, FunctionTracker(tracker):
            stepping = partial(_step_shapes, tracker=tracker)
            (training.on_shapes_packed() if packs_state else training).run(trial, inputs, tracker, stepping, packing)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise OMCError(
            f"the model's shapes depend on values ({error.func}) and cannot be predicted: pass predict=False"
        ) from error
    return tracker


def resized(batch: Any, size: int) -> Any:
    """Change the first dimension of each tensor in a batch, by leaving rows out or repeating them.

    Raises:
        OMCError: the tensors differ in their first dimension, or the size is not positive.
    """
    found = {x.shape[0] if x.dim() else 0 for x in tree_leaves(batch) if isinstance(x, Tensor)}
    if len(found) != 1 or 0 in found or size < 1:
        raise OMCError(
            f"batch_size={size!r} needs a batch whose tensors all have one first dimension of at least 1, but here it "
            f"is {', '.join(map(str, sorted(found))) or 'none'}: pass a batch of the size that you want"
        )
    rows = torch.arange(size, dtype=torch.int64) % found.pop()
    return tree_map(lambda x: x[rows] if isinstance(x, Tensor) else x, batch)


def _step_shapes(
    model: nn.Module,
    optimizer_class: Callable[..., Optimizer],
    *,
    clip_norm: float | None,
    tracker: StorageTracker,
    **kwargs: Any,
) -> None:
    """Step a model without values in its backward pass; of a gradient nothing is left."""

    def complete(optimizer: Optimizer, parameter: Tensor) -> None:
        if in_reentrant_checkpoint():
            raise RuntimeError("a reentrant checkpoint cannot be stepped in backward: pass use_reentrant=False to it")
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([parameter], clip_norm)
        optimizer.step()
        parameter.grad = None
        tracker.count(4 * parameter.numel())

    for parameter in model.parameters():
        if parameter.requires_grad:
            step = partial(complete, optimizer_class([parameter], **kwargs))
            parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


class _StateShapes(Optimizer):
    """Takes the memory of an optimizer whose state is held as codes: a stretch at a time, and the state itself."""

    def __init__(self, parameters: Any, *, tensors: int) -> None:
        super().__init__(parameters, {"tensors": tensors})

    def step(self, closure: Any = None) -> Any:
        """Make the state at first, and add the gradient."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state, tensors = self.state[parameter], group["tensors"]
                    for number in range(tensors):
                        state.setdefault(number, torch.zeros(parameter.shape, dtype=torch.float32))
                    stretch = min(parameter.numel(), CHUNK if parameter.numel() >= SMALLEST else 1)
                    scratch = torch.empty(2 * tensors * stretch, dtype=torch.float32)
                    parameter.add_(parameter.grad)
                    del scratch
