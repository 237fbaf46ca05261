"""The benchmark of fine-tuning: variants run, and rows have the fields that are promised."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import finetune

FIELDS = {
    "model", "method", "base_format", "adapter_format", "steps", "loss", "perplexity", "peak_rss_bytes", "peak_ratio",
    "step_seconds", "speed_ratio", "down_bytes", "up_bytes", "seed", "perplexity_ratio",
}  # fmt: skip


def test_rows_of_a_tiny_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(job: dict[str, Any]) -> dict[str, Any] | None:
        return finetune.run(**job)

    file, threads = tmp_path / "rows.json", torch.get_num_threads()
    variants = ["full:BF16", "full:S1E2M3/64+S1E2M1/64", "lora:S1E2M3/64:S1E4M3/64"]
    small = ["--steps", "1", "--length", "32", "--held-out", "2", "--pretraining-steps", "1"]
    arguments = ["benchmarks.finetune", *small, "--json", str(file), "--variants", *variants]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(finetune, "in_process", in_this_process)
    monkeypatch.setattr(finetune, "memory", lambda field: {"VmRSS": 1000, "VmHWM": 3000}[field])
    finetune.main()
    torch.set_num_threads(threads)
    rows = {f"{row['method']}:{row['base_format']}": row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["full:FP32", "lora:FP32", *(name.removesuffix(":S1E4M3/64") for name in variants)]
    for row in rows.values():
        assert row.keys() >= FIELDS and row["model"] == "embedded" and row["peak_rss_bytes"] == 2000
    full, lora = rows["full:FP32"], rows["lora:S1E2M3/64"]
    assert rows["full:S1E2M3/64+S1E2M1/64"]["down_bytes"] < 0.21 * full["down_bytes"]
    assert rows["full:S1E2M3/64+S1E2M1/64"]["up_bytes"] < 0.14 * full["up_bytes"]
    assert lora["up_bytes"] == lora["down_bytes"] < 0.4 * rows["lora:FP32"]["down_bytes"]
    assert rows["lora:FP32"]["loss"] == pytest.approx(lora["loss"], rel=0.05)


def test_a_variant_runs_in_its_own_process_and_one_that_fails_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.in_process({"variant": "full:FP32", "path": str(tmp_path)}) is None
    assert "full:FP32 failed: TypeError" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", "benchmarks.finetune", "--help"], capture_output=True, text=True)
    assert "--head-slice" in done.stdout


def test_a_ratio_is_to_fp32_by_the_same_method_and_seed_or_to_nothing() -> None:
    def row(method: str, base_format: str, size: int, seed: int = 0) -> dict[str, Any]:
        figures = {"peak_rss_bytes": size, "step_seconds": 2.0 * size, "perplexity": size / 10}
        return {"method": method, "base_format": base_format, "seed": seed, **figures}

    ones = {"peak_ratio": 1.0, "speed_ratio": 1.0, "perplexity_ratio": 1.0}
    rows = [row("full", "FP32", 100)]
    assert finetune.ratios(rows) == ones
    for other in (row("lora", "BF16", 30), row("full", "BF16", 30, seed=1)):  # FP32 did not fit into the memory
        rows.append(other)
        assert finetune.ratios(rows) == dict.fromkeys(ones)
        assert "%" not in finetune.line("", {**other, **finetune.ratios(rows), "down_bytes": 1, "up_bytes": 1})
    rows.append(row("full", "INT8", 50))
    assert finetune.ratios(rows) == {"peak_ratio": 0.5, "speed_ratio": 2.0, "perplexity_ratio": 0.5}
