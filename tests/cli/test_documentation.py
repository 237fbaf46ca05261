"""The commands and the example of docs/cli.md run as they are printed."""

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import run

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def test_the_page_runs(dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(dense.parent)
    (commands,) = re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        result = run(*arguments)
        assert program == "fedomc" and result.exit_code == 0 and result.stdout and not result.stderr, line
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(example, {})  # noqa: S102
    assert 0.15 < float(capsys.readouterr().out) < 0.25
