"""A federation in one process: what a real one must give, bit for bit."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from misbehaving import CONTENTS, spoilt

from fedomc.rounds import Checkpoint
from fedomc_speech import client, federation
from fedomc_speech.run_folder import CHECKPOINT, RunFolder
from fedomc_speech.settings import Settings, Variant

Faults = Mapping[str, Mapping[str, str]]
"""What goes wrong, by round and part of the data, as in ``misbehaving``."""


class Nodes:
    """A grid whose nodes work when they are asked; their numbers differ from run to run, as Flower's do.

    Attributes:
        faults: of the nodes; ``absent`` gives no answer.
    """

    def __init__(self, clients: int, first: int = 100, faults: Faults | None = None) -> None:
        self.clients, self.first, self.faults = clients, first, faults or {}

    def get_node_ids(self) -> list[int]:
        return list(range(self.first, self.first + self.clients))

    def node_of(self, part: int) -> int:
        return self.first + self.clients - 1 - part

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [reply for message in messages for reply in self.answers(message)][::-1]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.waiting: dict[str, Message] = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"to {message.metadata.dst_node_id}"
            self.waiting[message.metadata.message_id] = message
        return list(self.waiting)  # in order, as Flower promises

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for key in message_ids for reply in self.answers(self.waiting[key])]

    def answers(self, message: Message) -> list[Message]:
        part = self.clients - 1 - (message.metadata.dst_node_id - self.first)
        if message.metadata.message_type == "query":
            return [Message(RecordDict({"identity": MetricRecord({"partition-id": part})}), reply_to=message)]
        number = str(cast(Any, message.content["config"])["server-round"])
        fault = {**self.faults.get("*", {}), **self.faults.get(number, {})}.get(str(part))
        if fault == "absent":
            return []
        if fault == "error":
            return [Message(Error(code=1, reason="no memory"), reply_to=message)]
        if fault == "killed":
            reply = Message(Error(code=3, reason="node unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink, which answers in the node's place
            return [reply]
        content = client.train_partition(message, part)
        if fault in CONTENTS:
            content = spoilt(fault, content)
        return [Message(content, reply_to=message)]


class Watcher:
    """Keeps what it sees and stops after some rounds."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self.stop_after = stop_after

    def started(self, variant: Variant, first_round: int) -> None:
        pass

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        self.rows.append((str(variant), row))

    def stop_requested(self) -> bool:
        return len(self.rows) >= self.stop_after


def run_in_process(chosen: Settings, path: Path, nodes: Nodes) -> None:
    """Run into a folder."""
    federation.run(chosen, cast(Grid, nodes), RunFolder(path, chosen, resume=False), Watcher())


def results_of(path: Path) -> dict[str, Any]:
    """Read the results of a run, by variant, without what time they took."""
    stored = json.loads((path / "results.json").read_text())["runs"]
    return without_times({run["variant"]: run for run in stored})


def without_times(runs: dict[str, Any]) -> dict[str, Any]:
    cleaned: dict[str, Any] = json.loads(json.dumps(runs))
    for result in cleaned.values():
        del result["rounds_per_minute"]
        for row in result["history"]:
            del row["seconds"], row["server_seconds"]
    return cleaned


def state_of(path: Path) -> dict[str, bytes]:
    """Read the last checkpoint: model and optimizer state; every number must be finite."""
    state = Checkpoint.read(path / CHECKPOINT).arrays
    assert all(np.isfinite(array).all() for arrays in state.values() for array in arrays.values())
    return {f"{kind} {name}": array.tobytes() for kind, arrays in state.items() for name, array in arrays.items()}
