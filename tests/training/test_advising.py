import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedomc
from fedomc import Advice, CompressionPolicy, FormatAdvice, NonFiniteError, OMCError, PolicyError, advise
from fedomc.training.advising import FORMATS

SMALL = ("S1E2M1", "S1E2M3", "S1E3M7", "S1E2M3+S1E3M4", "S1E4M14")


class Network(nn.Module):
    """What must stay as it is: statistics in buffers, dropout, tied and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.norm = nn.BatchNorm1d(64)
        self.dropout = nn.Dropout(0.2)
        self.second = nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.second.weight
        self.frozen = nn.Linear(64, 16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(self.first(x)).tanh())
        return self.frozen(self.tied(self.second(hidden).tanh()))


def example(lr: float = 1e-3) -> tuple[nn.Module, Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, batch = Network(), torch.randn(24, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    mean_square(model(batch)).backward()
    optimizer.step()  # so that there is a state, and gradients
    return model, batch, optimizer


def mean_square(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


def row_of(advice: Advice, format: str) -> FormatAdvice:
    return next(row for row in advice.formats if str(row.policy) == format and not row.policy.exclude)


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for each in x.values():
            yield from tensors_in(each)
    elif isinstance(x, list | tuple):
        for each in x:
            yield from tensors_in(each)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    everything = (list(model.parameters()), [p.grad for p in model.parameters()], list(model.buffers()))
    return [x.clone() for x in tensors_in((*everything, optimizer.state_dict(), torch.get_rng_state()))]


@pytest.mark.parametrize("train", [True, False])
def test_nothing_changes(train: bool) -> None:
    model, batch, optimizer = example()
    model.train(train)
    before, kept = state_of(model, optimizer), batch.clone()
    parameters = list(model.parameters())
    advise(model, batch, mean_square, optimizer)
    after = state_of(model, optimizer)
    assert len(before) == len(after) > 20
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert torch.equal(batch, kept) and model.training is train
    assert all(x is y for x, y in zip(parameters, model.parameters(), strict=True))


def test_the_same_seed_gives_the_same_advice() -> None:
    model, batch, optimizer = example()
    first = advise(model, batch, mean_square, optimizer, formats=SMALL, seed=3)
    torch.manual_seed(9)
    assert advise(model, batch, mean_square, optimizer, formats=SMALL, seed=3) == first
    assert advise(model, batch, mean_square, optimizer, formats=SMALL, seed=4) != first
    assert all(row.policy.seed == 3 for row in first.formats)


@pytest.mark.parametrize("format", ["S1E2M3", "S1E3M7", "NF4", "INT8", "S1E2M3+S1E3M4"])
def test_the_error_is_that_of_the_compressed_model(format: str) -> None:
    model, batch, optimizer = example()
    model.eval()
    row = row_of(advise(model, batch, mean_square, optimizer, formats=[format]), format)
    wanted = model(batch)
    compressed = fedomc.compress_(copy.deepcopy(model), format)
    found = compressed(batch)
    error = (found - wanted).norm() / (wanted - wanted.mean(0)).norm()
    assert row.output_error == pytest.approx(float(error), rel=1e-4)
    assert row.loss == pytest.approx(float(mean_square(found)), rel=1e-4)
    assert row.ratio == pytest.approx(fedomc.parameter_bytes(compressed).ratio)


@pytest.mark.parametrize("lr", [1e-2, 1.0])
def test_the_noise_is_that_of_a_step_in_training(lr: float) -> None:
    """Against the optimizer's own step of the compressed model, which has the same gradient but for the encoding."""
    model, batch, optimizer = example()
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    row = row_of(advise(model, batch, mean_square, optimizer, formats=["S1E3M7"], steps=1), "S1E3M7")
    assert row.kept == pytest.approx(1, abs=0.15)
    compressed = fedomc.compress_(copy.deepcopy(model), "S1E3M7")
    before = {name: p.dequantize() for name, p in compressed.named_parameters() if p.dim() > 1}
    stepping = torch.optim.SGD(compressed.parameters(), lr=lr)
    stepping.zero_grad()
    mean_square(compressed(batch)).backward()
    changes = {name: -lr * p.grad for name, p in compressed.named_parameters() if p.dim() > 1 and p.requires_grad}
    stepping.step()
    noise = sum(
        float((p.dequantize() - before[name] - changes[name]).square().sum())
        for name, p in compressed.named_parameters()
        if name in changes
    )
    asked = sum(float(change.square().sum()) for change in changes.values())
    size = sum(float(value.square().sum()) for value in before.values())
    assert row.noise == pytest.approx(noise / asked, rel=0.1)
    assert row.drift == pytest.approx(math.sqrt(noise / size), rel=0.1)
    assert set(row.variables) == set(before) and row.variables["frozen.weight"].noise == 0


def test_rows_verdicts_and_the_cheapest_policy_that_holds() -> None:
    model, batch, optimizer = example(lr=1e-4)
    advice = advise(model, batch, mean_square, optimizer, steps=1000)
    ratios = [row.ratio for row in advice.formats]
    assert ratios == sorted(ratios) and len(ratios) >= len(FORMATS)
    assert row_of(advice, "S1E2M1").reason.count("steps: their noise moves the weights by") == 1
    assert row_of(advice, "S1E4M14").holds and row_of(advice, "S1E3M7").holds
    first = next(row for row in advice.formats if row.holds)
    assert advice.policy == first.policy and first.ratio < 0.36
    lines = str(advice).splitlines()
    assert lines[0].split() == ["format", "bytes", "output", "error", "loss", "noise", "drift", "verdict"]
    assert lines[1].startswith("FP32") and len(lines) == 2 + len(advice.formats)
    assert sum(line.endswith("holds") for line in lines) == sum(row.holds for row in advice.formats)
    fedomc.compress_(model, advice.policy)


def test_no_format_may_hold() -> None:
    model, batch, optimizer = example(lr=1e-4)
    advice = advise(model, batch, mean_square, optimizer, formats=["S1E2M1"], error_limit=1e-3)
    assert advice.policy is None and advice.formats[0].function_reason.startswith("output: ")


def test_more_steps_have_more_noise() -> None:
    model, batch, optimizer = example(lr=1e-4)
    few, many = (
        advise(model, batch, mean_square, optimizer, formats=["S1E2M3", "S1E2M3+S1E3M0"], steps=steps)
        for steps in (10, 1000)
    )
    assert row_of(many, "S1E2M3").drift == pytest.approx(10 * row_of(few, "S1E2M3").drift)
    two = "S1E2M3+S1E3M0"
    assert row_of(many, two).noise > 3 * row_of(few, two).noise  # the update is larger, and so is what is between codes


def test_steps_that_rounding_to_nearest_loses() -> None:
    model, batch, optimizer = example(lr=1e-6)
    policies = [CompressionPolicy("S1E3M7", rounding=rounding) for rounding in ("nearest", "stochastic")]
    for policy, lost in zip(policies, (True, False), strict=True):
        (row,) = advise(model, batch, mean_square, optimizer, formats=[policy]).formats
        assert (row.steps_reason == "steps: 0% arrive") is lost and row.holds is not lost


def test_variables_worth_excluding_are_found() -> None:
    """One layer has an outlier, which no input meets, and its scale leaves nothing of the layer's other values."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    with torch.no_grad():
        model[2].weight[7] = model[2].bias[7] = 0.0
        model[3].weight[5, 7] = 40.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batch = torch.randn(32, 64)
    advice = advise(model, batch, mean_square, optimizer, formats=["S1E2M3", "S1E4M14"])
    assert advice.policy is not None and advice.policy.exclude == ("3.weight",) and str(advice.policy) == "S1E2M3"
    failing = row_of(advice, "S1E2M3")
    errors = {name: variable.output_error for name, variable in failing.variables.items()}
    assert max(errors, key=lambda name: errors[name] or 0) == "3.weight"
    assert failing.function_reason and "S1E2M3 (1 excluded)" in str(advice)
    assert row_of(advice, "S1E4M14").variables["3.weight"].output_error is None  # it was not needed


@pytest.mark.parametrize("kind", ["mapping", "list", "tensor"])
def test_batches_and_outputs_of_several_kinds(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
            found = self.layer(x)
            return {"values": [found, found.argmax(-1)], "loss": mean_square(found - (0 if y is None else y))}

    model = Two()
    x, y = torch.randn(8, 64), torch.randn(8, 64)
    batch = {"mapping": {"x": x, "y": y}, "list": [x, y], "tensor": x}[kind]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    advice = advise(model, batch, lambda output: output["loss"], optimizer, formats=["S1E3M7"])
    assert advice.loss == pytest.approx(float(mean_square(model.layer(x) - (0 if kind == "tensor" else y))), rel=1e-5)
    assert advice.formats[0].holds


def test_progress_is_shown_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch, optimizer = example()
    advise(model, batch, mean_square, optimizer, formats=["S1E3M7"])
    assert capsys.readouterr() == ("", "")
    advise(model, batch, mean_square, optimizer, formats=["S1E3M7"], progress=True)
    out, err = capsys.readouterr()
    assert not out and "1/1 S1E3M7: the output" in err


def refused(change: Callable[[nn.Module], object] | None = None, **kwargs: Any) -> None:
    model, batch, optimizer = example()
    if change is not None:
        change(model)
    arguments = {"batch": batch, "loss": mean_square, "optimizer": optimizer, "formats": ["S1E3M7"], **kwargs}
    advise(model, arguments.pop("batch"), arguments.pop("loss"), arguments.pop("optimizer"), **arguments)


@pytest.mark.parametrize(
    ("error", "text", "kwargs"),
    [
        (
            PolicyError,
            r"first\.weight is compressed already.*decompress_",
            {"change": lambda m: fedomc.compress_(m, "INT8")},
        ),
        (PolicyError, r"first\.weight is torch\.float64", {"change": lambda m: m.double()}),
        (PolicyError, r"first\.weight lies on the meta device", {"change": lambda m: m.to("meta")}),
        (PolicyError, "none of 9 variables can be compressed", {"exclude": ["*"]}),
        (PolicyError, "no format to advise on", {"formats": []}),
        (PolicyError, "steps=0", {"steps": 0}),
        (PolicyError, "error_limit=nan", {"error_limit": math.nan}),
        (PolicyError, "have the same name", {"formats": ["S1E3M7", "S1E3M7"]}),
        (PolicyError, r"the optimizer steps none of .*first\.weight", {"optimizer": torch.optim.SGD([torch.zeros(1)])}),
        (PolicyError, "torch.optim.AdamW", {"optimizer": torch.optim.SGD}),
        (OMCError, r"the loss must be a scalar tensor, got \(24, 16\).*mean", {"loss": lambda y: y}),
        (OMCError, "got float", {"loss": lambda y: 1.0}),
        (OMCError, "has no scalar loss: pass loss=", {"loss": None}),
        (OMCError, "requires a gradient", {"change": lambda m: m.requires_grad_(False)}),
        (NonFiniteError, "the loss on the batch is nan", {"loss": lambda y: y.mean() * math.nan}),
        (
            NonFiniteError,
            r"a step makes first\.weight NaN",
            {"loss": lambda y: (y.mean() * 1e-30).sqrt() * 1e30 * 0 + (y * 0).sqrt().sum()},
        ),
        (fedomc.FormatError, "S1E9M9", {"formats": ["S1E9M9"]}),
    ],
)
def test_what_cannot_be_measured_is_refused(error: type[Exception], text: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=text):
        refused(**kwargs)


def test_an_output_without_values_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Opaque:
        def __init__(self, values: Tensor) -> None:
            self.values = values

    wrapped = nn.Sequential(model, _Applied(Opaque))
    with pytest.raises(OMCError, match="no floating-point tensor"):
        advise(wrapped, torch.randn(4, 64), lambda output: output.values.mean(), optimizer)


def test_an_output_whose_shape_depends_on_the_weights_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), _Applied(lambda y: y[y > 0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OMCError, match="shape of the model's output depends on the weights"):
        advise(model, torch.randn(64, 64), lambda output: output.mean(), optimizer, formats=["S1E2M1"])


class _Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)
