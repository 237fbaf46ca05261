"""One round's model: what each client is sent, and what its reply says against that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from torch import Tensor

from fedomc import codec
from fedomc.codec import CHUNK
from fedomc.codec.elements import FloatFormat
from fedomc.errors import PayloadError, PolicyError
from fedomc.flower.arrays import (
    CONFIG,
    STYPE,
    flat_tensor,
    packed_array,
    read_packed,
    records_of,
    to_config,
    view_dense,
)
from fedomc.methods.packed import Encoding, Packed, encode
from fedomc.serialization import frame
from fedomc.training.policy import CompressionPolicy

Values = np.ndarray[Any, Any]

STRETCH = 8 * CHUNK
"""Values that are taken at a time of several replies: their total stays in the cache meanwhile."""


@dataclass(frozen=True, slots=True)
class Returned:
    """One variable of a reply, checked, and not decoded until it is asked for.

    A reply has hundreds of them; more objects for each would have the garbage collector look at the whole process more
    often, which took as long as checking them.

    Attributes:
        held: what came back, where it lies in the message. What went through the lossless stage is unpacked anew each
            time, so that the codes of many replies are never held together.
        sent: what the client had been sent.
        is_update: whether what came back is the difference to that already.
    """

    held: Packed | Values | Callable[[], Packed]
    sent: Packed | Values
    is_update: bool

    def read(self) -> Packed | Values:
        """Give what came back."""
        return self.held() if callable(self.held) else self.held

    def change(self, out: Tensor) -> Tensor:
        """Write what the client changed to ``out``, flat."""
        return self._change(self.read(), out, 0)

    def _change(self, values: Packed | Values, out: Tensor, start: int) -> Tensor:
        """Write the changes from ``start`` on, a multiple of the block."""
        stop = start + out.numel()
        if not isinstance(values, Packed):
            np.copyto(out.numpy(), _flat(values)[start:stop])
        elif self.is_update or not isinstance(self.sent, Packed):
            values.decode(out, start)
        else:
            return values.decode_with(_negated(self.sent), out, start)
        if isinstance(self.sent, Packed):
            return out if self.is_update else self.sent.add_to(out, -1.0, start)
        np.subtract(out.numpy(), _flat(self.sent)[start:stop], out=out.numpy())
        return out

    def _add_change(self, values: Packed | Values, total: Tensor, weight: float, start: int) -> None:
        """Add ``weight`` times the changes from ``start`` on."""
        sent, stop = self.sent, start + total.numel()
        if self.is_update:
            assert isinstance(values, Packed)
            values.add_to(total, weight, start)
        elif isinstance(values, Packed) and isinstance(sent, Packed):
            values.add_difference_to(total, sent, weight, start)
        elif isinstance(values, Packed) or isinstance(sent, Packed):
            total.add_(self._change(values, torch.empty_like(total), start), alpha=weight)
        elif total.dtype == torch.float32 and total.numel() >= CHUNK:
            codec.add_difference(flat_tensor(values)[start:stop], flat_tensor(sent)[start:stop], weight, total)
        else:  # of which a model has hundreds: calling the codec takes longer than adding
            added = total.numpy()
            change = np.subtract(_flat(values)[start:stop], _flat(sent)[start:stop], dtype=added.dtype)
            change *= added.dtype.type(weight)
            added += change


def add_changes(total: Tensor, replies: Sequence[tuple[Returned, float]]) -> None:
    """Add what clients changed of a variable, each times its weight, to a flat total.

    The difference is taken first, value by value, so that the total is rounded on the scale of the changes.

    Args:
        total: float32 (or float64, of dense values).
        replies: in the order in which they are added.
    """
    read = [(returned, returned.read(), weight) for returned, weight in replies]
    for start in range(0, total.numel(), STRETCH):
        stretch = total[start : start + STRETCH]
        for returned, values, weight in read:
            returned._add_change(values, stretch, weight, start)


def _flat(values: Values) -> Values:
    return values.reshape(-1)


def _negated(packed: Packed) -> Packed:
    return Packed(packed.codes, -packed.affine, packed.format, packed.numel)


class Broadcast:
    """One round's model: the FP32 values, each variable encoded once in each format, and who was sent what.

    Args:
        arrays: the model.
        policy_of: the policy of a node; None sends FP32.
        server_round: number of the round.
        client_name: names a node for the random draws.
        lossless: which messages go through the lossless stage: ``none``, ``down``, ``up`` or ``both``.
        rest_format: in which the variables travel that partial quantization leaves in FP32; None is FP32.

    Attributes:
        errors: of the variables that were compressed: the sums of squares of what that missed, and of the values.
    """

    def __init__(
        self,
        arrays: ArrayRecord,
        policy_of: Callable[[int], CompressionPolicy | None],
        server_round: int,
        client_name: Callable[[int], str | int],
        lossless: str = "none",
        rest_format: FloatFormat | None = None,
    ) -> None:
        self.arrays = arrays
        self.round = server_round
        self.nodes: set[int] = set()
        self._policy_of = policy_of
        self._client_name = client_name
        self._lossless_down = lossless in ("down", "both")
        self._lossless_up = lossless in ("up", "both")
        self._rest_format = rest_format
        self._shapes = float32_shapes(arrays)
        self._pieces: dict[tuple[object, ...], tuple[Array, Packed]] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self._dense: dict[str, Values] = {}
        self._sent: dict[int, dict[str, Packed]] = {}

    def compress(self, message: Message) -> None:
        """Replace the model in a message by the client's own payload.

        Raises:
            PolicyError: the message has no model of the variables that the strategy was given.
        """
        node = message.metadata.dst_node_id
        self.nodes.add(node)
        policy, client = self._policy_of(node), self._client_name(node)
        if policy is not None:
            selection = policy.select(self._shapes, round=self.round, client=client)
            shared = {fmt: policy.encoding(fmt, round=self.round) for fmt in policy.formats}
            pieces = {name: self._piece(name, shared[how.format], frame.VARIABLE) for name, how in selection.items()}
            if self._rest_format is not None:
                rest = Encoding(self._rest_format, transform=policy.encoding().transform)
                for name in policy.compressible(self._shapes):
                    if name not in pieces:
                        pieces[name] = self._piece(name, rest, frame.DENSE)
            self._sent[node] = {name: packed for name, (_, packed) in pieces.items()}
            payload = ArrayRecord()
            for name, array in self.arrays.items():
                payload[name] = pieces[name][0] if name in pieces else array
            content = RecordDict(dict(message.content.items()))
            models = [
                key
                for key, record in records_of(message.content, ArrayRecord).items()
                if set(record) == set(self.arrays)
            ]
            if not models:
                raise PolicyError(
                    "the inner strategy sends no model of the variables it was given: nothing to compress"
                )
            for key in models:
                content[key] = payload
            content[CONFIG] = to_config(
                policy.encoding(round=self.round, client=client),
                lossless=self._lossless_up,
                rest_format=self._rest_format,
            )
            message.content = content

    def read(self, reply: Message) -> dict[str, Returned]:
        """Check all variables of a reply; they stay packed where they lie in it.

        Raises:
            PayloadError: it is damaged, not finite, or of another model.
        """
        records = list(records_of(reply.content, ArrayRecord).values())
        if len(records) != 1:
            raise PayloadError(f"the reply has {len(records)} array records, one expected")
        if set(records[0]) != set(self.arrays):
            raise PayloadError("the reply's variables are not those of the model that was sent")
        sent = self._sent.get(reply.metadata.src_node_id, {})
        return {name: self._returned(name, array, sent.get(name)) for name, array in records[0].items()}

    def dense(self, name: str) -> Values:
        """Return the server's values of a variable; they are not to be written."""
        if name not in self._dense:
            self._dense[name] = view_dense(self.arrays[name], name, check=False)
        return self._dense[name]

    def _piece(self, name: str, how: Encoding, kind: int) -> tuple[Array, Packed]:
        """Encode a variable, once for all clients whose format it is."""
        seed = how.seed if how.base_rounding == "stochastic" else 0
        key = (name, kind, how.format, how.transform, how.base_rounding, seed)
        if key not in self._pieces:
            values = flat_tensor(self.dense(name))
            packed = encode(values, how.format, how.transform, how.base_rounding, seed, name)
            array = packed_array(packed, self._shapes[name], kind, lossless=self._lossless_down)
            self._pieces[key] = array, packed
            self.errors[name] = max(self.errors.get(name, (0.0, 0.0)), _error(packed, values))
        return self._pieces[key]

    def _returned(self, name: str, array: Array, packed: Packed | None) -> Returned:
        own = self.arrays[name]
        if tuple(array.shape) != tuple(own.shape):
            raise PayloadError(f"{name}: shape {array.shape}, but {own.shape} was sent")
        sent = self.dense(name) if packed is None else packed
        if array.stype != STYPE:
            values = view_dense(array, name)
            if values.dtype != own.dtype:
                raise PayloadError(f"{name}: dtype {values.dtype}, but {own.dtype} was sent")
            return Returned(values, sent, False)
        if own.dtype != "float32":
            raise PayloadError(f"{name}: compressed values came back, but {own.dtype} was sent")
        parsed = read_packed(array, name, copy=False, sent=packed)
        is_update = parsed.kind == frame.UPDATE
        if is_update and packed is None:
            raise PayloadError(f"{name}: an update came back, but the variable was sent in FP32")
        in_message = len(array.data) > parsed.packed.codes.nbytes
        return Returned(parsed.packed if in_message else partial(_unpacked, array, name, packed), sent, is_update)


def _unpacked(array: Array, name: str, sent: Packed | None) -> Packed:
    return read_packed(array, name, copy=False, sent=sent).packed


def _error(packed: Packed, values: Tensor) -> tuple[float, float]:
    """Return the sums of squares of what compression missed, and of the values."""
    missed, of = 0.0, 0.0
    scratch = torch.empty(min(STRETCH, values.numel()), dtype=torch.float32)
    for start in range(0, values.numel(), STRETCH):
        part = values[start : start + STRETCH]
        difference = packed.decode(scratch[: part.numel()], start).sub_(part)
        missed += float(torch.dot(difference, difference))
        of += float(torch.dot(part, part))
    return missed, of


def float32_shapes(arrays: ArrayRecord) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what may be compressed."""
    return {name: tuple(array.shape) for name, array in arrays.items() if array.dtype == "float32"}
