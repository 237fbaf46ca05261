"""What training a model holds in memory, by kind and by format: predicted from shapes, and measured by a dry run.

[Note: lifetimes]
Both look at the same thing: each storage that an operator makes, how many bytes it has, and between which operators it
lives. The dry run trains a copy of the model, compressed, and watches what there is. The prediction trains a model
without values, in FP32, and looks at which operators read or write which variable: there, a compressed model holds a
decoded copy for as long as the operator, the function of ``torch`` around it or its backward node runs. So one run
predicts all formats, on a machine that could hold none of them. What lives is sorted into kinds afterwards: a storage
that turns out to be a variable's gradient was one from the beginning.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fedomc.codec.layout import CHUNK, words_of
from fedomc.errors import OMCError
from fedomc.model import compress_, decompress_
from fedomc.optim import step_in_backward
from fedomc.policy import CompressionPolicy
from fedomc.tensor import FUNCTIONS, CompressedTensor, is_compressed
from fedomc.transform import Encoding

FORMATS = ("FP32", "S1E4M14", "S1E3M7", "S1E2M3+S1E2M1")
FP32, AS_IS = "FP32", "as is"

_USED = ("decoded", "added", "written")
_STEPS = 2  # the second one has the optimizer's state from its beginning

_aten = torch.ops.aten
_IN_ONE_PASS = {_aten.add_.Tensor, _aten.sub_.Tensor}
"""Operators that a compressed variable does with no dense values."""

_RUN_ON_ZEROS = {_aten._ctc_loss.default, _aten._ctc_loss.Tensor, _aten.mkldnn_rnn_layer.default}
"""Operators of which only the kernel knows what it gives for the next one: by target lengths, or a workspace."""


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes that training holds: of each kind the most at one time.

    Attributes:
        parameters: packed or dense.
        buffers: of the modules, such as running statistics.
        gradients: of variables, complete. Stepping in backward never holds those of two layers.
        optimizer: state of the optimizer, in FP32.
        activations: what lives when the forward pass ends, for the backward pass.
        transients: what lives for a moment: decoded weights, gradients on their way, what a checkpoint computes again.
        peak: the most of all together. The kinds have their largest at different moments: it is less than their sum.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int
    transients: int
    peak: int


_KINDS = tuple(kind.name for kind in fields(MemoryBytes) if kind.name != "peak")


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
            budget: bytes, for all that is counted here. Not counted are the batch, the program itself and what an
                operator allocates inside itself: leave room for those.
        """
        return [name for name, found in (self.predicted | self.measured).items() if found.peak <= budget]

    def __str__(self) -> str:
        head = f"{'MB':16}{'':10}" + "".join(f"{kind:>13}" for kind in (*_KINDS, "peak"))
        rows = [
            f"{name:16}{source:10}" + "".join(f"{getattr(found, kind) / 1e6:13.3f}" for kind in (*_KINDS, "peak"))
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
        PolicyError: a policy that fits no variable of the model.
        OMCError: the loss is no scalar; the shapes in the model depend on values; a model on meta cannot be measured.
        RuntimeError: stepping in backward inside a reentrant checkpoint.
    """
    training = _Training(loss or _own_loss, optimizer_class, in_backward, clip_norm, kwargs)
    encodings = {_label(each): _encodings(model, each) for each in formats}
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
    return str(format.encoding()) + (f"@{format.fraction:g}" if format.fraction < 1 else "")


def _encodings(model: nn.Module, format: str | CompressionPolicy) -> _Encodings:
    """Return what is compressed, by qualified name."""
    if format == FP32:
        return {}
    if format == AS_IS:
        return {name: p.encoding for name, p in model.named_parameters() if is_compressed(p)}
    if isinstance(format, str):
        base, _, update = format.partition("+")
        format = CompressionPolicy(base, update_format=update or None)
    return format.select(model)


def _own_loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    result = output if found is None else found
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise OMCError(f"a {type(output).__name__} has no scalar loss: pass loss=, which makes one of the output")
    return result


@dataclass
class _Life:
    """A storage, or a variable while it is used.

    Attributes:
        nbytes: of the storage.
        birth: the number of the first operator that knows it.
        death: the number of the last, None while it lives.
        kind: of ``MemoryBytes``, or ``decoded``, ``added`` or ``written``: what is done with a variable.
        variable: which one, for a variable.
    """

    nbytes: int
    birth: int
    death: int | None = None
    kind: str = "transients"
    variable: str = ""


class _Lives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches which storages live."""

    def __init__(self, model: nn.Module, batch: _Batch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moment = 0
        self.lives: list[_Life] = []
        self.variables: dict[int, str] = {}
        self._alive: dict[int, tuple[Any, _Life]] = {}
        for name, parameter in model.named_parameters():
            self._see(parameter, "parameters", name)
            self.variables |= {storage._cdata: name for storage in _storages(parameter)}
        self._see(list(model.buffers()), "buffers")
        self._see(batch, "batch")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(cls, CompressedTensor) for cls in types):
            return NotImplemented  # it comes back here with the operators on its parts
        self.moment += 1
        self._uses(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self._see(result)
        return result

    def tag(self, kind: str, tensors: Any) -> None:
        """Say what tensors are."""
        for storage in _storages(tensors):
            if storage._cdata in self._alive:
                self._alive[storage._cdata][1].kind = kind

    def tag_alive(self, kind: str) -> None:
        """Say what everything is that lives and is not yet said to be something."""
        for _, life in self._alive.values():
            if life.kind == "transients":
                life.kind = kind

    def most(self, bytes_of: Callable[[_Life], int]) -> MemoryBytes:
        """Find the most bytes of each kind, and of all together, that live at one time."""
        changes = np.zeros((len(_KINDS), self.moment + 2), dtype=np.int64)
        for life in self.lives:
            kind = "transients" if life.kind in _USED else life.kind
            if kind in _KINDS:
                row, nbytes = _KINDS.index(kind), bytes_of(life)
                changes[row, life.birth] += nbytes
                changes[row, (self.moment if life.death is None else life.death) + 1] -= nbytes
        held = changes.cumsum(1)  # [kinds, moments]
        most = dict(zip(_KINDS, (int(each) for each in held.max(1)), strict=True))
        return MemoryBytes(**most, peak=int(held.sum(0).max()))

    def _see(self, tensors: Any, kind: str = "transients", variable: str = "") -> None:
        for storage in _storages(tensors):
            key = storage._cdata
            if key not in self._alive:
                life = _Life(storage.nbytes(), self.moment, None, kind, variable)
                self.lives.append(life)
                self._alive[key] = (weakref.ref(storage, partial(self._bury, key)), life)

    def _bury(self, key: int, _: Any) -> None:
        self._alive.pop(key)[1].death = self.moment

    def _uses(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of an operator."""


class _Uses(_Lives):  # type: ignore[no-untyped-call]
    """Watches, in a plain model, also which variables are used: where a compressed one would be decoded or written."""

    def __init__(self, model: nn.Module, batch: _Batch) -> None:
        super().__init__(model, batch)
        self._sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self._calls = 0
        self._node: Any = None
        self._since = 0  # the first operator of the node
        self._decoded: dict[str, _Life] = {}  # in the node

    @contextmanager
    def call(self, arguments: Any) -> Iterator[None]:
        """Decode the variables among the arguments of a function while it runs."""
        lives = [_Life(0, self.moment + 1, None, "decoded", name) for name in self._variables_in(arguments)]
        self.lives += lives
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            for life in lives:
                life.death = self.moment

    def _uses(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        node = torch._C._current_autograd_node()
        if node is not self._node:
            for life in self._decoded.values():
                life.death = self.moment - 1
            self._node, self._since, self._decoded = node, self.moment, {}
        if self._calls or func in (_aten.detach.default, _aten.alias.default):
            return
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        for argument, value in named.items():
            for name in self._variables_in(value):
                if argument in writes:
                    kind = "added" if func in _IN_ONE_PASS else "written"
                    self.lives.append(_Life(0, self.moment, self.moment, kind, name))
                elif node is None or node.name() == "torch::autograd::AccumulateGrad":
                    self.lives.append(_Life(0, self.moment, self.moment, "decoded", name))
                elif name not in self._decoded:  # unpacked before the node runs, and held until it ends
                    self._decoded[name] = _Life(0, self._since, None, "decoded", name)
                    self.lives.append(self._decoded[name])

    def most_in(self, encodings: _Encodings) -> MemoryBytes:
        """Find the most bytes that a model with these encodings would hold."""

        def bytes_of(life: _Life) -> int:
            encoding = encodings.get(life.variable)
            if encoding is None:
                return life.nbytes if life.kind in _KINDS else 0
            size = self._sizes[life.variable]
            formats = [fmt for fmt in (encoding.format, encoding.update_format) if fmt is not None]
            packed = [4 * words_of(size, fmt.bits) + 8 for fmt in formats]  # codes, factor and offset
            if life.kind == "parameters":
                return sum(packed)
            if life.kind == "decoded":
                return 4 * size
            if life.kind == "added":  # in one pass, to codes that take the place of the present ones
                return packed[-1]
            if encoding.update_format is None:  # a chunk is made while the one before is there
                return packed[0] + 4 * min(size, 2 * CHUNK)
            # A chunk of the values, of the base and of the difference; and codes often twice, since an update grows.
            chunk, following = min(size, CHUNK), min(max(size - CHUNK, 0), CHUNK)
            return 2 * packed[1] + 4 * max(3 * chunk, chunk + 3 * following)

        return self.most(bytes_of)

    def _variables_in(self, arguments: Any) -> set[str]:
        keys = {storage._cdata for storage in _storages(arguments)}
        return {self.variables[key] for key in keys & self.variables.keys()}


class _Functions(TorchFunctionMode):
    """Watches the functions that decode a compressed weight while they run."""

    def __init__(self, uses: _Uses) -> None:
        super().__init__()
        self._uses = uses

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS:
            return func(*args, **kwargs)
        with self._uses.call((args, kwargs)):
            return func(*args, **kwargs)


class _Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Runs a model without values. Integers and truths have theirs: what a model decides by, tokens and masks."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor) and args[0].constant is None:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func in _RUN_ON_ZEROS:
            found = func(*tree_map(_zeros, args), **tree_map(_zeros, kwargs or {}))
            return tree_map(lambda x: self.from_tensor(x) if isinstance(x, Tensor) else x, found)
        if tensors and all(_has_values(x) for x in tensors):
            return tree_map(self._without_values, func(*args, **(kwargs or {})))
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if not tensors and isinstance(result, FakeTensor) and not _is_float(result):
            return func(*args, **(kwargs or {}))
        return result

    def copy(self, x: Any) -> Any:
        """Copy a tensor, without its values if it is of floats."""
        if not isinstance(x, Tensor):
            return x
        device = "cpu" if x.is_meta else x.device
        if not _is_float(x):
            return torch.zeros_like(x, device=device) if x.is_meta else x.clone()
        with self:
            values = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return nn.Parameter(values, x.requires_grad) if isinstance(x, nn.Parameter) else values

    def _without_values(self, x: Any) -> Any:
        return self.from_tensor(x) if isinstance(x, Tensor) and _is_float(x) else x


@dataclass(frozen=True)
class _Training:
    """How a model is trained; see ``memory_report``."""

    loss: Callable[[Any], Tensor]
    optimizer_class: Callable[..., Optimizer]
    in_backward: bool
    clip_norm: float | None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module, batch: _Batch, lives: _Lives) -> None:
        """Train while what lives is watched."""
        optimizers: list[Optimizer] = []

        def watched(parameters: list[nn.Parameter], **kwargs: Any) -> Optimizer:
            optimizer = self.optimizer_class(parameters, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: lives.tag("gradients", [p.grad for p in parameters]))
            optimizers.append(optimizer)
            return optimizer

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.in_backward:
            step_in_backward(model, watched, clip_norm=self.clip_norm, **self.kwargs)
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
            lives.tag("optimizer", [list(state.values()) for each in optimizers for state in each.state.values()])


def _measured(model: nn.Module, batch: _Batch, training: _Training, encodings: _Encodings) -> MemoryBytes:
    """Train a compressed copy of the model."""
    trial = decompress_(_copied(model, _copy))
    compress_(trial, encodings)
    inputs = tree_map(_copy, batch)
    lives = _Lives(trial, inputs)
    with lives:
        training.run(trial, inputs, lives)
    return lives.most(lambda life: life.nbytes)


def _predicted(
    model: nn.Module, batch: _Batch, training: _Training, formats: Mapping[str, _Encodings]
) -> dict[str, MemoryBytes]:
    """Train a plain copy of the model that has no values, and see what compressed ones would hold."""
    shapes = _Shapes()
    trial = _copied(model, shapes.copy)
    inputs = tree_map(shapes.copy, batch)
    lives = _Uses(trial, inputs)
    try:
        with shapes, lives, _Functions(lives):
            training.run(trial, inputs, lives)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise OMCError(
            f"the model's shapes depend on values ({error.func}) and cannot be predicted: pass predict=False"
        ) from error
    return {name: lives.most_in(encodings) for name, encodings in formats.items()}


def _copied(model: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a model without its gradients and hooks of variables; each of its tensors as a function copies it."""
    memo = {id(x): copied(x) for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _copy(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    values = x.detach().clone()
    return nn.Parameter(values, x.requires_grad) if isinstance(x, nn.Parameter) else values


def _storages(x: Any) -> list[torch.UntypedStorage]:
    """Return the storages behind a tensor, or the tensors of a structure."""
    found: list[torch.UntypedStorage] = []
    for leaf in tree_leaves(x):
        if is_compressed(leaf):
            found += _storages([[part.codes, part.affine] for part in leaf.parts])
        elif isinstance(leaf, Tensor) and leaf.layout is torch.sparse_coo:
            found += _storages([leaf._indices(), leaf._values()])
        elif isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            found.append(leaf.untyped_storage())
    return found


def _zeros(x: Any) -> Any:
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, FakeTensor) else x


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _has_values(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) and not _is_float(x)
