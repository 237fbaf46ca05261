"""Views of a compressed tensor, which read its decoded values and write through to its codes.

[Note: views without memory]
A view of a plain parameter, such as ``p[0]``, shares the parameter's memory. A compressed parameter has no dense memory
to share, so all its views share one decoded copy. The copy is refreshed if the variable has changed by other means,
and the writes of an operator to a view are encoded immediately.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedomc._torch import tree_leaves, tree_map, without_overrides
from fedomc.methods.packed import State
from fedomc.tensor.arrays import numpy_of
from fedomc.tensor.compressed import CompressedTensor
from fedomc.tensor.schema import changes_geometry, run, written


class _DecodedCopy:
    """The decoded copy that all views of a variable share."""

    def __init__(self, owner: CompressedTensor) -> None:
        self.owner = owner
        self.values = owner.dequantize()
        self._seen = self._state()

    def refresh(self) -> None:
        """Decode again if the variable has changed since the last decoding."""
        if not self._is_current():
            self.restore()

    def restore(self) -> None:
        """Overwrite the copy with the variable's current values."""
        with torch.no_grad():
            self.values.copy_(self.owner.dequantize())
        self._seen = self._state()

    def encode(self) -> None:
        """Write the copy's values back to the variable.

        Raises:
            NonFiniteError: a value is NaN or infinite; the variable is unchanged.
        """
        self.owner.rewrite_from(self.values)

    def holds(self, x: Any) -> bool:
        """Tell whether a plain tensor shares the memory of this copy."""
        if type(x) is not Tensor or x.layout is not torch.strided:
            return False
        address = x.untyped_storage().data_ptr()
        return address != 0 and address == self.values.untyped_storage().data_ptr()

    def _state(self) -> list[State]:
        return [part.state for part in self.owner.parts]

    def _is_current(self) -> bool:
        """Tell whether no part has changed since the last decoding."""
        return all(part.state is seen for part, seen in zip(self.owner.parts, self._seen, strict=True))


_decoded_copies: "weakref.WeakValueDictionary[int, _DecodedCopy]" = weakref.WeakValueDictionary()
"""The decoded copy of each base with views, keyed by the id of the base, which the copy keeps alive."""


def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator that returns views of its first argument, a compressed tensor."""
    owner = args[0]
    decoded_copy = _decoded_copies.get(id(owner.base))
    if decoded_copy is None:
        decoded_copy = _decoded_copies[id(owner.base)] = _DecodedCopy(owner)
    decoded_copy.refresh()
    return tree_map(lambda x: _viewed(x, [decoded_copy]), func(decoded_copy.values, *args[1:], **kwargs))


def _viewed(x: Any, decoded_copies: list[_DecodedCopy]) -> Any:
    """Wrap a plain tensor that shares the memory of a decoded copy; return anything else unchanged."""
    decoded_copy = next((each for each in decoded_copies if each.holds(x)), None)
    return x if decoded_copy is None else DecodedView(x, decoded_copy)


class DecodedView(Tensor):
    """A view of a compressed tensor's decoded values; writes to it are encoded into the tensor."""

    __torch_function__ = without_overrides  # type: ignore[assignment]
    _decoded_copy: _DecodedCopy
    _plain: Tensor

    @staticmethod
    def __new__(cls, view: Tensor, decoded_copy: _DecodedCopy) -> "DecodedView":
        """Wrap a plain view of a decoded copy's values."""
        self: DecodedView = view.as_subclass(cls)
        self._decoded_copy, self._plain = decoded_copy, view
        return self

    def __init__(self, *args: Any) -> None:
        """Do nothing: ``__new__`` has already built the tensor."""

    @property
    def variable(self) -> str:
        """The name of the viewed variable."""
        return self._decoded_copy.owner.variable

    @property
    def data(self) -> Tensor:
        """The view, detached from autograd."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        raise RuntimeError(
            f"a view of {self.variable}, which is compressed, cannot become another tensor: write with copy_ instead"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Return a numpy array, read-only unless ``force`` is set because writes would not reach the codes."""
        return numpy_of(self.current().clone(), force)

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self.current().tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.current().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __format__(self, spec: str) -> str:
        return self.current().__format__(spec) if spec else str(self)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy to a plain tensor with the same values."""
        if not self.is_leaf:
            return super().__deepcopy__(memo)  # type: ignore[no-untyped-call, no-any-return]  # raises
        copy = memo[id(self)] = self.current().clone()
        return copy

    def apply_(self, function: Callable[[float], float]) -> "DecodedView":
        """Replace each value by a function of it."""
        self.copy_(self.current().clone().apply_(function))
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.current().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def current(self) -> Tensor:
        """Return the view as a plain tensor with the variable's current values."""
        self._decoded_copy.refresh()
        return self._plain

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the plain tensors, then encode its writes.

        Raises:
            NonFiniteError: the operator wrote NaN or infinity; no variable or view is changed.
            RuntimeError: the operator would change the shape or strides of a view.
        """
        kwargs = kwargs or {}
        views = {id(x._plain): x for x in tree_leaves((args, kwargs)) if isinstance(x, DecodedView)}
        targets = [x for x in written(func, args, kwargs) if isinstance(x, DecodedView)]
        if targets and changes_geometry(func):
            raise _geometry_error(targets[0], func)

        def plain(x: Any) -> Any:
            return x.current() if isinstance(x, DecodedView) else x

        try:
            result = run(func, tree_map(plain, args), tree_map(plain, kwargs), [x.variable for x in targets])
            for x in targets:
                x._check_geometry(func)
            for decoded_copy in _copies_of(targets):
                decoded_copy.encode()
        finally:  # the views show the rounded values, or the former ones after an error
            for decoded_copy in _copies_of(targets):
                decoded_copy.restore()
        decoded_copies = _copies_of(list(views.values()))
        return tree_map(lambda x: views[id(x)] if id(x) in views else _viewed(x, decoded_copies), result)

    def _check_geometry(self, func: Any) -> None:
        """Undo and report a change of the view's shape, as by an operator that resizes its ``out`` argument."""
        if self._plain.shape != self.shape:
            values = self._decoded_copy.values
            self._plain = values.as_strided(self.size(), self.stride(), self.storage_offset())
            raise _geometry_error(self, func)


def _copies_of(views: list[DecodedView]) -> list[_DecodedCopy]:
    return list({id(x._decoded_copy): x._decoded_copy for x in views}.values())


def _geometry_error(view: DecodedView, func: Any) -> RuntimeError:
    return RuntimeError(
        f"{func} would change the shape of a view of {view.variable}, which is compressed, in place: use the function "
        "that returns a new tensor (unsqueeze for unsqueeze_, inplace=False), or decompress_ the model"
    )
