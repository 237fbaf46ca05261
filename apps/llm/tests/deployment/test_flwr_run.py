"""``flwr run`` as ``docs/llm.md`` has it, with a model and texts that take no time."""

import json
from pathlib import Path

import pytest

from tests.flwr_run import run_as_page_says


@pytest.mark.deployment
def test_the_app_runs_as_its_page_says(tiny: Path, four: Path, tmp_path: Path) -> None:
    small = (
        f'model="{tiny}" texts="{four}" output="{tmp_path / "results"}" rounds=1 local-steps=1 length=32 held-out=2 '
        "sample-tokens=4 rank=2"
    )
    printed = run_as_page_says("docs/llm.md", tmp_path, nodes=4, run_config=small)
    runs = json.loads((tmp_path / "results" / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["full", "full", "lora"], printed
    assert (tmp_path / "results" / "report.html").exists()
