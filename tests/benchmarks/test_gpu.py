"""The benchmark of a GPU: without one it says so; its code runs on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--json", str(file)])
    with pytest.raises(SystemExit) as exit:
        gpu.main()
    assert exit.value.code == gpu.NO_DEVICE
    assert "there is no CUDA device here: nothing was measured" in capsys.readouterr().err
    assert not file.exists()


def test_a_dry_run_has_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    arguments = ["--dry-run", "--values", "3000", "--steps", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    gpu.main()
    found = json.loads(file.read_text())
    assert found["device"] == "dry run on the CPU"
    assert {(row["format"], row["op"]) for row in found["codec"]} == {
        (format, op) for format in gpu.FORMATS for op in ("decode", "encode", "update")
    }
    assert all(row["seconds"] > 0 and row["copy_ratio"] > 0 for row in found["codec"])
    variants = set(gpu.VARIANTS) - {"bitsandbytes"}
    assert {(row["model"], row["variant"]) for row in found["training"]} == {
        (model, variant) for model in gpu.MODELS for variant in variants
    }
    assert all(row["step_seconds"] > 0 and row["peak_bytes"] is None for row in found["training"])
