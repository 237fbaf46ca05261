"""The example of docs/asynchronous.md runs as it is printed."""

import re
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from torch import nn

import fedomc
from benchmarks.virtual_grid import VirtualGrid
from fedomc.flower import collect, install

PAGE = (Path(__file__).parents[2] / "docs" / "asynchronous.md").read_text(encoding="utf-8")


def trained(message: Message) -> Message:
    model = install(nn.Linear(80, 80), message)
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": collect(model, message), "metrics": metrics}), reply_to=message)


def test_the_example_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    exec(block, names)  # noqa: S102
    grid = VirtualGrid(range(1, 9), trained, lambda message: float(message.metadata.dst_node_id))
    with grid.as_grid() as connected:
        names["server"](connected, Context(1, 0, {}, RecordDict(), {}))
    assert len(grid.asked) == 4 + 2 * 7 + 1
    stored = fedomc.flower.Checkpoints(tmp_path / "run").load()
    assert stored is not None and stored.progress["round"] == 8
