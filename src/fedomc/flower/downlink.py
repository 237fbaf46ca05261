"""The server's downlink: the model that clients are sent in a round, with each variable encoded once per format."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedomc.errors import PolicyError
from fedomc.flower.arrays import Values, flat_tensor, packed_array, records_of, view_dense
from fedomc.flower.config import CONFIG, to_config
from fedomc.flower.mapped import ViewArray
from fedomc.methods import Encoding, Method, Packed, encode
from fedomc.serialization import frame
from fedomc.serialization.mapped_file import Scratch
from fedomc.tensor.dtypes import NAMES
from fedomc.training.fidelity import Distance, measure
from fedomc.training.policy import CompressionPolicy


@dataclass(frozen=True, slots=True)
class _Piece:
    """A variable in one format: its array, its codes, and how far these are from the values."""

    array: Array
    packed: Packed
    distance: Distance


class _Shared:
    """What the clients of one policy have in common in a round: the variables in the format in which most get them.

    Attributes:
        policy: the policy, which is held because it is known by its identity.
        selector: draws which variables a client is not sent in this format.
        encodings: the encoding for each of the policy's formats.
        unquantized: the encoding of the variables that have the unquantized format.
        payload: the model, with all variables that have been encoded so far.
        packed: the codes of these.
        missing: the names of the variables that have not been encoded yet.
    """

    def __init__(self, policy: CompressionPolicy, arrays: ArrayRecord, round: int, unquantized: Method | None) -> None:
        shapes = compressible_shapes(arrays)
        self.policy = policy
        self.selector = policy.selector(shapes)
        self.encodings = {fmt: policy.encoding(fmt, round=round) for fmt in policy.formats}
        transform = policy.encoding().transform
        self.unquantized = None if unquantized is None else Encoding(unquantized, transform=transform)
        self.payload = ArrayRecord()
        for name, array in arrays.items():
            self.payload[name] = array
        self.packed: dict[str, Packed] = {}
        self.missing = dict.fromkeys(self.selector.formats)

    def add(self, name: str, piece: _Piece) -> None:
        """Add a variable that has been encoded."""
        self.payload[name], self.packed[name] = piece.array, piece.packed
        del self.missing[name]


class Broadcast:
    """The model of a round: its FP32 values, its encoded variables, and a record of what each node was sent.

    Args:
        arrays: the model.
        policy_of: returns the policy of a node; None sends FP32.
        server_round: the number of the round.
        client_name: returns the name of a node that is used for random draws.
        entropy_coding: which messages are entropy coded: ``none``, ``down``, ``up`` or ``both``.
        unquantized_format: the format of the variables that partial quantization leaves unquantized; None is FP32.
        former: the previous broadcast. If it has the same arrays, its encoded variables are reused, because evaluation
            sends the same model as the next round of training.
        scratch: where the encoded variables are; None keeps them in memory.

    Attributes:
        arrays: the model.
        round: the number of the round.
        nodes: the nodes that were sent the model.
        distances: how far each compressed variable is from its values; of several formats, that of the largest error.
    """

    def __init__(
        self,
        arrays: ArrayRecord,
        policy_of: Callable[[int], CompressionPolicy | None],
        server_round: int,
        client_name: Callable[[int], str | int],
        entropy_coding: str = "none",
        unquantized_format: Method | None = None,
        former: "Broadcast | None" = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.arrays = arrays
        self.round = server_round
        self.nodes: set[int] = set()
        self._policy_of = policy_of
        self._client_name = client_name
        self._code_down = entropy_coding in ("down", "both")
        self._code_up = entropy_coding in ("up", "both")
        self._unquantized_format = unquantized_format
        self._scratch = scratch
        self._shapes = compressible_shapes(arrays)
        self._pieces: dict[tuple[object, ...], _Piece] = {}
        self.distances: dict[str, Distance] = {}
        self._dense: dict[str, Values] = {}
        self._former_pieces = {} if former is None else former.pieces_of(arrays)
        self._shared: dict[int, _Shared] = {}
        self._sent: dict[int, dict[str, Packed]] = {}
        self._uplinks: dict[int, tuple[Method, frozenset[str]]] = {}
        self._record_names: dict[int, list[str]] = {}

    def compress(self, message: Message) -> None:
        """Replace the model in a message by the payload for the client that receives it.

        Raises:
            PolicyError: the message does not contain the strategy's model.
        """
        node = message.metadata.dst_node_id
        self.nodes.add(node)
        policy, client = self._policy_of(node), self._client_name(node)
        records = records_of(message.content, ArrayRecord)
        self._record_names[node] = models = [k for k, record in records.items() if set(record) == set(self.arrays)]
        if policy is None:
            return
        if id(policy) not in self._shared:
            self._shared[id(policy)] = _Shared(policy, self.arrays, self.round, self._unquantized_format)
        shared, encoding = self._shared[id(policy)], policy.encoding(round=self.round, client=client)
        payload, packed = self._payload(shared, shared.selector.unquantized(self.round, client))
        unquantized = list[str]()
        if encoding.uplink is not None:
            unquantized = [name for name in shared.selector.uplinked if name not in packed]
            self._uplinks[node] = encoding.uplink, frozenset([*packed, *unquantized])
        self._sent[node] = packed
        if not models:
            raise PolicyError(
                "there is nothing to compress: no array record that the inner strategy sends has exactly the variables "
                "of the model. Have its configure_train send the arrays that it is given"
            )
        content = RecordDict(dict(message.content.items()))
        for key in models:
            content[key] = payload
        content[CONFIG] = to_config(
            encoding,
            entropy_coding=self._code_up,
            unquantized_format=self._unquantized_format,
            unquantized=unquantized,
        )
        message.content = content

    def dense(self, name: str) -> Values:
        """Return the server's values of a variable; they must not be modified."""
        if name not in self._dense:
            self._dense[name] = view_dense(self.arrays[name], name, check=False)
        return self._dense[name]

    def packed(self, node: int) -> dict[str, Packed]:
        """Return the variables that were sent to a node in compressed form."""
        return self._sent.get(node, {})

    def uplink_of(self, node: int, name: str) -> Method | None:
        """Return the method in which a node must send the change of a variable; None if it sends what it holds."""
        method, names = self._uplinks.get(node, (None, frozenset[str]()))
        return method if name in names else None

    def record_names(self, node: int) -> list[str]:
        """Return the names of the array records in which a node was sent the model."""
        return self._record_names.get(node) or ["arrays"]

    def _payload(self, shared: "_Shared", left: frozenset[str]) -> tuple[ArrayRecord, dict[str, Packed]]:
        """Return the model for a client that leaves some variables unquantized, and those that are compressed."""
        for name in [name for name in shared.missing if name not in left]:
            shared.add(name, self._piece(name, shared.encodings[shared.selector.formats[name]], frame.VARIABLE))
        payload, packed = shared.payload.copy(), shared.packed.copy()
        for name in left:
            if shared.unquantized is not None:
                piece = self._piece(name, shared.unquantized, frame.DENSE)
                payload[name], packed[name] = piece.array, piece.packed
            elif packed.pop(name, None) is not None:
                payload[name] = self.arrays[name]
        return payload, packed

    def _piece(self, name: str, how: Encoding, kind: int) -> _Piece:
        """Encode a variable, only once for all clients that receive it in this format."""
        key = (name, kind, how.sent, how.sent_transform)
        piece = self._pieces.get(key) or self._former_pieces.get(key)
        if piece is None:
            values = flat_tensor(self.dense(name))
            packed = encode(values, how.sent, how.sent_transform, name=name)
            array = packed_array(packed, self._shapes[name], kind, entropy_coding=self._code_down)
            distance = measure(packed, values)
            data = memoryview(array.data)
            if self._scratch is not None:
                data = self._scratch.put(array.data)
                array = ViewArray(array.dtype, self._shapes[name], array.stype, data)
            if data.nbytes > packed.codes.nbytes:  # otherwise it is entropy coded
                packed = frame.from_bytes(data, name, copy=False, shape=self._shapes[name]).packed
            piece = _Piece(array, packed, distance)
        self._pieces[key] = piece
        self.distances[name] = max(self.distances.get(name, piece.distance), piece.distance)
        return piece

    def retain(self, nodes: Collection[int]) -> None:
        """Release all but what the replies of these nodes are compared with; nothing more can be sent afterwards."""
        self._sent = {node: packed for node, packed in self._sent.items() if node in nodes}
        self._pieces, self._former_pieces, self._shared = {}, {}, {}
        in_fp32 = {name for node in nodes for name in self.arrays if name not in self.packed(node)}
        self._dense = {name: values for name, values in self._dense.items() if name in in_fp32}
        arrays = ArrayRecord()
        for name, array in self.arrays.items():
            arrays[name] = array if name in in_fp32 else Array(array.dtype, tuple(array.shape), array.stype, b"")
        self.arrays = arrays

    def release_former(self) -> None:
        """Release variables that the former broadcast encoded and that this one does not send."""
        self._former_pieces = {}

    def pieces_of(self, arrays: ArrayRecord) -> "dict[tuple[object, ...], _Piece]":
        """Return the encoded variables if the model has the same arrays as this broadcast; otherwise an empty dict."""
        own = self.arrays
        same = own is arrays or (list(own) == list(arrays) and all(own[name] is arrays[name] for name in own))
        return self._pieces if same else {}


def compressible_shapes(arrays: ArrayRecord) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the float32, bfloat16 and float16 variables, the only ones that can be compressed."""
    return {name: tuple(array.shape) for name, array in arrays.items() if array.dtype in NAMES}
