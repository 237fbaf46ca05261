import warnings

import pytest
import torch
from torch import nn

from fedomc import CompressionPolicy, NonFiniteError, StepReport, compress_, step_in_backward, step_report
from fedomc.tensor.steps import DRIFT_LIMIT, NOISE_LIMIT, StepRecord, total


def trained(
    policy: str, rounding: str, optimizer: str, lr: float, steps: int, width: int = 64, in_backward: bool = False
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    how = CompressionPolicy.parse(policy, rounding=rounding)
    compress_(model, how.select(model))
    optimizer_class = getattr(torch.optim, optimizer)
    if in_backward:
        step_in_backward(model, optimizer_class, lr=lr)
    else:
        stepper = optimizer_class(model.parameters(), lr=lr)
    for _ in range(steps):
        loss = model(torch.randn(32, width)).square().mean()
        if in_backward:
            loss.backward()
        else:
            stepper.zero_grad()
            loss.backward()
            stepper.step()
    return model


@pytest.mark.filterwarnings("ignore:most of the training steps")
@pytest.mark.parametrize(
    ("policy", "rounding", "optimizer", "lr", "least", "most"),
    [
        ("S1E8M23", "nearest", "AdamW", 5e-5, 0.99, 1.01),  # FP32 itself rounds a step to a multiple of its unit
        ("S1E3M7", "nearest", "AdamW", 5e-5, -0.05, 0.3),
        ("S1E3M7", "stochastic", "AdamW", 5e-5, 0.7, 1.3),
        ("S1E2M3", "nearest", "AdamW", 5e-5, -0.05, 0.1),
        ("S1E3M7", "nearest", "SGD", 10.0, 0.8, 1.2),
        ("S1E2M3+S1E3M0", "stochastic", "AdamW", 5e-5, 0.8, 1.2),
        ("S1E2M3+S1E3M4", "nearest", "SGD", 0.1, 0.8, 1.2),
        ("INT8", "stochastic", "AdamW", 5e-4, 0.7, 1.3),
    ],
)
def test_the_share_that_arrives(
    policy: str, rounding: str, optimizer: str, lr: float, least: float, most: float
) -> None:
    report = step_report(trained(policy, rounding, optimizer, lr, 40))
    assert least <= report.total.kept <= most, str(report)
    assert set(report.variables) == {"0.weight", "2.weight"}


def test_the_share_is_that_of_all_values_and_steps() -> None:
    """Against the whole variable at every step, which is what the sample stands for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    compress_(model, CompressionPolicy("S1E3M4", rounding="nearest").select(model))
    weight = model[0].weight
    asked = moved = noise = 0.0
    for step in range(120):
        gradient = torch.randn(512, 512, generator=torch.Generator().manual_seed(step))
        before = weight.dequantize().double()
        with torch.no_grad():
            weight.add_(gradient, alpha=-1e-3)
        change, wanted = weight.dequantize().double() - before, -1e-3 * gradient.double()
        asked += float(wanted.square().sum())
        moved += float((change * wanted).sum())
        noise += float((change - wanted).square().sum())
    total = step_report(model).total
    assert total.kept == pytest.approx(moved / asked, abs=0.02)
    assert total.noise == pytest.approx(noise / asked, abs=0.02)
    assert total.steps == 120


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("S1E2M3", 0.1), ("S1E3M4", 0.1), ("INT8", 0.1), ("S1E3M7+S1E2M3", 0.3)]
)
def test_drift_is_the_distance_that_noise_alone_moves_the_values(policy: str, tolerance: float) -> None:
    """Every other step undoes the one before it, so that all that is left in the end is noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    compress_(model, CompressionPolicy.parse(policy, rounding="stochastic").select(model))
    weight = model[0].weight
    before, direction = weight.dequantize(), torch.randn(256, 256)
    for step in range(200):
        with torch.no_grad():
            weight.add_(direction, alpha=3e-4 if step % 2 else -3e-4)
    moved = float((weight.dequantize() - before).norm() / before.norm())
    report = step_report(model)
    assert report.total.drift == pytest.approx(moved, rel=tolerance)
    assert report.variables["0.weight"].drift == pytest.approx(report.total.drift)


def test_the_total_weighs_variables_by_their_size() -> None:
    small, large = StepRecord("small", "S1E2M3", "stochastic"), StepRecord("large", "S1E2M3", "stochastic")
    small.steps = small.samples = large.samples = 1
    large.steps = 4
    small.asked, small.moved, small.noise, small.size = 1.0, 1.0, 1.0, 1.0
    large.asked, large.moved, large.noise, large.size = 3.0, 2.0, 0.5, 99.0
    found = total([small, large, StepRecord("not stepped", "S1E2M3", "stochastic")])
    assert found == (0.75, 0.375, pytest.approx(((1.0 + 4 * 0.5) / 100) ** 0.5))
    assert total([]) == (1.0, 0.0, 0.0)


def test_one_warning_names_the_worst_variables() -> None:
    with pytest.warns(RuntimeWarning, match="most of the training steps are lost") as caught:
        trained("S1E2M3", "nearest", "AdamW", 5e-5, 40)
    found = [str(each.message) for each in caught if "training steps are lost" in str(each.message)]
    assert len(found) == 1
    for part in ("0.weight (", "2.weight (", "S1E2M3 rounded to nearest", "rounding='stochastic'", "step_report"):
        assert part in found[0]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("policy", "optimizer", "lr"), [("S1E2M1", "SGD", 1.0), ("S1E2M1+S1E3M0", "AdamW", 1e-2)])
def test_one_warning_of_noise_names_the_worst_variables(
    policy: str, optimizer: str, lr: float, in_backward: bool
) -> None:
    with pytest.warns(RuntimeWarning, match="the noise of rounding spoils training") as caught:
        model = trained(policy, "stochastic", optimizer, lr, 120, in_backward=in_backward)
    (found,) = [str(each.message) for each in caught if "spoils training" in str(each.message)]
    method = policy.rpartition("+")[2]
    for part in ("0.weight (", "2.weight (", f"%, {method})", "update part", "by block", "exclude=[", "step_report"):
        assert part in found
    quality = step_report(model).total
    assert quality.drift > DRIFT_LIMIT and quality.noise > NOISE_LIMIT


def test_a_server_judges_the_noise_of_its_clients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        model = compress_(nn.Sequential(nn.Linear(64, 64)), "S1E2M1")
        model[0].weight.steps.judged_here = False
        for _ in range(120):
            with torch.no_grad():
                model[0].weight.add_(torch.randn(64, 64), alpha=1e-3)
    assert step_report(model).total.drift > DRIFT_LIMIT


def test_no_warning_of_noise_that_is_small_beside_the_steps() -> None:
    """In a run of many steps a fine format drifts as well, but the steps themselves move the values much further."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        model = compress_(nn.Sequential(nn.Linear(64, 64)), "S1E2M3")
        for _ in range(150):
            with torch.no_grad():
                model[0].weight.add_(torch.randn(64, 64), alpha=0.05)
    quality = step_report(model).total
    assert quality.drift > DRIFT_LIMIT and quality.noise < NOISE_LIMIT


@pytest.mark.parametrize(
    ("policy", "optimizer", "lr"),
    [("S1E3M7", "AdamW", 5e-5), ("S1E2M3", "SGD", 0.1), ("S1E2M3+S1E3M0", "AdamW", 5e-5), ("S1E2M1", "AdamW", 1e-4)],
)
def test_no_false_alarm_where_rounding_is_stochastic(policy: str, optimizer: str, lr: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(policy, "stochastic", optimizer, lr, 60)


def test_no_false_alarm_where_few_values_move() -> None:
    """Steps of a ten-thousandth of the distance between codes, in a few rows, as an embedding has them."""
    model = nn.Sequential(nn.Embedding(512, 32))
    compress_(model, CompressionPolicy("S1E2M3", rounding="stochastic").select(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40):
            gradient = torch.zeros(512, 32)
            gradient[step % 7] = 1.0
            with torch.no_grad():
                model[0].weight.add_(gradient, alpha=-3e-5)


def test_other_values_altogether_are_no_step() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    compress_(model, CompressionPolicy("S1E3M7").select(model))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 64))
    assert step_report(model) == StepReport(step_report(model).total, {})
    assert step_report(model).total.steps == 0


def test_a_refused_step_is_not_counted_among_the_samples() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    compress_(model, CompressionPolicy("S1E3M7").select(model))
    weight = model[0].weight
    with pytest.raises(NonFiniteError), torch.no_grad():
        weight.add_(torch.full((64, 64), float("nan")))
    with torch.no_grad():
        weight.add_(torch.ones(64, 64), alpha=0.01)
    record: StepRecord = weight.steps
    assert torch.isfinite(torch.tensor([record.asked, record.moved, record.noise])).all()


def test_the_table_has_the_worst_first() -> None:
    text = str(step_report(trained("S1E3M7", "stochastic", "SGD", 0.1, 10)))
    lines = text.splitlines()
    assert lines[0].split() == ["variable", "kept", "noise", "drift", "steps"]
    assert lines[1].startswith("total") and {line.split()[0] for line in lines[2:]} == {"0.weight", "2.weight"}
