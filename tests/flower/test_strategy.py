"""The strategy: own payloads, one encoding a round, aggregation by value and by difference, bad replies left out."""

import random
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy
from torch import nn

import fedomc
from fedomc.flower import OMCStrategy, client, collect, downlink, install
from fedomc.flower.arrays import STYPE, read_packed
from fedomc.serialization.checkpointing import Checkpoints

NODES = (11, 22, 33, 44)


class Nodes:
    """As much of a grid as choosing nodes takes."""

    def get_node_ids(self) -> Iterable[int]:
        return NODES


def build() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(48, 48) for _ in range(8)]
    return nn.Sequential(*layers, nn.LayerNorm(48))


def policy(**kwargs: object) -> fedomc.CompressionPolicy:
    return fedomc.CompressionPolicy(**{"format": "S1E3M7", "fraction": 0.75, **kwargs})  # type: ignore[arg-type]


def configure(wrapped: OMCStrategy, arrays: ArrayRecord, server_round: int = 1) -> dict[int, Message]:
    grid: Grid = Nodes()  # type: ignore[assignment]
    messages = wrapped.configure_train(server_round, arrays, ConfigRecord({"rate": 0.1}), grid)
    return {message.metadata.dst_node_id: message for message in messages}


def answer(message: Message, arrays: ArrayRecord, examples: int = 1) -> Message:
    metrics = MetricRecord({"num-examples": examples, "loss": 1.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def values(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def trained(message: Message) -> Message:
    """Do one step of training on a client, the same everywhere."""
    with torch.device("meta"):
        model = build()
    install(model, message)
    fedomc.step_in_backward(model, torch.optim.SGD, lr=0.05)
    torch.manual_seed(message.metadata.dst_node_id)
    model(torch.randn(16, 48)).square().mean().backward()
    return answer(message, collect(model, message))


def test_a_policy_may_be_a_string_and_has_a_default() -> None:
    assert OMCStrategy(FedAvg()).policy == fedomc.CompressionPolicy.parse(fedomc.DEFAULT)
    policy = OMCStrategy(FedAvg(), "S1E3M7@0.9").policy
    assert isinstance(policy, fedomc.CompressionPolicy)
    assert str(policy.format) == "S1E3M7" and policy.fraction == 0.9
    assert OMCStrategy(FedAvg(), None).policy is None
    with pytest.raises(fedomc.FormatError, match="S2"):
        OMCStrategy(FedAvg(), "S2")


def test_every_client_gets_its_own_payload_and_each_variable_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    real = downlink.encode

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        encoded.append(kwargs["name"])
        return real(*args, **kwargs)

    monkeypatch.setattr(downlink, "encode", counted)
    arrays = collect(build())
    messages = configure(OMCStrategy(FedAvg(), policy()), arrays)
    packed = {
        node: frozenset(name for name, array in message.content["arrays"].items() if array.stype == STYPE)
        for node, message in messages.items()
    }
    assert len(set(packed.values())) == len(NODES)
    assert len(encoded) == len(set(encoded)) == len(frozenset().union(*packed.values()))
    assert all(set(message.content["arrays"]) == set(arrays) for message in messages.values())
    # One and the same object in all payloads, so that Flower stores it once.
    shared = [message.content["arrays"][encoded[0]] for message in messages.values()]
    assert len({id(array) for array in shared if array.stype == STYPE}) == 1


def test_evaluation_and_the_next_round_send_what_was_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    real = downlink.encode

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        encoded.append(kwargs["name"])
        return real(*args, **kwargs)

    monkeypatch.setattr(downlink, "encode", counted)
    grid: Grid = Nodes()  # type: ignore[assignment]
    wrapped, alone = OMCStrategy(FedAvg(), policy(fraction=1.0)), OMCStrategy(FedAvg(), policy(fraction=1.0))
    arrays = collect(build())
    list(wrapped.configure_evaluate(1, arrays, ConfigRecord(), grid))
    assert len(encoded) == 8
    again = configure(wrapped, arrays, 2)
    assert len(encoded) == 8
    assert wrapped.report is not None and wrapped.report.errors.keys() == set(encoded)
    expected = configure(alone, arrays, 2)
    for node, message in expected.items():
        own = again[node].content["arrays"]
        assert {n: a.data for n, a in message.content["arrays"].items()} == {n: a.data for n, a in own.items()}
    assert alone.report is not None and wrapped.report.errors == alone.report.errors
    encoded.clear()
    list(wrapped.configure_evaluate(2, collect(build()), ConfigRecord(), grid))  # other arrays, if of the same values
    assert len(encoded) == 8


def test_a_round_walks_the_model_once_for_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[fedomc.CompressionPolicy] = []
    real = fedomc.CompressionPolicy.selector

    def counted(policy: fedomc.CompressionPolicy, variables: object) -> object:
        walked.append(policy)
        return real(policy, variables)  # type: ignore[arg-type]

    monkeypatch.setattr(fedomc.CompressionPolicy, "selector", counted)
    wrapped, arrays = OMCStrategy(FedAvg(), policy()), collect(build())
    messages = configure(wrapped, arrays, 3)
    assert walked == [wrapped.policy]
    for node, message in messages.items():  # the draws are those of each client alone
        packed = {name for name, array in message.content["arrays"].items() if array.stype == STYPE}
        shapes = {name: array.shape for name, array in arrays.items()}
        assert packed == set(policy().select(shapes, round=3, client=str(node)))


def test_each_variable_travels_both_ways_in_its_own_format() -> None:
    mixed = policy(format="S1E2M1", fraction=1.0, format_by_name={"0.*": "S1E3M7", "[0-3].*": "S1E2M3"})
    message = configure(OMCStrategy(FedAvg(), mixed), collect(build()))[NODES[0]]
    for arrays in (message.content["arrays"], trained(message).content["arrays"]):
        found = {
            name: str(read_packed(array, name, copy=False).packed.method)
            for name, array in arrays.items()
            if array.stype == STYPE
        }
        small = {f"{i}.weight": "S1E2M1" for i in range(4, 8)}
        assert found == {"0.weight": "S1E3M7", **{f"{i}.weight": "S1E2M3" for i in (1, 2, 3)}, **small}


def test_payloads_depend_on_seed_round_and_client_alone() -> None:
    arrays = collect(build())

    def payloads(server_round: int, **kwargs: object) -> dict[int, dict[str, bytes]]:
        made = configure(OMCStrategy(FedAvg(), policy(**kwargs)), arrays, server_round)
        return {node: {n: a.data for n, a in m.content["arrays"].items()} for node, m in made.items()}

    assert payloads(1) == payloads(1)
    assert payloads(1) != payloads(2)
    assert payloads(1) != payloads(1, seed=1)


@pytest.mark.parametrize("aggregate", ["delta", "weights"])
@pytest.mark.parametrize(
    "how",
    [
        {"format": "S1E3M7"},
        {"format": "S1E2M3", "update_format": "S1E2M3", "fraction": 1.0},
        {"format": "S1E2M3", "update_format": "S1E3M4", "rounding": "stochastic"},
        {"format": "S1E2M1", "format_by_name": {"[0-3].*": "S1E3M7"}},
        {"format": "S1E2M1", "update_format": "S1E3M4", "format_by_name": {"[0-3].*": "S1E2M3"}},
    ],
)
def test_aggregation_is_the_weighted_mean_of_what_the_notes_say(aggregate: str, how: dict[str, object]) -> None:
    """Against an average in numpy over the dequantized models of the clients."""
    wrapped = OMCStrategy(FedAvg(), policy(**how), aggregate=aggregate)
    server = build()
    arrays = collect(server)
    messages = configure(wrapped, arrays)
    replies, expected, total = [], {n: np.zeros(a.shape) for n, a in arrays.items()}, 0
    for weight, message in enumerate(messages.values(), start=1):
        reply = trained(message)
        reply.content["metrics"]["num-examples"] = weight
        replies.append(reply)
        before, after = install(build(), message), install(build(), message)
        fedomc.step_in_backward(after, torch.optim.SGD, lr=0.05)
        torch.manual_seed(message.metadata.dst_node_id)
        after(torch.randn(16, 48)).square().mean().backward()
        for name in expected:
            sent, got = (_dense(dict(model.named_parameters())[name]) for model in (before, after))
            base = _dense(dict(server.named_parameters())[name]) if aggregate == "delta" else sent
            expected[name] += weight * (base + (got - sent))
        total += weight
    result, metrics = wrapped.aggregate_train(1, reversed(replies))
    assert result is not None and metrics is not None
    for name, array in result.items():
        assert array.dtype == "float32"
        np.testing.assert_allclose(array.numpy(), expected[name] / total, atol=2e-6, err_msg=name)


def _dense(parameter: torch.Tensor) -> np.ndarray:
    tensor = parameter.dequantize() if isinstance(parameter, fedomc.CompressedTensor) else parameter.detach()
    return tensor.numpy().astype(np.float64)


def test_difference_keeps_the_server_model_when_nobody_trains_and_value_does_not() -> None:
    kept = {}
    for aggregate in ("delta", "weights"):
        wrapped = OMCStrategy(FedAvg(), policy(format="S1E2M3", fraction=1.0), aggregate=aggregate)
        arrays = collect(build())
        replies = [answer(m, collect(install(build(), m))) for m in configure(wrapped, arrays).values()]
        result, _ = wrapped.aggregate_train(1, replies)
        assert result is not None
        kept[aggregate] = max(np.abs(result[n].numpy() - a.numpy()).max() for n, a in arrays.items())
    assert kept["delta"] < 1e-6
    assert kept["weights"] > 1e-3


def test_order_of_replies_does_not_matter() -> None:
    arrays = collect(build())
    results = []
    for order in (1, -1):
        wrapped = OMCStrategy(FedAvg(), policy())
        replies = [trained(message) for message in configure(wrapped, arrays).values()]
        result, _ = wrapped.aggregate_train(1, replies[::order])
        assert result is not None
        results.append({name: array.data for name, array in result.items()})
    assert results[0] == results[1]


@pytest.mark.parametrize("inner", [FedAvg, lambda: FedAdam(tau=1e-7)])
def test_dtypes_stay_and_traffic_is_counted(inner) -> None:  # type: ignore[no-untyped-def]
    for chosen in (None, policy()):
        wrapped = OMCStrategy(inner(), chosen)
        arrays = collect(build())
        for server_round in (1, 2):
            messages = configure(wrapped, arrays, server_round)
            replies = [trained(message) for message in messages.values()]
            down = sum(len(a.data) for m in messages.values() for a in m.content["arrays"].values())
            up = sum(len(a.data) for m in replies for a in m.content["arrays"].values())
            new, _ = wrapped.aggregate_train(server_round, replies)
            assert new is not None
            arrays = new
            assert {array.dtype for array in arrays.values()} == {"float32"}
            traffic = wrapped.traffic[-1]
            assert (traffic.round, traffic.sent, traffic.received) == (server_round, 4, 4)
            assert (traffic.down_bytes, traffic.up_bytes) == (down, up)


def damaged(record: ArrayRecord, name: str, array: Array) -> ArrayRecord:
    result = ArrayRecord()
    for key, old in record.items():
        result[key] = array if key == name else old
    return result


def test_bad_replies_are_left_out_and_named(flower_log: pytest.LogCaptureFixture) -> None:
    wrapped = OMCStrategy(FedAvg(), policy(fraction=1.0))
    alone = OMCStrategy(FedAvg(), policy(fraction=1.0))
    arrays = collect(build())
    messages = list(configure(wrapped, arrays).values())
    good = trained(messages[0])
    name = "0.weight"
    bad_bytes = bytearray(good.content["arrays"][name].data)
    bad_bytes[-1] ^= 1
    wrong = [
        Array("float32", (48, 48), STYPE, bytes(bad_bytes)),
        Array(np.full((48, 48), np.inf, np.float32)),
        Array(np.zeros((48, 47), np.float32)),
    ]
    replies = [good] + [
        answer(message, damaged(trained(message).content["arrays"], name, array))
        for message, array in zip(messages[1:], wrong, strict=True)
    ]
    result, _ = wrapped.aggregate_train(1, replies)
    first = next(m for m in configure(alone, arrays).values() if m.metadata.dst_node_id == good.metadata.src_node_id)
    expected, _ = alone.aggregate_train(1, [trained(first)])
    assert result is not None and expected is not None
    assert {n: a.data for n, a in result.items()} == {n: a.data for n, a in expected.items()}
    assert wrapped.traffic[-1].received == 1
    for message in messages[1:]:
        assert f"left out node {message.metadata.dst_node_id}: {name}" in flower_log.text


@pytest.mark.parametrize(
    "metrics",
    [
        {"num-examples": float("nan"), "loss": 1.0},
        {"num-examples": float("inf"), "loss": 1.0},
        {"num-examples": -3, "loss": 1.0},
        {"num-examples": [1, 2], "loss": 1.0},
        {"loss": 1.0},
        None,
    ],
)
def test_replies_with_a_wrong_weight_are_left_out(metrics: dict[str, object] | None) -> None:
    arrays = collect(build())
    results = []
    for bad in (metrics, "absent"):
        wrapped = OMCStrategy(FedAvg(), policy())
        messages = sorted(configure(wrapped, arrays).values(), key=lambda m: m.metadata.dst_node_id)
        replies = [trained(message) for message in messages[:-1]]
        if bad != "absent":
            odd = trained(messages[-1])
            content = {"arrays": odd.content["arrays"]} | ({} if bad is None else {"metrics": MetricRecord(bad)})
            replies.append(Message(RecordDict(content), reply_to=messages[-1]))
        result, _ = wrapped.aggregate_train(1, replies)
        assert result is not None
        assert wrapped.traffic[-1].received == 3
        results.append({name: array.data for name, array in result.items()})
    assert results[0] == results[1]


def test_an_error_in_the_superlinks_name_is_of_the_node_that_was_asked(flower_log: pytest.LogCaptureFixture) -> None:
    wrapped = OMCStrategy(FedAvg(), policy())
    messages = list(configure(wrapped, collect(build())).values())
    for number, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = f"message {number}"
    lost = Message(Error(code=3, reason="node unavailable"), reply_to=messages[0])
    lost.metadata.__dict__["_src_node_id"] = 1
    result, _ = wrapped.aggregate_train(1, iter([lost, *map(trained, messages[1:])]))
    assert result is not None and wrapped.traffic[-1].received == 3
    assert f"left out node {messages[0].metadata.dst_node_id}: node unavailable" in flower_log.text
    assert "no reply came in time" not in flower_log.text


def test_replies_of_other_dtypes_are_left_out() -> None:
    arrays = collect(build())
    for dtype in (np.int64, np.bool_, np.float64):
        wrapped = OMCStrategy(FedAvg(), policy())
        messages = list(configure(wrapped, arrays).values())
        good = [trained(message) for message in messages[1:]]
        odd = damaged(trained(messages[0]).content["arrays"], "0.weight", Array(np.full((48, 48), 1, dtype)))
        result, _ = wrapped.aggregate_train(1, [*good, answer(messages[0], odd)])
        assert result is not None and wrapped.traffic[-1].received == 3


def test_nobody_answers_twice_or_unasked() -> None:
    wrapped = OMCStrategy(FedAvg(), policy(), client_name=dict(zip(NODES, "abcd", strict=True)).__getitem__)
    messages = list(configure(wrapped, collect(build())).values())
    replies = [trained(message) for message in messages]
    stranger = trained(messages[0])
    stranger.metadata.__dict__["_src_node_id"] = 99
    wrapped.aggregate_train(1, [*replies, trained(messages[0]), stranger])
    assert wrapped.traffic[-1].received == 4


def test_a_result_that_is_not_finite_is_dropped() -> None:
    wrapped = OMCStrategy(FedAvg(), policy(fraction=1.0))
    messages = list(configure(wrapped, collect(build())).values())
    huge = [
        answer(m, damaged(trained(m).content["arrays"], "0.bias", Array(np.full(48, 3e38, np.float32))), 10**9)
        for m in messages
    ]
    assert wrapped.aggregate_train(1, huge)[0] is not None  # finite, if far off
    wrapped.inner.aggregate_train = lambda *args: (  # type: ignore[method-assign]
        damaged(collect(build()), "0.bias", Array(np.full(48, np.inf, np.float32))),
        None,
    )
    assert wrapped.aggregate_train(1, [trained(m) for m in messages])[0] is None


def test_no_weight_no_model() -> None:
    wrapped = OMCStrategy(FedAvg(), policy())
    messages = configure(wrapped, collect(build())).values()
    assert wrapped.aggregate_train(1, [answer(m, trained(m).content["arrays"], 0) for m in messages]) == (None, None)


def test_integer_counters_are_rounded() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 40))
    model[0].num_batches_tracked.fill_(7)
    wrapped = OMCStrategy(FedAvg(), policy())
    messages = configure(wrapped, collect(model)).values()
    replies = [answer(m, m.content["arrays"], weight) for m, weight in zip(messages, (60, 57, 43, 49), strict=True)]
    result, _ = wrapped.aggregate_train(1, replies)
    assert result is not None and result["0.num_batches_tracked"].numpy() == 7


def test_a_strategy_that_copies_the_model_is_compressed_too() -> None:
    class Copying(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):  # type: ignore[no-untyped-def]
            return super().configure_train(server_round, ArrayRecord(dict(arrays.items())), config, grid)

    for message in configure(OMCStrategy(Copying(), policy(fraction=1.0)), collect(build())).values():
        assert message.content["arrays"]["0.weight"].stype == STYPE


def test_error_replies_reach_the_inner_strategy() -> None:
    wrapped = OMCStrategy(FedAvg(), policy())
    messages = list(configure(wrapped, collect(build())).values())
    replies = [trained(messages[0]), Message(Error(code=1, reason="gone"), reply_to=messages[1])]
    result, _ = wrapped.aggregate_train(1, replies)
    assert result is not None
    assert wrapped.traffic[-1].received == 1


def test_evaluation_messages_are_compressed_too() -> None:
    wrapped = OMCStrategy(FedAvg(), policy(fraction=1.0))
    grid: Grid = Nodes()  # type: ignore[assignment]
    for message in wrapped.configure_evaluate(1, collect(build()), ConfigRecord({}), grid):
        assert message.content["arrays"]["0.weight"].stype == STYPE
        install(build(), message)


def test_a_non_finite_server_weight_is_named() -> None:
    model = build()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(fedomc.NonFiniteError, match=r"2\.weight"):
        configure(OMCStrategy(FedAvg(), policy(fraction=1.0)), collect(model))


def test_it_is_a_strategy_and_refuses_nonsense() -> None:
    assert isinstance(OMCStrategy(FedAvg(), None), Strategy)
    with pytest.raises(fedomc.PolicyError, match="median"):
        OMCStrategy(FedAvg(), None, aggregate="median")


class Best(FedAvg):
    """A strategy that runs its own rounds and remembers what they gave."""

    def start(self, grid, initial_arrays, num_rounds=3, timeout=3600, *configs):  # type: ignore[no-untyped-def]
        self.measured, self.arrays = list[float](), initial_arrays
        for number in range(1, num_rounds + 1):
            messages = self.configure_train(number, self.arrays, ConfigRecord(), grid)
            replies = grid.send_and_receive(messages=messages, timeout=timeout)
            arrays, metrics = self.aggregate_train(number, replies)
            self.measured.append(metrics["loss"])
            self.arrays = arrays
        return "its own result"

    def configure_train(self, server_round, arrays, config, grid):  # type: ignore[no-untyped-def]
        assert arrays is self.arrays
        return super().configure_train(server_round, arrays, config, grid)


class Answering(Nodes):
    """A grid whose nodes train when they are asked for their reply."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.sent = {str(message.metadata.dst_node_id): message for message in messages}
        return list(self.sent)

    def pull_messages(self, keys: Iterable[str]) -> list[Message]:
        return [trained(self.sent[key]) for key in keys]


def test_the_inner_strategys_own_start_runs_compressed(tmp_path: Path) -> None:
    grid: Grid = Answering()  # type: ignore[assignment]
    inner = Best()
    wrapped = OMCStrategy(inner, policy(fraction=1.0))
    random.seed(0)  # by which Flower orders the nodes
    assert wrapped.start(grid, collect(build()), num_rounds=2) == "its own result"  # type: ignore[comparison-overlap]
    assert inner.measured == [1.0, 1.0]
    assert [(row.round, row.received) for row in wrapped.traffic] == [(1, 4), (2, 4)]
    assert all(row.down_bytes < 4 * 0.5 * sum(len(a.data) for a in inner.arrays.values()) for row in wrapped.traffic)
    random.seed(0)
    plain = OMCStrategy(FedAvg(fraction_evaluate=0.0), policy(fraction=1.0)).start(grid, collect(build()), num_rounds=2)
    assert {n: a.data for n, a in inner.arrays.items()} == {n: a.data for n, a in plain.arrays.items()}
    wrapped.checkpoints = Checkpoints(tmp_path)
    with pytest.raises(fedomc.PolicyError, match=r"Best has its own start: override start in a subclass"):
        wrapped.start(grid, collect(build()))


WAYS = [
    {"format": "S1E3M7"},
    {"format": "S1E3M7", "rounding": "stochastic", "fraction": 1.0},
    {"format": "S1E2M3", "update_format": "S1E2M1"},
    {"format": "S1E2M1", "format_by_name": {"[0-3].*": "S1E2M3"}},
]


@pytest.mark.parametrize("aggregate", ["delta", "weights"])
@pytest.mark.parametrize("how", WAYS)
def test_entropy_coding_changes_bytes_alone(aggregate: str, how: dict[str, object]) -> None:
    results, bytes_of = {}, {}
    for coding in ("none", "down", "up", "both"):
        wrapped = OMCStrategy(FedAvg(), policy(**how), aggregate=aggregate, entropy_coding=coding)
        messages = configure(wrapped, collect(build()))
        result, _ = wrapped.aggregate_train(1, [trained(message) for message in messages.values()])
        assert result is not None and wrapped.traffic[-1].received == len(NODES)
        results[coding] = {name: array.data for name, array in result.items()}
        bytes_of[coding] = wrapped.traffic[-1].down_bytes, wrapped.traffic[-1].up_bytes
    assert results["none"] == results["down"] == results["up"] == results["both"]
    (down, up), (smaller_down, smaller_up) = bytes_of["none"], bytes_of["both"]
    assert bytes_of["down"] == (smaller_down, up) and bytes_of["up"] == (down, smaller_up)
    assert smaller_down < down and smaller_up < up


@pytest.mark.parametrize("aggregate", ["delta", "weights"])
@pytest.mark.parametrize("coding", ["none", "both"])
def test_unquantized_variables_in_a_format_of_their_own(aggregate: str, coding: str) -> None:
    """Less goes both ways; the mean is that of an FP32 rest, as near as the format says."""
    results, bytes_of = [], []
    for rest in (None, "S1E8M23", "S1E5M10"):
        wrapped = OMCStrategy(FedAvg(), policy(), aggregate=aggregate, unquantized_format=rest, entropy_coding=coding)
        messages = configure(wrapped, collect(build()))
        result, _ = wrapped.aggregate_train(1, [trained(message) for message in messages.values()])
        assert result is not None and wrapped.traffic[-1].received == len(NODES)
        results.append(values(result))
        bytes_of.append((wrapped.traffic[-1].down_bytes, wrapped.traffic[-1].up_bytes))
    for name, expected in results[0].items():
        np.testing.assert_allclose(results[1][name], expected, atol=1e-6, err_msg=name)
        tolerance = 2e-5 if aggregate == "delta" else 2e-4
        np.testing.assert_allclose(results[2][name], expected, atol=tolerance, err_msg=name)
    assert bytes_of[2][0] < bytes_of[0][0] and bytes_of[2][1] < bytes_of[0][1]


def test_a_damaged_entropy_coded_reply_is_left_out() -> None:
    wrapped = OMCStrategy(FedAvg(), policy(fraction=1.0), entropy_coding="both")
    messages = list(configure(wrapped, collect(build())).values())
    replies = [trained(message) for message in messages]
    other = trained(configure(OMCStrategy(FedAvg(), policy(fraction=1.0)), collect(build()))[NODES[1]])
    reply = replies[1].content["arrays"]["0.weight"]
    assert reply.data[14] == 1
    bad = bytearray(reply.data)
    bad[-1] ^= 1
    replies[0] = answer(
        messages[0], damaged(replies[0].content["arrays"], "0.weight", Array("float32", (48, 48), STYPE, bytes(bad)))
    )
    assert wrapped.aggregate_train(1, replies)[0] is not None
    assert wrapped.traffic[-1].received == len(NODES) - 1
    assert other.content["arrays"]["0.weight"].data[13] == 0  # who was not asked for it does not do it


def test_wrong_ways_to_travel_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fedomc.PolicyError, match="sideways"):
        OMCStrategy(FedAvg(), policy(), entropy_coding="sideways")
    with pytest.raises(fedomc.FormatError, match="S1E5"):
        OMCStrategy(FedAvg(), policy(), unquantized_format="S1E5")
    monkeypatch.setattr(fedomc.serialization.entropy, "zstandard", None)
    OMCStrategy(FedAvg(), policy())
    with pytest.raises(fedomc.PolicyError, match=r"fedomc\[lossless\]"):
        OMCStrategy(FedAvg(), policy(), entropy_coding="down")


@pytest.mark.parametrize(
    ("how", "told", "kept"),
    [
        (None, {}, False),
        ({}, {}, False),
        ({"format": "S1E2M3", "update_format": "S1E2M1"}, {"entropy_coding": "both"}, False),
        ({}, {"entropy_coding": "both"}, True),
        ({}, {"entropy_coding": "down"}, False),
        ({}, {"unquantized_format": "S1E5M10"}, True),
    ],
)
def test_a_message_is_consumed_but_for_what_collect_needs(
    how: dict[str, object] | None, told: dict[str, object], kept: bool
) -> None:
    arrays = collect(build())
    wrapped = OMCStrategy(FedAvg(), None if how is None else policy(**how), **told)  # type: ignore[arg-type]
    message, other, *_ = configure(wrapped, arrays).values()
    expected = {name: array.data for name, array in collect(install(build(), message), message).items()}
    shared = {name: array.data for name, array in other.content["arrays"].items()}
    model = install(build(), message, consume=True)
    left = message.content["arrays"]
    assert {name: tuple(a.shape) for name, a in left.items()} == {name: tuple(a.shape) for name, a in arrays.items()}
    assert any(array.data for array in left.values()) == kept
    assert {name: array.data for name, array in collect(model, message).items()} == expected
    assert {name: array.data for name, array in other.content["arrays"].items()} == shared


def test_a_consumed_message_is_let_go_of_one_variable_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    message = next(iter(configure(OMCStrategy(FedAvg(), policy()), collect(build())).values()))
    own = ArrayRecord()
    for name, array in message.content["arrays"].items():
        own[name] = Array(array.dtype, tuple(array.shape), array.stype, array.data)
    message.content["arrays"] = own
    held = [weakref.ref(array) for array in own.values()]
    del own, array
    counts, real = [], client._read

    def counted(*args: object) -> torch.Tensor:
        counts.append(sum(array() is not None for array in held))
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "_read", counted)
    install(build(), message, consume=True)
    assert counts == list(range(len(held), 0, -1))
