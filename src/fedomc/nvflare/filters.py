"""NVFlare: a pair of filters, so that the models of a federated job travel compressed.

    server out   CompressFilter(policy)      each client's own payload
    client in    DecompressFilter()          float32, or CompressedTensors
    client out   CompressFilter(policy)      weights, or differences of weights
    server in    DecompressFilter()          float32, checked against what was sent

[Note: nothing is mutated]
The server hands one and the same model to every client's call of a filter, several at a time. So a filter never
writes to the DXO, its data, its meta or its Shareable: it returns new ones, which share the values that stay as they
are. What the clients do have in common, a variable's frame, is encoded once and kept until the next round.
"""

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_copy
from nvflare.app_common.app_constant import AppConstants
from nvflare.recipe.spec import Recipe
from torch import Tensor

from fedomc.errors import PayloadError, PolicyError
from fedomc.methods.packed import Encoding, encode
from fedomc.serialization import frame
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.training.module_state import is_finite, some
from fedomc.training.policy import CompressionPolicy

ALGORITHM = "fedomc"
"""What ``MetaKey.PROCESSED_ALGORITHM`` says of a compressed model; its encoding is in the meta under this name too."""

_SENT = "fedomc.sent"
"""The property of the server's context that keeps what was sent, for the check of what comes back."""

_LIBRARIES = ("numpy", "torch")

_Sent = Mapping[str, tuple[tuple[int, ...], str, str]]
"""Of each variable: shape, dtype and library of the array."""


def add_filters(
    recipe: Recipe, policy: CompressionPolicy, *, compressed: bool = False, tasks: Sequence[str] = ("train",)
) -> None:
    """Add all four filters to a job's recipe.

    Args:
        recipe: of a PyTorch job; its sites need fedomc installed, and ``fedomc.`` in their ``class_allow_list`` for a
            job without code of its own.
        policy: how to compress.
        compressed: whether clients get ``CompressedTensor`` instead of float32; see ``DecompressFilter``.
        tasks: names of the tasks that carry models.

    Raises:
        PolicyError: ``*`` as a task, which NVFlare 2.9 writes into the job but matches with no task.
    """
    if isinstance(tasks, str) or "*" in tasks:
        raise PolicyError(f"tasks={tasks!r} would filter nothing: list the names, such as ['train', 'validate']")
    recipe.add_server_output_filter(CompressFilter(policy), list(tasks))
    recipe.add_client_input_filter(DecompressFilter(compressed), list(tasks))
    recipe.add_client_output_filter(CompressFilter(policy), list(tasks))
    recipe.add_server_input_filter(DecompressFilter(), list(tasks))
    # Otherwise the job carries copies of fedomc's Python files, which hide the installed ones and their kernels.
    config = recipe._job.job
    config.set_app_packages([*config.app_packages, "fedomc"])


class _ModelFilter(DXOFilter):  # type: ignore[misc]
    """A filter of models that leaves what it is given as it was."""

    def __init__(self) -> None:
        super().__init__(None, None)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter the models in a Shareable and return them in a new one."""
        return super().process(_with_own_collections(shareable), fl_ctx)

    def _is_task(self) -> bool:
        """Tell whether the model goes from the server to a client, or back."""
        chain = self.get_prop(FilterContextKey.CHAIN_TYPE)
        if chain not in (FilterChainType.TASK_DATA_CHAIN, FilterChainType.TASK_RESULT_CHAIN):
            raise PolicyError(
                f"{type(self).__name__} is in no chain of filters: add it with fedomc.nvflare.add_filters"
            )
        return bool(chain == FilterChainType.TASK_DATA_CHAIN)


class CompressFilter(_ModelFilter):
    """Compress the models that the server sends to clients, or that a client sends back.

    Which variables stay FP32 is drawn from the policy's seed, the round and the client's name, alike on both sides.
    Weights are encoded in the policy's format, differences of weights in its ``update_format`` if it has one. Variables
    that are not float32 stay as they are. On a client, a ``CompressedTensor`` travels as the codes it has: in one part
    among weights, in two parts, of which only the update is sent, among differences.

    Attributes:
        policy: how to compress.
    """

    def __init__(self, policy: CompressionPolicy) -> None:
        super().__init__()
        self.policy = policy
        self._lock = threading.Lock()
        self._round = -1
        self._frames: dict[str, tuple[weakref.ref[Any], int, bytes]] = {}

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return a compressed model; what is no model stays as it is.

        Raises:
            PolicyError: the policy fits no variable; the model went through another filter that encodes; a
                ``CompressedTensor`` is in one part where two are needed, or the other way round.
            NonFiniteError: a variable to compress has a NaN or an infinity.
        """
        if (kind := _kind_of(dxo)) is None:
            return None
        if (other := dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)) is not None:
            raise PolicyError(f"the model is encoded already, by {other!r}: use one of the two filters")
        to_client = self._is_task()
        client = _name_of(fl_ctx.get_peer_context() if to_client else fl_ctx)
        round = _round_of(shareable)
        shapes = {name: tuple(value.shape) for name, value in dxo.data.items() if _is_float32(value)}
        selection = self.policy.select(shapes, round=round, client=client)
        data, count = dict(dxo.data), 0
        for name, value in dxo.data.items():
            if is_compressed(value):
                data[name] = _own_codes(name, value, kind)
            elif name in selection and to_client:
                data[name] = self._shared_frame(name, value, kind, round)
            elif name in selection:
                data[name] = _to_frame(name, value, kind, selection[name])
            else:
                continue
            count += 1
        if to_client:
            sent = {name: (tuple(np.shape(value)), _dtype(value), _library(value)) for name, value in dxo.data.items()}
            with self._lock:  # a job may have several models, or a message a collection of them
                fl_ctx.set_prop(_SENT, {**fl_ctx.get_prop(_SENT, {}), **sent}, private=True, sticky=True)
        before, after = (sum(map(_nbytes, values.values())) for values in (dxo.data, data))
        left = [name for name in self.policy.compressible(shapes) if name not in selection]
        self.log_info(
            fl_ctx,
            f"round {round}, {'to' if to_client else 'from'} {client}: {count} of {len(data)} variables compressed, "
            f"{before} -> {after} bytes; drawn to stay FP32: {some(left)}",
        )
        library = "torch" if any(isinstance(value, Tensor) for value in dxo.data.values()) else "numpy"
        encoding = frame.encoding_fields(self.policy.encoding(round=round, client=client))
        meta = {MetaKey.PROCESSED_ALGORITHM: ALGORITHM, ALGORITHM: {"library": library, **encoding}}
        return _replaced(dxo, data, meta)

    def _shared_frame(self, name: str, value: Any, kind: int, round: int) -> bytes:
        """Encode a variable, unless that was done for another client of this round."""
        with self._lock:
            if round != self._round:
                self._round, self._frames = round, {}
            source, source_kind, data = self._frames.get(name, (lambda: None, kind, b""))
            if source() is not value or source_kind != kind:
                data = _to_frame(name, value, kind, self.policy.encoding(self.policy.format_of(name), round=round))
                self._frames[name] = (weakref.ref(value), kind, data)
            return data


class DecompressFilter(_ModelFilter):
    """Decompress the models that a client receives, or that come back to the server.

    Everything is checked: frames, names, shapes, dtypes, and that every value is finite. What a filter refuses is to
    NVFlare an error of that client like any other: its FedAvg goes on while enough others can answer and otherwise ends
    the job (``ignore_result_error``). The log names the client and the variable.

    Attributes:
        compressed: whether variables of weights that come to a client stay packed, as ``CompressedTensor``; for a job
            with ``server_expected_format=ExchangeFormat.PYTORCH`` whose script runs in the client's process.
    """

    def __init__(self, compressed: bool = False) -> None:
        super().__init__()
        self.compressed = compressed

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return the model decoded, in arrays of the library that it was compressed from.

        Raises:
            PayloadError: it is damaged, not finite, or not of the model that was sent.
            PolicyError: it is to stay compressed, but the job exchanges numpy arrays.
        """
        to_client = self._is_task()
        sent = None if to_client else fl_ctx.get_prop(_SENT)
        if _kind_of(dxo) is None and (sent is None or dxo.data_kind == DataKind.METRICS):
            return None
        try:
            return self._decoded(dxo, sent, self.compressed and to_client and dxo.data_kind == DataKind.WEIGHTS)
        except PayloadError as error:
            raise PayloadError(f"{_name_of(fl_ctx.get_peer_context())} sent {error}") from error

    def _decoded(self, dxo: DXO, sent: _Sent | None, keep: bool) -> DXO:
        if (kind := _kind_of(dxo)) is None:  # NVFlare would take it for weights
            raise PayloadError(f"{dxo.data_kind!r}, where weights, differences or metrics are expected")
        library, encoding = _read_meta(dxo.meta)
        if keep and encoding is not None and library != "torch":
            raise PolicyError(
                "compressed=True needs a job that exchanges tensors: server_expected_format=ExchangeFormat.PYTORCH"
            )
        data: dict[str, Any] = {}
        for name, value in dxo.data.items():
            if not isinstance(name, str) or (sent is not None and name not in sent):
                raise PayloadError(f"{name!r}, which is not a variable of the model that was sent")
            shape, dtype, wanted = (None, None, None) if sent is None else sent[name]
            if not isinstance(value, bytes | bytearray | memoryview):
                data[name] = _checked(name, value, shape, dtype, wanted)
                continue
            if encoding is None:
                raise PayloadError(f"{name} as bytes, but nothing in the meta says how to decode them")
            # A base is never rewritten and may lie in the message; a variable in one part needs memory of its own.
            parsed = frame.from_bytes(value, name, copy=keep and encoding.update_format is None, shape=shape)
            if dtype not in (None, "float32"):
                raise PayloadError(f"{name} compressed, but {dtype} was sent")
            if parsed.kind != kind:
                raise PayloadError(f"{name} as a frame of kind {parsed.kind}, but {dxo.data_kind} have kind {kind}")
            if keep:
                data[name] = CompressedTensor.from_packed(parsed.packed, encoding, parsed.shape, name)
            else:
                values = parsed.packed.decode(torch.empty(parsed.packed.numel, dtype=torch.float32)).view(parsed.shape)
                data[name] = values.numpy() if (wanted or library) == "numpy" else values
        return _replaced(dxo, data, {})


def _with_own_collections(shareable: Shareable) -> Shareable:
    """Copy a Shareable, and the collections in it, in which NVFlare would replace the models in place."""
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


def _kind_of(dxo: DXO) -> int | None:
    """Return the kind of the frames in a DXO; None if it is no model."""
    kinds = {DataKind.WEIGHTS: frame.VARIABLE, DataKind.WEIGHT_DIFF: frame.UPDATE}
    return kinds.get(dxo.data_kind) if isinstance(dxo.data_kind, str) else None


def _replaced(dxo: DXO, data: dict[str, Any], meta: Mapping[str, Any]) -> DXO:
    """Return a new DXO; its history of filters, which NVFlare copies and extends, begins anew."""
    dropped = (MetaKey.FILTER_HISTORY, MetaKey.PROCESSED_ALGORITHM, ALGORITHM)
    kept = {key: value for key, value in (dxo.meta or {}).items() if key not in dropped}
    return DXO(dxo.data_kind, data=data, meta={**kept, **meta})


def _name_of(context: FLContext | None) -> str:
    name = context.get_identity_name() if isinstance(context, FLContext) else ""
    if not name:
        raise PolicyError("the context does not name the client: add the filters with fedomc.nvflare.add_filters")
    return str(name)


def _round_of(shareable: Shareable) -> int:
    """Return the number of the round; 0 in a workflow without rounds."""
    round = shareable.get_header(AppConstants.CURRENT_ROUND)
    if round is None:
        return 0
    if type(round) is not int or round < 0:
        raise PayloadError(f"{AppConstants.CURRENT_ROUND}={round!r} is not the number of a round")
    return round


def _dtype(value: Any) -> str:
    """Name a value's dtype, alike for numpy and torch."""
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else str(np.asarray(value).dtype)


def _library(value: Any) -> str:
    return "torch" if isinstance(value, Tensor) else "numpy"


def _is_float32(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor) and _dtype(value) == "float32"


def _nbytes(value: Any) -> int:
    return len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 0))


def _to_frame(name: str, value: Any, kind: int, how: Encoding) -> bytes:
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value).reshape(value.shape)
        value = torch.from_numpy(value if value.flags.writeable else value.copy())
    format, rounding = how.format, how.base_rounding
    if kind == frame.UPDATE:
        format, rounding = how.update_format or how.format, how.rounding
    packed = encode(value.cpu(), format, how.transform, rounding, how.seed, name)
    return frame.to_bytes(packed, tuple(value.shape), kind, name)


def _own_codes(name: str, value: CompressedTensor, kind: int) -> bytes:
    if kind == frame.VARIABLE and value.update is not None:
        raise PolicyError(
            f"{name} is in two parts, of which the update travels, but the model is sent as weights: send it as "
            "differences (ParamsType.DIFF), or use a policy without update_format"
        )
    if kind == frame.UPDATE and value.update is None:
        raise PolicyError(
            f"{name} is in one part and has no update to send among differences: send weights (ParamsType.FULL), "
            "or use a policy with update_format"
        )
    return frame.to_bytes(value.parts[-1], tuple(value.shape), kind, name)


def _read_meta(meta: Mapping[str, Any] | None) -> tuple[str, Encoding | None]:
    """Read the library of the arrays and the encoding; no encoding where nothing was compressed."""
    meta = meta or {}
    algorithm = meta.get(MetaKey.PROCESSED_ALGORITHM)
    if algorithm is None:
        return "numpy", None
    fields = meta.get(ALGORITHM)
    if algorithm != ALGORITHM or not isinstance(fields, Mapping):
        raise PayloadError(f"a model encoded by {algorithm!r}, {ALGORITHM!r} expected")
    if fields.get("library") not in _LIBRARIES:
        raise PayloadError(f"arrays of {fields.get('library')!r}, one of {', '.join(_LIBRARIES)} expected")
    return fields["library"], frame.read_encoding(fields)


def _checked(name: str, value: Any, shape: Sequence[int] | None, dtype: str | None, library: str | None) -> Any:
    """Check a variable that travelled as it is."""
    if not isinstance(value, np.ndarray | np.generic | Tensor) or is_compressed(value):
        raise PayloadError(f"{name} as a {type(value).__name__}, an array of numbers is expected")
    _check_shape(name, tuple(value.shape), shape)
    if isinstance(value, Tensor):
        numbers = value.layout is torch.strided and not (value.is_meta or value.is_quantized or value.is_complex())
    else:
        numbers = value.dtype.kind in "fiub"
    if not numbers:
        raise PayloadError(f"{name} as {_dtype(value)}, plain numbers are expected")
    if library not in (None, _library(value)) or (dtype == "float32" != _dtype(value)):
        raise PayloadError(f"{name} as {_dtype(value)} of {_library(value)}, but {dtype} of {library} was sent")
    if not (is_finite(value) if isinstance(value, Tensor) else np.isfinite(value).all()):
        raise PayloadError(f"{name} with a value that is NaN or infinite")
    return value


def _check_shape(name: str, shape: Sequence[int], expected: Sequence[int] | None) -> None:
    if expected is not None and tuple(shape) != tuple(expected):
        raise PayloadError(f"{name} of shape {tuple(shape)}, but {tuple(expected)} was sent")
