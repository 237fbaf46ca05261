"""Clients that keep what their replies lost, and add it to the next ones."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedomc
from fedomc.flower import OMCStrategy, collect, install, omc_mod
from fedomc.flower.arrays import read_packed
from fedomc.flower.config import CONFIG, from_config
from fedomc.flower.feedback import STATE
from tests.conftest import randn
from tests.flower.test_aggregation import Nodes

KEY = f"{STATE}.arrays"
NODES = 2


def build() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])


STEPS = {name: randn(*p.shape, seed=i, scale=0.01) for i, (name, p) in enumerate(build().named_parameters())}
WEIGHTS = [name for name in STEPS if name.endswith("weight")]


def answer(message: Message, arrays: ArrayRecord) -> Message:
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 2})}), reply_to=message)


def packed(message: Message, context: Context, steps: dict[str, Any] = STEPS, consume: bool = True) -> Message:
    """Train packed: change each variable by its step."""
    with torch.device("meta"):
        model = build()
    install(model, message, consume=consume)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(steps[name])
    return answer(message, collect(model, message, consume=consume, error_feedback=context))


def plain(message: Message, context: Context, steps: dict[str, Any] = STEPS) -> Message:
    """Train as a client that knows nothing of compression."""
    app = ClientApp(mods=[functools.partial(omc_mod, error_feedback=True)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        return answer(message, ArrayRecord({n: Array(a.numpy() + steps[n].numpy()) for n, a in record.items()}))

    return app(message, context)


CLIENTS: dict[str, Callable[..., Message]] = {
    "packed": packed,
    "packed, message kept": functools.partial(packed, consume=False),
    "plain": plain,
}
clients = pytest.mark.parametrize("client", CLIENTS)


def contexts() -> list[Context]:
    return [Context(1, node, {}, RecordDict(), {}) for node in range(1, NODES + 1)]


def messages(text: str, number: int = 1) -> list[Message]:
    strategy = OMCStrategy(FedAvg(), fedomc.CompressionPolicy.parse(text))
    return list(strategy.configure_train(number, collect(build()), ConfigRecord(), Nodes(NODES)))  # type: ignore[arg-type]


def rounds(text: str, client: Callable[..., Message], states: list[Context] | None, count: int) -> dict[str, float]:
    """Return the relative error of what all rounds changed, by variable."""
    strategy, arrays = OMCStrategy(FedAvg(), fedomc.CompressionPolicy.parse(text)), collect(build())
    initial = arrays
    for number in range(1, count + 1):
        sent = strategy.configure_train(number, arrays, ConfigRecord(), Nodes(NODES))  # type: ignore[arg-type]
        replies = [client(*pair) for pair in zip(sent, states or contexts(), strict=True)]
        arrays, _ = strategy.aggregate_train(number, replies)  # type: ignore[assignment]
        assert arrays is not None and strategy.traffic[-1].received == NODES
    found = {name: torch.from_numpy(arrays[name].numpy() - initial[name].numpy()) for name in STEPS}
    return {name: float((found[name] - count * step).norm() / step.norm()) for name, step in STEPS.items()}


@clients
@pytest.mark.parametrize("text", ["S1E4M10>DRIVE1", "S1E4M10>DRIVE1@0.6", "S1E4M10+S1E4M10>S1E3M0@0.6"])
def test_the_sum_of_many_rounds_lacks_one_residual_alone(client: str, text: str) -> None:
    """Also of variables that partial quantization leaves in FP32 in some of the rounds, and not in others."""
    states = contexts()
    found = rounds(text, CLIENTS[client], states, 12)
    forgetful = rounds(text, CLIENTS[client], None, 12)  # each context is new: the residual is always empty
    assert all(found[name] < 1.0 for name in WEIGHTS)
    assert sum(found[name] for name in WEIGHTS) < 0.5 * sum(forgetful[name] for name in WEIGHTS)
    for context in states:
        record = context.state[KEY]
        assert isinstance(record, ArrayRecord) and set(record) == set(WEIGHTS)
        assert sum(len(array.data) for array in record.values()) < 1.1 * len(WEIGHTS) * 64 * 64  # bytes


def test_a_client_that_misses_rounds_sends_its_residual_when_it_is_back() -> None:
    (context, _), policy = contexts(), "S1E4M10>DRIVE1"
    first, *_ = messages(policy, 1)
    reply = packed(first, context)
    name = WEIGHTS[0]
    arrived = read_packed(reply.content["arrays"][name], name, copy=True).packed.decode(torch.empty(64 * 64))
    later, *_ = messages(policy, 9)
    nothing = {name: torch.zeros_like(step) for name, step in STEPS.items()}
    reply = packed(later, context, nothing)
    arrived += read_packed(reply.content["arrays"][name], name, copy=True).packed.decode(torch.empty(64 * 64))
    left = read_packed(context.state[KEY][name], name, copy=True).packed.decode(torch.empty(64 * 64))
    torch.testing.assert_close(arrived + left, STEPS[name].view(-1), atol=2e-3, rtol=0)
    assert float(left.norm()) < 0.5 * float(STEPS[name].norm())


DAMAGES: dict[str, tuple[Callable[[Context], object], str]] = {
    "another record": (lambda c: c.state.update({KEY: ConfigRecord({"a": 1})}), "is a ConfigRecord and is dropped"),
    "plain values": (lambda c: c.state[KEY].update({WEIGHTS[0]: Array(STEPS[WEIGHTS[0]].numpy())}), WEIGHTS[0]),
    "another shape": (
        lambda c: c.state[KEY].update({WEIGHTS[0]: resized(c.state[KEY][WEIGHTS[0]], (32, 128))}),
        rf"the residual of {WEIGHTS[0]} in the client's state is dropped",
    ),
    "cut": (
        lambda c: c.state[KEY].update({WEIGHTS[0]: resized(c.state[KEY][WEIGHTS[0]], (64, 64), cut=5)}),
        rf"the residual of {WEIGHTS[0]} in the client's state is dropped",
    ),
    "no such variable": (
        lambda c: c.state[KEY].update({"old.weight": c.state[KEY][WEIGHTS[0]]}),
        "the residuals of old.weight are dropped: the model has no such variables",
    ),
}


def resized(array: Array, shape: tuple[int, ...], cut: int = 0) -> Array:
    return Array(array.dtype, shape, array.stype, array.data[: len(array.data) - cut])


@clients
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_dropped_with_a_warning(
    client: str, damage: str, flower_log: pytest.LogCaptureFixture
) -> None:
    (context, _), (spoil, warning) = contexts(), DAMAGES[damage]
    CLIENTS[client](messages("S1E4M10>DRIVE1", 1)[0], context)
    assert flower_log.text == ""
    spoil(context)
    reply = CLIENTS[client](messages("S1E4M10>DRIVE1", 2)[0], context)
    assert warning in flower_log.text
    assert set(reply.content["arrays"]) == set(STEPS) and set(context.state[KEY]) == set(WEIGHTS)


@clients
def test_a_reply_that_fails_leaves_the_state_as_it_was(client: str) -> None:
    context, _ = contexts()
    CLIENTS[client](messages("S1E4M10>DRIVE1", 1)[0], context)
    before = context.state[KEY]
    message = messages("S1E4M10>DRIVE1@0.6", 2)[0]
    last = sorted(from_config(message.content[CONFIG]).unquantized)[-1]  # dense, so that training does not see it
    bad = {name: step * (torch.nan if name == last else 1) for name, step in STEPS.items()}
    with pytest.raises(fedomc.NonFiniteError, match=last):
        CLIENTS[client](message, context, bad)
    assert context.state[KEY] is before


@clients
def test_a_policy_without_an_uplink_is_refused_and_fp32_has_nothing_to_feed_back(client: str) -> None:
    context, _ = contexts()
    with pytest.raises(fedomc.PolicyError, match=r"error feedback needs an uplink.*S1E3M7>DRIVE1"):
        CLIENTS[client](messages("S1E3M7")[0], context)
    message, *_ = FedAvg().configure_train(1, collect(build()), ConfigRecord(), Nodes(NODES))  # type: ignore[arg-type]
    reply = CLIENTS[client](message, context)
    assert {array.stype for array in reply.content["arrays"].values()} == {"numpy.ndarray"}
    assert not context.state
    with pytest.raises(fedomc.PolicyError, match="needs the message"):
        collect(build(), error_feedback=context)
