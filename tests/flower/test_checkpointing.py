"""A run that was stopped after any round goes on bit by bit as one that was not."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Result

import fedomc
from fedomc.flower import OMCStrategy
from fedomc.serialization.checkpointing import Checkpoint, Checkpoints
from tests.flower.test_aggregation import Network, answer, model

INNERS = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.7},
    "FedAdam": {"tau": 1e-7},
    "FedYogi": {},
    "FedMedian": {},
}


def start(
    name: str, rounds: int, folder: Path | None, initial: ArrayRecord | None = None, **kwargs: object
) -> tuple[ArrayRecord, OMCStrategy, list[int]]:
    inner = getattr(strategies, name)(fraction_train=0.5, fraction_evaluate=0.5, **INNERS[name])
    policy = fedomc.CompressionPolicy(**{"format": "S1E3M7", "fraction": 0.5, "rounding": "stochastic", **kwargs})  # type: ignore[arg-type]
    checkpoints = None if folder is None else Checkpoints(folder, keep=2)
    wrapped = OMCStrategy(inner, policy, checkpoints=checkpoints)
    measured: list[int] = []
    grid = Network(8, lambda message: answer(message, 1e-2))
    result = wrapped.start(
        grid,  # type: ignore[arg-type]
        initial or model(),
        num_rounds=rounds,
        evaluate_fn=lambda number, arrays: measured.append(number),
    )
    return result.arrays, wrapped, measured


@pytest.fixture
def flower_info(flower_log: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Capture Flower's log, that of what goes well included."""
    flower_log.set_level(logging.INFO, logger="flwr")
    return flower_log


def test_the_log_says_what_a_run_begins_with(tmp_path: Path, flower_info: pytest.LogCaptureFixture) -> None:
    start("FedAvg", 2, tmp_path)
    assert "resumed" not in flower_info.text and "finished" not in flower_info.text
    start("FedAvg", 3, tmp_path)
    assert f"resumed after round 2 of 3 from {tmp_path}" in flower_info.text
    start("FedAvg", 3, tmp_path)
    assert f"already finished: {tmp_path} has the model after round 3 of 3" in flower_info.text


def test_a_folder_of_another_initial_model_is_not_taken_silently(
    tmp_path: Path, flower_info: pytest.LogCaptureFixture
) -> None:
    start("FedAvg", 2, tmp_path)
    with pytest.raises(fedomc.PayloadError, match="finished after round 2, but began with another initial model"):
        start("FedAvg", 2, tmp_path, initial=model(scale=0.1))
    assert "another initial model" not in flower_info.text
    start("FedAvg", 3, tmp_path, initial=model(scale=0.1))
    assert f"the run in {tmp_path} began with another initial model, so the given one is not used" in flower_info.text
    flower_info.clear()
    start("FedAvg", 3, tmp_path)  # with its own
    assert "another initial model" not in flower_info.text


def test_a_result_has_the_metrics_of_earlier_rounds(tmp_path: Path) -> None:
    def run(rounds: int, folder: Path | None) -> Result:
        checkpoints = None if folder is None else Checkpoints(folder)
        wrapped = OMCStrategy(strategies.FedAvg(), None, checkpoints=checkpoints)
        grid = Network(
            4, lambda message: measured(message) if message.metadata.message_type == "evaluate" else a(message)
        )
        return wrapped.start(
            grid,  # type: ignore[arg-type]
            model(),
            num_rounds=rounds,
            evaluate_fn=lambda number, arrays: MetricRecord({"error": number / 3, "list": [1, number]}),
        )

    def a(message: Message) -> Message:
        return answer(message, 1e-2)

    def measured(message: Message) -> Message:
        metrics = MetricRecord({"num-examples": message.metadata.dst_node_id, "loss": message.metadata.dst_node_id / 7})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    random.seed(7)  # by which Flower orders the nodes
    whole = run(3, None)
    random.seed(7)
    run(2, tmp_path)
    for resumed in (run(3, tmp_path), run(3, tmp_path)):
        assert resumed.evaluate_metrics_serverapp == whole.evaluate_metrics_serverapp
        assert resumed.evaluate_metrics_clientapp == whole.evaluate_metrics_clientapp
        assert list(whole.evaluate_metrics_clientapp) == list(resumed.train_metrics_clientapp) == [1, 2, 3]
        assert list(resumed.evaluate_metrics_serverapp) == [0, 1, 2, 3]
        up = [metrics["fedomc.up-bytes"] for metrics in whole.train_metrics_clientapp.values()]
        assert [metrics["fedomc.up-bytes"] for metrics in resumed.train_metrics_clientapp.values()] == up
        assert data(resumed.arrays) == data(whole.arrays)


def data(arrays: ArrayRecord) -> dict[str, bytes]:
    return {name: array.data for name, array in arrays.items()}


@pytest.mark.parametrize("name", INNERS)
def test_a_resumed_run_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    random.seed(7)
    whole, uninterrupted, measured = start(name, 5, None)
    assert measured == [0, 1, 2, 3, 4, 5]
    for stop in (1, 3):
        folder = tmp_path / str(stop)
        random.seed(7)
        start(name, stop, folder)
        random.seed(99)  # what another process would have
        resumed, wrapped, measured = start(name, 5, folder)
        assert data(resumed) == data(whole)
        assert wrapped.traffic == uninterrupted.traffic
        assert measured == list(range(stop + 1, 6))
        assert len(list(folder.glob("round-*"))) == 2
        again, _, measured = start(name, 5, folder)  # there is nothing left to do
        assert data(again) == data(whole) and measured == []


def test_another_model_or_policy_is_refused(tmp_path: Path) -> None:
    start("FedAdam", 1, tmp_path)
    for kwargs in ({"seed": 1}, {"format": "S1E4M3"}, {"fraction": 1.0}, {"format_by_name": {"w*": "S1E3M7"}}):
        with pytest.raises(fedomc.PayloadError, match="another folder"):
            start("FedAdam", 2, tmp_path, **kwargs)
    with pytest.raises(fedomc.PayloadError, match="FedYogi"):
        start("FedYogi", 2, tmp_path)
    other = OMCStrategy(strategies.FedAdam(), None, checkpoints=Checkpoints(tmp_path))
    arrays = model()
    del arrays["bias"]
    with pytest.raises(fedomc.PayloadError, match="another model"):
        other.resume(arrays)


def test_a_round_without_a_usable_reply_is_kept_too(tmp_path: Path) -> None:
    inner, checkpoints = strategies.FedAvg(fraction_evaluate=0.0), Checkpoints(tmp_path)
    wrapped = OMCStrategy(inner, None, checkpoints=checkpoints, failed_rounds=None)
    grid = Network(2, lambda message: None)
    wrapped.start(grid, model(), num_rounds=1, timeout=0.01)  # type: ignore[arg-type]
    arrays, done = OMCStrategy(strategies.FedAvg(), None, checkpoints=Checkpoints(tmp_path)).resume(model())
    assert done == 1
    assert all(np.array_equal(arrays[name].numpy(), array.numpy()) for name, array in model().items())


BAD_RANDOM = {
    "a number beyond 32 bits": lambda state: [3, [2**40, *state[1][1:]], None],
    "a negative number": lambda state: [3, [-1, *state[1][1:]], None],
    "too few numbers": lambda state: [3, state[1][:5], None],
    "no numbers": lambda state: [3, None, None],
    "an unknown version": lambda state: [9, state[1], None],
    "a text as the next normal number": lambda state: [3, state[1], "1"],
    "nothing": lambda state: None,
}


@pytest.mark.parametrize("bad", BAD_RANDOM)
def test_a_damaged_random_state_is_a_payload_error_and_changes_nothing(bad: str, tmp_path: Path) -> None:
    start("FedAdam", 1, tmp_path)
    initial, path = Checkpoints(tmp_path).paths()
    initial.unlink()
    stored = Checkpoint.read(path)
    stored.progress["random"] = BAD_RANDOM[bad](stored.progress["random"])
    stored.write(path)
    policy = fedomc.CompressionPolicy("S1E3M7", fraction=0.5, rounding="stochastic")
    inner = strategies.FedAdam(fraction_train=0.5, fraction_evaluate=0.5, **INNERS["FedAdam"])
    wrapped = OMCStrategy(inner, policy, checkpoints=Checkpoints(tmp_path))
    before = random.getstate()
    with pytest.raises(fedomc.PayloadError, match="random state"):
        wrapped.resume(model())
    assert random.getstate() == before and inner.m_t is None and wrapped.traffic == []
