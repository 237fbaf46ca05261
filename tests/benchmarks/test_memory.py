"""The benchmark of memory: every kind of variant runs, and rows have the fields that are promised."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory

FIELDS = {
    "variant", "batch", "seconds", "parameters", "activations", "optimizer", "checkpointing", "parameter_bytes",
    "peak_rss_bytes", "peak_ratio", "speed_ratio", "gradient_error",
}  # fmt: skip


def rows_of(model: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Run variants of a small model; return the rows by variant."""
    file = tmp_path / "rows.json"
    arguments = ["--models", model, "--rounds", "1", "--steps", "1", "--json", str(file), "--variants", *names]
    monkeypatch.setattr(sys, "argv", ["benchmarks.memory", *arguments])
    memory.main()
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    for row in rows.values():
        assert row.keys() >= FIELDS
        assert row["peak_rss_bytes"] > 0 and row["speed_ratio"] > 0
    return rows


def test_rows_of_a_tiny_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = "S1E3M7+8-checkpointed"
    rows = rows_of("tiny", [packed], tmp_path, monkeypatch)
    assert list(rows) == ["fp32", packed]
    assert {(row["batch"], row["seconds"], row["tokens"]) for row in rows.values()} == {(2, 4, None)}
    assert rows["fp32"]["gradient_error"] is None and rows["fp32"]["peak_ratio"] == 1
    assert 0 < rows[packed]["gradient_error"] < 0.03
    assert rows["fp32"]["predicted_bytes"] is None
    assert rows[packed]["predicted_bytes"] > rows[packed]["parameter_bytes"]
    assert rows[packed]["parameter_bytes"] < 0.45 * rows["fp32"]["parameter_bytes"]


def test_rows_of_a_language_model_are_compared_with_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = "S1E3M7+8-packed-adamw-sliced"
    rows = rows_of("gpt2-tiny", [packed], tmp_path, monkeypatch)
    assert list(rows) == ["fp32-adamw", packed]
    assert {(row["batch"], row["seconds"], row["tokens"]) for row in rows.values()} == {(2, None, 64)}
    assert rows["fp32-adamw"]["peak_ratio"] == 1 and rows[packed]["optimizer"] == "AdamW (S1E4M3/64)"
    assert 0 < rows[packed]["gradient_error"] < 0.1


def test_every_variant_is_listed_with_its_columns() -> None:
    wanted = {(p, a, c) for p in ("S1E3M7", "S1E2M3") for a in ("FP32", "S1E4M3", "INT4") for c in (False, True)}
    listed = [memory.VARIANTS[name] for name in memory.variants_of("large")]
    assert {(each.parameters, each.activations, each.checkpointing) for each in listed} > wanted
    optimizers = {each.optimizer for each in listed}
    assert optimizers == {memory.SGD, memory.ADAMW, memory.TORCHAO_ADAMW, memory.PACKED_ADAMW}
    assert all(memory.VARIANTS[name].optimizer != memory.SGD for name in memory.variants_of("gpt2"))
