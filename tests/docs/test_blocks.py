"""Every block of code in the pages runs as it is printed, and does what the page says."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedomc
from fedomc.cli import planning
from tests.docs.execution import Outcome, dense_model, execute, language_model
from tests.docs.federation import NODES, federate
from tests.docs.pages import PAGES, blocks, prose
from tests.flower.conftest import flower_log, identity  # noqa: F401  (fixtures)

WITH_BLOCKS = [page for page, text in PAGES.items() if blocks(text)]
MOST_NOT_RUN = 4


def check_training(outcome: Outcome) -> None:
    held = re.search(r"([0-9.]+)% of FP32", outcome.output)
    assert held is not None and 31.2 < float(held[1]) < 33  # ten bits of 32, and the biases


def check_advice(outcome: Outcome) -> None:
    network, advice = outcome.names["network"], outcome.names["advice"]
    assert isinstance(network[0].weight, fedomc.CompressedTensor) and str(advice) in outcome.output
    assert fedomc.parameter_bytes(network).ratio == min(row.ratio for row in advice.formats if row.holds) < 0.36


def check_budget(outcome: Outcome) -> None:
    fitting = re.search(r"^\[(.*)\]$", outcome.output, re.MULTILINE)
    assert fitting is not None and "S1E2M3/64+S1E2M1/64" in fitting[1] and "FP32" not in fitting[1]


def check_files(outcome: Outcome) -> None:
    tensors = outcome.names["tensors"]
    assert tensors.keys() == {"weight", "weight_scale", "bias"}
    assert tensors["weight"].dtype is torch.float8_e4m3fn and tensors["weight_scale"].shape == (64, 8)


def check_huggingface(outcome: Outcome) -> None:
    assert re.search(r"3\d% of FP32", outcome.output)
    model, tokens = outcome.names["model"], torch.arange(6)[None]
    assert model.get_input_embeddings().weight.shape[0] == 140 and model(tokens).logits.shape[-1] == 140
    assert torch.isfinite(outcome.names["same"](tokens).logits).all()


def check_steps(outcome: Outcome) -> None:
    assert "'fedomc.step-kept': 0.9" in outcome.output or "'fedomc.step-kept': 1.0" in outcome.output


def check_cli(outcome: Outcome) -> None:
    assert 0.15 < float(outcome.output) < 0.25


CHECKS: dict[str, Callable[[Outcome], None]] = {
    "docs/budget.md": check_budget,
    "docs/choose-format.md": check_advice,
    "docs/cli.md": check_cli,
    "docs/files.md": check_files,
    "docs/huggingface.md": check_huggingface,
    "docs/local-steps.md": check_steps,
    "docs/training.md": check_training,
}
"""What a page promises beside the texts behind its blocks."""


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_the_blocks_run(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flower_log: pytest.LogCaptureFixture,  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    dense_model(tmp_path / "model.safetensors")
    language_model(tmp_path / "checkpoint")
    monkeypatch.setattr(planning, "_PATIENCE", math.inf)  # what it says of its time depends on the machine
    outcome = execute(page, PAGES[page])
    assert outcome.ran + sum(bool(block.reason) or block.language == "bash" for block in blocks(PAGES[page]))
    if page in CHECKS:
        CHECKS[page](outcome)
    if {"server", "client"} <= outcome.names.keys():
        federation = federate(outcome.names, monkeypatch)
        rounds = len(federation.strategy.traffic)
        assert [str(reply.error) for reply in federation.replies if reply.has_error()] == []
        assert "left out" not in flower_log.text
        assert rounds > 1 and all(row.received == NODES for row in federation.strategy.traffic)
        for name, array in federation.result.arrays.items():
            assert (array.numpy() != federation.initial[name].numpy()).any(), name
        if page == "docs/lora.md":
            assert all("lora_" in name for name in federation.initial)
        else:
            fp32 = sum(array.numpy().nbytes for array in federation.initial.values())
            assert federation.strategy.traffic[-1].down_bytes < 0.25 * NODES * fp32


def test_few_blocks_are_not_run() -> None:
    reasons = [block.reason for text in PAGES.values() for block in blocks(text) if block.reason]
    assert len(reasons) <= MOST_NOT_RUN and all(len(reason) > 20 for reason in reasons)


@pytest.mark.parametrize("page", PAGES)
def test_code_is_fenced(page: str) -> None:
    """What is indented instead would be run by nothing; the formulas of the bytes are no code."""
    if page not in ("docs/format.md",):
        lines = prose(PAGES[page]).splitlines()
        indented = [
            line for before, line in zip(["", *lines], lines, strict=False) if not before and line[:4] == " " * 4
        ]
        assert not indented


def test_checks_are_for_pages_that_exist() -> None:
    assert CHECKS.keys() <= PAGES.keys()
