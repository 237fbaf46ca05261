"""The running mean against exact arithmetic, within the bound that its notes state, in any order; and its memory."""

import itertools
import weakref
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from hypothesis import given, settings
from hypothesis import strategies as st

import fedomc
from fedomc import codec
from fedomc.flower import OMCStrategy, StreamingGrid, aggregation, variables
from fedomc.flower.aggregation import BATCH, Mean, averages
from fedomc.flower.arrays import STYPE, packed_array, read_packed
from fedomc.flower.downlink import Broadcast
from fedomc.flower.replies import read_variables
from fedomc.methods import encode
from fedomc.serialization import frame

U = 2.0**-24
SHAPE = (40, 50)


class Nodes:
    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.count + 1))


def model(scale: float = 0.05) -> ArrayRecord:
    draw = np.random.default_rng(0)
    return ArrayRecord(
        {
            "weight": Array((draw.standard_normal(SHAPE) * scale).astype(np.float32)),
            "bias": Array(draw.standard_normal(50).astype(np.float32)),
            "steps": Array(np.array(41)),
        }
    )


def policy_of(node: int) -> fedomc.CompressionPolicy | None:
    """Mixed formats: every third client is sent FP32, the others two formats."""
    formats = [None, ("S1E3M7", None), ("S1E2M3", "S1E2M1")]
    chosen = formats[node % 3]
    return None if chosen is None else fedomc.CompressionPolicy(format=chosen[0], update_format=chosen[1])


def sent(node: int, broadcast: Broadcast, arrays: ArrayRecord) -> Message:
    message = Message(RecordDict({"arrays": arrays}), node, "train")
    broadcast.compress(message)
    return message


def answer(message: Message, step: float, dense: bool = False) -> Message:
    """Change what came by random steps, in the format in which it came (or in FP32)."""
    node = message.metadata.dst_node_id
    draw = torch.Generator().manual_seed(node)
    record = ArrayRecord()
    for name, array in message.content["arrays"].items():
        change = torch.randn(array.shape, generator=draw) * step
        if array.stype == STYPE:
            packed = read_packed(array, name, copy=True).packed
            update = message.content.config_records["fedomc"].get("update_format")
            value = packed.decode(torch.empty(packed.numel)).view(array.shape)
            if dense:
                record[name] = Array((value + change).numpy())
            elif update is None:
                record[name] = packed_array(encode(value + change, packed.method), array.shape)
            else:
                made = encode(change, fedomc.FloatFormat.parse(str(update)))
                record[name] = packed_array(made, array.shape, frame.UPDATE)
        elif array.dtype == "float32":
            record[name] = Array((torch.from_numpy(array.numpy()) + change).numpy())
        else:
            record[name] = array
    return Message(RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": node})}), reply_to=message)


def exact(arrays: ArrayRecord, messages: list[Message], replies: list[Message], weights: list[float], value: bool):
    """Give the mean in rational numbers, the mean magnitude of the changes, and that of what was sent."""
    result = {}
    total = sum(map(Fraction, weights))
    for name in arrays:
        own = arrays[name].numpy().ravel().astype(np.float64)
        mean = [Fraction(0)] * own.size
        size, base = np.zeros(own.size), np.zeros(own.size)
        for message, reply, weight in zip(messages, replies, weights, strict=True):
            was, (now, is_update) = decode(message, name)[0], decode(reply, name)
            d = now if is_update else now - was
            start = was if value else own
            for i in range(own.size):
                mean[i] += Fraction(weight) / total * (Fraction(start[i]) + Fraction(d[i]))
            size += float(Fraction(weight) / total) * np.abs(d)
            base += float(Fraction(weight) / total) * np.abs(was)
        result[name] = np.array([float(x) for x in mean]), size, base
    return result


def decode(message: Message, name: str) -> tuple[np.ndarray, bool]:
    array = message.content["arrays"][name]
    if array.stype != STYPE:
        return array.numpy().ravel().astype(np.float64), False
    parsed = read_packed(array, name, copy=True)
    values = parsed.packed.decode(torch.empty(parsed.packed.numel)).numpy()
    return values.astype(np.float64), parsed.kind == frame.UPDATE


def mean_of(
    broadcast: Broadcast, replies: list[Message], weights: list[float], value: bool, together: int = 3
) -> dict[str, np.ndarray]:
    mean = Mean(broadcast, of_weights=value)
    read = [(read_variables(broadcast, reply)[1], weight) for reply, weight in zip(replies, weights, strict=True)]
    for at in range(0, len(read), together):
        mean.add(read[at : at + together])
    return {name: array.numpy().copy() for name, array in mean.result().items()}


def bound(count: int, size: np.ndarray, result: np.ndarray, own: np.ndarray, base: np.ndarray, value: bool):
    rest = 8 * U * (np.abs(own) + base) if value else U * np.abs(result)
    return (min(count, BATCH) + 8) * U * size + rest


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_every_order_of_mixed_formats_is_the_exact_mean_within_the_bound(value: bool, dense: bool) -> None:
    arrays = model()
    broadcast = Broadcast(arrays, policy_of, 1, str)
    messages = [sent(node, broadcast, arrays) for node in range(1, 6)]
    replies = [answer(message, 1e-3, dense) for message in messages]
    weights = [3.0, 1000.0, 0.25, 7.0, 1e-3]
    wanted = exact(arrays, messages, replies, weights, value)
    for order in itertools.permutations(range(5)):
        found = mean_of(broadcast, [replies[i] for i in order], [weights[i] for i in order], value)
        assert found["steps"] == 41
        for name in ("weight", "bias"):
            mean, size, base = wanted[name]
            own = arrays[name].numpy().ravel()
            limit = bound(5, size, mean, own, base, value)
            assert found[name].dtype == np.float32
            assert (np.abs(found[name].ravel() - mean) <= limit).all(), (name, order)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_replies_that_are_added_together_give_the_bits_of_one_by_one(
    value: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = model()
    arrays["table"] = Array(np.linspace(-1, 1, codec.CHUNK + 100, dtype=np.float32))
    broadcast = Broadcast(arrays, policy_of, 1, str)
    replies = [answer(sent(node, broadcast, arrays), 1e-3, dense) for node in range(1, 8)]
    weights = [3.0, 1000.0, 0.0, 7.0, 1e-3, 5e6, 2.0]
    alone = mean_of(broadcast, replies, weights, value, together=1)
    monkeypatch.setattr(variables, "STRETCH", codec.BLOCK)
    for together in (1, 2, 3, 7):
        found = mean_of(broadcast, replies, weights, value, together)
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in alone.items()
        }


@pytest.mark.parametrize("together", [1, 2])
def test_clients_that_changed_nothing_count_with_or_without_replies_beside_them(together: int) -> None:
    arrays = ArrayRecord({"x": Array(np.zeros(3, np.float32))})
    broadcast = Broadcast(arrays, lambda node: None, 1, str)
    reply = Message(RecordDict({"a": ArrayRecord({"x": Array(np.full(3, 8.0, np.float32))})}), 1, "train")
    read = [(read_variables(broadcast, reply)[1], 1.0), (read_variables(broadcast, reply)[1], 0.0)]
    mean = Mean(broadcast, of_weights=False)
    for at in range(0, 2, together):
        mean.add(read[at : at + together], unchanged=3.0 if at + together == 2 else 0.0)
    assert mean.result()["x"].numpy().tolist() == [2.0, 2.0, 2.0]


def test_of_clients_that_all_changed_nothing_the_mean_is_the_model() -> None:
    arrays = model()
    mean = Mean(Broadcast(arrays, policy_of, 1, str), of_weights=False)
    mean.add([], unchanged=3.0)
    found = mean.result()
    assert all(np.array_equal(found[name].numpy(), array.numpy()) for name, array in arrays.items())


@pytest.mark.parametrize("count", [BATCH, BATCH + 1, 3 * BATCH + 5])
def test_the_bound_does_not_grow_beyond_a_batch(count: int) -> None:
    arrays = model()
    broadcast = Broadcast(arrays, policy_of, 1, str)
    messages = [sent(node, broadcast, arrays) for node in range(1, count + 1)]
    replies = [answer(message, 1e-3) for message in messages]
    weights = [float(1 + node % 17) for node in range(count)]
    total = {name: np.zeros(arrays[name].numpy().size, np.longdouble) for name in ("weight", "bias")}
    size = {name: np.zeros(arrays[name].numpy().size) for name in total}
    for message, reply, weight in zip(messages, replies, weights, strict=True):
        for name in total:
            was, (now, is_update) = decode(message, name)[0], decode(reply, name)
            d = now if is_update else now - was
            total[name] += weight * d.astype(np.longdouble)
            size[name] += weight * np.abs(d)
    found = mean_of(broadcast, replies, weights, False)
    for name in total:
        mean = arrays[name].numpy().ravel() + total[name] / sum(weights)
        limit = bound(count, size[name] / sum(weights), mean, mean, mean, False)
        assert (np.abs(found[name].ravel() - mean) <= limit).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-300, 2.0**63), min_size=1, max_size=8),
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=8, max_size=8),
    st.integers(1, 8),
)
def test_any_weights_and_values_stay_finite_between_the_least_and_the_largest(
    weights: list[float], given_values: list[float], together: int
) -> None:
    arrays = ArrayRecord({"x": Array(np.zeros(3, np.float32))})
    broadcast = Broadcast(arrays, lambda node: None, 1, str)
    replies = [
        Message(RecordDict({"a": ArrayRecord({"x": Array(np.full(3, x, np.float32))})}), node, "train")
        for node, x in enumerate(given_values[: len(weights)], start=1)
    ]
    found = mean_of(broadcast, replies, weights, False, together)["x"]
    used = given_values[: len(weights)]
    slack = 16 * U * max(map(abs, used)) + 2.0**-80
    assert np.isfinite(found).all()
    assert (min(used) - slack <= found).all() and (found <= max(used) + slack).all()


NAMES = ("FedAvg", "FedAvgM", "FedProx", "FedAdam", "FedYogi", "FedAdagrad")
WHOLE = ("FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg")


def rounds(inner: strategies.Strategy, replies_of, policy) -> list[dict[str, np.ndarray]]:  # type: ignore[no-untyped-def]
    wrapped = OMCStrategy(inner, policy)
    arrays, found = model(), []
    for number in (1, 2):
        nodes = Nodes(7)
        messages = list(wrapped.configure_train(number, arrays, ConfigRecord(), nodes))  # type: ignore[arg-type]
        replies = [answer(message, 1e-2) for message in messages]
        result, metrics = wrapped.aggregate_train(number, replies_of(replies))
        assert result is not None and metrics is not None
        arrays = result
        found.append({name: array.numpy() for name, array in arrays.items()})
    return found


@pytest.mark.parametrize("name", NAMES)
def test_strategies_that_need_a_mean_do_what_flowers_do_and_hold_nothing(name: str) -> None:
    made = {"FedAvgM": {"server_momentum": 0.5}, "FedProx": {"proximal_mu": 0.1}}.get(name, {})
    kind = getattr(strategies, name)
    assert averages(kind(**made))

    class Watched(kind):  # type: ignore[misc,valid-type]
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            return super().aggregate_train(server_round, replies)

    assert not averages(Watched(**made))  # may look at the replies
    policy = fedomc.CompressionPolicy(format="S1E3M7")
    streamed = rounds(kind(**made), iter, policy)
    whole = rounds(Watched(**made), list, policy)
    for a, b in zip(streamed, whole, strict=True):
        for key in a:
            # Adam's first steps are of one size, whatever the change: where it is nearly none, rounding has its say.
            close = np.abs(a[key].astype(float) - b[key]) < 1e-5 * max(1.0, np.abs(b[key]).max())
            assert close.mean() > 0.99, key


@pytest.mark.parametrize("name", WHOLE)
def test_strategies_that_need_all_replies_get_them(name: str) -> None:
    if name == "QFedAvg":
        pytest.importorskip("flwr.serverapp.strategy.qfedavg")
    made = {"FedTrimmedAvg": {"beta": 0.2}, "MultiKrum": {"num_nodes_to_select": 3}}.get(name, {})
    if name == "QFedAvg":
        made = {"client_learning_rate": 0.1}
    assert not averages(getattr(strategies, name)(**made))


def test_median_and_krum_see_the_decoded_models() -> None:
    arrays = model()
    for inner in (strategies.FedMedian(), strategies.Krum(num_malicious_nodes=1), strategies.FedTrimmedAvg(beta=0.2)):
        wrapped = OMCStrategy(inner, fedomc.CompressionPolicy(format="S1E2M3", update_format="S1E2M3"))
        messages = list(wrapped.configure_train(1, arrays, ConfigRecord(), Nodes(5)))  # type: ignore[arg-type]
        replies = [answer(message, 1e-3) for message in messages]
        changes = np.stack([decode(reply, "weight")[0] for reply in replies])
        huge = packed_array(encode(torch.full(SHAPE, 1e6), fedomc.FloatFormat(2, 3)), SHAPE, frame.UPDATE)
        replies[2].content["arrays"]["weight"] = huge
        result, _ = wrapped.aggregate_train(1, iter(replies))
        assert result is not None
        moved = result["weight"].numpy() - arrays["weight"].numpy()
        assert np.abs(moved).max() <= np.abs(changes).max() + 1e-6
        assert np.abs(moved).max() > 0


class Network(Nodes):
    """A grid of which each node answers when it is asked for; it knows which replies are still alive."""

    def __init__(self, count: int, reply_to) -> None:  # type: ignore[no-untyped-def]
        super().__init__(count)
        self.reply_to = reply_to
        self.sent: dict[str, Message] = {}
        self.alive: list[weakref.ref[Message]] = []
        self.most = 0

    def push_messages(self, messages):  # type: ignore[no-untyped-def]
        named = {str(message.metadata.dst_node_id): message for message in messages}
        self.sent.update(named)
        return list(named)

    def pull_messages(self, message_ids) -> Iterator[Message]:  # type: ignore[no-untyped-def]
        for key in message_ids:
            reply = self.reply_to(self.sent[key])
            if reply is not None:
                known = [(ref, ref()) for ref in self.alive]
                self.alive = [ref for ref, old in known if old and old.has_content() and old.content.array_records]
                del known
                self.alive.append(weakref.ref(reply))
                self.most = max(self.most, len(self.alive))
                yield reply


def test_of_a_large_cohort_few_replies_are_alive_at_a_time() -> None:
    most = []
    for count in (8, 32):
        network = Network(count, lambda message: answer(message, 1e-3))
        wrapped = OMCStrategy(strategies.FedAvg(fraction_evaluate=0.0), fedomc.CompressionPolicy(format="S1E3M7"))
        wrapped.start(network, model(), num_rounds=1)  # type: ignore[arg-type]
        assert wrapped.traffic[-1].received == count
        most.append(network.most)
    assert most[0] == most[1] <= 4


def bad(message: Message) -> Message | None:
    """Answer well, or in one of the ways in which a client can fail."""
    node = message.metadata.dst_node_id
    good = answer(message, 1e-3)
    record = good.content["arrays"]
    if node == 2:
        record["weight"] = Array("float32", SHAPE, STYPE, b"garbage")
    elif node == 3:
        record["weight"] = Array(np.zeros((3, 3), np.float32))
    elif node == 4:
        record["bias"] = Array(np.full(50, np.nan, np.float32))
    elif node == 5:
        return None
    elif node == 6:
        return Message(Error(code=1, reason="out of memory"), reply_to=message)
    elif node == 7:
        del record["bias"]
    elif node == 8:
        record["steps"] = record["weight"]
    return good


def test_a_round_ends_with_the_good_clients_and_names_the_others(flower_log: pytest.LogCaptureFixture) -> None:
    arrays = model()
    policy = fedomc.CompressionPolicy(format="S1E3M7")
    wrapped = OMCStrategy(strategies.FedAvg(fraction_evaluate=0.0), policy)
    result = wrapped.start(Network(10, bad), arrays, num_rounds=1, timeout=0.3)  # type: ignore[arg-type]
    assert wrapped.traffic[-1].received == 3
    for node, why in {
        2: "weight",
        3: "weight has shape",
        4: "bias has a value",
        5: "no reply",
        6: "out of memory",
        7: "the reply has other variables",
        8: "steps",
    }.items():
        assert f"left out node {node}: {why}" in flower_log.text
    alone = OMCStrategy(strategies.FedAvg(), policy)
    messages = list(alone.configure_train(1, arrays, ConfigRecord(), Nodes(10)))  # type: ignore[arg-type]
    good = [answer(m, 1e-3) for m in messages if m.metadata.dst_node_id in (1, 9, 10)]
    expected, _ = alone.aggregate_train(1, good)
    assert expected is not None
    for name, array in result.arrays.items():
        np.testing.assert_allclose(array.numpy(), expected[name].numpy(), rtol=1e-6)


def test_replies_one_by_one_are_all_given_and_late_ones_are_not() -> None:
    asked: list[int] = []

    def slowly(message: Message) -> Message | None:
        asked.append(message.metadata.dst_node_id)
        return (
            answer(message, 1e-3) if asked.count(message.metadata.dst_node_id) > message.metadata.dst_node_id else None
        )

    broadcast = Broadcast(model(), lambda node: None, 1, str)
    messages = [sent(node, broadcast, model()) for node in (1, 2, 3)]
    replies = StreamingGrid(Network(3, slowly)).send_and_receive(messages)  # type: ignore[arg-type]
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
    asked.clear()
    replies = StreamingGrid(Network(3, slowly), in_order=True).send_and_receive(messages[::-1])  # type: ignore[arg-type]
    assert [reply.metadata.src_node_id for reply in replies] == [3, 2, 1]

    def others(message: Message) -> Message | None:
        return None if message.metadata.dst_node_id == 1 else answer(message, 1e-3)

    for in_order in (False, True):
        grid = StreamingGrid(Network(3, others), in_order=in_order)  # type: ignore[arg-type]
        late = grid.send_and_receive(messages, timeout=0.15)
        assert [reply.metadata.src_node_id for reply in late] == [2, 3]


def test_metrics_of_all_replies_reach_the_strategys_own_function() -> None:
    seen: list[int] = []

    def own(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        seen.extend(int(next(iter(c.metric_records.values()))[weighted_by]) for c in contents)  # type: ignore[call-overload]
        return MetricRecord({"count": len(contents)})

    inner = strategies.FedAvg(train_metrics_aggr_fn=own)
    wrapped = OMCStrategy(inner, None)
    messages = list(wrapped.configure_train(1, model(), ConfigRecord(), Nodes(5)))  # type: ignore[arg-type]
    _, metrics = wrapped.aggregate_train(1, iter([answer(m, 1e-3) for m in messages]))
    assert metrics is not None and metrics["count"] == 5 and sorted(seen) == [1, 2, 3, 4, 5]
    assert inner.train_metrics_aggr_fn is own
    assert aggregation.AGGREGATES == ("delta", "weights")
