"""The example of ``docs/huggingface.md`` runs as it is printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(block, names)  # noqa: S102
    assert re.search(r"3\d% of FP32", capsys.readouterr().out)
    tokens = torch.arange(6)[None]
    assert torch.equal(names["same"](tokens).logits, names["model"](tokens).logits)
