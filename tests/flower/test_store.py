"""The state of a run in its files: what a killed server leaves, and how little of it is in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = {"FedAvg": 6, "FedAvgM": 6, "FedAdam": 12, "FedMedian": 6}
"""How often a server of each strategy is killed; ``FedMedian`` has no optimizer of ours."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="servers are forks, so that they start at once")


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
