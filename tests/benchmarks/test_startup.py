"""The benchmark of starting: a row for each statement, and the library costs little more than torch."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import startup
from fedomc._torch import processor_name


def test_the_library_starts_like_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr(startup, "STATEMENTS", {"import torch": "", "import fedomc": "", "import no_such_module": ""})
    monkeypatch.setattr(sys, "argv", ["benchmarks.startup", "--rounds", "1", "--json", str(file)])
    startup.main()
    written = json.loads(file.read_text())
    assert written["processor"] == processor_name() and written["rounds"] == 1
    torch, fedomc = written["rows"]
    assert (torch["statement"], torch["time_ratio"], torch["memory_ratio"]) == ("import torch", 1, 1)
    assert fedomc["seconds"] > 0 and fedomc["modules"] > torch["modules"]
    assert fedomc["memory_ratio"] < 1.1
