"""Rounds that select more clients than they need, and go on without the last ones."""

import logging
import math
import random
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, Strategy

import fedomc
from benchmarks.virtual_grid import VirtualGrid
from fedomc.flower import OMCStrategy
from fedomc.flower.arrays import STYPE
from fedomc.serialization.checkpointing import Checkpoints
from tests.flower.test_aggregation import SHAPE, answer, model

NODES = range(1, 14)


def late(message: Message) -> float:
    """Return the seconds of a node: as many as its ID says, but node 3 dies."""
    node = message.metadata.dst_node_id
    return math.inf if node == 3 else float(node)


def some_bad(message: Message) -> Message:
    """Answer as most nodes do, but node 1 fails, and node 2 sends damaged codes."""
    reply = answer(message, 1e-3)
    if message.metadata.dst_node_id == 1:
        return Message(Error(1, "no memory"), reply_to=message)
    if message.metadata.dst_node_id == 2:
        reply.content["arrays"]["weight"] = Array("float32", SHAPE, STYPE, b"garbage")
    return reply


def evaluated(message: Message) -> Message:
    node = message.metadata.dst_node_id
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "node": node})}), reply_to=message)


def both(message: Message) -> Message:
    return evaluated(message) if message.metadata.message_type == "evaluate" else some_bad(message)


def run(
    over_selection: float,
    inner: Strategy | None = None,
    rounds: int = 1,
    folder: Path | None = None,
    grid: VirtualGrid | None = None,
) -> tuple[OMCStrategy, VirtualGrid, ArrayRecord]:
    grid = grid or VirtualGrid(NODES, both, late)
    checkpoints = None if folder is None else Checkpoints(folder)
    policy = fedomc.CompressionPolicy("S1E3M7", fraction=0.5)
    wrapped = OMCStrategy(
        inner or FedAvg(fraction_evaluate=0.0), policy, over_selection=over_selection, checkpoints=checkpoints
    )
    with grid.as_grid() as connected:
        result = wrapped.start(connected, model(), num_rounds=rounds, timeout=60)
    return wrapped, grid, result.arrays


@pytest.mark.parametrize("inner", [FedAvg, FedMedian])
def test_a_round_goes_on_with_the_first_usable_replies(
    inner: type[Strategy], flower_log: pytest.LogCaptureFixture
) -> None:
    flower_log.set_level(logging.INFO, logger="flwr")
    wrapped, grid, _ = run(1.3, inner(fraction_evaluate=0.0))  # type: ignore[call-arg]
    assert (wrapped.traffic[0].sent, wrapped.traffic[0].received) == (13, 10)
    assert grid.now == 13.0  # three of the thirteen fail: all others are needed
    assert "no reply came in time" not in flower_log.text
    wrapped, grid, _ = run(1.625, inner(fraction_evaluate=0.0))  # type: ignore[call-arg]
    assert wrapped.traffic[0].received == 8
    assert grid.now == 11.0  # those of nodes 4 to 11
    assert "went on with the first 8 usable replies, without nodes 3, 12, 13 (over_selection)" in flower_log.text
    assert "left out node 1: no memory" in flower_log.text and "left out node 2: " in flower_log.text


def test_without_over_selection_a_round_waits_until_its_time_is_up(flower_log: pytest.LogCaptureFixture) -> None:
    wrapped, grid, _ = run(1.0)
    assert 60.0 <= grid.now <= 61.0
    assert wrapped.traffic[0].received == 10
    assert "left out node 3: no reply came in time" in flower_log.text
    assert "over_selection" not in flower_log.text


def test_the_result_is_that_of_the_first_replies_alone() -> None:
    _, _, arrays = run(1.625)
    grid = VirtualGrid(range(4, 12), both, late)
    wrapped = OMCStrategy(FedAvg(fraction_evaluate=0.0), fedomc.CompressionPolicy("S1E3M7", fraction=0.5))
    with grid.as_grid() as connected:
        alone = wrapped.start(connected, model(), num_rounds=1).arrays
    assert {name: array.data for name, array in arrays.items()} == {name: a.data for name, a in alone.items()}


def test_an_evaluation_goes_on_too() -> None:
    wrapped = OMCStrategy(FedAvg(), None, over_selection=2.0)
    grid = VirtualGrid(range(4, 12), both, late)
    with grid.as_grid() as connected:
        result = wrapped.start(connected, model(), num_rounds=1)
    assert result.evaluate_metrics_clientapp[1]["node"] == pytest.approx((4 + 5 + 6 + 7) / 4)
    assert grid.now == 7.0 + 7.0  # of nodes 4 to 7 both times


def test_late_clients_of_one_round_begin_with_the_next_when_they_are_done(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    wrapped, grid, _ = run(1.625, rounds=3)
    assert [row.received for row in wrapped.traffic] == [8, 8, 8]
    assert "does not belong to this round" not in flower_log.text
    assert grid.now == 33.0


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    def inner() -> FedAvg:
        return FedAvg(fraction_train=0.8, fraction_evaluate=0.0)

    random.seed(3)  # by which Flower draws the nodes
    _, _, whole = run(1.625, inner(), 4)
    random.seed(3)
    _, grid, _ = run(1.625, inner(), 2, tmp_path)
    random.seed(4)
    wrapped, _, resumed = run(1.625, inner(), 4, tmp_path, grid)  # nodes work on while the server is restarted
    assert [(row.sent, row.received) for row in wrapped.traffic] == [(10, 7)] * 4
    assert {name: array.data for name, array in resumed.items()} == {name: a.data for name, a in whole.items()}
    with pytest.raises(fedomc.PayloadError, match="over_selection"):
        run(1.3, inner(), 5, tmp_path)


@pytest.mark.parametrize("over_selection", [0.9, -1.0, math.inf, math.nan])
def test_an_impossible_over_selection_is_refused(over_selection: float) -> None:
    with pytest.raises(fedomc.PolicyError, match="over_selection="):
        OMCStrategy(FedAvg(), over_selection=over_selection)


@pytest.mark.parametrize(
    ("selected", "over_selection", "enough"), [(130, 1.3, 100), (39, 1.3, 30), (10, 1.3, 8), (1, 3.0, 1), (7, 1.0, 7)]
)
def test_the_replies_that_are_enough(selected: int, over_selection: float, enough: int) -> None:
    assert OMCStrategy(FedAvg(), over_selection=over_selection)._enough(selected) == enough
