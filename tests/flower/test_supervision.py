import logging
import math
import re

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, Strategy
from torch import nn

import fedomc
from fedomc import RoundsFailedError
from fedomc.flower import OMCStrategy, collect, install, step_metrics
from fedomc.flower.supervision import STEP_DRIFT, STEP_KEPT, STEP_NOISE, Supervision, gain_of
from tests.flower.test_aggregation import Network
from tests.flower.test_strategy import Nodes, build


class FailingGrid(Nodes):
    """A grid on which every client fails in the rounds named, and answers with what it got in the others."""

    def __init__(self, failing: set[int]) -> None:
        self.failing, self.round = failing, 0

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        self.round += bool(messages)
        if self.round in self.failing:
            return [Message(Error(1, "no memory"), reply_to=message) for message in messages]
        return [self.answer(message) for message in messages]

    def answer(self, message: Message) -> Message:
        arrays = collect(install(build(), message), message)
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


def run(failing: set[int], rounds: int, **kwargs: object) -> None:
    strategy = OMCStrategy(FedAvg(fraction_evaluate=0.0), fedomc.CompressionPolicy("S1E3M7"), **kwargs)  # type: ignore[arg-type]
    arrays = collect(build())
    for number in range(1, rounds + 1):
        grid = FailingGrid({1} if number in failing else set())
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))  # type: ignore[arg-type]
        new, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
        arrays = arrays if new is None else new


@pytest.mark.parametrize(
    ("failing", "rounds", "kwargs", "when"),
    [
        ({1, 2, 3}, 5, {}, "in round 3 and the 2 before it"),
        ({3, 4, 5}, 5, {}, "in round 5 and the 2 before it"),
        ({2}, 3, {"failed_rounds": 1}, "in round 2 and the 0 before it"),
        ({1, 2}, 5, {}, None),
        ({1, 2, 4, 5}, 6, {}, None),
        ({1, 2, 3, 4, 5}, 5, {"failed_rounds": None}, None),
    ],
)
def test_rounds_without_a_usable_reply_end_the_run(
    failing: set[int], rounds: int, kwargs: dict[str, object], when: str | None
) -> None:
    if when is None:
        run(failing, rounds, **kwargs)
        return
    with pytest.raises(RoundsFailedError, match=when) as caught:
        run(failing, rounds, **kwargs)
    assert "4 selected" in str(caught.value) and "failed_rounds=None" in str(caught.value)


def test_a_short_run_of_failed_rounds_alone_fails_at_its_end() -> None:
    supervision = Supervision(3)
    supervision.add(1, 4, 0, None)
    with pytest.raises(RoundsFailedError, match="in any of 1 rounds"):
        supervision.finish()
    supervision.add(2, 4, 1, None)
    supervision.finish()
    Supervision(3).finish()  # nothing was asked of anybody


def test_a_second_run_is_judged_by_its_own_rounds() -> None:
    def fail(message: Message) -> Message:
        return Message(Error(1, "no memory"), reply_to=message)

    strategy = OMCStrategy(FedAvg(fraction_evaluate=0.0), "S1E3M7")
    strategy.start(Network(2, randomly_stepped), collect(build()), num_rounds=1)  # type: ignore[arg-type]
    for _ in range(2):  # of the same number of rounds: three in a row do not end the second
        with pytest.raises(RoundsFailedError, match="in any of 2 rounds"):
            strategy.start(Network(2, fail), collect(build()), num_rounds=2)  # type: ignore[arg-type]


def test_lost_steps_are_warned_of_once(flower_log: pytest.LogCaptureFixture) -> None:
    supervision = Supervision(3)
    with flower_log.at_level(logging.WARNING):
        for number, kept in enumerate((0.11, 0.13, 0.12, 0.12, 0.12, 0.12, 0.97), start=1):
            supervision.add(number, 4, 4, MetricRecord({STEP_KEPT: kept}))
    assert "round 5: only 12% of the clients' training steps take effect" in flower_log.text
    assert "round 4" not in flower_log.text and "round 6" not in flower_log.text


@pytest.mark.parametrize("kept", [(0.0, 0.0, 3.1, 0.0, 0.4, 2.7, 0.0), (0.9, 1.1, 1.0, 1.0, 0.95)])
def test_what_varies_about_the_whole_is_not_lost(kept: tuple[float, ...], flower_log: pytest.LogCaptureFixture) -> None:
    supervision = Supervision(3)
    for number, value in enumerate(kept, start=1):
        supervision.add(number, 4, 4, MetricRecord({STEP_KEPT: value}))
    assert "training steps" not in flower_log.text


@pytest.mark.parametrize(
    ("gain", "clients", "noise", "drift", "when"),
    [
        (1.0, 4, 2.0, 0.2, 13),  # 0.1 a round
        (1.0, 1, 2.0, 0.2, 4),
        (10.0, 4, 2.0, 0.02, 13),
        (1.0, 4, 2.0, 0.02, None),
        (1.0, 4, 0.1, 0.2, None),
    ],
)
def test_noise_is_warned_of_once_when_the_rounds_add_up(
    gain: float, clients: int, noise: float, drift: float, when: int | None, flower_log: pytest.LogCaptureFixture
) -> None:
    supervision = Supervision(3, gain, "S1E2M3")
    for number in range(1, 40):
        supervision.add(number, clients, clients, MetricRecord({STEP_NOISE: noise, STEP_DRIFT: drift}))
        assert ("spoils training" in flower_log.text) is (when is not None and number >= when), number
    if when is not None:
        (warning,) = {text for text in flower_log.messages if "spoils training" in text}
        for part in (
            f"round {when}: the noise of rounding to S1E2M3",
            "by 36%" if when == 13 else "by 40%",
            f"{noise / clients:.2f} times",
        ):
            assert part in warning
        assert "update part" in warning and "exclude=" in warning


def test_no_noise_is_judged_without_its_metrics(flower_log: pytest.LogCaptureFixture) -> None:
    supervision = Supervision(3)
    for number in range(1, 9):
        supervision.add(number, 4, 4, MetricRecord({STEP_NOISE: 9.0}))
        supervision.add(number, 4, 4, MetricRecord({STEP_DRIFT: 9.0}))
        supervision.add(number, 4, 0, None)
        supervision.add(number, 4, 4, MetricRecord({STEP_KEPT: 1.0}))
    assert "spoils training" not in flower_log.text


@pytest.mark.parametrize("figure", [1e300, -1e300, 1e-300, 0.0, math.inf, [1.0]])
@pytest.mark.parametrize("name", [STEP_KEPT, STEP_NOISE, STEP_DRIFT])
def test_a_figure_that_no_client_can_have_measured_ends_no_run(name: str, figure: float | list[float]) -> None:
    supervision = Supervision(3)
    for number in range(1, 9):
        found = {STEP_KEPT: 1.0, STEP_NOISE: 0.1, STEP_DRIFT: 0.1, name: figure}
        supervision.add(number, 4, 4, MetricRecord(found))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "gain"),
    [
        (FedAvg(), 1.0),
        (FedAdam(), 1.0),
        (FedAvgM(server_momentum=0.9), 10.0),
        (FedAvgM(server_momentum=0.5, server_learning_rate=0.1), 0.2),
    ],
)
def test_a_momentum_multiplies_what_a_change_does_in_the_end(strategy: Strategy, gain: float) -> None:
    assert gain_of(strategy) == pytest.approx(gain)
    assert OMCStrategy(strategy, None)._supervision._gain == pytest.approx(gain)


def randomly_stepped(message: Message) -> Message:
    """Make one small step in a random direction."""
    model = install(build(), message)
    torch.manual_seed(message.metadata.dst_node_id)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape), alpha=3e-3)
    metrics = MetricRecord({"num-examples": 1, **step_metrics(model)})
    return Message(RecordDict({"arrays": collect(model, message), "metrics": metrics}), reply_to=message)


@pytest.mark.parametrize(("format", "warned"), [("S1E2M1", True), ("S1E3M7", False)])
def test_a_federation_in_too_few_bits_is_warned(
    format: str, warned: bool, flower_log: pytest.LogCaptureFixture
) -> None:
    strategy = OMCStrategy(FedAvgM(fraction_evaluate=0.0, server_momentum=0.9), fedomc.CompressionPolicy(format))
    strategy.start(Network(4, randomly_stepped), collect(build()), num_rounds=8)  # type: ignore[arg-type]
    assert (f"the noise of rounding to {format} spoils training" in flower_log.text) is warned


def test_a_client_leaves_it_to_the_server_to_judge_noise() -> None:
    judged = []

    def answer(message: Message) -> Message:
        model = install(build(), message)
        judged.extend(p.steps.judged_here for p in model.parameters() if isinstance(p, fedomc.CompressedTensor))
        return randomly_stepped(message)

    strategy = OMCStrategy(FedAvg(fraction_evaluate=0.0), fedomc.CompressionPolicy("S1E2M3"))
    strategy.start(Network(2, answer), collect(build()), num_rounds=1)  # type: ignore[arg-type]
    assert judged and not any(judged)


def test_metrics_of_a_trained_model() -> None:
    assert step_metrics(nn.Linear(64, 64)) == {}
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    fedomc.compress_(model, "S1E3M7")
    assert step_metrics(model) == {}
    with torch.no_grad():
        model.weight.add_(torch.randn(64, 64), alpha=0.1)
    found = step_metrics(model)
    assert set(found) == {STEP_KEPT, STEP_NOISE, STEP_DRIFT}
    assert found[STEP_KEPT] == pytest.approx(1, abs=0.1) and 0 < found[STEP_NOISE] < 0.1
    record = ArrayRecord(dict(collect(model).items()))
    assert list(record) == ["weight", "bias"]


def test_variables_that_the_format_cannot_hold_are_warned_of_once(flower_log: pytest.LogCaptureFixture) -> None:
    model = build()
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() > 1).view(-1)[0] = 1e3
    arrays, grid = collect(model), FailingGrid(set())
    for format, warned in (("S1E2M3", 1), ("S1E2M3/64", 0)):
        flower_log.clear()
        strategy = OMCStrategy(FedAvg(fraction_evaluate=0.0), format)
        with flower_log.at_level(logging.WARNING):
            for number in (1, 2):
                list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        found = {record.getMessage() for record in flower_log.records if "cannot hold" in record.getMessage()}
        assert len(found) == warned
        assert all(
            re.match(r"round 1: S1E2M3 cannot hold 1 of 8 variables: it loses \d+% of 0\.weight", x) for x in found
        )
