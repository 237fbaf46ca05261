"""Files to run the commands on, and how to run them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from fedomc.cli.app import app


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(network().state_dict(), path, {"format": "pt"})
    return path


def refused(result: Any, code: int) -> str:
    """Check that a command failed with one line and no traceback; return the line."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit) and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("fedomc: ")
    return line
