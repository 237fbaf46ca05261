"""A run that was stopped after any round goes on bit by bit as one that was not."""

import random
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp import strategy as strategies

import fedomc
from fedomc.flower import OMCStrategy
from fedomc.serialization.checkpointing import Checkpoints
from tests.flower.test_aggregation import Network, answer, model

INNERS = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.7},
    "FedAdam": {"tau": 1e-7},
    "FedYogi": {},
    "FedMedian": {},
}


def start(name: str, rounds: int, folder: Path | None, **kwargs: object) -> tuple[ArrayRecord, OMCStrategy, list[int]]:
    inner = getattr(strategies, name)(fraction_train=0.5, fraction_evaluate=0.5, **INNERS[name])
    policy = fedomc.CompressionPolicy(**{"format": "S1E3M7", "fraction": 0.5, "rounding": "stochastic", **kwargs})  # type: ignore[arg-type]
    checkpoints = None if folder is None else Checkpoints(folder, keep=2)
    wrapped = OMCStrategy(inner, policy, checkpoints=checkpoints)
    measured: list[int] = []
    grid = Network(8, lambda message: answer(message, 1e-2))
    result = wrapped.start(
        grid,  # type: ignore[arg-type]
        model(),
        num_rounds=rounds,
        evaluate_fn=lambda number, arrays: measured.append(number),
    )
    return result.arrays, wrapped, measured


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
        assert len(list(folder.iterdir())) == 2
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
    wrapped = OMCStrategy(strategies.FedAvg(fraction_evaluate=0.0), None, checkpoints=Checkpoints(tmp_path))
    grid = Network(2, lambda message: None)
    wrapped.start(grid, model(), num_rounds=1, timeout=0.01)  # type: ignore[arg-type]
    arrays, done = OMCStrategy(strategies.FedAvg(), None, checkpoints=Checkpoints(tmp_path)).resume(model())
    assert done == 1
    assert all(np.array_equal(arrays[name].numpy(), array.numpy()) for name, array in model().items())
