"""Calls that stand in sentences run, and errors that are quoted exist."""

import ast
import copy
import functools
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch.optim.swa_utils import AveragedModel

import fedomc
import fedomc.huggingface
import fedomc.nvflare
from fedomc import flower
from tests.docs.execution import execute
from tests.docs.pages import PAGES, REPOSITORY, prose
from tests.flower.conftest import identity  # noqa: F401  (a fixture)
from tests.flower.test_aggregation import Network

WITH_CALLS = tuple(
    f"docs/{name}.md"
    for name in (
        "adam", "aggregation", "comparison", "files", "formats", "local-steps", "metrics", "nvflare", "training",
        "troubleshooting", "unchanged-clients", "uplink",
    )
)  # fmt: skip
"""The pages whose calls in sentences run."""


def calls(page: str) -> list[str]:
    """List the calls in a page's sentences that are whole expressions."""
    found = []
    for text in re.findall(r"`([^`]+)`", prose(PAGES[page])):
        code = text.removeprefix("with ").removesuffix(":").removeprefix("**")
        if "(" in code and "..." not in code and not code.startswith(("accumulate(", "collect(")):
            ast.parse(code, mode="eval")  # it is Python, or the page says something that cannot be written
            found.append(code)
    return found


@pytest.mark.parametrize("page", WITH_CALLS)
def test_calls_in_sentences_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = torch.nn.Sequential(torch.nn.Linear(80, 64))
    stepping = fedomc.step_in_backward(fedomc.compress_(copy.deepcopy(plain), "S1E3M7"), torch.optim.SGD, lr=0.1)
    policy = fedomc.CompressionPolicy.parse("S1E2M3+S1E2M1")
    known: dict[str, Any] = {
        **vars(fedomc),
        **vars(flower),
        "fedomc": fedomc,
        "AveragedModel": AveragedModel,
        "ArrayRecord": ArrayRecord,
        "ClientApp": ClientApp,
        "FedAvg": FedAvg,
        "copy": copy,
        "functools": functools,
        "grid": Network(2, lambda message: None),
        "policy": policy,
        "recipe": MagicMock(),
        "source": plain.state_dict(),
        "stepping": stepping,
        "torch": torch,
    }
    for call in calls(page):
        with torch.device("meta" if "materialize_" in call else "cpu"):
            model = torch.nn.Sequential(torch.nn.Linear(80, 64))
        selection = policy.select(model)
        if not call.startswith(("fedomc.materialize_", "fedomc.compress_", "policy.")):
            fedomc.compress_(model, selection)
        if call.startswith("model.bfloat16"):
            model = fedomc.decompress_(model)
        try:
            eval(call, {**known, "model": model, "selection": selection})  # noqa: S307
        except Exception as error:
            raise AssertionError(f"`{call}` in {page}: {error!r}") from error
        finally:
            torch.compiler.set_stance("default")  # which one of the calls changes for the whole process
    if page == "docs/nvflare.md":
        assert known["recipe"].add_server_output_filter.called


def test_there_are_calls() -> None:
    assert sum(len(calls(page)) for page in WITH_CALLS) > 12


def texts() -> list[list[str]]:
    """List the texts in the source, each as its constant pieces."""
    found = []
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append([part.value for part in node.values if isinstance(part, ast.Constant)])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.split(r"%[.\d]*[dfgs]", node.value.replace("%%", "%")))
    return found


def exists(quote: str, known: list[list[str]]) -> bool:
    """Tell whether each piece of a quoted text stands in one text of the source, in this order."""
    pieces = [piece.strip() for piece in quote.split("...") if piece.strip(" :")]
    return any(all(any(piece in part for part in parts) for piece in pieces) for parts in known)


def test_quoted_errors_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "docs/troubleshooting.md"
    quotes = [line for block in execute(page, PAGES[page]).unchecked for line in block.code.splitlines()]
    quotes += re.findall(r"^\| `([^`]+)` \|", PAGES[page], re.MULTILINE)
    known = texts()
    assert len(quotes) > 10 and [quote for quote in quotes if not exists(quote, known)] == []
    assert not exists("the message is for no model", known) and not exists("round ...: left out client ...", known)
