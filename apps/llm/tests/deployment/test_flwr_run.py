"""``flwr run`` as ``docs/llm.md`` has it, with a model and texts that take no time."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[4]


@pytest.mark.deployment
def test_the_app_runs_as_its_page_says(tiny: Path, four: Path, tmp_path: Path) -> None:
    (line,) = re.findall(r"^flwr run .*$", (REPOSITORY / "docs/llm.md").read_text(encoding="utf-8"), re.MULTILINE)
    command = shlex.split(line)
    small = (
        f'model="{tiny}" texts="{four}" output="{tmp_path / "results"}" rounds=1 local-steps=1 length=32 held-out=2 '
        "sample-tokens=4 rank=2"
    )
    command[command.index("--run-config") + 1] = small
    command[command.index("--federation-config") + 1] = "num-supernodes=4"
    programs = str(Path(sys.executable).parent)
    environment = {
        **os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
    }  # fmt: skip
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400
        )
    finally:
        _stop_superlink(environment["FLWR_HOME"])
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "results" / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["full", "full", "lora"], done.stdout + done.stderr
    assert (tmp_path / "results" / "report.html").exists()


def _stop_superlink(home: str) -> None:
    """End what ``flwr run`` leaves running: the processes with this home."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={home}\0" in (place / "environ").read_text(errors="replace"):
                os.kill(int(place.name), signal.SIGTERM)
