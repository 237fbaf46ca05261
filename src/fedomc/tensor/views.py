"""Views of a compressed tensor, which show its values and write through to its codes.

[Note: views of something that is not there]
A view of a plain parameter, such as ``p[0]``, is a window on the parameter's memory. A compressed one has no such
memory, so all its views are windows on one decoded copy. The copy is decoded again when the variable was changed in
another way, and what an operator writes into a view is encoded at once.
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
    """The decoded copy that all views of a variable look at."""

    def __init__(self, owner: CompressedTensor) -> None:
        self.owner = owner
        self.values = owner.dequantize()
        self._seen = self._state()

    def refresh(self) -> None:
        """Decode again if the variable was changed in another way."""
        if not self._is_current():
            self.restore()

    def restore(self) -> None:
        """Decode again."""
        with torch.no_grad():
            self.values.copy_(self.owner.dequantize())
        self._seen = self._state()

    def encode(self) -> None:
        """Encode the values.

        Raises:
            NonFiniteError: a value is NaN or infinite; the variable was not changed.
        """
        self.owner.rewrite_from(self.values)

    def holds(self, x: Any) -> bool:
        """Tell whether a plain tensor lies in the memory of this copy."""
        if type(x) is not Tensor or x.layout is not torch.strided:
            return False
        address = x.untyped_storage().data_ptr()
        return address != 0 and address == self.values.untyped_storage().data_ptr()

    def _state(self) -> list[State]:
        return [part.state for part in self.owner.parts]

    def _is_current(self) -> bool:
        """Tell whether no part was changed."""
        return all(part.state is seen for part, seen in zip(self.owner.parts, self._seen, strict=True))


_decoded_copies: "weakref.WeakValueDictionary[int, _DecodedCopy]" = weakref.WeakValueDictionary()
"""The decoded copy of each base that has views, by the id of the base, which the copy keeps alive."""


def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator that returns views of a compressed tensor, its first argument."""
    owner = args[0]
    decoded_copy = _decoded_copies.get(id(owner.base))
    if decoded_copy is None:
        decoded_copy = _decoded_copies[id(owner.base)] = _DecodedCopy(owner)
    decoded_copy.refresh()
    return tree_map(lambda x: _viewed(x, [decoded_copy]), func(decoded_copy.values, *args[1:], **kwargs))


def _viewed(x: Any, decoded_copies: list[_DecodedCopy]) -> Any:
    """Wrap a plain tensor that lies in the memory of a decoded copy; return everything else as it is."""
    decoded_copy = next((each for each in decoded_copies if each.holds(x)), None)
    return x if decoded_copy is None else DecodedView(x, decoded_copy)


class DecodedView(Tensor):
    """A view of a compressed tensor's decoded values; what is written into it is encoded again."""

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
        """Do nothing: ``__new__`` made the tensor."""

    @property
    def variable(self) -> str:
        """The name of the variable that this is a view of."""
        return self._decoded_copy.owner.variable

    @property
    def data(self) -> Tensor:
        """The view outside of autograd."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        raise RuntimeError(
            f"a view of {self.variable}, which is compressed, cannot become another tensor: write with copy_ instead"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Return a numpy array, which is read-only (what is written to it would be lost) unless with ``force``."""
        return numpy_of(self.current().clone(), force)

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self.current().tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.current().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __format__(self, spec: str) -> str:
        return self.current().__format__(spec) if spec else str(self)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy to a plain tensor of the same values."""
        if not self.is_leaf:
            return super().__deepcopy__(memo)  # type: ignore[no-untyped-call, no-any-return]  # which says why not
        copy = memo[id(self)] = self.current().clone()
        return copy

    def apply_(self, function: Callable[[float], float]) -> "DecodedView":
        """Replace each value by a function of it."""
        self.copy_(self.current().clone().apply_(function))
        return self

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
        """Run an operator on the plain tensors, then encode what it wrote.

        Raises:
            NonFiniteError: it wrote a NaN or an infinity; no variable and no view was changed.
            RuntimeError: it would change the geometry of a view.
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
        finally:  # show what the codes made of it, or that nothing was changed
            for decoded_copy in _copies_of(targets):
                decoded_copy.restore()
        decoded_copies = _copies_of(list(views.values()))
        return tree_map(lambda x: views[id(x)] if id(x) in views else _viewed(x, decoded_copies), result)

    def _check_geometry(self, func: Any) -> None:
        """Refuse that an operator gave the view another shape, as those with an ``out`` of a wrong shape do."""
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
