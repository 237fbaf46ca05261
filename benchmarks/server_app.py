"""Measures one run of a ServerApp, from the initial model to the last round, in a process of its own.

``benchmarks.server`` starts it. Messages go through Flower's own serialization in both directions, as with the grid of
a real deployment: what is sent is turned into objects, queued and dropped at once, where the SuperLink would store it;
the objects of a reply are made here as if they had been received, and Flower makes a message of them.
"""

import functools
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import push_objects
from flwr.superlink.grid import http_grid

from benchmarks.training import memory
from fedomc import CompressionPolicy
from fedomc.flower import Checkpoints, OMCStrategy, RoundReport, open_arrays
from fedomc.flower._flower import identify_process, name_message
from fedomc.flower.arrays import STYPE, packed_array
from fedomc.methods import encode
from fedomc.serialization import frame
from fedomc.serialization.tensor_file import dense_piece, raw_bytes, write_tensor_file

INTERVAL = 0.01  # seconds between two looks at the memory
SCALE = 0.01  # of a client's change
BUFFER = 2**26  # bytes: larger than the caches

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""The dtype and the shape of each variable, by name."""


class Watch:
    """Watches the resident memory of this process: anonymous memory and file pages apart."""

    def __init__(self) -> None:
        self.start = memory("RssAnon"), memory("RssFile") + memory("RssShmem")
        self.anonymous = self.files = self.process = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(INTERVAL):
            self.look()

    def look(self) -> None:
        """Take the present sizes into account."""
        self.anonymous = max(self.anonymous, memory("RssAnon") - self.start[0])
        self.files = max(self.files, memory("RssFile") + memory("RssShmem") - self.start[1])

    def end(self) -> dict[str, int]:
        """Return the peaks above the level at the start."""
        self._ended.set()
        self._thread.join()
        self.look()
        return {"peak_anonymous_bytes": self.anonymous, "peak_file_bytes": self.files}


class Stored(Array):
    """An array whose objects lie in a file, and which is in memory only by their IDs."""

    def __init__(self, key: str, places: dict[str, tuple[int, int]]) -> None:
        super().__init__("float32", (), "stored", b"")
        self.key, self.places = key, places

    @property
    def object_id(self) -> str:
        """The ID of the array's object."""
        return self.key


class Replies:
    """Makes the objects of clients' replies, which are the same in each reply, from a file.

    Args:
        shapes: of the model's variables.
        policy: of the clients; None for FP32.
        folder: of the file.
    """

    def __init__(self, shapes: Shapes, policy: CompressionPolicy | None, folder: Path) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.memcpy: list[float] = []
        self._one, self._other = torch.zeros(BUFFER // 4), torch.ones(BUFFER // 4)
        self.dense: dict[str, Stored] = {}
        self.packed: dict[str, Stored] = {}
        self._file = (folder / "replies").open("w+b")
        for i, (name, (dtype, shape)) in enumerate(shapes.items()):
            values = random_values(i, dtype, shape).mul_(SCALE)
            self.dense[name] = self._stored(Array(values.numpy()))
            if policy is not None and dtype == "float32":
                kind = frame.VARIABLE if policy.update_format is None else frame.UPDATE
                packed = encode(values, policy.encoding().methods[-1], name=name)
                self.packed[name] = self._stored(packed_array(packed, shape, kind))

    def _stored(self, array: Array) -> Stored:
        places = {}
        for key, one in get_all_nested_objects(array).items():
            places[key] = self._file.tell(), self._file.write(one.deflate())
        self._file.flush()
        return Stored(array.object_id, places)

    def to(self, message: Message, names: dict[str, bool]) -> Message:
        """Make the reply to a message as Flower does from the objects that arrive.

        Args:
            message: the message that was sent, whose content is not used.
            names: for each variable whether it was sent packed.
        """
        began, worked = time.perf_counter(), time.thread_time()
        self._one.copy_(self._other)
        self.memcpy.append(time.perf_counter() - began)
        record = ArrayRecord()
        for name, packed in names.items():
            record[name] = (self.packed if packed else self.dense)[name]
        metrics = MetricRecord({"num-examples": 7, "loss": 1.0})
        content = RecordDict({"arrays": record, "metrics": metrics})
        objects = {one.object_id: one.deflate() for one in (content, record, metrics)}
        for stored in record.values():
            assert isinstance(stored, Stored)
            for key, (offset, size) in stored.places.items():
                objects[key] = os.pread(self._file.fileno(), size, offset)
        arrived = http_grid.inflate_object_from_contents(content.object_id, objects)
        assert isinstance(arrived, RecordDict)
        reply = Message(arrived, reply_to=message)
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.thread_time() - worked
        return reply


class Grid:
    """A grid whose nodes reply at once.

    Args:
        replies: makes the replies.
        clients: the number of nodes.
    """

    def __init__(self, replies: Replies, clients: int) -> None:
        self.replies, self.clients = replies, clients
        self._sent: dict[str, tuple[Message, dict[str, bool]]] = {}
        self._stored: set[str] = set()

    def get_node_ids(self) -> list[int]:
        """List the nodes."""
        return list(range(1, self.clients + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Serialize messages as Flower's grid does; the SuperLink stores each object once."""
        messages, began, worked = list(messages), time.perf_counter(), time.thread_time()
        objects: dict[str, Any] = {}
        with no_object_id_recompute():
            for message in messages:
                name_message(message, message.object_id)
                objects.update(get_all_nested_objects(message))
                get_object_tree(message)
        new = set(objects) - self._stored
        push_objects(objects, lambda key, content: None, object_ids_to_push=new)
        self._stored = new | {key for key in self._stored if key in objects}
        for message in messages:
            arrays = next(one for one in message.content.values() if isinstance(one, ArrayRecord))
            names = {name: array.stype == STYPE for name, array in arrays.items()}
            empty = Message(RecordDict(), message.metadata.dst_node_id, "train")
            name_message(empty, message.metadata.message_id)
            self._sent[message.metadata.message_id] = empty, names
        self.replies.seconds += time.perf_counter() - began
        self.replies.cpu_seconds += time.thread_time() - worked
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids: Iterable[str]) -> Iterator[Message]:
        """Make the replies to messages."""
        for key in ids:
            if key in self._sent:
                yield self.replies.to(*self._sent.pop(key))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return all replies, as Flower's own grids do."""
        return list(self.pull_messages(self.push_messages(messages)))


def random_values(seed: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Make the values of a variable."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.mul_(torch.Size(shape[1:]).numel() ** -0.5).to(getattr(torch, dtype))


def random_model(shapes: Shapes, path: Path) -> ArrayRecord:
    """Write a model with random values to a file, one variable after the other, and open it."""
    pieces = []
    for i, (name, (dtype, shape)) in enumerate(shapes.items()):
        like = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        make = functools.partial(random_values, i, dtype, shape)
        pieces.append(dense_piece(name, like, lambda make=make: raw_bytes(make())))  # type: ignore[misc]
    write_tensor_file(path, {}, pieces)
    return open_arrays(path)


def billion() -> Shapes:
    """Return the shapes of a model with a billion parameters."""
    shapes: Shapes = {"embedding.weight": ("float32", (50_000, 2048))}
    for layer in range(18):
        shapes |= {f"layers.{layer}.{part}.weight": ("float32", (8192, 2048)) for part in ("gate", "up", "down")}
    return shapes


def run(format: str, strategy: str, clients: int, rounds: int, shapes: Shapes, alone: bool) -> dict[str, float | None]:
    """Run a ServerApp.

    Args:
        format: of the policy, or ``FP32``.
        strategy: the name of Flower's.
        clients: the number of replies in a round.
        rounds: the number of rounds.
        shapes: of the model.
        alone: whether Flower's strategy runs without ``OMCStrategy``, and the initial model is in memory.

    Returns:
        The peaks above the level before the model exists; the seconds of a round without those of making replies, and
        those in which the processor works on them;
        the time of a memcpy of the FP32 model, measured between the replies, relative to that of checking and
        aggregating a reply; and the bytes of the model and of the last round.
    """
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    identify_process()
    policy = None if format == "FP32" else CompressionPolicy.parse(format)
    inner = getattr(strategies, strategy)(fraction_evaluate=0.0)
    size = sum(torch.Size(shape).numel() * getattr(torch, dtype).itemsize for dtype, shape in shapes.values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        replies = Replies(shapes, policy, folder)
        grid: Any = Grid(replies, clients)
        initial = random_model(shapes, folder / "initial.safetensors")
        watch, began, worked = Watch(), time.perf_counter(), time.thread_time()
        reports: list[RoundReport] = []
        wrapped: OMCStrategy | None = None
        if alone:
            plain = ArrayRecord({name: Array(array.numpy()) for name, array in initial.items()})
            result = inner.start(grid, plain, num_rounds=rounds)
        else:
            checkpoints = Checkpoints(folder / "run", keep=1)
            wrapped = OMCStrategy(inner, policy, checkpoints=checkpoints, observers=[reports.append])
            result = wrapped.start(grid, initial, num_rounds=rounds)
        seconds = (time.perf_counter() - began - replies.seconds) / rounds
        cpu_seconds = (time.thread_time() - worked - replies.cpu_seconds) / rounds
        peaks = watch.end()
        assert len(result.train_metrics_clientapp) == rounds
    of_replies = [(one.decode_seconds + one.aggregate_seconds) / clients for one in reports]
    reply = statistics.median(of_replies) if reports else None
    return {
        **peaks,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memcpy_ratio": statistics.median(replies.memcpy) * size / BUFFER / reply if reply else None,
        "model_bytes": size,
        "down_bytes": wrapped.traffic[-1].down_bytes if wrapped else None,
        "up_bytes": wrapped.traffic[-1].up_bytes if wrapped else None,
    }
