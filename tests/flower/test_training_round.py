"""A round of replies: what is dropped is a metric, a record or a weight above the cap, and the update is kept."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

import fedomc
from fedomc.flower import OMCStrategy, collect
from fedomc.serialization.checkpointing import Checkpoints
from tests.flower.test_aggregation import Network
from tests.flower.test_aggregation import answer as answer_of
from tests.flower.test_mapped import anonymous
from tests.flower.test_strategy import NODES, Nodes, answer, build, configure, policy, trained, values

Arriving = Callable[[list[Message]], Iterable[Message]]


class Watching(FedAvg):
    """A strategy that may look at the replies, and therefore gets them all."""

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        return super().aggregate_train(server_round, replies)


def in_order(messages: dict[int, Message]) -> list[Message]:
    return [messages[node] for node in sorted(messages)]


# ---- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [FedAvg, FedAdam, FedMedian])
@pytest.mark.parametrize("loss", [float("nan"), [1.0, 2.0], 2**64, None])
def test_a_wrong_metric_costs_the_metric_and_not_the_update(
    inner: type[FedAvg], loss: object, flower_log: pytest.LogCaptureFixture
) -> None:
    results, reported = [], []
    for wrong in (True, False):
        wrapped = OMCStrategy(inner(), policy())
        replies = [trained(message) for message in in_order(configure(wrapped, collect(build())))]
        replies[-1].content["metrics"]["loss"] = 5.0
        if wrong and loss is None:
            del replies[-1].content["metrics"]["loss"]
        elif wrong:
            replies[-1].content["metrics"]["loss"] = loss
        result, metrics = wrapped.aggregate_train(1, iter(replies))
        assert result is not None and metrics is not None and wrapped.traffic[-1].received == 4
        results.append({name: array.data for name, array in result.items()})
        reported.append(metrics["loss"])
    assert results[0] == results[1]
    assert reported == [1.0, 2.0]
    assert f"metric loss is aggregated without node {NODES[-1]}" in flower_log.text


def test_a_strategy_that_may_need_a_metric_is_not_given_a_reply_without_it(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    wrapped = OMCStrategy(Watching(), policy())
    replies = [trained(message) for message in in_order(configure(wrapped, collect(build())))]
    del replies[1].content["metrics"]["loss"]
    result, _ = wrapped.aggregate_train(1, replies)
    assert result is not None and wrapped.traffic[-1].received == 3
    assert f"left out node {NODES[1]}: it lacks metrics that the strategy may need" in flower_log.text


def with_extra_metric(message: Message, number: int) -> Message:
    reply = trained(message)
    if number < 2:
        reply.content["metrics"]["extra"] = 7.0
    return reply


@pytest.mark.parametrize("inner", [FedAvg, FedAdam, FedMedian, Watching])
@pytest.mark.parametrize("arriving", [iter, list])
def test_two_of_eight_with_an_extra_metric_do_not_silence_the_others(
    inner: type[FedAvg],
    arriving: Arriving,
    monkeypatch: pytest.MonkeyPatch,
    flower_log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Nodes, "get_node_ids", lambda self: range(1, 9))
    results = []
    for answered in (with_extra_metric, lambda message, number: trained(message)):
        wrapped = OMCStrategy(inner(), policy())
        messages = in_order(configure(wrapped, collect(build())))
        replies = [answered(message, number) for number, message in enumerate(messages)]
        result, metrics = wrapped.aggregate_train(1, arriving(replies))
        assert result is not None and metrics is not None and wrapped.traffic[-1].received == 8
        assert metrics["loss"] == 1.0 and "extra" not in metrics
        results.append({name: array.data for name, array in result.items()})
    assert results[0] == results[1]
    assert "metric extra is dropped, because only 2 of 8 replies have it in this form: nodes 1, 2" in flower_log.text


def test_evaluation_keeps_the_metrics_that_most_have(flower_log: pytest.LogCaptureFixture) -> None:
    wrapped = OMCStrategy(FedAvg(), None)
    grid: Grid = Nodes()  # type: ignore[assignment]
    messages = list(wrapped.configure_evaluate(1, collect(build()), ConfigRecord({}), grid))
    messages.sort(key=lambda message: message.metadata.dst_node_id)
    sent = [
        {"num-examples": 1, "loss": 1.0, "extra": 1.0},
        {"num-examples": 1, "loss": float("nan")},
        {"num-examples": 2**62, "loss": 2.0},
        {"num-examples": 1, "loss": 3.0},
    ]
    replies = [
        Message(RecordDict({"metrics": MetricRecord(row)}), reply_to=message)  # type: ignore[arg-type]
        for message, row in zip(messages, sent, strict=True)
    ]
    metrics = wrapped.aggregate_evaluate(1, replies)
    assert metrics is not None and dict(metrics) == {"loss": pytest.approx((1.0 + 10 * 2.0 + 3.0) / 12)}
    said = ("extra is dropped, because only 1", "node 22: metric loss=nan", "without node 22", "node 33 has weight")
    for says in said:
        assert says in flower_log.text


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [FedAvg, FedAdam, Watching])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
@pytest.mark.parametrize("arriving", [iter, list])
def test_no_client_owns_the_model_by_its_weight(
    inner: type[FedAvg],
    order: tuple[int, ...],
    arriving: Arriving,
    flower_log: pytest.LogCaptureFixture,
) -> None:
    """It counts as much as one with the weight of the cap, which the log says; whichever comes first."""
    results = []
    for weights in ((2**62, 100, 100, 100), (1000, 100, 100, 100)):
        wrapped = OMCStrategy(inner(), policy())
        replies = [trained(message) for message in in_order(configure(wrapped, collect(build())))]
        for reply, weight in zip(replies, weights, strict=True):
            reply.content["metrics"]["num-examples"] = weight
        result, metrics = wrapped.aggregate_train(1, arriving([replies[i] for i in order]))
        assert result is not None and metrics is not None and metrics["loss"] == pytest.approx(1.0)
        results.append(values(result))
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name], err_msg=name)
    says = f"node {NODES[0]} has weight 4.61169e+18, which is capped at 1000, 10 times the median weight"
    assert says in flower_log.text


def test_the_cap_holds_for_replies_that_were_added_before_the_median_fell(
    monkeypatch: pytest.MonkeyPatch, flower_log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Nodes, "get_node_ids", lambda self: range(1, 13))
    wrapped = OMCStrategy(FedAvg(), None)
    arrays = collect(build())
    replies = []
    for message in in_order(configure(wrapped, arrays)):
        attacker = message.metadata.dst_node_id <= 3
        moved = ArrayRecord({n: Array(a.numpy() + np.float32(attacker)) for n, a in arrays.items()})
        replies.append(answer(message, moved, 2**60 if attacker else 100))
    result, _ = wrapped.aggregate_train(1, iter(replies))
    assert result is not None
    moved_by = result["0.weight"].numpy() - arrays["0.weight"].numpy()
    np.testing.assert_allclose(moved_by, 3 * 1000 / (3 * 1000 + 9 * 100), rtol=1e-5)
    assert "replies added so far are scaled by" in flower_log.text


def test_weights_within_the_cap_change_nothing() -> None:
    results = []
    for cap in (10.0, None):
        wrapped = OMCStrategy(FedAvg(), policy(), weight_cap=cap)
        replies = [trained(message) for message in in_order(configure(wrapped, collect(build())))]
        for weight, reply in enumerate(replies, start=1):
            reply.content["metrics"]["num-examples"] = 10 * weight
        result, _ = wrapped.aggregate_train(1, iter(replies))
        assert result is not None
        results.append({name: array.data for name, array in result.items()})
    assert results[0] == results[1]
    for nonsense in (0.5, -1.0, float("nan")):
        with pytest.raises(fedomc.PolicyError, match="weight_cap"):
            OMCStrategy(FedAvg(), None, weight_cap=nonsense)


# ---- who may answer, and with what ----------------------------------------------------------------------------------


def numbered(messages: Iterable[Message], server_round: int) -> list[Message]:
    """Give messages the ids that a grid gives them when it sends them."""
    messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    for number, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = f"round {server_round} message {number}"
    return messages


def test_a_reply_to_an_old_message_is_not_taken_for_one_to_the_new(flower_log: pytest.LogCaptureFixture) -> None:
    wrapped = OMCStrategy(FedAvg(), policy())
    arrays = collect(build())
    asked = numbered(configure(wrapped, arrays, 1).values(), 1)
    old, lost = trained(asked[0]), Message(Error(code=5, reason="gone"), reply_to=asked[1])
    messages = numbered(configure(wrapped, arrays, 2).values(), 2)
    stolen = trained(messages[2])
    stolen.metadata.__dict__["_src_node_id"] = NODES[3]
    replies = [old, lost, *[trained(message) for message in messages[:3]], stolen]
    result, _ = wrapped.aggregate_train(2, iter(replies))
    assert result is not None and wrapped.traffic[-1].received == 3
    assert f"left out node {NODES[0]}: it replies to message 'round 1 message 0'" in flower_log.text
    assert f"left out node {NODES[3]}: it replies to the message for node {NODES[2]}" in flower_log.text
    assert f"left out node {NODES[3]}: no reply came in time" in flower_log.text
    grid: Grid = Nodes()  # type: ignore[assignment]
    late = [
        Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 1.0})}), reply_to=message)
        for message in numbered(wrapped.configure_evaluate(1, arrays, ConfigRecord(), grid), 1)
    ]
    numbered(wrapped.configure_evaluate(2, arrays, ConfigRecord(), grid), 2)
    assert wrapped.aggregate_evaluate(2, late) is None


class Controlled(FedAvg):
    """As SCAFFOLD does, take a second array record from every reply."""

    def __init__(self) -> None:
        super().__init__()
        self.controls: list[float] = []

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        replies = list(replies)
        for reply in replies:
            self.controls.append(float(reply.content["control"]["0.bias"].numpy()[0]))
            del reply.content["control"], reply.content["timing"]
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("inner", [FedAvg, FedAdam, FedMedian, Controlled])
@pytest.mark.parametrize("names", ["other", "the model's"])
def test_further_records_go_to_who_looks_at_them_and_the_update_is_kept(
    inner: type[FedAvg], names: str, flower_log: pytest.LogCaptureFixture
) -> None:
    strategy = inner()
    wrapped = OMCStrategy(strategy, policy(fraction=1.0))
    replies = []
    for message in in_order(configure(wrapped, collect(build()))):
        reply = trained(message)
        shapes = {name: array.shape for name, array in reply.content["arrays"].items()}
        shapes = shapes if names == "the model's" else {"0.bias": (48,)}
        node = np.float32(message.metadata.dst_node_id)
        control = ArrayRecord({key: Array(np.full(shape, node)) for key, shape in shapes.items()})
        content = {"control": control, **reply.content, "timing": MetricRecord({"seconds": 3.0})}
        replies.append(Message(RecordDict(content), reply_to=message))
    result, metrics = wrapped.aggregate_train(1, iter(replies))
    assert result is not None and metrics is not None and wrapped.traffic[-1].received == 4
    if isinstance(strategy, Controlled):
        assert sorted(strategy.controls) == list(NODES)
    else:
        assert all(f"node {node}: dropped control, timing" in flower_log.text for node in NODES)


def test_who_lacks_a_further_record_is_left_out_where_a_strategy_looks_at_it() -> None:
    wrapped = OMCStrategy(Controlled(), policy(fraction=1.0))
    replies = []
    for number, message in enumerate(in_order(configure(wrapped, collect(build())))):
        content = dict(trained(message).content.items())
        if number != 2:
            content["control"] = ArrayRecord({"0.bias": Array(np.zeros(48, np.float32))})
            content["timing"] = MetricRecord({"seconds": 3.0})
        replies.append(Message(RecordDict(content), reply_to=message))
    result, _ = wrapped.aggregate_train(1, iter(replies))
    assert result is not None and wrapped.traffic[-1].received == 3


def test_what_could_be_the_model_twice_must_be_named_as_it_was_sent(flower_log: pytest.LogCaptureFixture) -> None:
    wrapped = OMCStrategy(FedAvg(), policy(fraction=1.0))
    replies = []
    for message in configure(wrapped, collect(build())).values():
        arrays = trained(message).content["arrays"]
        content = RecordDict({"a": arrays, "b": arrays, "metrics": MetricRecord({"num-examples": 1})})
        replies.append(Message(content, reply_to=message))
    assert wrapped.aggregate_train(1, replies)[0] is None
    assert f"left out node {NODES[0]}: each of the records a, b could be the model: name it 'arrays'" in flower_log.text


# ---- strategies that need all replies -------------------------------------------------------------------------------


class Weighing(FedMedian):
    """A median that measures the memory while it holds all replies."""

    held = 0

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        replies = list(replies)
        self.held = anonymous()
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("format", [None, "S1E4M14"])
def test_with_checkpoints_the_replies_that_a_strategy_needs_together_are_in_files(
    format: str | None, tmp_path: Path
) -> None:
    arrays = ArrayRecord({f"{i}.weight": Array(np.ones((500, 1000), np.float32)) for i in range(4)})
    whole, clients = 8_000_000 * (1.0 if format is None else 20 / 32), 16
    held, results = [], []
    for checkpoints in (None, Checkpoints(tmp_path)):
        inner = Weighing(fraction_evaluate=0.0)
        network = Network(clients, lambda message: answer_of(message, 1e-3))
        began = anonymous()
        result = OMCStrategy(inner, format, checkpoints=checkpoints).start(network, arrays, num_rounds=1)  # type: ignore[arg-type]
        held.append(inner.held - began)
        results.append([array.numpy().tobytes() for array in result.arrays.values()])
    assert held[0] > 0.8 * clients * whole and held[1] < whole, held
    assert results[0] == results[1]
