"""Which storages are alive between which operators while a model trains, by kind: the data of a memory report.

[Note: liveness]
Each storage that an operator makes has a size, and a first and a last operator that knows it. ``StorageTracker``
records that for any run. ``VariableTracker`` records, for a plain model, also which operators read or write which
variable: a compressed one would be decoded there, for as long as the operator, the function of ``torch`` around it or
its backward node runs. So one run of a plain model, under ``ShapeMode`` even one without values, predicts what the
model would hold in any format. Storages are sorted into kinds afterwards: one that turns out to be a variable's
gradient was one from the beginning.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
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
from fedomc.codec.layout import CHUNK, words_of
from fedomc.codec.workspace import PANEL_BYTES
from fedomc.methods.packed import Encoding
from fedomc.tensor.compressed import FUNCTIONS, CompressedTensor, is_compressed
from fedomc.tensor.ops.convolution import CONVOLUTIONS

_USED = ("decoded", "panel", "chunk", "added", "written")

_aten = torch.ops.aten
_IN_ONE_PASS = {_aten.add_.Tensor, _aten.sub_.Tensor}
"""Operators that a compressed variable does with no dense values."""

_BY_PANELS = {F.linear, F.embedding, *CONVOLUTIONS}
"""FunctionTracker that decode no more of a variable at a time than a panel."""


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes that training holds: of each kind the most at one time.

    Attributes:
        parameters: packed or dense.
        buffers: of the modules, such as running statistics.
        gradients: of variables, complete; in backward those of one function, a layer or all weights of an LSTM.
        optimizer: state of the optimizer, in FP32.
        activations: what lives when the forward pass ends, for the backward pass.
        transients: what lives for a moment: decoded weights, gradients on their way, what a checkpoint computes again.
        peak: the most of all together. The kinds have their largest at different moments: it is at most their sum.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int
    transients: int
    peak: int


KINDS = tuple(kind.name for kind in fields(MemoryBytes) if kind.name != "peak")


@dataclass
class Lifetime:
    """A storage, or a variable while it is used.

    Attributes:
        nbytes: of the storage.
        birth: the number of the first operator that knows it.
        death: the number of the last, None while it lives.
        kind: of ``MemoryBytes``, or one of ``_USED``: what is done with a variable.
        variable: which one, for a variable.
    """

    nbytes: int
    birth: int
    death: int | None = None
    kind: str = "transients"
    variable: str = ""


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches which storages live, as a context around any run.

    Args:
        model: whose parameters and buffers are there from the beginning.
        batch: tensors, in any structure, that are not counted.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moment = 0
        self.lives: list[Lifetime] = []
        self.variables: dict[int, str] = {}
        self._alive: dict[int, tuple[Any, Lifetime]] = {}
        for name, parameter in model.named_parameters():
            self._see(parameter, "parameters", name)
            self.variables |= {storage_key(storage): name for storage in _storages(parameter)}
        self._see(list(model.buffers()), "buffers")
        self._see(batch, "batch")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(cls, CompressedTensor) for cls in types):
            return NotImplemented  # it comes back here with the operators on its parts
        self.moment += 1
        self._look(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self._see(result)
        return result

    def tag(self, kind: str, tensors: Any) -> None:
        """Say of which kind tensors are, in any structure; those that were made elsewhere are left out."""
        for storage in _storages(tensors):
            if storage_key(storage) in self._alive:
                self._alive[storage_key(storage)][1].kind = kind

    def tag_alive(self, kind: str) -> None:
        """Say of which kind everything is that lives and has no kind yet."""
        for _, life in self._alive.values():
            if life.kind == "transients":
                life.kind = kind

    def most(self, bytes_of: Callable[[Lifetime], int]) -> MemoryBytes:
        """Find the most bytes of each kind, and of all together, that live at one time.

        Args:
            bytes_of: what a life counts; ``nbytes`` is what was there.
        """
        changes = np.zeros((len(KINDS), self.moment + 2), dtype=np.int64)
        for life in self.lives:
            kind = "transients" if life.kind in _USED else life.kind
            if kind in KINDS:
                row, nbytes = KINDS.index(kind), bytes_of(life)
                changes[row, life.birth] += nbytes
                changes[row, (self.moment if life.death is None else life.death) + 1] -= nbytes
        held = changes.cumsum(1)  # [kinds, moments]
        most = dict(zip(KINDS, (int(each) for each in held.max(1)), strict=True))
        return MemoryBytes(**most, peak=int(held.sum(0).max()))

    def _see(self, tensors: Any, kind: str = "transients", variable: str = "") -> None:
        for storage in _storages(tensors):
            key = storage_key(storage)
            if key not in self._alive:
                life = Lifetime(storage.nbytes(), self.moment, None, kind, variable)
                self.lives.append(life)
                self._alive[key] = (weakref.ref(storage, partial(self._bury, key)), life)

    def _bury(self, key: int, _: Any) -> None:
        self._alive.pop(key)[1].death = self.moment

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of an operator."""


class VariableTracker(StorageTracker):  # type: ignore[no-untyped-call]
    """Watches, in a plain model, also which variables are used: where a compressed one would be decoded or written."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__(model, batch)
        self._sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self._frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self._functions: dict[str, Any] = {}  # the last that used a variable
        self._calls = 0
        self._node: Any = None
        self._since = 0  # the first operator of the node
        self._decoded: dict[str, Lifetime] = {}  # in the node

    @contextmanager
    def call(self, func: Any, arguments: Any) -> Iterator[None]:
        """Decode the variables among the arguments of a function while it runs."""
        names = self._variables_in(arguments)
        self._functions |= dict.fromkeys(names, func)
        lives = [Lifetime(0, self.moment + 1, None, self._decoding(name), name) for name in names]
        self.lives += lives
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            for life in lives:
                life.death = self.moment

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        node = current_node()
        if node is not self._node:
            for life in self._decoded.values():
                life.death = self.moment - 1
            self._node, self._since, self._decoded = node, self.moment, {}
        if self._calls or func in (_aten.detach.default, _aten.alias.default):
            return
        named = dict(zip((argument.name for argument in schema_of(func).arguments), args, strict=False)) | kwargs
        writes = {a.name for a in schema_of(func).arguments if a.alias_info is not None and a.alias_info.is_write}
        for argument, value in named.items():
            for name in self._variables_in(value):
                if argument in writes:
                    kind = "added" if func in _IN_ONE_PASS else "written"
                    self.lives.append(Lifetime(0, self.moment, self.moment, kind, name))
                elif node is None or node.name() == "torch::autograd::AccumulateGrad":
                    kind = "chunk" if func is _aten.add.Tensor else "decoded"  # weight decay
                    self.lives.append(Lifetime(0, self.moment, self.moment, kind, name))
                elif self._functions.get(name) is F.linear:
                    if name in self._frozen:  # else it is gone before its gradient, which is as large, is made
                        self.lives.append(Lifetime(0, self.moment, self.moment, "panel", name))
                elif name not in self._decoded:  # unpacked before the node runs, and held until it ends
                    self._decoded[name] = Lifetime(0, self._since, None, self._decoding(name), name)
                    self.lives.append(self._decoded[name])

    def most_in(self, encodings: Mapping[str, Encoding]) -> MemoryBytes:
        """Find the most bytes that the model would hold with these variables compressed."""

        def bytes_of(life: Lifetime) -> int:
            encoding = encodings.get(life.variable)
            if encoding is None:
                return life.nbytes if life.kind in KINDS else 0
            size = self._sizes[life.variable]
            formats = [fmt for fmt in (encoding.format, encoding.update_format) if fmt is not None]
            packed = [4 * words_of(size, fmt.bits) + 8 for fmt in formats]  # codes, factor and offset
            if life.kind == "parameters":
                return sum(packed)
            if life.kind == "decoded":
                return 4 * size
            if life.kind in ("panel", "chunk"):
                return min(4 * size, PANEL_BYTES if life.kind == "panel" else 4 * CHUNK)
            if life.kind == "added":  # to codes that take the place of the present ones
                return packed[-1]
            if encoding.update_format is None:  # a chunk is made while the one before is there
                return packed[0] + 4 * min(size, 2 * CHUNK)
            # A chunk of the values, of the base and of the difference.
            chunk, following = min(size, CHUNK), min(max(size - CHUNK, 0), CHUNK)
            return 2 * packed[1] + 4 * max(3 * chunk, chunk + 3 * following)

        return self.most(bytes_of)

    def _decoding(self, name: str) -> str:
        return "panel" if self._functions.get(name) in _BY_PANELS else "decoded"

    def _variables_in(self, arguments: Any) -> set[str]:
        keys = {storage_key(storage) for storage in _storages(arguments)}
        return {self.variables[key] for key in keys & self.variables.keys()}


class FunctionTracker(TorchFunctionMode):
    """Watches the functions that decode a compressed weight while they run."""

    def __init__(self, uses: VariableTracker) -> None:
        super().__init__()
        self._uses = uses

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS:
            return func(*args, **kwargs)
        with self._uses.call(func, (args, kwargs)):
            return func(*args, **kwargs)


def _storages(x: Any) -> list[torch.UntypedStorage]:
    """Return the storages behind a tensor, or the tensors of a structure."""
    found: list[torch.UntypedStorage] = []
    for leaf in tree_leaves(x):
        if is_compressed(leaf):
            found += _storages([[part.codes, part.affine] for part in leaf.parts])
        elif isinstance(leaf, Tensor) and leaf.layout is torch.sparse_coo:
            found += _storages(sparse_parts(leaf))
        elif isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            found.append(leaf.untyped_storage())
    return found
