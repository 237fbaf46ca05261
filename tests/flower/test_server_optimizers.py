"""Each server optimizer against Flower's own on the same replies: the same bits, in memory and in files."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import FedAvg, Strategy

import fedomc
from fedomc.errors import NonFiniteError
from fedomc.flower import OMCStrategy
from fedomc.flower.aggregation import Mean
from fedomc.flower.arrays import Bfloat16Array, array_of
from fedomc.flower.downlink import Broadcast
from fedomc.flower.replies import read_variables
from fedomc.flower.server_optimizers import RoundFiles, ServerOptimizer, has_optimizer
from fedomc.serialization.checkpointing import Checkpoint
from fedomc.serialization.mapped_file import Zeros
from tests.flower.test_aggregation import Network, Nodes, answer, model, policy_of, sent

MOMENTS = ("m_t", "v_t", "momentum_vector")

STRATEGIES = {
    "FedAvg": lambda: strategies.FedAvg(),
    "FedProx": lambda: strategies.FedProx(proximal_mu=0.1),
    "FedAvgM, off": lambda: strategies.FedAvgM(),
    "FedAvgM, rate": lambda: strategies.FedAvgM(server_learning_rate=0.7),
    "FedAvgM": lambda: strategies.FedAvgM(server_momentum=0.9, server_learning_rate=0.7),
    "FedAdam": lambda: strategies.FedAdam(),
    "FedAdam, no momentum": lambda: strategies.FedAdam(beta_1=0.0, beta_2=0.0, tau=1e-9),
    "FedYogi": lambda: strategies.FedYogi(),
    "FedAdagrad": lambda: strategies.FedAdagrad(eta=0.3),
    "a subclass with another way to choose nodes": lambda: Choosing(),
}


class Choosing(strategies.FedAdam):
    def configure_train(self, *arguments: object) -> list[Message]:  # type: ignore[override]
        return list(super().configure_train(*arguments))[:1]  # type: ignore[arg-type]


class Averaging(FedAvg):
    def aggregate_train(self, *arguments: object):  # type: ignore[no-untyped-def, override]
        return super().aggregate_train(*arguments)  # type: ignore[arg-type]


class Noisy(strategies.FedAdam):
    def aggregate_train(self, *arguments: object):  # type: ignore[no-untyped-def, override]
        return super().aggregate_train(*arguments)  # type: ignore[arg-type]


def large_model() -> ArrayRecord:
    """Make a model of all dtypes; one variable has several stretches, of which the last is not whole."""
    draw = np.random.default_rng(1)
    record = model()
    record["large"] = Array(draw.standard_normal((300, 777)).astype(np.float32))
    record["half"] = Array(draw.standard_normal(70).astype(np.float16))
    record["bfloat16"] = Bfloat16Array(torch.from_numpy(draw.standard_normal((7, 9))).bfloat16())
    record["double"] = Array(draw.standard_normal(5))
    record["none"] = Array(np.zeros((0, 3), np.float32))
    return record


def rounds(arrays: ArrayRecord, count: int, value: bool) -> Iterator[tuple[Broadcast, Mean]]:
    """Yield a broadcast and the mean of its replies again and again, as long as the model is replaced in place."""
    for number in range(1, count + 1):
        broadcast = Broadcast(arrays, policy_of, number, str)
        replies = [answer(sent(node, broadcast, arrays), 1e-3 * number) for node in (1, 2, 3, 4)]
        yield broadcast, mean_of(broadcast, replies, value)


def mean_of(broadcast: Broadcast, replies: list[Message], value: bool) -> Mean:
    mean = Mean(broadcast, of_weights=value)
    mean.add([(read_variables(broadcast, reply)[1], float(i + 1)) for i, reply in enumerate(replies)])
    return mean


def by_flower(inner: Strategy, broadcast: Broadcast, mean: Mean) -> ArrayRecord:
    """Let Flower's own method compute the new model from a reply that is the mean.

    ``FedAvgM`` would otherwise go on from its last result before it was rounded to bfloat16, float16 or integers.
    """
    if hasattr(inner, "current_arrays"):
        inner.current_arrays = None
    messages = list(inner.configure_train(broadcast.round, broadcast.arrays, ConfigRecord(), Nodes(2)))  # type: ignore[arg-type]
    content = RecordDict({"arrays": mean.result(), "metrics": MetricRecord({"num-examples": 1.0})})
    arrays, _ = inner.aggregate_train(broadcast.round, [Message(content, reply_to=messages[0])])
    assert arrays is not None
    converted = ArrayRecord()
    for name, array in broadcast.arrays.items():
        converted[name] = array_of(arrays[name].numpy(), array.dtype)
    return converted


def data(arrays: ArrayRecord) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (array.dtype, tuple(array.shape), array.data) for name, array in arrays.items()}


def moments(inner: Strategy) -> dict[str, list[tuple[str, tuple[int, ...], bytes]]]:
    found = {}
    for slot in MOMENTS:
        stored = getattr(inner, slot, None) or []
        values = list(stored.values()) if isinstance(stored, dict) else stored
        found[slot] = [(str(np.asarray(v).dtype), np.shape(v), np.asarray(v).tobytes()) for v in values]
    return found


@pytest.mark.parametrize("value", [False, True], ids=["delta", "weights"])
@pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_bits_are_those_of_flower(name: str, in_files: bool, value: bool, tmp_path: Path) -> None:
    ours, theirs = STRATEGIES[name](), STRATEGIES[name]()
    assert has_optimizer(ours)
    arrays, wanted = large_model(), large_model()
    pairs = zip(rounds(arrays, 3, value), rounds(wanted, 3, value), strict=True)
    for number, ((own, mean), (other, same)) in enumerate(pairs):
        files = RoundFiles(tmp_path, Zeros(tmp_path)) if in_files else None
        after = ServerOptimizer(ours, own.round).update(own, mean, files)
        expected = by_flower(theirs, other, same)
        assert data(after) == data(expected), number
        assert moments(ours) == moments(theirs), number
        arrays.update(after)
        wanted.update(expected)
        if files is not None and files.draft is not None:
            files.draft.commit(tmp_path / "state", {"round": number})
            stored = Checkpoint.read(tmp_path / "state")
            assert {k: v.tobytes() for k, v in stored.arrays["model"].items() if k != "bfloat16"} == {
                k: a.numpy().tobytes() for k, a in expected.items() if k != "bfloat16"
            }


def test_what_a_strategy_overrides_is_its_own() -> None:
    for inner in (Averaging(), Noisy(), strategies.FedMedian(), strategies.Krum()):
        assert not has_optimizer(inner)
    replaced = FedAvg()
    replaced.aggregate_train = lambda *_: (None, None)  # type: ignore[method-assign]
    assert not has_optimizer(replaced)
    own_change = strategies.FedAdam()
    own_change._compute_deltat_and_mt = lambda _: None  # type: ignore[method-assign, assignment, return-value]
    assert not has_optimizer(own_change)


@pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM", "FedAvg"])
def test_a_result_that_is_not_finite_leaves_model_and_moments_as_they_were(
    name: str, in_files: bool, tmp_path: Path
) -> None:
    inner = STRATEGIES[name]()
    arrays = model()
    ((broadcast, mean),) = rounds(arrays, 1, False)
    arrays.update(ServerOptimizer(inner, 1).update(broadcast, mean, None))
    before, model_before = moments(inner), data(arrays)
    broadcast = Broadcast(arrays, lambda node: None, 2, str)
    replies = [answer(sent(node, broadcast, arrays), 1.0) for node in (1, 2)]
    for reply, huge in zip(replies, (3e38, 3e38), strict=True):
        values = reply.content["arrays"]["weight"].numpy().copy()
        values[-1, -1] = huge
        reply.content["arrays"]["weight"] = Array(values)  # the last variable's last stretch is enough
    if isinstance(inner, strategies.FedAvgM):
        inner.server_learning_rate = 3.0
    if name == "FedAvg":
        broadcast._dense["weight"] = np.full_like(broadcast.dense("weight"), -3e38)
    with pytest.raises(NonFiniteError, match="weight would become NaN or infinite"):
        files = RoundFiles(tmp_path, Zeros(tmp_path)) if in_files else None
        ServerOptimizer(inner, 2).update(broadcast, mean_of(broadcast, replies, False), files)
    assert moments(inner) == before and data(arrays) == model_before


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_keeps_no_copy_of_the_model_for_the_optimizer(name: str) -> None:
    inner = STRATEGIES[name]()
    wrapped = OMCStrategy(inner, fedomc.CompressionPolicy("S1E3M7"))
    grid = Network(3, lambda message: answer(message, 1e-2))
    result = wrapped.start(grid, model(), num_rounds=2)  # type: ignore[arg-type]
    assert getattr(inner, "current_arrays", None) is None
    assert len(result.train_metrics_clientapp) == 2


def test_every_optimizer_of_flower_is_covered() -> None:
    """A new strategy of Flower's that is an averaging one would otherwise silently go the slow way."""
    known = {type(make()).__name__ for make in STRATEGIES.values()}
    classes = [value for value in vars(strategies).values() if isinstance(value, type) and issubclass(value, FedAvg)]
    assert classes
    for cls in classes:
        if cls.__module__.startswith("flwr.serverapp.strategy.fed") and cls.__name__ not in known:
            assert cls.__name__ in {"FedMedian", "FedTrimmedAvg", "FedXgbBagging", "FedXgbCyclic", "FedOpt"}, cls


def test_stretches_cover_a_variable_once() -> None:
    inner = strategies.FedAvg()
    ((broadcast, mean),) = rounds(large_model(), 1, False)
    for name in broadcast.arrays:
        parts = [(start, new.size) for start, new, _ in ServerOptimizer(inner, 1)._stretches(broadcast, mean, name)]
        ends = list(itertools.accumulate(size for _, size in parts))
        assert [start for start, _ in parts] == [0, *ends][: len(parts)]
        assert (ends or [0])[-1] == broadcast.dense(name).size
