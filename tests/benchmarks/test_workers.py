"""Processes of benchmarks: what they print last is read, and one that fails says why."""

from pathlib import Path

import pytest

from benchmarks.workers import WorkerError, run_worker, try_worker

MODULE = """
import json, os, sys
if sys.argv[1] == "killed":
    os._exit(9)  # as for want of memory: without a word
if sys.argv[1] == "wrong":
    raise ValueError("no such model")
print("first\\n" + json.dumps({"given": sys.argv[1:]}))
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_worker.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_the_last_line_is_what_is_returned() -> None:
    assert run_worker("some_worker", "a", "b") == {"given": ["a", "b"]}


@pytest.mark.parametrize(("way", "reason"), [("wrong", "ValueError: no such model"), ("killed", "exit status 9")])
def test_one_that_fails_says_why(way: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerError, match=reason):
        run_worker("some_worker", way)
    assert try_worker("a variant", "some_worker", way) is None
    assert capsys.readouterr().out == f"a variant failed: {reason}\n"
