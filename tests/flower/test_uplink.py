"""Rounds of Flower in which what goes up has a method of its own."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedMedian, Strategy
from torch import nn

import fedomc
from fedomc.flower import OMCStrategy, collect, install, omc_mod
from fedomc.flower.arrays import STYPE, dense_array, packed_array, read_packed
from fedomc.flower.config import CONFIG, from_config, to_config
from fedomc.methods import encode
from fedomc.serialization import frame
from tests.conftest import randn
from tests.flower.test_aggregation import Nodes

POLICIES = (
    "S1E4M10>DRIVE1",
    "S1E4M10>DRIVE2@0.7",
    "S1E4M10>S1E2M1@0.7",
    "S1E4M10+S1E4M10>DRIVE2@0.7",
    "S1E4M10+S1E4M10>S1E3M0",
    "S1E4M10+S1E2M1>S1E2M1@0.7",
)
policies = pytest.mark.parametrize("text", POLICIES)


def build() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(64, 64) for _ in range(6)]
    return nn.Sequential(*layers, nn.LayerNorm(64))


STEPS = {name: randn(*p.shape, seed=i, scale=0.01) for i, (name, p) in enumerate(build().named_parameters())}


def answer(message: Message, arrays: ArrayRecord) -> Message:
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 2})}), reply_to=message)


def train_packed(message: Message, consume: bool = True) -> Message:
    """Keep the model packed, and change each variable by its step."""
    with torch.device("meta"):
        model = build()
    install(model, message, consume=consume)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(STEPS[name])
    return answer(message, collect(model, message, consume=consume))


def train_plain(message: Message) -> Message:
    """Know nothing of compression, but for the mod."""
    app = ClientApp(mods=[omc_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        assert {array.stype for array in record.values()} == {"numpy.ndarray"}
        new = {name: Array(array.numpy() + STEPS[name].numpy()) for name, array in record.items()}
        return answer(message, ArrayRecord(new))

    return app(message, Context(1, message.metadata.dst_node_id, {}, RecordDict(), {}))


CLIENTS: dict[str, Any] = {
    "packed": train_packed,
    "packed, message kept": lambda message: train_packed(message, consume=False),
    "plain": train_plain,
}


def round_of(strategy: OMCStrategy, client: Any, clients: int) -> tuple[ArrayRecord, ArrayRecord, list[ArrayRecord]]:
    """Return the model before and after a round, and the arrays of the replies."""
    arrays = collect(build())
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), Nodes(clients)))  # type: ignore[arg-type]
    replies = [client(message) for message in messages]
    records = [reply.content["arrays"] for reply in replies]
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None and strategy.traffic[-1].received == clients
    return arrays, result, records


@policies
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(("coding", "unquantized_format"), [("none", None), ("both", "S1E5M10")])
def test_every_compressible_variable_goes_up_as_a_change_in_the_uplinks_method(
    text: str, client: str, coding: str, unquantized_format: str | None
) -> None:
    policy = fedomc.CompressionPolicy.parse(text)
    strategy = OMCStrategy(FedAvg(), policy, entropy_coding=coding, unquantized_format=unquantized_format)
    before, after, records = round_of(strategy, CLIENTS[client], 2)
    for record in records:
        for name, array in record.items():
            if name not in policy.compressible(build()):
                assert array.stype == "numpy.ndarray"
                continue
            assert array.stype == STYPE
            found = read_packed(array, name, copy=True)
            assert (found.kind, found.packed.method) == (frame.UPDATE, policy.uplink)
    moved = torch.cat([torch.from_numpy(after[n].numpy() - before[n].numpy()).view(-1) for n in STEPS])
    step = torch.cat([STEPS[name].view(-1) for name in STEPS])
    assert float(torch.cosine_similarity(moved, step, dim=0)) > 0.75


@pytest.mark.parametrize("text", ["S1E4M10>DRIVE1@0.7", "S1E4M10+S1E4M10>S1E2M1@0.7"])
@pytest.mark.parametrize("client", ["packed", "plain"])
def test_the_errors_of_clients_cancel(text: str, client: str) -> None:
    """The rounding of each client is its own: the squared error of the mean of 8 is a quarter of that of 2."""
    errors = []
    for clients in (2, 8):
        strategy = OMCStrategy(FedAvg(), fedomc.CompressionPolicy.parse(text))
        before, after, _ = round_of(strategy, CLIENTS[client], clients)
        changes = [after[name].numpy() - before[name].numpy() for name in STEPS if "weight" in name]
        wanted = [STEPS[name].numpy() for name in STEPS if "weight" in name]
        errors.append(sum(float(np.square(a - b).sum()) for a, b in zip(changes, wanted, strict=True)))
    assert 0.6 < errors[1] * 4 / errors[0] < 1.6


@pytest.mark.parametrize("text", POLICIES[1:4])
@pytest.mark.parametrize("aggregate", ["delta", "weights"])
@pytest.mark.parametrize("inner", [FedAvg, FedMedian])
def test_both_ways_to_aggregate_and_strategies_that_need_all_replies(
    text: str, aggregate: str, inner: type[Strategy]
) -> None:
    strategy = OMCStrategy(inner(), fedomc.CompressionPolicy.parse(text), aggregate=aggregate)
    before, after, _ = round_of(strategy, train_packed, 6)
    for name, step in STEPS.items():
        change = torch.from_numpy(after[name].numpy() - before[name].numpy())
        assert float((change - step).norm() / step.norm()) < 0.5, name


@policies
def test_the_bytes_are_those_of_the_uplinks_method(text: str) -> None:
    policy = fedomc.CompressionPolicy.parse(text)
    strategy = OMCStrategy(FedAvg(), policy)
    _, _, records = round_of(strategy, train_packed, 2)
    assert strategy.report is not None and policy.uplink is not None
    for name, numel in policy.compressible(build()).items():
        expected = 2 * frame.size_of(encode(torch.zeros(numel), policy.uplink), (64, 64))  # type: ignore[arg-type]
        assert strategy.report.up_bytes[name] == expected
    total = sum(len(array.data) for record in records for array in record.values())
    assert strategy.traffic[-1].up_bytes == total


def test_the_message_names_what_it_needs_and_a_consumed_one_keeps_that() -> None:
    for text, kept in (("S1E4M10>DRIVE1@0.7", True), ("S1E4M10@0.7", False)):
        policy = fedomc.CompressionPolicy.parse(text)
        strategy, arrays = OMCStrategy(FedAvg(), policy), collect(build())
        message, _ = strategy.configure_train(1, arrays, ConfigRecord(), Nodes(2))  # type: ignore[arg-type]
        config = from_config(message.content[CONFIG])
        selection = policy.select(build(), round=1, client=str(message.metadata.dst_node_id))
        assert config.unquantized == frozenset(selection.unquantized if kept else ())
        with torch.device("meta"):
            model = build()
        install(model, message, consume=True)
        left = {name for name, array in message.content["arrays"].items() if array.data}
        assert left == (set(policy.compressible(build())) if kept else set())


def test_a_reply_in_another_method_than_the_uplinks_is_left_out(flower_log: pytest.LogCaptureFixture) -> None:
    """As of a client that does not give ``collect`` the message, or one that chooses by itself."""
    policy = fedomc.CompressionPolicy.parse("S1E4M10+S1E3M4>DRIVE1@0.7")

    def unasked(message: Message) -> Message:
        return answer(message, collect(install(build(), message)))

    def other_method(message: Message) -> Message:
        reply = train_packed(message, consume=False)
        name = next(name for name in policy.compressible(build()) if reply.content["arrays"][name].stype == STYPE)
        packed = encode(STEPS[name], fedomc.methods.parse_method("DRIVE2"))
        reply.content["arrays"][name] = packed_array(packed, (64, 64), frame.UPDATE)
        return reply

    for client, found in ((unasked, "S1E3M4"), (other_method, "DRIVE2")):
        strategy = OMCStrategy(FedAvg(), policy)
        messages = list(strategy.configure_train(1, collect(build()), ConfigRecord(), Nodes(2)))  # type: ignore[arg-type]
        result, _ = strategy.aggregate_train(1, [client(messages[0]), train_packed(messages[1])])
        assert result is not None and strategy.traffic[-1].received == 1
        assert f"is an update in {found}, but its change in DRIVE1 was requested" in flower_log.text


def test_an_update_of_what_was_sent_in_fp32_is_left_out_unless_it_was_asked_for(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    strategy, arrays = OMCStrategy(FedAvg(), fedomc.CompressionPolicy.parse("S1E4M10>DRIVE1@0.7")), collect(build())
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), Nodes(2)))  # type: ignore[arg-type]
    bad = train_packed(messages[0])
    bias = encode(torch.zeros(64), fedomc.methods.parse_method("DRIVE1"))
    bad.content["arrays"]["0.bias"] = packed_array(bias, (64,), frame.UPDATE)
    strategy.aggregate_train(1, [bad, train_packed(messages[1])])
    assert strategy.traffic[-1].received == 1
    assert "0.bias is an update, but the variable was sent in FP32" in flower_log.text


@pytest.mark.parametrize("names", ["0.weight", 3, [1, 2]])
def test_a_record_without_a_list_of_names_is_refused(names: Any) -> None:
    config = dict(to_config(fedomc.Encoding.parse("S1E3M7>DRIVE1"), unquantized=["0.weight"]))
    assert from_config(config).unquantized == {"0.weight"}
    with pytest.raises(fedomc.PayloadError, match="not a list of names"):
        from_config({**config, "unquantized": names})
    with pytest.raises(fedomc.PayloadError, match="DRIVE7"):
        from_config({**config, "uplink": "DRIVE7"})


def test_values_that_were_sent_dense_and_are_not_finite_are_refused_by_the_mod() -> None:
    message, _ = OMCStrategy(FedAvg(), fedomc.CompressionPolicy.parse("S1E4M10>DRIVE1@0.7")).configure_train(
        1,
        collect(build()),
        ConfigRecord(),
        Nodes(2),  # type: ignore[arg-type]
    )
    (name, *_) = from_config(message.content[CONFIG]).unquantized
    record = ArrayRecord(dict(message.content["arrays"]))
    record[name] = dense_array(np.full((64, 64), np.nan, np.float32))
    message.content = RecordDict({**message.content, "arrays": record})
    with pytest.raises(fedomc.PayloadError, match=name):
        train_plain(message)


def test_what_is_sent_both_ways_has_a_method_that_holds() -> None:
    with pytest.raises(fedomc.PolicyError, match="DRIVE1 can only be used for the uplink"):
        OMCStrategy(FedAvg(), fedomc.CompressionPolicy("S1E3M7"), unquantized_format="DRIVE1")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("text", ["S1E4M10>DRIVE1@0.7", "S1E4M10+S1E4M10>S1E2M1"])
def test_what_is_held_in_fp32_goes_up_in_the_uplink_if_it_is_named(text: str, client: str) -> None:
    policy = fedomc.CompressionPolicy.parse(text, uplink_include=["*.bias", "6.weight"])
    strategy = OMCStrategy(FedAvg(), policy)
    before, after, records = round_of(strategy, CLIENTS[client], 4)
    assert {n for n in STEPS if n not in policy.compressible(build())} == {"6.weight", *(f"{i}.bias" for i in range(7))}
    for record in records:
        for name, array in record.items():
            found = read_packed(array, name, copy=True)
            assert (found.kind, found.packed.method) == (frame.UPDATE, policy.uplink)
    moved = torch.cat([torch.from_numpy(after[n].numpy() - before[n].numpy()).view(-1) for n in STEPS])
    step = torch.cat([STEPS[name].view(-1) for name in STEPS])
    assert float(torch.cosine_similarity(moved, step, dim=0)) > 0.85
