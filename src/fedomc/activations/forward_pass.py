"""``ForwardPass``: one forward pass of a model, during which what autograd saves is packed.

[Note: who saves]
A hook of saved tensors is told the tensor and not the operation that saves it. A mode for torch functions therefore
notes which function runs. Both are in effect during the forward pass alone: a loss that is computed after it saves
exact tensors. Inside a checkpointed region the checkpoint's own hooks are innermost, and nothing there is packed; the
inputs of the region, which the checkpoint saves, are.

[Note: packed once]
The key of a packed tensor is the address of the header of its storage, its version, and the place of its values. An
address is no identity, as the next storage may be given it. A weak reference keeps the header, not the memory, so that
its address is not given away before the pass ends.
"""

from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedomc._torch import (
    StorageWeakRef,
    in_checkpoint,
    is_plain,
    running_modules,
    saved_by_checkpoint,
    saved_tensors_hooks,
    storage_key,
)
from fedomc.activations.attention import attention
from fedomc.activations.kept import Coded, Flags, Kept, Span
from fedomc.activations.operations import CHECKPOINT, SMALLEST, Keeping, Operation, operation_of
from fedomc.activations.slabs import Slabs
from fedomc.codec import INFINITY_BITS, absmax_bits
from fedomc.codec.heap import heap
from fedomc.errors import NonFiniteError
from fedomc.methods import Method, Packed, encode

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GAIN = 0.75  # codes that take more than this part of the tensor's bytes are not worth their time


class ForwardPass(TorchFunctionMode):
    """A context in which tensors that autograd saves are packed.

    Args:
        model: whose forward pass this is; its parameters and buffers are not packed.
        method: the compression method.
        rounding: ``nearest`` or ``stochastic``.
        seed: the seed of stochastic rounding.
        count: how many tensors were packed before, from which their seeds follow.

    Attributes:
        count: how many tensors were packed so far.
        saved_bytes: the bytes of the packed tensors.
        held_bytes: the bytes of what is held in their place.
    """

    def __init__(self, model: torch.nn.Module, method: Method, rounding: str, seed: int, count: int) -> None:
        super().__init__()
        self.count, self.saved_bytes, self.held_bytes = count, 0, 0
        self._model, self._method, self._rounding, self._seed = model, method, rounding, seed
        self._operation: Operation | None = None
        # Plain tensors alone: others may have no storage.
        lasting = [x for x in (*model.parameters(), *model.buffers()) if is_plain(x.data) and not x.is_sparse]
        self._lasting = {storage_key(x.untyped_storage()) for x in lasting}
        self._packed: dict[tuple[Any, ...], ref[Packed]] = {}
        self._places: set[tuple[Any, ...]] = set()
        self._exact: set[tuple[int, int]] = set()
        self._storages: dict[int, StorageWeakRef] = {}
        self._slabs = Slabs()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _load)

    def __enter__(self) -> "ForwardPass":
        self._hooks.__enter__()  # first, as it fails inside the transforms of torch.func
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(*error)
        self._packed.clear()
        self._places.clear()
        self._exact.clear()
        self._storages.clear()

    @property
    def is_innermost(self) -> bool:
        """Whether no other hooks of saved tensors were set since the pass began."""
        hooks = saved_tensors_hooks()
        return hooks is not None and hooks[0] == self._pack

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function and note that it runs."""
        kwargs = kwargs or {}
        before, self._operation = self._operation, operation_of(func, args, kwargs)
        try:
            # A checkpoint computes its region again outside of this pass, and must find the same tensors saved.
            replaced = func is F.scaled_dot_product_attention and not in_checkpoint()
            return (attention if replaced else func)(*args, **kwargs)
        finally:
            self._operation = before

    def _pack(self, saved: Tensor) -> Kept:
        operation = self._operation
        if operation is None and saved_by_checkpoint():
            operation = CHECKPOINT
        by = "an operation" if operation is None else operation.name
        if not is_plain(saved) or saved.layout is not torch.strided or saved.dtype not in _DTYPES:
            return Kept(saved, by)
        storage = saved.untyped_storage()
        key, version = storage_key(storage), saved._version
        if saved.numel() < SMALLEST or key in self._lasting:
            return Kept(saved, by)
        self._storages.setdefault(key, StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        keeping = Keeping.EXACT if operation is None else operation.keeping(saved)
        saved_bytes = min(saved.nbytes, storage.nbytes())
        is_smaller = self._method.nbytes(saved.numel()) <= _GAIN * saved_bytes
        if is_smaller and keeping is not Keeping.EXACT and (key, version) not in self._exact:
            kept = self._shrunk(saved, by, keeping, (key, version), saved_bytes)
            if kept is not None:
                return kept
        self._exact.add((key, version))
        return Kept(saved, by)

    def _shrunk(
        self, saved: Tensor, by: str, keeping: Keeping, identity: tuple[int, int], saved_bytes: int
    ) -> Kept | None:
        """Pack a tensor; None for a mask that is none."""
        with torch.no_grad():
            span = Span.of(saved.detach())
            place = (*identity, *span.place)
            packed = self._packed[place]() if keeping is Keeping.CODES and place in self._packed else None
            if packed is not None:
                return Coded(saved, by, span, packed)
            if keeping is Keeping.SIGNS:
                self._check_finite(span.values, by)
            flags = (Flags.of_signs if keeping is Keeping.SIGNS else Flags.of_mask)(saved, by, span)
            if flags is not None:
                flags.bits = self._slabs.empty(len(flags.bits), torch.uint8, saved.device).copy_(flags.bits)
                self._note(place, saved_bytes, flags.bits.nbytes)
                return flags
            if keeping is Keeping.MASK:
                return None
            packed = self._encode(span.values, by)
            self._packed[place] = ref(packed)
            self._note(place, saved_bytes, packed.nbytes)
            return Coded(saved, by, span, packed)

    def _encode(self, values: Tensor, by: str) -> Packed:
        self.count += 1
        try:
            name = f"activation {self.count}"
            return encode(
                values, self._method, rounding=self._rounding, seed=self._seed, name=name, room=self._slabs.empty
            )
        except NonFiniteError:
            raise self._not_finite(by) from None

    def _check_finite(self, values: Tensor, by: str) -> None:
        if absmax_bits(values) >= INFINITY_BITS:
            raise self._not_finite(by)

    def _not_finite(self, by: str) -> NonFiniteError:
        return NonFiniteError(
            f"{_running_module(self._model)} has an activation, saved by {by}, with a value that is NaN or infinite: "
            "look for a diverging loss, lower the learning rate, or call remove() on what compress_activations "
            "returned to see what follows from it"
        )

    def _note(self, place: tuple[Any, ...], saved_bytes: int, held_bytes: int) -> None:
        """Count what is held, and the bytes of each tensor that was saved once."""
        self.saved_bytes += 0 if place in self._places else saved_bytes
        self.held_bytes += held_bytes
        heap.count(saved_bytes)
        self._places.add(place)


def _load(kept: Kept) -> Tensor:
    return kept.load()


def _running_module(model: torch.nn.Module) -> str:
    """Name the innermost module of a model that runs, as found in the stack of calls."""
    names = {id(module): name for name, module in model.named_modules()}
    inner = next((module for module in running_modules() if id(module) in names), model)
    return names[id(inner)] or type(model).__name__
