"""Some of the models of ``benchmarks.models``, which measures all of them, and what its checks can tell."""

import pytest
import torch

from benchmarks import models
from benchmarks.architectures import ARCHITECTURES, Architecture
from fedomc import CompressionPolicy, compress_, parameter_bytes

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
RIGHT = {
    "largest_difference": 0.0, "loss_first": 2.0, "loss_last": 1.0, "parameter_bytes": 40, "predicted_bytes": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["NemotronAsrStreamingEncoder", "GPT2LMHeadModel", "ResNetForImageClassification", "torch.nn.LSTM"]
)
def test_trains_as_it_should(name: str) -> None:
    rows = models.measure(BY_NAME[name])
    assert [row["format"] for row in rows] == ["S1E3M7@0.9", "S1E2M3+S1E2M1"]
    for row in rows:
        assert row["wrong"] == []
        assert row["parameter_bytes"] < 0.45 * row["fp32_bytes"]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
@pytest.mark.parametrize("policy", [*models.POLICIES.values(), *models.LOSSLESS])
def test_holds_the_predicted_bytes(architecture: Architecture, policy: CompressionPolicy) -> None:
    model, _ = architecture.make()
    predicted = models.predicted_bytes(model, policy)
    compress_(model, policy.select(model))
    assert parameter_bytes(model).total == predicted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"largest_difference": 2e-6}, "differs"),
        ({"loss_last": float("nan")}, "not finite"),
        ({"loss_last": 1.9}, "does not fall"),
        ({"predicted_bytes": 41}, "41 bytes were predicted"),
    ],
)
def test_a_wrong_figure_is_told(change: dict[str, float], message: str) -> None:
    assert models.wrong(RIGHT) == []
    assert any(message in reason for reason in models.wrong({**RIGHT, **change}))


def test_a_format_that_loses_a_bit_is_not_lossless() -> None:
    architecture = BY_NAME["torch.nn.LSTM"]
    almost = CompressionPolicy("S1E8M22", transform="none", weight_matrices_only=False)
    plain, packed = (models.trained(architecture, policy, 1)[0] for policy in (None, almost))
    assert models.largest_difference(models.values_of(plain), models.values_of(packed)) > 0


def test_differences_see_the_sign_of_zero() -> None:
    assert models.largest_difference([torch.tensor([0.0])], [torch.tensor([-0.0])]) > 0
    assert models.largest_difference([torch.tensor([-0.0, 1.0])], [torch.tensor([-0.0, 1.0])]) == 0
    assert models.largest_difference([torch.tensor([100.0])], [torch.tensor([101.0])]) == pytest.approx(0.01)
