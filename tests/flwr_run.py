"""Runs the command ``flwr run`` that a page shows, with settings that take less time."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def run_as_page_says(
    page: str, folder: Path, *, nodes: int, run_config: str = "", app_folder: Path = REPOSITORY
) -> str:
    """Run the one ``flwr run`` of a page to its end.

    Args:
        page: relative to the repository.
        folder: where Flower keeps what it needs.
        nodes: in the place of the page's number.
        run_config: in the place of that of the page, if it has one.
        app_folder: where the command is run.

    Returns:
        What was printed.
    """
    (line,) = re.findall(r"^flwr run .*$", (REPOSITORY / page).read_text(encoding="utf-8"), re.MULTILINE)
    command = shlex.split(line)
    if run_config:
        command[command.index("--run-config") + 1] = run_config
    command[command.index("--federation-config") + 1] = f"num-supernodes={nodes}"
    environment = {
        **os.environ, "FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=app_folder, env=environment, capture_output=True, text=True, timeout=400
        )
    finally:
        _stop_superlink(environment["FLWR_HOME"])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _stop_superlink(home: str) -> None:
    """End what ``flwr run`` leaves running: the processes with this home."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={home}\0" in (place / "environ").read_text(errors="replace"):
                os.kill(int(place.name), signal.SIGTERM)
