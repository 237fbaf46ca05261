"""The state of a run in its files: what a killed server leaves, and how little of it is in memory."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam
from safetensors.torch import save_file

from fedomc.flower import Checkpoints, OMCStrategy, open_arrays
from fedomc.flower.arrays import dense_array
from fedomc.flower.mapped import MappedArray
from tests.flower.test_aggregation import Network, answer, model
from tests.flower.test_mapped import anonymous

KILLS = {"FedAvg": 6, "FedAvgM": 6, "FedAdam": 12, "FedMedian": 6}
"""How often a server of each strategy is killed; ``FedMedian`` has no optimizer of ours."""

LARGE = 10_000_000
"""Values of a variable of 40 MB, which the C library gives back to the system as soon as it is released."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="servers are forks, so that they start at once")
def test_a_server_killed_at_any_moment_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "24", *(f"{name}={count}" for name, count in KILLS.items())]
    command = [sys.executable, "-m", "tests.flower.killed_server", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == sum(KILLS.values()) == 30
    for row in rows:
        assert row["signal"] == 9, row
        assert row["found"] and row["found"] == row["wanted"], row
        assert not row["rest"], row
    assert len({len(row["left"]) for row in rows}) > 1  # before and after checkpoints


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_between_messages_the_state_of_a_run_is_in_files(tmp_path: Path) -> None:
    """Adam's model and moments are three models in memory; in files they are none. Each kind of run is far from 1."""
    grown = {kind: growth(Checkpoints(tmp_path, keep=1) if kind == "files" else None) for kind in ("files", "memory")}
    assert grown["memory"] > 2 and grown["files"] < 0.5, grown


def growth(checkpoints: Checkpoints | None) -> float:
    """Return how much anonymous memory a run takes after two rounds, in sizes of the model."""
    wrapped = OMCStrategy(FedAdam(fraction_evaluate=0.0), None, checkpoints=checkpoints)
    grid = Network(2, changed)
    sizes: list[int] = []
    before = anonymous()
    wrapped.start(
        grid,  # type: ignore[arg-type]
        ArrayRecord({name: Array(np.ones(LARGE, np.float32)) for name in "ab"}),
        num_rounds=2,
        evaluate_fn=lambda number, arrays: sizes.append(anonymous()),  # type: ignore[func-returns-value]
    )
    return (sizes[-1] - before) / (2 * 4 * LARGE)


def changed(message: Message) -> Message:
    record = ArrayRecord()
    for name, array in message.content["arrays"].items():
        values = array.numpy()
        values += np.float32(message.metadata.dst_node_id)
        record[name] = dense_array(values)
    content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


def test_the_initial_model_is_the_first_checkpoint(tmp_path: Path) -> None:
    save_file({name: torch.from_numpy(a.numpy()) for name, a in model().items()}, tmp_path / "model.safetensors")
    seen: dict[int, bool] = {}

    def look(number: int, arrays: ArrayRecord) -> None:
        seen[number] = all(isinstance(array, MappedArray) for array in arrays.values())

    grid = Network(2, lambda message: answer(message, 1e-2))
    results = []
    opened, ordered = open_arrays(tmp_path / "model.safetensors"), ArrayRecord()
    for name in model():  # the nodes draw their changes in this order
        ordered[name] = opened[name]
    for initial in (model(), ordered):
        folder = tmp_path / f"run-{len(results)}"
        random.seed(7)  # by which Flower orders the nodes
        wrapped = OMCStrategy(FedAdam(), "S1E3M7", checkpoints=Checkpoints(folder))
        result = wrapped.start(grid, initial, num_rounds=2, evaluate_fn=look)  # type: ignore[arg-type]
        assert [path.name for path in Checkpoints(folder).paths()] == [f"round-{i:08}.safetensors" for i in range(3)]
        assert seen == {0: True, 1: True, 2: True}
        results.append({name: result.arrays[name].data for name in model()})
    assert results[0] == results[1]


class Tweaking(OMCStrategy):
    """A strategy that changes what was aggregated: a file to which that was written is not the model."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        arrays["bias"] = dense_array(np.full(50, server_round, np.float32))
        return arrays, metrics


def test_what_a_subclass_makes_of_the_model_is_saved(tmp_path: Path) -> None:
    wrapped = Tweaking(FedAdam(), "S1E3M7", checkpoints=Checkpoints(tmp_path))
    wrapped.start(Network(2, lambda message: answer(message, 1e-2)), model(), num_rounds=2)  # type: ignore[arg-type]
    stored = Checkpoints(tmp_path).load()
    assert stored is not None and set(stored.arrays) == {"model", "m_t", "v_t"}
    assert (stored.arrays["model"]["bias"] == 2).all()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".fedomc")) == []


def test_a_round_that_ends_in_an_error_leaves_no_file(tmp_path: Path) -> None:
    def fail(number: int, arrays: ArrayRecord) -> None:
        if number == 2:
            raise RuntimeError("the evaluation failed")

    wrapped = OMCStrategy(FedAdam(), "S1E3M7", checkpoints=Checkpoints(tmp_path))
    grid = Network(2, lambda message: answer(message, 1e-2))
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        wrapped.start(grid, model(), num_rounds=3, evaluate_fn=fail)  # type: ignore[arg-type]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", "round-00000000.safetensors", "round-00000001.safetensors"]
    lock = "import sys; from fedomc.serialization import folder_lock; folder_lock.acquire(sys.argv[1])"
    subprocess.run([sys.executable, "-c", lock, str(tmp_path)], check=True)  # noqa: S603  (another process may go on)
