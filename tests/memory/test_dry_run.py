"""A dry run on shapes serves all formats of a kind, and leaves what is outside of it alone."""

from typing import Any

import pytest
import torch
from torch import nn

import fedomc
from fedomc.memory import report
from fedomc.memory.dry_run import undisturbed
from tests.conftest import randn


def test_all_formats_of_a_kind_are_predicted_from_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tracked, runs = report.tracked, list[tuple[bool, bool]]()

    def counted(*args: Any, packs_activations: bool, packs_state: bool, **kwargs: Any) -> Any:
        runs.append((packs_activations, packs_state))
        return tracked(*args, packs_activations=packs_activations, packs_state=packs_state, **kwargs)

    monkeypatch.setattr(report, "tracked", counted)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    found = fedomc.memory_report(
        model, randn(8, 64), loss=lambda y: y.square().mean(), lr=0.1, measure=False,
        formats=("FP32", "S1E3M7", "S1E2M3"), activations=("FP32", "S1E4M3", "INT4"),
    )  # fmt: skip
    assert len(found.predicted) == 9 and sorted(runs) == [(False, False), (True, False)]


def test_a_dry_run_works_in_inference_mode_and_draws_nothing() -> None:
    model = nn.Linear(2, 2)
    state = torch.get_rng_state()
    with torch.inference_mode(), undisturbed(model):
        torch.randn(3)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)
