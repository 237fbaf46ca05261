"""Tracks which storages are alive between which operators while a model trains: the data of a memory report.

[Note: liveness]
Each storage has a size, a kind, and a first and a last operator during which it is alive. ``StorageTracker`` records
them for any run. For a plain model, ``VariableTracker`` also records which operators read or write which variable. A
compressed variable would be decoded at these operators, for as long as the operator, the function of ``torch`` around
it or its backward node runs. One run of a plain model therefore predicts what the model would hold in any format, and
under ``shapes.ShapeMode`` that run needs no values. Storages are sorted into kinds afterwards, because a storage that
turns out to be a gradient was one from the beginning.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedomc._torch import TorchDispatchMode, current_node, schema_of, sparse_parts, storage_key, tree_leaves
from fedomc.codec import CHUNK
from fedomc.codec.workspace import PANEL_BYTES
from fedomc.memory.resident import Block, peak_resident
from fedomc.methods import Encoding, Method
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.handlers import FUNCTIONS
from fedomc.tensor.ops.convolution import CONVOLUTIONS
from fedomc.training.optimizer_state import SMALLEST

_USED = ("decoded", "panel", "chunk", "added", "written")
_PACKED = ("codes", "flags")
"""Activations that are held as codes, counted as four bytes a value, or as a bit a value."""

_aten = torch.ops.aten
_IN_ONE_PASS = {_aten.add_.Tensor, _aten.sub_.Tensor}
"""In-place operators that a compressed variable executes without dense values."""

_CONVOLUTION, _CONVOLUTION_BACKWARD = _aten.convolution.default, _aten.convolution_backward.default

_BY_PANELS = {F.linear, F.embedding, *CONVOLUTIONS}
"""Functions that decode no more than a panel of a variable at a time."""


@dataclass(frozen=True)
class MemoryBytes:
    """The bytes that training holds: the maximum over time, for each kind and for all together.

    Attributes:
        parameters: the parameters, packed or dense.
        buffers: the modules' buffers, such as running statistics.
        gradients: complete gradients of variables. With steps in the backward pass these are the gradients of one
            function at a time, such as a layer or all weights of an LSTM.
        optimizer: the state of the optimizer, packed or in FP32.
        activations: what is kept for the backward pass when the forward pass ends.
        arrived: what a client was sent and keeps until it replies, because the change that goes back in an uplink is
            taken against it; see ``training.selection.arrived_bytes``.
        transients: everything short-lived: decoded weights, gradients in flight, what a checkpoint recomputes.
        peak: the maximum of the total. It is at most the sum of the others, whose maxima occur at different times.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int
    arrived: int
    transients: int
    peak: int


KINDS = tuple(kind.name for kind in fields(MemoryBytes) if kind.name != "peak")


@dataclass
class Lifetime:
    """The time during which a storage is alive, or a variable is in use.

    Attributes:
        nbytes: size of the storage.
        start: number of the operator that makes it.
        end: number of the last operator at which it is alive; None if it still is.
        kind: a field of ``MemoryBytes``; one of ``_USED``, how a variable is used, or of ``_PACKED``; or ``scratch``,
            what an operator allocates inside itself.
        variable: name of the variable, if it is one.
    """

    nbytes: int
    start: int
    end: int | None = None
    kind: str = "transients"
    variable: str = ""


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that tracks which storages are alive while a model runs.

    Args:
        model: its parameters and buffers are alive from the beginning.
        batch: the input, in any structure; it is not counted.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moment = 0
        self.lifetimes: list[Lifetime] = []
        self.variables: dict[int, str] = {}
        self.counted: dict[int, int] = {}
        self._alive: dict[int, tuple[Any, Lifetime]] = {}
        for name, parameter in model.named_parameters():
            self._register(parameter, "parameters", name)
            self.variables |= {storage_key(storage): name for storage in _storages(parameter)}
        self._register(list(model.buffers()), "buffers")
        self._register(batch, "batch")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(cls, CompressedTensor) for cls in types):
            return NotImplemented  # it comes back here with the operators on its parts
        self.moment += 1
        self._observe(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self._register(result)
        if func in (_CONVOLUTION, _CONVOLUTION_BACKWARD):
            copies = _copies_in(func, args, result)
            self.lifetimes += [Lifetime(nbytes, self.moment, self.moment, "scratch") for nbytes in copies]
        return result

    def count(self, nbytes: int) -> None:
        """Note that bytes are counted now for the trims of ``codec.heap``."""
        self.counted[self.moment] = self.counted.get(self.moment, 0) + nbytes

    def tag(self, kind: str, tensors: Any) -> None:
        """Set the kind of tensors, in any structure; tensors that were made outside of the run are ignored."""
        for storage in _storages(tensors):
            if storage_key(storage) in self._alive:
                self._alive[storage_key(storage)][1].kind = kind

    def follow(self, model: nn.Module) -> None:
        """Count the new fields of changed variables as parameters, from when the former fields were gone."""
        for name, parameter in model.named_parameters():
            for storage in _storages(parameter):
                reference, lifetime = self._alive[storage_key(storage)]
                if lifetime.kind == "parameters":
                    continue
                former = [x.end for x in self.lifetimes if (x.kind, x.variable) == ("parameters", name)]
                lifetime.kind = "transients"
                lifetime.end = max((end for end in former if end is not None), default=lifetime.start)
                held = Lifetime(lifetime.nbytes, lifetime.end + 1, None, "parameters", name)
                self.lifetimes.append(held)
                self._alive[storage_key(storage)] = (reference, held)

    def tag_alive(self, kind: str) -> None:
        """Set the kind of everything that is alive and has no kind yet."""
        for _, lifetime in self._alive.values():
            if lifetime.kind == "transients":
                lifetime.kind = kind

    def peaks(self, bytes_of: Callable[[Lifetime], int], arrived: int = 0) -> MemoryBytes:
        """Return the maximum over time of the bytes of each kind, and of their total.

        Args:
            bytes_of: gives the bytes that a lifetime counts for.
            arrived: bytes that are held all the time.
        """
        changes = np.zeros((len(KINDS), self.moment + 2), dtype=np.int64)
        for lifetime in self.lifetimes:
            kind = lifetime.kind
            kind = "transients" if kind in _USED else "activations" if kind in _PACKED else kind
            if kind in KINDS:
                row, nbytes = KINDS.index(kind), bytes_of(lifetime)
                changes[row, lifetime.start] += nbytes
                changes[row, (self.moment if lifetime.end is None else lifetime.end) + 1] -= nbytes
        held = changes.cumsum(1)  # [kinds, moments]
        held[KINDS.index("arrived")] += arrived
        peaks = dict(zip(KINDS, (int(each) for each in held.max(1)), strict=True))
        return MemoryBytes(**peaks, peak=int(held.sum(0).max()))

    def _register(self, tensors: Any, kind: str = "transients", variable: str = "") -> None:
        for storage in _storages(tensors):
            key = storage_key(storage)
            if key not in self._alive:
                lifetime = Lifetime(storage.nbytes(), self.moment, None, kind, variable)
                self.lifetimes.append(lifetime)
                self._alive[key] = (weakref.ref(storage, partial(self._end, key)), lifetime)

    def _end(self, key: int, _: Any) -> None:
        self._alive.pop(key)[1].end = self.moment

    def _observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the use of an operator's arguments."""


class VariableTracker(StorageTracker):  # type: ignore[no-untyped-call]
    """Tracks, for a plain model, also where each variable would be decoded or written if it were compressed."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__(model, batch)
        self._sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self._widths = {name: parameter.itemsize for name, parameter in model.named_parameters()}  # decoded, in bytes
        self._frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self._functions: dict[str, Any] = {}  # the last that used a variable
        self._calls = 0
        self._node: Any = None
        self._since = 0  # the first operator of the node
        self._decoded: dict[str, Lifetime] = {}  # in the node

    @contextmanager
    def call(self, func: Any, arguments: Any) -> Iterator[None]:
        """Count the variables among a function's arguments as decoded while it runs."""
        names = self._variables_in(arguments)
        self._functions |= dict.fromkeys(names, func)
        lifetimes = [Lifetime(0, self.moment + 1, None, self._decoding(name), name) for name in names]
        self.lifetimes += lifetimes
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            for lifetime in lifetimes:
                lifetime.end = self.moment

    def _observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        node = current_node()
        if node is not self._node:
            for lifetime in self._decoded.values():
                lifetime.end = self.moment - 1
            self._node, self._since, self._decoded = node, self.moment, {}
        if self._calls or func in (_aten.detach.default, _aten.alias.default):
            return
        named = dict(zip((argument.name for argument in schema_of(func).arguments), args, strict=False)) | kwargs
        writes = {a.name for a in schema_of(func).arguments if a.alias_info is not None and a.alias_info.is_write}
        for argument, value in named.items():
            for name in self._variables_in(value):
                if argument in writes:
                    kind = "added" if func in _IN_ONE_PASS else "written"
                    self.lifetimes.append(Lifetime(0, self.moment, self.moment, kind, name))
                elif node is None or node.name() == "torch::autograd::AccumulateGrad":
                    kind = "chunk" if func is _aten.add.Tensor else "decoded"  # weight decay
                    self.lifetimes.append(Lifetime(0, self.moment, self.moment, kind, name))
                elif self._functions.get(name) is F.linear:
                    if name in self._frozen:  # else it is gone before its gradient, which is as large, is made
                        self.lifetimes.append(Lifetime(0, self.moment, self.moment, "panel", name))
                elif name not in self._decoded:  # unpacked before the node runs, and held until it ends
                    self._decoded[name] = Lifetime(0, self._since, None, self._decoding(name), name)
                    self.lifetimes.append(self._decoded[name])

    def peaks_with(
        self,
        encodings: Mapping[str, Encoding],
        arrived: int = 0,
        activations: Method | None = None,
        state: Method | None = None,
    ) -> MemoryBytes:
        """Return what the model would hold with some variables compressed.

        Args:
            encodings: their encodings, by name.
            arrived: bytes that are held all the time, as for ``peaks``.
            activations: the format of the activations that were packed into tensors of the kind ``codes``.
            state: the format of the optimizer's state; None holds it as it is.
        """
        return self.peaks(self._bytes_with(encodings, activations, state), arrived)

    def resident_with(
        self,
        encodings: Mapping[str, Encoding],
        arrived: int = 0,
        activations: Method | None = None,
        state: Method | None = None,
    ) -> int:
        """Return by how many bytes the process would grow; see ``resident`` for the arguments and ``peaks_with``."""
        bytes_of = self._bytes_with(encodings, activations, state)
        kinds = (*KINDS, *_USED, *_PACKED, "released", "scratch")
        counted = dict(self.counted)
        for lifetime in self.lifetimes:
            if lifetime.kind in ("decoded", "panel") and lifetime.variable in encodings:
                decoded = self._widths[lifetime.variable] * self._sizes[lifetime.variable]
                counted[lifetime.start] = counted.get(lifetime.start, 0) + decoded
        blocks = (
            Block(bytes_of(each), each.start, self.moment if each.end is None else each.end, each.kind in _PACKED)
            for each in self.lifetimes
            if each.kind in kinds
        )
        return arrived + peak_resident(blocks, counted, self.moment)

    def _bytes_with(
        self, encodings: Mapping[str, Encoding], activations: Method | None, state: Method | None
    ) -> Callable[[Lifetime], int]:

        def bytes_of(lifetime: Lifetime) -> int:
            if lifetime.kind == "codes" and activations is not None:
                return activations.nbytes(lifetime.nbytes // 4)
            if lifetime.kind == "optimizer" and state is not None and lifetime.nbytes >= 4 * SMALLEST:
                return state.nbytes(lifetime.nbytes // 4)
            encoding = encodings.get(lifetime.variable)
            if encoding is None:
                return 0 if lifetime.kind in _USED else lifetime.nbytes
            size, width = self._sizes[lifetime.variable], self._widths[lifetime.variable]
            packed = [method.nbytes(size) for method in encoding.methods]
            if lifetime.kind == "parameters":
                return sum(packed)
            if lifetime.kind == "decoded":
                return width * size
            if lifetime.kind == "panel":
                return width * min(size, PANEL_BYTES // 4)
            if lifetime.kind == "chunk":
                return 4 * min(size, CHUNK)
            if lifetime.kind == "added":  # to codes that take the place of the present ones
                return packed[-1]
            if encoding.update_format is None:  # a chunk is made while the one before is there
                return packed[0] + 4 * min(size, 2 * CHUNK)
            # A chunk of the values, of the base and of the difference.
            chunk, following = min(size, CHUNK), min(max(size - CHUNK, 0), CHUNK)
            return 2 * packed[1] + 4 * max(3 * chunk, chunk + 3 * following)

        return bytes_of

    def _decoding(self, name: str) -> str:
        return "panel" if self._functions.get(name) in _BY_PANELS else "decoded"

    def _variables_in(self, arguments: Any) -> set[str]:
        keys = {storage_key(storage) for storage in _storages(arguments)}
        return {self.variables[key] for key in keys & self.variables.keys()}


class FunctionTracker(TorchFunctionMode):
    """A context that reports the functions that decode a compressed weight to a ``VariableTracker``."""

    def __init__(self, tracker: VariableTracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS:
            return func(*args, **kwargs)
        with self._tracker.call(func, (args, kwargs)):
            return func(*args, **kwargs)


def _copies_in(convolution: Any, args: Sequence[Any], result: Any) -> list[int]:
    """Return the bytes of each copy in oneDNN's layout at the peak of a convolution, beside its results.

    A convolution with a kernel of one value, stride 1 and one group is a matrix product and copies nothing.
    """
    if convolution is _CONVOLUTION:
        inputs, weight, _, stride, *_, groups = args
        copies = [max(inputs.nbytes, result.nbytes)]  # first the inputs are copied, then the results are copied back
    else:
        gradient, inputs, weight, _, stride, *_, groups, needed = args
        copies = [gradient.nbytes, inputs.nbytes] if needed[0] else [gradient.nbytes]
    return [] if {*weight.shape[2:], *stride, groups} == {1} else copies


def _storages(x: Any) -> list[torch.UntypedStorage]:
    """Return the storages of all tensors in a structure."""
    storages: list[torch.UntypedStorage] = []
    for leaf in tree_leaves(x):
        if is_compressed(leaf):
            storages += _storages([part.fields for part in leaf.parts])
        elif isinstance(leaf, Tensor) and leaf.layout is torch.sparse_coo:
            storages += _storages(sparse_parts(leaf))
        elif isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            storages.append(leaf.untyped_storage())
    return storages
