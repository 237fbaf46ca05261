"""A federation in one process: what a real one must give, bit for bit."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Error, Message
from flwr.serverapp import Grid
from misbehaving import CONTENTS, spoilt

from fedomc.flower.in_process import InProcess
from fedomc.serialization.checkpointing import Checkpoint
from fedomc_speech import federation
from fedomc_speech.client import app
from fedomc_speech.run_folder import CHECKPOINT, RunFolder
from fedomc_speech.settings import Settings, Variant

Faults = Mapping[str, Mapping[str, str]]
"""What goes wrong, by round and part of the data, as in ``misbehaving``."""


class Nodes(InProcess):
    """Nodes that can go wrong; their numbers differ from run to run, and replies come in any order, as Flower's do.

    Attributes:
        faults: of the nodes; ``absent`` gives no answer.
    """

    def __init__(self, clients: int, first: int = 100, faults: Faults | None = None) -> None:
        super().__init__(app, clients, first)
        self.faults = faults or {}

    def part_of(self, node: int) -> int:
        return self.clients - 1 - (node - self.first)

    def node_of(self, part: int) -> int:
        return self.first + self.clients - 1 - part

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return super().send_and_receive(messages)[::-1]

    def answers(self, message: Message) -> list[Message]:
        if message.metadata.message_type == "query":
            return super().answers(message)
        number = str(cast(Any, message.content["config"])["server-round"])
        part = str(self.part_of(message.metadata.dst_node_id))
        fault = {**self.faults.get("*", {}), **self.faults.get(number, {})}.get(part)
        if fault == "absent":
            return []
        if fault == "error":
            return [Message(Error(code=1, reason="no memory"), reply_to=message)]
        if fault == "killed":
            reply = Message(Error(code=3, reason="node unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink, which answers in the node's place
            return [reply]
        [reply] = super().answers(message)
        if fault in CONTENTS:
            reply.content = spoilt(fault, reply.content)
        return [reply]


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
