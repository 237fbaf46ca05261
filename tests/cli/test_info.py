import json

import pytest
import torch

import fedomc
from fedomc.codec import native
from tests.cli.conftest import run


def test_info_says_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDOMC_PRODUCTS", "blas")
    result = run("info", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["fedomc"] == fedomc.__version__ and found["packages"]["torch"] == torch.__version__
    assert found["codec"] == ("reference" if native.extension is None else "native")
    assert found["settings"]["FEDOMC_PRODUCTS"] == "blas" and found["devices"][0] == "cpu"


def test_info_prints_every_entry_on_a_line() -> None:
    found, lines = json.loads(run("info", "--json").stdout), run("info").stdout.splitlines()
    assert len(lines) == sum(len(value) if isinstance(value, dict) else 1 for value in found.values())
    assert any(line.split() == ["packages", "torch", torch.__version__] for line in lines)
