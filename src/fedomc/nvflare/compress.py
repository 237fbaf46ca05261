"""The filter that compresses models: on the server for each client, and on a client for the server.

What the server's messages to different clients have in common, a variable's frame, is encoded once and kept until the
next round.
"""

import threading
import weakref
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import Tensor

from fedomc.errors import PolicyError
from fedomc.methods import Encoding, encode
from fedomc.nvflare.messages import (
    ALGORITHM,
    RECEIVED,
    SENT,
    ModelFilter,
    dtype_of,
    kind_of,
    library_of,
    name_of,
    replaced,
    round_of,
)
from fedomc.serialization import frame, uplink
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.dtypes import NAMES
from fedomc.training.module_state import some
from fedomc.training.policy import CompressionPolicy


class CompressFilter(ModelFilter):
    """Compress the models that the server sends to clients, or that a client sends back.

    The variables that stay FP32 are drawn from the policy's seed, the round and the client's name, alike on both sides.
    Weights are encoded in the policy's format, differences of weights in its ``update_format`` if it has one. What
    clients send is encoded in the policy's uplink, if it has one, and that includes the variables that stayed FP32 on
    the way to them. A policy with an ``update_format`` or an uplink needs clients that send differences. Other
    variables than float32, bfloat16 and float16 stay as they are. What a client sends is encoded by
    ``serialization.uplink``, as on every transport:
    the codes of a ``CompressedTensor`` are sent unchanged (among weights it must have one part, among differences two,
    of which only the update is sent), and so is a variable whose values the client did not change.

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
        """Return the compressed model in a new DXO; None, so that the DXO is passed on, if it holds no model.

        Raises:
            PolicyError: the policy fits no variable; another filter has already encoded the model; a
                ``CompressedTensor`` has one part where two are needed, or the other way round; a client sends whole
                weights, but the policy has an ``update_format`` or an uplink.
            NonFiniteError: a variable to compress has a NaN or an infinity.
        """
        if (kind := kind_of(dxo)) is None:
            return None
        if (other := dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)) is not None:
            raise PolicyError(f"the model is encoded already, by {other!r}: use only one of the two filters")
        to_client = self.is_task()
        client = name_of(fl_ctx.get_peer_context() if to_client else fl_ctx)
        if not to_client and kind == frame.VARIABLE and needs_differences(self.policy):
            raise whole_weights_error(f"{client} sends", self.policy)
        round = round_of(shareable)
        shapes = {name: tuple(value.shape) for name, value in dxo.data.items() if _is_compressible(value)}
        selection: dict[str, Encoding] = dict(self.policy.select(shapes, round=round, client=client))
        encoding = self.policy.encoding(round=round, client=client)
        if not to_client and self.policy.uplink is not None:
            selection = dict.fromkeys(self.policy.uplinked(shapes), encoding)
        received = {} if to_client else fl_ctx.get_prop(RECEIVED, {})
        data, count = dict(dxo.data), 0
        for name, value in dxo.data.items():
            if is_compressed(value):
                data[name] = _codes_frame(name, value, kind, None if to_client else encoding)
            elif name in selection and to_client:
                data[name] = self._shared_frame(name, value, kind, round)
            elif name in selection:
                data[name] = _reply_frame(name, value, kind, selection[name], received.get(name))
            else:
                continue
            count += 1
        if to_client:
            sent = {
                name: (tuple(np.shape(value)), dtype_of(value), library_of(value)) for name, value in dxo.data.items()
            }
            with self._lock:  # a job may have several models, and a message a collection of them
                fl_ctx.set_prop(SENT, {**fl_ctx.get_prop(SENT, {}), **sent}, private=True, sticky=True)
        before, after = (sum(map(_nbytes, values.values())) for values in (dxo.data, data))
        left = [name for name in self.policy.compressible(shapes) if name not in selection]
        self.log_info(
            fl_ctx,
            f"round {round}, {'to' if to_client else 'from'} {client}: {count} of {len(data)} variables compressed, "
            f"{before} -> {after} bytes; drawn to stay FP32: {some(left)}",
        )
        library = "torch" if any(isinstance(value, Tensor) for value in dxo.data.values()) else "numpy"
        narrow = {name: dtype_of(dxo.data[name]) for name in data if isinstance(data[name], bytes)}
        narrow = {name: dtype for name, dtype in narrow.items() if dtype != "float32"}
        described = {"library": library, **({"dtypes": narrow} if narrow else {}), **frame.encoding_fields(encoding)}
        meta = {MetaKey.PROCESSED_ALGORITHM: ALGORITHM, ALGORITHM: described}
        return replaced(dxo, data, meta)

    def _shared_frame(self, name: str, value: Any, kind: int, round: int) -> bytes:
        """Return the frame of a variable, which is encoded once for all clients of a round."""
        with self._lock:
            if round != self._round:
                self._round, self._frames = round, {}
            source, source_kind, data = self._frames.get(name, (lambda: None, kind, b""))
            if source() is not value or source_kind != kind:
                data = _message_frame(name, value, kind, self.policy.encoding(self.policy.format_of(name), round=round))
                self._frames[name] = (weakref.ref(value), kind, data)
            return data


def needs_differences(policy: CompressionPolicy) -> bool:
    """Tell whether a policy has a format for what a client changed."""
    return policy.update_format is not None or policy.uplink is not None


def whole_weights_error(who: str, policy: CompressionPolicy) -> PolicyError:
    """Return the error for whole weights under a policy with an update format or an uplink.

    The update format would be ignored, and the weights rounded so coarsely that small changes are lost.
    """
    option = "update_format" if policy.uplink is None else "uplink"
    return PolicyError(
        f"{who} whole weights, but {option}={getattr(policy, option)} is for what a client changed: pass "
        "params_transfer_type=TransferType.DIFF to the recipe (in a script of your own, send ParamsType.DIFF), or use "
        f"a policy without {option}"
    )


def _is_compressible(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor) and dtype_of(value) in NAMES


def _nbytes(value: Any) -> int:
    return len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 0))


def _as_tensor(value: np.ndarray[Any, Any] | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    contiguous = np.ascontiguousarray(value).reshape(value.shape)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())


def _message_frame(name: str, value: Any, kind: int, how: Encoding) -> bytes:
    """Encode what the server sends of a variable."""
    tensor, format, transform, rounding = _as_tensor(value), how.sent, how.sent_transform, "nearest"
    if kind == frame.UPDATE:
        format, transform, rounding = how.update_format or how.format, how.transform, how.rounding
    packed = encode(tensor.cpu(), format, transform, rounding, how.seed, name)
    return frame.to_bytes(packed, tuple(tensor.shape), kind, name)


def _reply_frame(name: str, value: Any, kind: int, how: Encoding, received: frame.Frame | None) -> bytes:
    """Encode what a client sends of a dense variable, which is weights or differences by the kind of its message."""
    tensor, config = _as_tensor(value), uplink.UplinkConfig(how)
    if how.uplink is not None:
        return uplink.uplink_frame(tensor, None, config, name)
    if kind == frame.UPDATE:
        return uplink.change_frame(tensor, how.update_format or how.format, config, name)
    data = uplink.reply_frame(tensor, received, config, name)
    return uplink.value_frame(tensor, how.format, config, name) if data is None else data


def _codes_frame(name: str, value: CompressedTensor, kind: int, how: Encoding | None) -> bytes:
    """Write the codes of a compressed variable, if they are of the kind of its message; or its update in an uplink."""
    if kind == frame.VARIABLE and value.update is not None:
        raise PolicyError(
            f"{name} has two parts, of which only the update is sent, but the model is sent as weights: send it as "
            "differences (ParamsType.DIFF), or use a policy without update_format"
        )
    if kind == frame.UPDATE and value.update is None:
        raise PolicyError(
            f"{name} has one part and no update, but the model is sent as differences: send weights "
            "(ParamsType.FULL), or use a policy with update_format"
        )
    data = uplink.reply_frame(value, None, None if how is None else uplink.UplinkConfig(how), name)
    assert data is not None
    return data
