"""The model of costs: it runs, and finds the constants of costs that follow it."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import scale
from tests.flower.conftest import identity  # noqa: F401  (a fixture)


def cost(nodes: int, size: int) -> scale.Row:
    return {
        "nodes": nodes,
        "parameters": size,
        "cpu_seconds": 0.5 + 3e-8 * size + nodes * (0.002 + 1e-9 * size),
        "down_bytes": 1.5 * nodes * size,
        "up_bytes": 1.25 * nodes * size,
        "peak_anonymous_bytes": 1e6 + 2 * size,
        "peak_file_bytes": 3e6 + 20 * size,
    }


def test_costs_that_follow_the_model_are_predicted() -> None:
    constants = scale.fit([cost(nodes, size) for nodes in (10, 40) for size in (2**18, 2**21)])
    for nodes, size in ((10, 2**20), (1000, 10**9)):
        found, wanted = scale.predicted(constants, nodes, size), cost(nodes, size)
        wanted["peak_file_bytes"] += 8 * size if nodes > 64 else 0  # the float64 total
        for key in wanted.keys() - {"nodes", "parameters"}:
            assert found[key] == pytest.approx(wanted[key], rel=1e-6), key
        transfers = 2.75 * size / 2.5e6, nodes * 2.75 * size / 1.25e9
        assert found["round_seconds"] == pytest.approx(transfers[0] + 60 + max(transfers[1], found["cpu_seconds"]))


@pytest.mark.usefixtures("identity")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(nodes: int, parameters: int, format: str, strategy: str, repeats: int) -> scale.Row:
        row = scale.run(nodes, parameters, format, strategy)
        return {**row, "nodes": nodes, "parameters": parameters}

    monkeypatch.setattr(scale, "measured", here)
    file = tmp_path / "out.json"
    arguments = ["--calibration", "2", "3", "--sizes", "32768", "65536", "--nodes", "4", "--parameters", "32768"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.scale", *arguments, "--json", str(file)])
    scale.main()
    written = json.loads(file.read_text())
    (check,) = written["checks"]
    for key in ("down_bytes", "up_bytes"):  # partial quantization draws other variables for each client
        assert check["predicted"][key] == pytest.approx(check["measured"][key], rel=0.25)
    assert [row["nodes"] for row in written["extrapolated"]] == [nodes for nodes, _ in scale.COHORTS]
