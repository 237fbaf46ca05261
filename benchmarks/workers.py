"""Runs parts of a benchmark in processes of their own, so that none counts what another one took."""

import json
import subprocess
import sys
from typing import Any


class WorkerError(Exception):
    """A process failed; the text is what it wrote to its standard error, or its exit status."""


def run_worker(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module with arguments, and return the JSON in the last line of its output.

    Raises:
        WorkerError: the process failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise WorkerError(done.stderr.strip() or f"exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def try_worker(name: str, module: str, *arguments: str) -> dict[str, Any] | None:
    """Do what ``run_worker`` does, but print that ``name`` failed, as it may for want of memory, and return None."""
    try:
        return run_worker(module, *arguments)
    except WorkerError as error:
        print(f"{name} failed: {str(error).splitlines()[-1]}", flush=True)
        return None
