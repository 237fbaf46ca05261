"""``flwr run`` as ``docs/speech.md`` has it, with two rounds of two clients."""

import json
from pathlib import Path

import pytest

from tests.flwr_run import run_as_page_says


@pytest.mark.deployment
def test_the_app_runs_as_its_page_says(tmp_path: Path) -> None:
    small = f'output="{tmp_path / "results"}" split="iid" clients=2 cohort=2 rounds=2 formats="FP32 S1E3M7"'
    printed = run_as_page_says("docs/speech.md", tmp_path, nodes=2, run_config=small)
    runs = json.loads((tmp_path / "results" / "results.json").read_text())["runs"]
    assert [(run["format"], run["rounds"]) for run in runs] == [("FP32", 2), ("S1E3M7", 2)], printed
    assert (tmp_path / "results" / "report.html").exists()
