"""Krum selects from stretches of the replies what Flower selects from whole models."""

import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Krum, MultiKrum, Strategy

import fedomc
from fedomc.codec import BLOCK
from fedomc.flower import OMCStrategy, decoding, krum
from tests.flower.test_aggregation import Nodes
from tests.flower.test_decoding import CLIENTS, POLICIES, SHAPES, model, replies_to

INNER = {
    "krum": lambda: Krum(num_malicious_nodes=2),
    "multi": lambda: MultiKrum(num_malicious_nodes=3, num_nodes_to_select=5),
    "all": lambda: MultiKrum(num_nodes_to_select=CLIENTS),
}


def in_doubles(inner: Strategy, models: list[ArrayRecord]) -> dict[str, np.ndarray]:
    """Return what Flower's own strategy makes of the models of the replies in float64."""
    contents = []
    nodes = sorted(range(1, CLIENTS + 1), key=str)  # the order of replies; a node's number is its weight
    for number, arrays in zip(nodes, models, strict=True):
        doubles = {name: Array(np.asarray(array.numpy(), np.float64)) for name, array in arrays.items()}
        metrics = MetricRecord({"num-examples": number})
        contents.append(RecordDict({"arrays": ArrayRecord(doubles), "metrics": metrics}))
    result, _ = inner.aggregate_train(1, [Message(content, 1, "train") for content in contents])
    assert result is not None
    return {name: array.numpy() for name, array in result.items()}


@pytest.mark.parametrize("stretch", [BLOCK, 2**20])
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("aggregate", ["delta", "weights"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_the_result_is_that_of_flower(
    inner, policy, aggregate: str, lossless: bool, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(decoding, "STRETCH", stretch)
    models: list[ArrayRecord] = []
    whole = decoding.decoded

    def watched(*args, **kwargs):  # type: ignore[no-untyped-def]
        models.append(whole(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr("fedomc.flower.training_round.decoded", watched)
    strategy = OMCStrategy(inner(), policy, aggregate=aggregate)
    messages = list(strategy.configure_train(1, model(SHAPES), ConfigRecord(), Nodes(CLIENTS)))  # type: ignore[arg-type]
    result, metrics = strategy.aggregate_train(1, replies_to(messages, lossless))
    assert result is not None and metrics is not None
    for name, expected in in_doubles(inner(), models).items():
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def selected_of(values: list[np.ndarray]) -> np.ndarray:
    """Return which of the clients' values Krum selects if it assumes one client to be malicious."""
    strategy = OMCStrategy(Krum(num_malicious_nodes=1), None)
    start = ArrayRecord({"weight": Array(np.full(1000, 1000, np.float32))})
    messages = list(strategy.configure_train(1, start, ConfigRecord(), Nodes(len(values))))  # type: ignore[arg-type]
    replies = []
    for message, each in zip(messages, values, strict=True):
        content = {"arrays": ArrayRecord({"weight": Array(each)}), "metrics": MetricRecord({"num-examples": 1})}
        replies.append(Message(RecordDict(content), reply_to=message))
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None
    return result["weight"].numpy()


@pytest.mark.parametrize("malicious", [0, 3, 6])
@pytest.mark.parametrize("size", [2.0, 1e30])
def test_small_changes_of_large_values_are_told_apart(malicious: int, size: float) -> None:
    """The changes are some millionths of the values, whose squares leave no distances in float32; one client lies."""
    steps = [1.0, 1.1, 0.9, 1.27, 0.8, 1.07, 0.95]
    values = [np.float32(1000) + np.full(1000, round(step * 100) * 2**-14, np.float32) for step in steps]
    values[malicious] = np.full(1000, 1000 + size, np.float32)
    honest = [each.mean(dtype=np.float64) for index, each in enumerate(values) if index != malicious]
    scores = [sum(sorted((a - b) ** 2 for b in honest)[: len(steps) - 3 + 1]) for a in honest]
    assert selected_of(values).mean(dtype=np.float64) == honest[int(np.argmin(scores))]


def test_one_reply_is_selected_and_none_is_nothing() -> None:
    assert krum.selected(np.zeros((1, 1)), 0, 1) == [0]
    strategy = OMCStrategy(Krum(), None)
    list(strategy.configure_train(1, model(SHAPES), ConfigRecord(), Nodes(2)))  # type: ignore[arg-type]
    assert strategy.aggregate_train(1, []) == (None, None)


def test_a_stretch_of_all_replies_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, size, replies = {"embedding": (2**11, 2**10)}, 4 * 2**21, 16  # 8 MB, and 128 MB of all replies
    monkeypatch.setattr(decoding, "STRETCH", 2**16)
    strategy = OMCStrategy(Krum(num_malicious_nodes=1), fedomc.CompressionPolicy(format="S1E3M7"))
    messages = list(strategy.configure_train(1, model(shapes), ConfigRecord(), Nodes(replies)))  # type: ignore[arg-type]
    answers = replies_to(messages)
    tracemalloc.start()
    try:
        strategy.aggregate_train(1, answers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * size
