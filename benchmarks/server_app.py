"""Measures one run of a ServerApp, from the initial model to the last round, in a process of its own.

``benchmarks.server`` starts it. Messages go through Flower's own serialization in both directions, as with the grid of
a real deployment: what is sent is turned into objects, queued and dropped at once, where the SuperLink would store it;
the objects of a reply are made here as if they had been received, and Flower makes a message of them.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.training import memory
from fedomc import CompressionPolicy
from fedomc.flower import Checkpoints, OMCStrategy
from fedomc.flower.arrays import STYPE, packed_array
from fedomc.methods import encode
from fedomc.serialization import frame

INTERVAL = 0.01  # seconds between two looks at the memory
SCALE = 0.01  # of a client's change

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


class Replies:
    """Makes the objects of clients' replies, with random values that are the same in each reply.

    Args:
        shapes: of the model's variables.
        policy: of the clients; None for FP32.
    """

    def __init__(self, shapes: Shapes, policy: CompressionPolicy | None) -> None:
        self.shapes, self.policy = shapes, policy
        self.seconds = 0.0
        size = max(torch.Size(shape).numel() for _, shape in shapes.values())
        self._values = torch.randn(size, generator=torch.Generator().manual_seed(1)).mul_(SCALE)
        self._made: dict[tuple[bool, str, tuple[int, ...]], Array] = {}

    def _array(self, name: str, packed: bool) -> Array:
        """Return an array for a variable; variables of the same shape have the same values."""
        dtype, shape = self.shapes[name]
        key = packed, dtype, shape
        if key not in self._made:
            values = self._values[: torch.Size(shape).numel()].view(shape)
            if packed:
                assert self.policy is not None
                kind = frame.VARIABLE if self.policy.update_format is None else frame.UPDATE
                self._made[key] = packed_array(encode(values, self.policy.encoding().methods[-1]), shape, kind)
            else:
                self._made[key] = Array(values.to(getattr(torch, dtype)).numpy())
        return self._made[key]

    def to(self, message: Message, names: dict[str, bool]) -> Message:
        """Make the reply to a message as Flower does from the objects that arrive.

        Args:
            message: the message that was sent, whose content is not used.
            names: for each variable whether it was sent packed.
        """
        began = time.perf_counter()
        record = ArrayRecord()
        for name, packed in names.items():
            record[name] = self._array(name, packed)
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 7, "loss": 1.0})})
        objects = {key: one.deflate() for key, one in get_all_nested_objects(content).items()}
        arrived = inflate_object_from_contents(content.object_id, objects)
        assert isinstance(arrived, RecordDict)
        reply = Message(arrived, reply_to=message)
        self.seconds += time.perf_counter() - began
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
        messages, began = list(messages), time.perf_counter()
        objects: dict[str, Any] = {}
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                objects.update(get_all_nested_objects(message))
                get_object_tree(message)
        new = set(objects) - self._stored
        push_objects(objects, lambda key, content: None, object_ids_to_push=new)
        self._stored = new | {key for key in self._stored if key in objects}
        for message in messages:
            arrays = next(one for one in message.content.values() if isinstance(one, ArrayRecord))
            names = {name: array.stype == STYPE for name, array in arrays.items()}
            empty = Message(RecordDict(), message.metadata.dst_node_id, "train")
            empty.metadata.__dict__["_message_id"] = message.metadata.message_id
            self._sent[message.metadata.message_id] = empty, names
        self.replies.seconds += time.perf_counter() - began
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids: Iterable[str]) -> Iterator[Message]:
        """Make the replies to messages."""
        for key in ids:
            if key in self._sent:
                yield self.replies.to(*self._sent.pop(key))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return all replies, as Flower's own grids do."""
        return list(self.pull_messages(self.push_messages(messages)))


def random_arrays(shapes: Shapes) -> ArrayRecord:
    """Make a model with random values."""
    draw, record = torch.Generator().manual_seed(0), ArrayRecord()
    for name, (dtype, shape) in shapes.items():
        values = torch.randn(shape, generator=draw) * torch.Size(shape[1:]).numel() ** -0.5
        record[name] = Array(values.to(getattr(torch, dtype)).numpy())
    return record


def run(
    format: str, strategy: str, clients: int, rounds: int, shapes: Shapes, folder: str | None, alone: bool
) -> dict[str, float]:
    """Run a ServerApp.

    Args:
        format: of the policy, or ``FP32``.
        strategy: the name of Flower's.
        clients: the number of replies in a round.
        rounds: the number of rounds.
        shapes: of the model.
        folder: where the checkpoints are; None for a run without any.
        alone: whether Flower's strategy runs without ``OMCStrategy``.
    """
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)
    policy = None if format == "FP32" else CompressionPolicy.parse(format)
    replies = Replies(shapes, policy)
    for name in shapes:  # before the level of memory is taken
        replies._array(name, False)
        if policy is not None:
            replies._array(name, True)
    grid = Grid(replies, clients)
    inner = getattr(strategies, strategy)(fraction_evaluate=0.0)
    checkpoints = None if folder is None else Checkpoints(folder, keep=1)
    wrapped = inner if alone else OMCStrategy(inner, policy, checkpoints=checkpoints, weight_cap=None)
    watch = Watch()
    began = time.perf_counter()
    result = wrapped.start(grid, random_arrays(shapes), num_rounds=rounds)
    seconds = time.perf_counter() - began - replies.seconds
    peaks = watch.end()
    assert len(result.train_metrics_clientapp) == rounds
    return {**peaks, "seconds": seconds / rounds}
