"""The filter that decompresses models and checks everything about them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import Tensor

from fedomc.errors import PayloadError, PolicyError
from fedomc.methods import Encoding
from fedomc.nvflare.messages import (
    ALGORITHM,
    RECEIVED,
    SENT,
    ModelFilter,
    Sent,
    dtype_of,
    kind_of,
    library_of,
    name_of,
    replaced,
)
from fedomc.serialization import frame
from fedomc.serialization.downlink import as_held
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.dtypes import NAMES
from fedomc.training.module_state import is_finite

_LIBRARIES = ("numpy", "torch")


class DecompressFilter(ModelFilter):
    """Decompress the models that a client receives, or that come back to the server.

    Everything is checked: frames, names, shapes, dtypes, and that every value is finite. NVFlare treats a refused model
    like any other error of that client: FedAvg continues as long as enough other clients can answer, and otherwise ends
    the job (``ignore_result_error``). The log names the client and the variable.

    Attributes:
        compressed: whether the weights that a client receives stay packed, as ``CompressedTensor``. This needs a job
            with ``server_expected_format=ExchangeFormat.PYTORCH`` whose script runs in the client's process.
    """

    def __init__(self, compressed: bool = False) -> None:
        super().__init__()
        self.compressed = compressed

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return the decoded model in a new DXO, as arrays of the library that it was compressed from.

        Returns None, so that the DXO is passed on, if it holds no model.

        Raises:
            PayloadError: the model is damaged, not finite, or does not belong to the model that was sent.
            PolicyError: the model should stay compressed, but the job exchanges numpy arrays.
        """
        to_client = self.is_task()
        sent = None if to_client else fl_ctx.get_prop(SENT)
        if kind_of(dxo) is None and (sent is None or dxo.data_kind == DataKind.METRICS):
            return None
        try:
            keep = self.compressed and to_client and dxo.data_kind == DataKind.WEIGHTS
            decoded, frames = self._decoded(dxo, sent, keep)
        except PayloadError as error:
            raise PayloadError(f"{name_of(fl_ctx.get_peer_context())} sent {error}") from error
        if to_client:
            received = {**fl_ctx.get_prop(RECEIVED, {}), **dict.fromkeys(dxo.data), **frames}
            fl_ctx.set_prop(RECEIVED, received, private=True, sticky=True)
        return decoded

    def _decoded(self, dxo: DXO, sent: Sent | None, keep: bool) -> tuple[DXO, dict[str, frame.Frame]]:
        """Return the decoded model, and the frames of the variables that a client may send back as they came."""
        if (kind := kind_of(dxo)) is None:  # NVFlare would take it for weights
            raise PayloadError(f"{dxo.data_kind!r}, where weights, differences or metrics are expected")
        library, encoding, dtypes = _read_meta(dxo.meta)
        if keep and encoding is not None and library != "torch":
            raise PolicyError(
                "compressed=True needs a job that exchanges tensors: server_expected_format=ExchangeFormat.PYTORCH"
            )
        data: dict[str, Any] = {}
        frames: dict[str, frame.Frame] = {}
        for name, value in dxo.data.items():
            if not isinstance(name, str) or (sent is not None and name not in sent):
                raise PayloadError(f"{name!r}, which is not a variable of the model that was sent")
            shape, dtype, sent_library = (None, None, None) if sent is None else sent[name]
            if not isinstance(value, bytes | bytearray | memoryview):
                data[name] = _checked(name, value, shape, dtype, sent_library)
                continue
            if encoding is None:
                raise PayloadError(f"{name} as bytes, but nothing in the meta says how to decode them")
            # A base is never rewritten, so it may stay in the message's memory; a variable in one part may not.
            parsed = frame.from_bytes(value, name, copy=keep and encoding.rewrites_what_arrives, shape=shape)
            if dtype not in (None, *NAMES):
                raise PayloadError(f"{name} compressed, but {dtype} was sent")
            own = getattr(torch, dtype or dtypes.get(name, "float32"))
            if parsed.kind != kind:
                raise PayloadError(f"{name} as a frame of kind {parsed.kind}, but {dxo.data_kind} have kind {kind}")
            if keep:
                held = parsed.packed if kind == frame.UPDATE else as_held(parsed.packed, encoding, name)
                data[name] = CompressedTensor.from_packed(held, encoding, parsed.shape, name, own)
                if not is_finite(data[name]):
                    raise PayloadError(f"{name} with a value beyond {own}")
            else:
                values = parsed.packed.decode(torch.empty(parsed.packed.numel, dtype=torch.float32, device="cpu")).view(
                    parsed.shape
                )
                values = values.to(own)
                if own is not torch.float32 and not is_finite(values):
                    raise PayloadError(f"{name} with a value beyond {own}")
                data[name] = values.numpy() if (sent_library or library) == "numpy" else values
                if kind == frame.VARIABLE and encoding.update_format is None and encoding.uplink is None:
                    frames[name] = parsed
        return replaced(dxo, data, {}), frames


def _read_meta(meta: Mapping[str, Any] | None) -> tuple[str, Encoding | None, Mapping[str, str]]:
    """Return the library of the arrays, the encoding, and the dtypes of compressed variables that are not float32.

    The encoding is None if nothing was compressed.
    """
    meta = meta or {}
    algorithm = meta.get(MetaKey.PROCESSED_ALGORITHM)
    if algorithm is None:
        return "numpy", None, {}
    fields = meta.get(ALGORITHM)
    if algorithm != ALGORITHM or not isinstance(fields, Mapping):
        raise PayloadError(f"a model encoded by {algorithm!r}, {ALGORITHM!r} expected")
    if fields.get("library") not in _LIBRARIES:
        raise PayloadError(f"arrays of {fields.get('library')!r}, one of {', '.join(_LIBRARIES)} expected")
    dtypes = fields.get("dtypes", {})
    if not isinstance(dtypes, Mapping) or not all(type(dtype) is str and dtype in NAMES for dtype in dtypes.values()):
        raise PayloadError(f"variables of dtypes {dtypes!r}, of which each must be one of {', '.join(NAMES)}")
    return fields["library"], frame.read_encoding(fields), dtypes


def _checked(name: str, value: Any, shape: Sequence[int] | None, dtype: str | None, library: str | None) -> Any:
    """Check a variable that was sent uncompressed, and return it."""
    if not isinstance(value, np.ndarray | np.generic | Tensor) or is_compressed(value):
        raise PayloadError(f"{name} as a {type(value).__name__}, an array of numbers is expected")
    _check_shape(name, tuple(value.shape), shape)
    if isinstance(value, Tensor):
        numbers = value.layout is torch.strided and not (value.is_meta or value.is_quantized or value.is_complex())
    else:
        numbers = value.dtype.kind in "fiub"
    if not numbers:
        raise PayloadError(f"{name} as {dtype_of(value)}, plain numbers are expected")
    if library not in (None, library_of(value)) or (dtype in NAMES and dtype != dtype_of(value)):
        raise PayloadError(f"{name} as {dtype_of(value)} of {library_of(value)}, but {dtype} of {library} was sent")
    if not (is_finite(value) if isinstance(value, Tensor) else np.isfinite(value).all()):
        raise PayloadError(f"{name} with a value that is NaN or infinite")
    return value


def _check_shape(name: str, shape: Sequence[int], expected: Sequence[int] | None) -> None:
    if expected is not None and tuple(shape) != tuple(expected):
        raise PayloadError(f"{name} of shape {tuple(shape)}, but {tuple(expected)} was sent")
