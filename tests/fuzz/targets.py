"""What reads bytes from outside. Each target does one attempt: good bytes, damaged, and what must hold whatever comes.

An attempt may raise ``PayloadError`` in what it tests; that is caught here. Everything else that escapes is a finding.
"""

import copy
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian
from torch import Tensor, nn

import fedomc
from fedomc import codec
from fedomc.errors import PayloadError
from fedomc.flower import OMCStrategy, collect, install
from fedomc.flower._flower import identify_process
from fedomc.methods import Packed, encode, method_from_header, parse_method
from fedomc.serialization import entropy, frame
from fedomc.training.module_state import ModuleState, is_finite
from tests.conftest import randn, same_bits
from tests.fuzz.mutations import FORMATS, Pieces, damaged, forged_content, forged_frame, forged_planes
from tests.serialization.forging import signed_again

Target = Callable[[Random], bool]
"""Does one attempt; whether the damaged bytes were taken for good ones, as harmless damage may be."""

SHAPES = ((), (1,), (7, 9), (40, 48), (0, 3), (1025, 2), (1, 2, 1, 2, 1, 2, 1, 2), (3, 50000))


class Model(nn.Module):
    """A little of everything: matrices, a kernel, vectors, a scalar of whole numbers, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 48)
        self.conv = nn.Conv1d(48, 40, 3)
        self.norm = nn.BatchNorm1d(40)
        self.linear = nn.Linear(40, 48)
        self.head = nn.Linear(48, 50)
        self.head.weight = self.embedding.weight


def build(seed: int | None = None) -> Model:
    """Build a model with values; on the meta device if there is no seed."""
    if seed is None:
        with torch.device("meta"):
            return Model()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model()


POLICIES = tuple(
    fedomc.CompressionPolicy(**how, fraction=fraction)  # type: ignore[arg-type]
    for fraction in (1.0, 0.6)
    for how in (
        {"format": "S1E3M7"},
        {"format": "S1E2M3", "update_format": "S1E2M1"},
        {"format": "NF4", "update_format": "INT8"},
        {"format": "MXFP6"},
        {"format": "S1E3M7", "uplink": "DRIVE1"},
        {"format": "S1E8M23", "transform": "none"},
    )
)


def make() -> dict[str, Target]:
    """Make all targets, with the good bytes that they damage."""
    identify_process()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    frames = Frames()
    return {
        "frame": frames.read,
        "planes": frames.read_planes,
        "file": File(frames.others).load,
        "message": Messages(frames.others).install,
        "reply": Replies(frames.others).aggregate,
    }


class Frames:
    """Single variables."""

    def __init__(self) -> None:
        self.good: list[tuple[bytes, tuple[int, ...], Packed | None]] = []
        for number, shape in enumerate(SHAPES):
            values = randn(*shape, seed=number)
            moved = values + randn(*shape, seed=number + 1) * 1e-3 * (values > 0)
            for method in map(parse_method, FORMATS):
                packed, sent = encode(moved, method), encode(values, method)
                for kind in (frame.VARIABLE, frame.UPDATE):
                    self.good.append((frame.to_bytes(packed, shape, kind), shape, None))
                    self.good.append((frame.to_bytes(packed, shape, kind, lossless=True), shape, None))
                    self.good.append((frame.to_bytes(packed, shape, kind, lossless=True, sent=sent), shape, sent))
        self.others = [data for data, _, _ in self.good if len(data) < 20_000]

    def read(self, rng: Random) -> bool:
        """Parse a damaged frame; what is taken is finite and whole."""
        data, shape, sent = rng.choice(self.good)
        data = forged_frame(rng, data, self.others)
        sent = sent if rng.random() < 0.8 else rng.choice(self.good)[2]
        expected = shape if rng.random() < 0.7 else None
        try:
            found = frame.from_bytes(data, "x", copy=rng.random() < 0.5, shape=expected, sent=sent)
        except PayloadError:
            return False
        packed = found.packed
        assert expected in (None, found.shape) and packed.numel == math.prod(found.shape)
        for field, tensor in zip(packed.method.fields(packed.numel), packed.fields, strict=True):
            assert (tensor.dtype, tensor.shape) == (field.dtype, (field.length,))
        assert torch.isfinite(packed.decode(torch.empty(packed.numel))).all()
        again = frame.from_bytes(frame.to_bytes(packed, found.shape, found.kind), shape=found.shape)
        assert again.packed.method == packed.method and all(map(torch.equal, again.packed.fields, packed.fields))
        return True

    def read_planes(self, rng: Random) -> bool:
        """Unpack damaged planes, or good ones as something else than they are."""
        data, shape, sent = rng.choice(self.good)
        pieces = Pieces.of(data)
        way, difference = pieces.fixed["coding"], bool(pieces.fixed["difference"])
        method, numel = method_from_header(pieces.fixed["method"], pieces.header), math.prod(shape)
        bits, order = method.code_bits, rng.choice((method.code_order, "unsigned", "twos-complement", "sign-magnitude"))
        if way == entropy.PLAIN:
            way = rng.choice((entropy.BYTES, entropy.BITS))
        body = pieces.fields[0]
        for _ in range(rng.choice((0, 1, 1, 2))):
            body = rng.choice((damaged, forged_planes, forged_planes))(rng, body, self.others)
        match rng.randrange(12):
            case 0:
                bits = rng.randrange(2, 33)
            case 1:
                way = rng.choice((entropy.BYTES, entropy.BITS))
            case 2:
                numel = rng.choice((0, 1, numel + 1, numel * 2, max(0, numel - 1), numel + entropy.SEGMENT))
            case 3:
                difference = not difference
        reference = None
        if sent is not None and (sent.numel, sent.method.code_bits) == (numel, bits):
            reference = sent.codes
        try:
            words = entropy.decompress(memoryview(body), way, difference, numel, bits, reference, "x", order)
        except PayloadError:
            return False
        codes = codec.unpack(words, numel, bits)
        assert torch.equal(codec.pack(codes, bits, torch.empty_like(words)), words)  # nothing between the codes
        return True


class File:
    """Model files."""

    def __init__(self, others: list[bytes]) -> None:
        self.others = others
        self._folder = tempfile.TemporaryDirectory()  # kept until the process ends
        self.path = Path(self._folder.name) / "model.safetensors"
        self.good = []
        for policy in POLICIES:
            model = build(0)
            fedomc.compress_(model, policy.select(model))
            if policy.update_format:
                model.linear.weight.data.add_(randn(48, 40, seed=1, scale=1e-3))
            fedomc.save_model(model, self.path)
            self.good.append(self.path.read_bytes())
        for format in ("MXFP8", "MXFP6", "MXFP4"):
            fedomc.save_model(fedomc.compress_(build(0), format), self.path, interchange=True)
            self.good.append(self.path.read_bytes())

    def load(self, rng: Random) -> bool:
        """Load a damaged file."""
        data = rng.choice(self.good)
        for _ in range(rng.choice((1, 1, 2))):
            data = rng.choice((damaged, _forged_header, _forged_piece, _forged_piece))(rng, data, self.others)
        if rng.random() < 0.8:
            data = signed_again(data)
        self.path.unlink(missing_ok=True)  # the one before may still be mapped
        self.path.write_bytes(data)
        load = fedomc.materialize_ if rng.random() < 0.3 else fedomc.load_model
        return _filled(lambda model: load(model, self.path), _a_model(rng)) is not None


def _forged_header(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Change something in the JSON of a file, or in that of its metadata."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        if rng.random() < 0.6:
            described = json.loads(header["__metadata__"]["fedomc"])
            header["__metadata__"]["fedomc"] = json.dumps(_forged_json(rng, described))
        else:
            header = _forged_json(rng, header)
    except (ValueError, KeyError, TypeError):  # it was damaged before
        return damaged(rng, data, others)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _forged_json(rng: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, rng.choice(("", "conv.weight", key + ".update")): value[rng.choice(sorted(value))]}
            case 2:
                return {**value, key: value[rng.choice(sorted(value))]}
            case _:
                return {**value, key: _forged_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _forged_json(rng, value[at]), *value[at + 1 :]]
    oddities = (None, True, 0, 1, -1, 1.5, 2**31, 2**53, 2**64, "", "U8", "F32", "S1E2M3", [], [1], {}, "x" * 999)
    return rng.choice(oddities)


def _forged_piece(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Damage one of a file's tensors, in place or with what follows moved."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        name = rng.choice(sorted(set(header) - {"__metadata__"}))
        begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
        old = data[begin:end]
        new = forged_frame(rng, old, others) if header[name]["dtype"] == "U8" else damaged(rng, old, others)
    except (ValueError, KeyError, TypeError, IndexError):
        return damaged(rng, data, others)
    if len(new) != len(old):
        new = new[: len(old)].ljust(len(old), b"\0") if rng.random() < 0.5 else new
        end -= len(old) - len(new) if rng.random() < 0.2 else 0
    return data[:begin] + new + data[max(end, begin) :]


class Messages:
    """What a client is sent."""

    def __init__(self, others: list[bytes]) -> None:
        self.others = others
        self.good: list[RecordDict] = []
        for policy in (None, *POLICIES):
            for how in ({}, {"entropy_coding": "both", "unquantized_format": "S1E5M10"}):
                strategy = OMCStrategy(FedAvg(), policy, **how)  # type: ignore[arg-type]
                self.good += [message.content for message in _configured(strategy)[:1]]

    def install(self, rng: Random) -> bool:
        """Fill a model from a damaged message, and collect what a client would return."""
        content = forged_content(rng, rng.choice(self.good), self.others)
        consume = rng.random() < 0.5
        model = _filled(lambda model: install(model, content, consume=consume), _a_model(rng))
        if model is None:
            return False
        try:
            collect(model, content)
        except PayloadError:
            return False
        return True


class Replies:
    """What a server is sent: two good replies, and a damaged one among them."""

    def __init__(self, others: list[bytes]) -> None:
        self.others = others
        self.rounds = []
        for policy in (None, *POLICIES):
            for how in ({}, {"entropy_coding": "both", "unquantized_format": "S1E5M10"}, {"aggregate": "weights"}):
                for inner in (FedAvg, FedMedian):
                    strategy = OMCStrategy(inner(), policy, **how)  # type: ignore[arg-type]
                    asked = _configured(strategy)
                    answers = [_answered(message) for message in asked]
                    expected = _aggregated(strategy, [_reply(*pair) for pair in zip(asked[:2], answers, strict=False)])
                    assert expected is not None
                    self.rounds.append((strategy, asked, answers, expected))

    def aggregate(self, rng: Random) -> bool:
        """Aggregate; the damaged reply is left out and the others give what they give alone, or it is harmless."""
        strategy, asked, answers, expected = rng.choice(self.rounds)
        bad = forged_content(
            rng, rng.choice((answers[2], answers[2], answers[2], answers[1], asked[2].content)), self.others
        )
        replies = [_reply(message, content) for message, content in zip(asked[:2], answers, strict=False)]
        hostile = _reply(asked[2], bad)
        if rng.random() < 0.02:
            hostile = Message(Error(rng.randrange(300), rng.choice(("", "x" * 999))), reply_to=asked[2])
        replies.insert(rng.randrange(3), hostile)
        if rng.random() < 0.1:
            replies.append(_reply(asked[2], bad))
        found = _aggregated(strategy, replies if rng.random() < 0.5 else iter(replies))
        assert found is not None, "the round was lost"
        assert all(np.isfinite(values).all() for values in found.values())
        if strategy.traffic[-1].received == 3:
            return True
        assert strategy.traffic[-1].received == 2, "a good reply was left out"
        for name, values in expected.items():
            assert values.dtype == found[name].dtype and np.array_equal(values, found[name]), name
        return False


class _Nodes:
    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]


def _configured(strategy: OMCStrategy) -> list[Message]:
    nodes: Any = _Nodes()
    messages = strategy.configure_train(1, collect(build(0)), ConfigRecord({"rate": 0.1}), nodes)
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def _answered(message: Message) -> RecordDict:
    """Train a little, as a client does."""
    model = install(build(), message)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(randn(*parameter.shape, seed=number + message.metadata.dst_node_id, scale=1e-2))
    metrics = MetricRecord({"num-examples": message.metadata.dst_node_id, "loss": 1.0})
    return RecordDict({"arrays": collect(model, message), "metrics": metrics})


def _reply(message: Message, content: RecordDict) -> Message:
    return Message(copy.copy(content), reply_to=message)


def _aggregated(strategy: OMCStrategy, replies: Any) -> dict[str, np.ndarray] | None:
    arrays: ArrayRecord | None = strategy.aggregate_train(1, replies)[0]
    return None if arrays is None else {name: array.numpy() for name, array in arrays.items()}


# ---- models ---------------------------------------------------------------------------------------------------------


def _a_model(rng: Random) -> nn.Module:
    """Give a model to fill: on the meta device, with values, or compressed."""
    model = build(None if rng.random() < 0.4 else 7)
    if model.linear.weight.is_meta or rng.random() < 0.5:
        return model
    return fedomc.compress_(model, rng.choice(POLICIES).select(model))


def _filled(fill: Callable[[nn.Module], object], model: nn.Module) -> nn.Module | None:
    """Fill a model: all of it, with finite values; or nothing, and it is as it was."""
    with _unchanged_on_refusal(model) as refused:
        fill(model)
    if refused:
        return None
    state = ModuleState.of(model).tensors
    assert set(state) == set(ModuleState.of(build()).tensors)
    assert not any(tensor.is_meta for tensor in state.values()) and all(map(is_finite, state.values()))
    return model


@contextmanager
def _unchanged_on_refusal(model: nn.Module) -> Iterator[list[PayloadError]]:
    before = {
        name: (tensor, tensor if tensor.is_meta else _values(tensor))
        for name, tensor in ModuleState.of(model).tensors.items()
    }
    refused: list[PayloadError] = []
    try:
        yield refused
    except PayloadError as error:
        refused.append(error)
    if refused:
        after = ModuleState.of(model).tensors
        assert list(after) == list(before)
        for name, (tensor, values) in before.items():
            assert after[name] is tensor, f"{name} was replaced"
            assert tensor.is_meta or same_bits(_values(tensor).float(), values.float()), f"{name} was changed"


def _values(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, fedomc.CompressedTensor) else tensor.detach().clone()
