"""The benchmark of asynchronous rounds: it runs, and its figures are computed as its docstring says."""

import json
import math
import sys
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from benchmarks import asynchronous, simulation_client
from benchmarks.virtual_grid import VirtualGrid
from fedomc.flower import collect
from tests.flower.conftest import identity  # noqa: F401  (a fixture)


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, figure = tmp_path / "out.json", tmp_path / "out.svg"
    options = ["--seeds", "1", "--minutes", "1", "--json", str(file), "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.asynchronous", *options, "--ways", "synchronous", "buffered"])
    asynchronous.main()
    found = json.loads(file.read_text())
    assert [(row["way"], row["seed"]) for row in found["rows"]] == [("synchronous", 0), ("buffered", 0)] * 2
    assert all(len(row["errors"]) == len(row["seconds"]) == asynchronous.MOMENTS for row in found["rows"])
    buffered = next(row for row in found["rows"] if row["way"] == "buffered")
    assert buffered["steps"] > 3 and buffered["errors"][-1] < buffered["errors"][0]
    assert len(found["summary"]) == 4 and figure.read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("errors", "target", "expected"),
    [
        ([0.5, 0.1, 0.1, 0.1, 0.1, 0.1], 0.1, 5.0),
        ([0.05, 0.05, 0.05], 0.1, 0.0),
        ([0.05, 0.5, 0.05], 0.1, None),
        ([0.5] * 3, 0.1, None),
    ],
)
def test_the_time_from_which_an_error_stays_low(errors: list[float], target: float, expected: float | None) -> None:
    curve = [(float(at), error) for at, error in enumerate(errors)]
    assert asynchronous.reached(curve, target) == expected


def test_a_summary_is_the_median_over_seeds() -> None:
    def row(way: str, seconds: float | None) -> dict[str, object]:
        return {"way": way, "format": "FP32", "seconds_to_error": seconds, "errors": [0.1], "replies": 2, "up_bytes": 8}

    rows = [row("synchronous", 300.0), row("synchronous", None), row("synchronous", 200.0), row("buffered", 100.0)]
    slow, fast = asynchronous.summarize(rows)
    assert (slow["seconds_to_error"], slow["speedup"], fast["speedup"]) == (300.0, 1.0, 3.0)
    assert slow["bytes_per_reply"] == 4.0


def test_the_virtual_clock_jumps_from_reply_to_reply() -> None:
    times = {1: 5.0, 2: 2.0, 3: math.inf}
    grid = VirtualGrid(times, lambda message: message, lambda message: times[message.metadata.dst_node_id])
    with grid.as_grid() as connected:
        keys = list(connected.push_messages([Message(RecordDict(), node, "train") for node in times]))
        assert list(connected.pull_messages(keys)) == []
        grid.sleep(0.1)
        assert grid.now == 2.0 and len(list(connected.pull_messages(keys))) == 1
        grid.sleep(0.1)
        assert grid.now == 5.0 and len(list(connected.pull_messages(keys))) == 1
        grid.sleep(0.1)
        assert grid.now == 6.0 and list(connected.pull_messages(keys)) == []


@pytest.mark.parametrize("app", [simulation_client.packed, simulation_client.plain])
def test_the_clients_of_the_simulation_train(app: ClientApp) -> None:
    model = simulation_client.build(2, 64)
    content = {"arrays": collect(model), "config": ConfigRecord({"layers": 2, "width": 64})}
    reply = app(Message(RecordDict({**content}), 7, "train"), Context(1, 1, {}, RecordDict(), {}))
    found = reply.content["arrays"]
    assert list(found) == list(collect(model))
    assert (found["0.weight"].numpy() != collect(model)["0.weight"].numpy()).any()
