"""Every other operation: on decoded copies, whose changes are encoded again; their views write through.

[Note: views of something that is not there]
``p[0]`` of a plain parameter is a window on its memory; a compressed one has no such memory. Its views are windows on
one decoded copy, shared by all views of the variable and decoded again when the variable was changed by another way.
What an operation writes into a view is encoded at once.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedomc.tensor.compressed import FALLBACK, METHODS, CompressedTensor, is_compressed


class _DecodedCopy:
    """The decoded copy that the views of a variable look at."""

    def __init__(self, owner: CompressedTensor) -> None:
        self.owner = owner
        self.values = owner.dequantize()
        self.seen = self._look()

    def refresh(self) -> None:
        """Decode again if the variable was changed by another way."""
        if not self._is_current():
            with torch.no_grad():
                self.values.copy_(self.owner.dequantize())
            self.seen = self._look()

    def encode(self) -> None:
        """Encode what was written, then show what the codes made of it."""
        self.owner.rewrite_from(self.values)
        self.refresh()

    def _look(self) -> list[tuple[int, "weakref.ref[Tensor]"]]:
        return [(part.rewrites, weakref.ref(part.codes)) for part in self.owner.parts]

    def _is_current(self) -> bool:
        """Tell whether no part was rewritten, nor got the codes and the count of another variable."""
        looks = zip(self.owner.parts, self.seen, strict=True)
        return all(part.rewrites == rewrites and part.codes is codes() for part, (rewrites, codes) in looks)


_decoded_copies: "weakref.WeakValueDictionary[int, _DecodedCopy]" = weakref.WeakValueDictionary()
"""The decoded_copy of each base that has views, by its id."""


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on decoded copies; encode again what it wrote."""
    if _returns_view(func) and is_compressed(args[0]):
        return _view(func, args, kwargs)
    decoded: dict[int, tuple[CompressedTensor, Tensor]] = {}

    def dense(x: Any) -> Any:
        return decoded.setdefault(id(x), (x, x.dequantize()))[1] if is_compressed(x) else x

    result = func(*tree_map(dense, args), **tree_map(dense, kwargs))
    written: dict[int, CompressedTensor] = {}
    for x in _written(func, args, kwargs):
        if is_compressed(x):
            values = decoded[id(x)][1]
            x.rewrite_from(values)
            written[id(values)] = x
    if func._schema.name.startswith(("aten::_foreach", "aten::_fused")):
        # The variables in lists have to tell autograd themselves that they were changed.
        torch.autograd.graph.increment_version(written.values())
    return tree_map(lambda x: written.get(id(x), x), result)


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owner = args[0]
    decoded_copy = _decoded_copies.get(id(owner.base))
    if decoded_copy is None:
        decoded_copy = _decoded_copies[id(owner.base)] = _DecodedCopy(
            owner
        )  # which keeps the base, and so its id, alive
    decoded_copy.refresh()
    return tree_map(lambda x: _viewed(x, decoded_copy), func(decoded_copy.values, *args[1:], **kwargs))


def _viewed(x: Any, decoded_copy: _DecodedCopy) -> Any:
    return DecodedView(x, decoded_copy) if type(x) is Tensor else x


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what an operator writes to, by its schema."""
    arguments = func._schema.arguments
    named = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    mutable = (a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return [x for name in mutable for x in tree_leaves(named.get(name))]


def _returns_view(func: Any) -> bool:
    return any(output.alias_info is not None and not output.alias_info.is_write for output in func._schema.returns)


class DecodedView(Tensor):
    """A view of a compressed tensor's decoded values; what is written into it is encoded again."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _decoded_copy: _DecodedCopy
    _plain: Tensor

    @staticmethod
    def __new__(cls, view: Tensor, decoded_copy: _DecodedCopy) -> "DecodedView":
        """Wrap a view of a decoded_copy's values."""
        self: DecodedView = view.as_subclass(cls)
        self._decoded_copy, self._plain = decoded_copy, view
        return self

    def __init__(self, *args: Any) -> None:
        """Do nothing: ``__new__`` made the tensor."""

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as a numpy array."""
        return self.current().numpy(force=force)

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self.current().tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.current().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.current().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def current(self) -> Tensor:
        """Return the view as a plain tensor that shows the variable's present values."""
        self._decoded_copy.refresh()
        return self._plain

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the plain tensor, then encode what it wrote."""
        kwargs = kwargs or {}
        views = {id(x._plain): x for x in tree_leaves((args, kwargs)) if isinstance(x, DecodedView)}

        def plain(x: Any) -> Any:
            return x.current() if isinstance(x, DecodedView) else x

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        for x in _written(func, args, kwargs):
            if isinstance(x, DecodedView):
                x._decoded_copy.encode()
        if _returns_view(func):
            decoded_copy = next(iter(views.values()))._decoded_copy
            return tree_map(lambda x: _viewed(x, decoded_copy), result)
        return tree_map(lambda x: views.get(id(x), x), result)


def _set_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take new values of the same shape through ``p.data = values``."""
    target, values = args
    if not is_compressed(target):
        func(target, values.dequantize() if is_compressed(values) else values)
        return
    if values.dtype != torch.float32 or values.shape != target.shape or values.device != target.device:
        raise RuntimeError(
            f"{target.variable} is compressed and cannot become {values.dtype} {tuple(values.shape)} "
            f"on {values.device}: decompress_ the model first"
        )
    with torch.no_grad():
        target.copy_(values)


def _share_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move the codes to memory that processes share."""
    for part in args[0].parts:
        part.codes.share_memory_()
        part.affine.share_memory_()
    return args[0]


FALLBACK.append(_on_dense)
METHODS[Tensor.data.__set__] = _set_data  # type: ignore[attr-defined]
METHODS[Tensor.share_memory_] = _share_memory
