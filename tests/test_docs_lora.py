"""The example of docs/lora.md runs as it is printed: the adapters alone travel, and change."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

import fedomc
from tests.flower.conftest import flower_log, identity  # noqa: F401  (fixtures)
from tests.flower.test_aggregation import Network

PAGE = (Path(__file__).parent.parent / "docs" / "lora.md").read_text(encoding="utf-8")


def test_the_federated_example_runs_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "lora"}
    exec(block, names)  # noqa: S102
    results, start = [], fedomc.flower.OMCStrategy.start

    def watched(strategy: Any, grid: Any, arrays: Any, **kwargs: Any) -> Any:
        results.append((strategy, start(strategy, grid, arrays, **kwargs), arrays))
        return results[-1][1]

    monkeypatch.setattr(fedomc.flower.OMCStrategy, "start", watched)
    answer = lambda message: names["client"](copy.copy(message), Context(1, 1, {}, RecordDict(), {}))  # noqa: E731
    names["server"](Network(2, answer), Context(1, 0, {}, RecordDict(), {}))
    ((strategy, result, initial),) = results
    assert [row.received for row in strategy.traffic] == [2, 2]
    assert list(result.arrays) == list(initial) and all("lora_" in name for name in initial)
    changed = [name for name in initial if (result.arrays[name].numpy() != initial[name].numpy()).any()]
    assert len(changed) == len(initial)
