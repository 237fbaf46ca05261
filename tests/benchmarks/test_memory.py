"""The benchmark of memory: every kind of variant runs, and rows have the fields that are promised."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import memory

FIELDS = {
    "variant", "batch", "seconds", "parameters", "activations", "optimizer", "checkpointing", "parameter_bytes",
    "peak_rss_bytes", "peak_ratio", "speed_ratio", "gradient_error",
}  # fmt: skip


def test_rows_of_a_tiny_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    names = ["fp32", "S1E3M7+8-checkpointed"]
    arguments = ["--model", "tiny", "--batches", "2x4", "--rounds", "1", "--steps", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.memory", *arguments, "--variants", *names])
    memory.main()
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == names
    for row in rows.values():
        assert row.keys() >= FIELDS and (row["batch"], row["seconds"]) == (2, 4)
        assert row["peak_rss_bytes"] > 0 and row["speed_ratio"] > 0
    assert rows["fp32"]["gradient_error"] is None and rows["fp32"]["peak_ratio"] == 1
    assert 0 < rows[names[1]]["gradient_error"] < 0.03
    assert rows[names[1]]["parameter_bytes"] < 0.45 * rows["fp32"]["parameter_bytes"]


def test_every_variant_is_listed_with_its_columns() -> None:
    wanted = {(p, a, c) for p in ("S1E3M7", "S1E2M3") for a in ("FP32", "S1E4M3", "INT4") for c in (False, True)}
    found = {(each.parameters, each.activations, each.checkpointing) for each in memory.VARIANTS.values()}
    assert found > wanted
