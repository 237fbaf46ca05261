"""What the two filters have in common: how they read NVFlare's messages and make new ones.

[Note: nothing is mutated]
The server passes one and the same model to the filter calls of all clients, several at a time. So a filter never writes
to the DXO, its data, its meta or its Shareable: it returns new ones, which share the values that stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_copy
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from fedomc.errors import PayloadError, PolicyError
from fedomc.serialization import frame

ALGORITHM = "fedomc"
"""The value of ``MetaKey.PROCESSED_ALGORITHM`` of a compressed model, and the key of its encoding in the meta."""

SENT = "fedomc.sent"
"""The property of the server's context that keeps what was sent, to check what comes back."""

RECEIVED = "fedomc.received"
"""The property of a client's context that keeps the frames of whole variables that were decoded to dense values, by
name; ``None`` for a variable that came in another way. What the client did not change goes back as it came."""

Sent = Mapping[str, tuple[tuple[int, ...], str, str]]
"""Shape, dtype and library of each variable's array."""


class ModelFilter(DXOFilter):  # type: ignore[misc]
    """A filter of models that does not modify its input."""

    def __init__(self) -> None:
        super().__init__(None, None)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter the models in a Shareable and return them in a new one."""
        return super().process(_with_own_collections(shareable), fl_ctx)

    def is_task(self) -> bool:
        """Return whether the model goes from the server to a client; otherwise it comes back.

        Raises:
            PolicyError: the filter is in no chain of filters.
        """
        chain = self.get_prop(FilterContextKey.CHAIN_TYPE)
        if chain not in (FilterChainType.TASK_DATA_CHAIN, FilterChainType.TASK_RESULT_CHAIN):
            raise PolicyError(
                f"{type(self).__name__} is not part of a filter chain: add it with fedomc.nvflare.add_filters"
            )
        return bool(chain == FilterChainType.TASK_DATA_CHAIN)


def _with_own_collections(shareable: Shareable) -> Shareable:
    """Copy a Shareable and the collections in it, because NVFlare replaces the models of a collection in place."""
    own = make_copy(shareable)
    try:
        dxo = from_shareable(own)
    except ValueError:
        return own
    return _with_own_collection(dxo).update_shareable(own)


def _with_own_collection(dxo: DXO) -> DXO:
    if dxo.data_kind != DataKind.COLLECTION:
        return dxo
    copied = {name: _with_own_collection(x) if isinstance(x, DXO) else x for name, x in dxo.data.items()}
    return DXO(dxo.data_kind, data=copied, meta=dxo.meta)


def kind_of(dxo: DXO) -> int | None:
    """Return the kind of frames for a DXO's model; None if it holds no model."""
    kinds = {DataKind.WEIGHTS: frame.VARIABLE, DataKind.WEIGHT_DIFF: frame.UPDATE}
    return kinds.get(dxo.data_kind) if isinstance(dxo.data_kind, str) else None


def replaced(dxo: DXO, data: dict[str, Any], meta: Mapping[str, Any]) -> DXO:
    """Return a new DXO with other data and more meta, without the history of filters, which NVFlare adds again."""
    dropped = (MetaKey.FILTER_HISTORY, MetaKey.PROCESSED_ALGORITHM, ALGORITHM)
    kept = {key: value for key, value in (dxo.meta or {}).items() if key not in dropped}
    return DXO(dxo.data_kind, data=data, meta={**kept, **meta})


def name_of(context: FLContext | None) -> str:
    """Return the name of a client, or of the server, from its context.

    Raises:
        PolicyError: the context has none.
    """
    name = context.get_identity_name() if isinstance(context, FLContext) else ""
    if not name:
        raise PolicyError("the context does not name the client: add the filters with fedomc.nvflare.add_filters")
    return str(name)


def round_of(shareable: Shareable) -> int:
    """Return the number of the round; 0 in a workflow without rounds.

    Raises:
        PayloadError: the header holds something else.
    """
    round = shareable.get_header(AppConstants.CURRENT_ROUND)
    if round is None:
        return 0
    if type(round) is not int or round < 0:
        raise PayloadError(f"{AppConstants.CURRENT_ROUND}={round!r} is not the number of a round")
    return round


def dtype_of(value: Any) -> str:
    """Return the name of a value's dtype, which is the same for numpy and torch."""
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else str(np.asarray(value).dtype)


def library_of(value: Any) -> str:
    """Return the library of an array: ``torch`` or ``numpy``."""
    return "torch" if isinstance(value, Tensor) else "numpy"
