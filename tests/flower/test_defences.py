"""Differential privacy, mods and secure aggregation with compression: right values, right order, or a refusal."""

import copy
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secagg_mod, secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.compat.common import recorddict_compat
from flwr.server import strategy as legacy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.default_workflows import default_init_params_workflow
from flwr.serverapp import strategy as strategies
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    PrivacySpent,
    SamplingMethod,
)
from torch import nn

import fedomc
from fedomc.flower import OMCStrategy, StreamingGrid, collect, install, omc_mod
from fedomc.flower.arrays import STYPE, packed_array
from fedomc.methods import encode
from fedomc.serialization.checkpointing import Checkpoints
from tests.flower.test_aggregation import Network, Nodes, decode

SHAPE, C, CLIENTS = (64, 96), 1.0, 4
GUIDE = Path(__file__).parents[2] / "docs" / "defences.md"


def model() -> ArrayRecord:
    draw = np.random.default_rng(0)
    weight = (draw.standard_normal(SHAPE) * 0.05).astype(np.float32)
    return ArrayRecord({"weight": Array(weight), "bias": Array(draw.standard_normal(96).astype(np.float32))})


def step(node: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Give what a client learns: node 1 0.6 of the clipping norm, node 4 2.4 of it."""
    draw = np.random.default_rng([node, len(name)]).standard_normal(shape)
    share = 0.6 if name == "bias" else 0.8
    return (draw / np.linalg.norm(draw) * share * node * 0.6 * C).astype(np.float32)


def train(message: Message, context: Context) -> Message:
    """Train with numpy alone."""
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    new = ArrayRecord({n: Array(a + step(context.node_id, n, a.shape)) for n, a in arrays.items()})
    content = RecordDict({"arrays": new, "metrics": MetricRecord({"num-examples": 1, "loss": 0.5})})
    return Message(content, reply_to=message)


def client(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))
    app.train()(train)
    return app


def poison(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    new = ArrayRecord({name: Array(np.full(array.shape, 50, np.float32)) for name, array in arrays.items()})
    content = RecordDict({"arrays": new, "metrics": MetricRecord({"num-examples": 1, "loss": 0.5})})
    return Message(content, reply_to=message)


poisoned = ClientApp(mods=[omc_mod])
poisoned.train()(poison)


def packed_client(*mods: Any) -> ClientApp:
    """Train in compressed memory."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with torch.device("meta"):
            layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
            layer.bias = nn.Parameter(torch.empty(96))
        install(layer, message)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.add_(torch.from_numpy(step(context.node_id, name, tuple(parameter.shape))))
        content = {"arrays": collect(layer, message), "metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}
        return Message(RecordDict(content), reply_to=message)

    return app


def ask(app: ClientApp, message: Message) -> Message:
    """Answer as Flower's runtime does, which makes an error of an exception."""
    node = message.metadata.dst_node_id
    message = copy.copy(message)  # what omc_mod changes is the client's
    np.random.seed(node)  # for LocalDpMod
    try:
        return app(message, Context(1, node, {}, RecordDict(), {}))
    except Exception as error:
        reason = str(type(error)) + ":<'" + str(error) + "'>"
        return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)


def fixed(kind: type, inner: strategies.Strategy, noise: float = 0.0, **kwargs: Any) -> strategies.Strategy:
    return kind(inner, noise, C, CLIENTS, **kwargs)


def adaptive(kind: type, inner: strategies.Strategy, noise: float = 0.0) -> strategies.Strategy:
    return kind(inner, noise, CLIENTS, initial_clipping_norm=C)


def none(kind: type, inner: strategies.Strategy, noise: float = 0.0) -> strategies.Strategy:
    return inner


Defence = tuple[Callable[..., Any], Any, tuple[Any, ...]]

ON_SERVER: dict[str, Defence] = {
    "server, fixed": (fixed, strategies.DifferentialPrivacyServerSideFixedClipping, ()),
    "server, adaptive": (adaptive, strategies.DifferentialPrivacyServerSideAdaptiveClipping, ()),
}
ON_CLIENTS: dict[str, Defence] = {
    "client, fixed": (fixed, strategies.DifferentialPrivacyClientSideFixedClipping, (fixedclipping_mod,)),
    "client, adaptive": (adaptive, strategies.DifferentialPrivacyClientSideAdaptiveClipping, (adaptiveclipping_mod,)),
}
LOCAL: dict[str, Defence] = {"local": (none, None, (LocalDpMod(C, 0.01, 10.0, 1e-5),))}
CLIPPING = ON_SERVER | ON_CLIENTS

FORMATS = {
    "one part": {"format": "S1E3M7"},
    "coarse": {"format": "S1E2M1"},
    "stochastic": {"format": "S1E2M3", "rounding": "stochastic"},
    "two parts": {"format": "S1E2M3", "update_format": "S1E2M1"},
}


def policy(**kwargs: Any) -> fedomc.CompressionPolicy:
    return fedomc.CompressionPolicy(**{"format": "S1E3M7", **kwargs})


class Watched(strategies.FedAvg):
    """Keep what is added up."""

    added: dict[int, dict[str, np.ndarray]]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        self.added = {
            reply.metadata.src_node_id: {name: array.numpy() for name, array in reply.content["arrays"].items()}
            for reply in replies
            if reply.has_content()
        }
        return super().aggregate_train(server_round, replies)


def rounds(strategy: strategies.Strategy, app: ClientApp, count: int = 2) -> tuple[ArrayRecord, list[Message]]:
    """Run rounds, seed the noise, and give the model and the last messages."""
    arrays, messages = model(), []
    for number in range(1, count + 1):
        messages = configured(strategy, arrays, number)
        replies = [ask(app, message) for message in messages]
        np.random.seed(number)
        arrays, _ = strategy.aggregate_train(number, replies)
        assert arrays is not None
    return arrays, messages


def configured(
    strategy: strategies.Strategy, arrays: ArrayRecord | None = None, number: int = 1, count: int = CLIENTS
) -> list[Message]:
    """Give the messages of a round, for the nodes 1, 2, ..."""
    messages = strategy.configure_train(number, arrays or model(), ConfigRecord(), Nodes(count))  # type: ignore[arg-type]
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def length(change: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(((change[n].astype(np.float64) - base[n]) ** 2).sum() for n in change)))


def numpy(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("defence", CLIPPING | LOCAL)
@pytest.mark.parametrize("how", [None, {"format": "S1E8M23"}, {"format": "S1E8M23", "update_format": "S1E8M23"}])
def test_a_lossless_format_gives_what_flower_alone_gives(
    defence: str, how: dict[str, Any] | None, noise: float
) -> None:
    """Two rounds, with the same noise, against Flower's own strategies and mods in FP32."""
    make, kind, mods = (CLIPPING | LOCAL)[defence]
    plain = make(kind, strategies.FedAvg(), noise)
    expected, _ = rounds(plain, client(*mods))
    inner = make(kind, strategies.FedAvg(), noise)
    found, messages = rounds(OMCStrategy(inner, None if how is None else policy(**how)), client(omc_mod, *mods))
    assert (messages[0].content["arrays"]["weight"].stype == STYPE) == (how is not None)
    for name, array in found.items():
        moved = np.abs(expected[name].numpy() - model()[name].numpy()).max()
        np.testing.assert_allclose(array.numpy(), expected[name].numpy(), atol=1e-4 * moved, err_msg=name)
    if kind is not None:
        assert getattr(inner, "clipping_norm", C) == getattr(plain, "clipping_norm", C)
        assert ("adaptive" in defence) == (inner.clipping_norm != C)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("defence", CLIPPING)
def test_nothing_longer_than_the_clipping_norm_is_added_up_and_nothing_else_is_changed(defence: str, how: str) -> None:
    """Against numpy, in float64: what a client changed of what it was sent, clipped."""
    make, kind, mods = CLIPPING[defence]
    watched = Watched()
    strategy = OMCStrategy(make(kind, watched), policy(**FORMATS[how]))
    app = client(omc_mod, *mods)
    messages = configured(strategy)
    shapes = {name: array.shape for name, array in model().items()}
    sent = {m.metadata.dst_node_id: {n: decode(m, n)[0].reshape(shapes[n]) for n in shapes} for m in messages}
    own, changes = numpy(model()), {}
    replies = [ask(app, message) for message in messages]
    for reply in replies:
        node, changes[node] = reply.metadata.src_node_id, {}
        for name in own:
            values, is_update = decode(reply, name)
            changes[node][name] = values.reshape(own[name].shape) - (0 if is_update else sent[node][name])
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None and sorted(watched.added) == [1, 2, 3, 4]
    lengths = {node: length(change, {name: np.zeros(1) for name in own}) for node, change in changes.items()}
    for node, change in changes.items():
        assert length(watched.added[node], own) <= C * (1 + 1e-5)
        for name in own:
            wanted = own[name] + min(1, C / lengths[node]) * change[name]
            np.testing.assert_allclose(watched.added[node][name], wanted, atol=1e-6)
    if defence in ON_CLIENTS and how == "coarse":  # the clients had clipped: hence the server's clipping
        assert max(lengths.values()) > 1.05 * C


@pytest.mark.parametrize("defence", [*ON_SERVER, "client, fixed"])
def test_clients_that_train_compressed_are_clipped_on_the_server(defence: str) -> None:
    """And so is a client that should have clipped and has no mod for it."""
    make, kind, _ = CLIPPING[defence]
    watched = Watched()
    rounds(OMCStrategy(make(kind, watched), policy(**FORMATS["two parts"])), packed_client(), 1)
    lengths = {node: length(added, numpy(model())) for node, added in watched.added.items()}
    assert 0.5 < lengths[1] < 0.7 and lengths[4] == pytest.approx(C, rel=1e-5)


ROBUST = {
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
}


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("name", ROBUST)
def test_robust_strategies_find_the_poisoned_update_among_decoded_ones(name: str, how: str) -> None:
    moved = {}
    for inner in (getattr(strategies, name)(**ROBUST[name]), strategies.FedAvg()):
        strategy = OMCStrategy(inner, policy(**FORMATS[how]))
        apps = [client(omc_mod)] * 7 + [poisoned]
        replies = [ask(app, m) for app, m in zip(apps, configured(strategy, count=8), strict=True)]
        result, _ = strategy.aggregate_train(1, replies)
        assert result is not None
        moved[inner] = length(numpy(result), numpy(model()))
    robust, plain = moved.values()
    assert robust < 7 * 0.6 * C < 100 < plain


WRONG_ORDERS = {
    "clipping around omc_mod": ("client, fixed", client(fixedclipping_mod, omc_mod), "after omc_mod"),
    "adaptive clipping around omc_mod": ("client, adaptive", client(adaptiveclipping_mod, omc_mod), "after omc_mod"),
    "clipping around compressed training": ("client, fixed", packed_client(fixedclipping_mod), "after omc_mod"),
    "local noise around omc_mod": ("local", client(LocalDpMod(C, 1.0, 1.0, 1e-5), omc_mod), "after omc_mod"),
    "local noise around compressed training": ("local", packed_client(LocalDpMod(C, 1.0, 1.0, 1e-5)), "after omc_mod"),
    "secure aggregation outside": ("local", client(secaggplus_mod, omc_mod), "only for its legacy strategies"),
    "SecAgg inside": ("local", client(omc_mod, secagg_mod), "only for its legacy strategies"),
    "secure aggregation inside": ("local", client(omc_mod, secaggplus_mod), "only for its legacy strategies"),
}


@pytest.mark.parametrize("case", WRONG_ORDERS)
def test_a_wrong_order_of_mods_fails_with_its_reason_and_nothing_is_added_up(
    case: str, flower_log: pytest.LogCaptureFixture
) -> None:
    defence, app, reason = WRONG_ORDERS[case]
    make, kind, _ = (CLIPPING | LOCAL)[defence]
    strategy = OMCStrategy(make(kind, strategies.FedAvg()), policy())
    messages = configured(strategy)
    replies = [ask(app, message) for message in messages]
    assert all(reply.has_error() for reply in replies)
    assert strategy.aggregate_train(1, replies)[0] is None
    for node in range(1, CLIENTS + 1):
        assert re.search(rf"left out node {node}: .*{reason}.*docs/defences\.md", flower_log.text)


def plain_client(message: Message, context: Context) -> Message:
    values = {name: array.numpy() for name, array in message.content["arrays"].items()}
    return Message(RecordDict({"arrays": ArrayRecord({n: Array(a) for n, a in values.items()})}), reply_to=message)


def test_a_client_that_is_not_adapted_is_told_what_to_do(flower_log: pytest.LogCaptureFixture) -> None:
    """On the client by Flower's own error, in which the type of the array speaks; on the server by the log."""
    strategy = OMCStrategy(strategies.FedAvg(), policy())
    app, old = ClientApp(), ClientApp(lambda context: NumPyClient().to_client())
    app.train()(plain_client)
    messages = configured(strategy)
    replies = [ask(app, messages[0]), *(ask(old, message) for message in messages[1:])]
    says = "Unsupported serialization type .* read it with fedomc.flower.install or fedomc.flower.omc_mod"
    assert re.search(says, str(replies[0].error.reason))
    assert strategy.aggregate_train(1, replies)[0] is None
    assert re.search(r"left out node 1: .*fedomc\.flower\.install and reply with .*omc_mod", flower_log.text)
    assert re.search(r"left out node 2: .*legacy app.*@app\.train\(\) of flwr\.clientapp", flower_log.text)
    flower_log.clear()
    assert strategy.aggregate_evaluate(1, replies) is None
    assert "fedomc.flower.install and reply" in flower_log.text


def test_mods_that_count_bytes_are_right_on_either_side() -> None:
    for message in configured(OMCStrategy(strategies.FedAvg(), policy()), count=2):
        app = client(message_size_mod, arrays_size_mod, omc_mod, message_size_mod, arrays_size_mod)
        assert ask(app, message).content["arrays"]["weight"].stype == STYPE


@pytest.mark.parametrize("defence", CLIPPING)
def test_what_cannot_be_right_is_refused(defence: str) -> None:
    make, kind, _ = CLIPPING[defence]
    with pytest.raises(fedomc.PolicyError, match=r"aggregate='weights'.*docs/defences"):
        OMCStrategy(make(kind, strategies.FedAvg()), policy(), aggregate="weights")
    outside = make(kind, OMCStrategy(strategies.FedAvg(), policy()))
    for call in (
        lambda: configured(outside),
        lambda: outside.start(StreamingGrid(Network(CLIENTS, lambda message: None)), model(), num_rounds=1),  # type: ignore[arg-type]
    ):
        with pytest.raises(fedomc.PolicyError, match=rf"OMCStrategy\({kind.__name__}\(FedAvg.*docs/defences.md"):
            call()
    counting = model()
    counting["steps"] = Array(np.array(41))
    strategy = OMCStrategy(make(kind, strategies.FedAvg()), policy())
    with pytest.raises(fedomc.PolicyError, match=r"steps is int64.*docs/defences"):
        configured(strategy, counting)


def echo(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


@pytest.mark.parametrize("defence", ON_SERVER)
def test_a_client_that_changes_nothing_is_counted_and_does_no_harm(defence: str) -> None:
    """Flower alone divides by the norm of its update."""
    make, kind, _ = ON_SERVER[defence]
    idle = ClientApp()
    idle.train()(echo)
    clipped = ClientApp(mods=[omc_mod, fixedclipping_mod])
    clipped.train()(echo)
    on_clients = OMCStrategy(fixed(ON_CLIENTS["client, fixed"][1], strategies.FedAvg()), policy())
    assert "ZeroDivisionError" in str(ask(clipped, configured(on_clients)[0]).error.reason)
    with pytest.raises(ZeroDivisionError):
        rounds(make(kind, strategies.FedAvg()), idle, 1)
    for zeros in (False, True):
        watched = Watched()
        strategy = OMCStrategy(make(kind, watched), policy(format="S1E2M3", update_format="S1E2M3"))
        arrays = ArrayRecord({n: Array(np.zeros_like(a.numpy())) for n, a in model().items()}) if zeros else model()
        messages = configured(strategy, arrays)
        replies = [ask(idle if m.metadata.dst_node_id == 1 else client(omc_mod), m) for m in messages]
        result, _ = strategy.aggregate_train(1, replies)
        assert result is not None and sorted(watched.added) == [1, 2, 3, 4]
        for name, array in arrays.items():
            assert np.abs(watched.added[1][name] - array.numpy()).max() < 1e-6


@pytest.mark.parametrize("defence", CLIPPING)
def test_a_hostile_reply_costs_no_more_than_itself(defence: str, flower_log: pytest.LogCaptureFixture) -> None:
    """An update beyond what float32 holds, one that is as large as can be, and variables in another order."""
    make, kind, mods = CLIPPING[defence]
    watched = Watched()
    strategy = OMCStrategy(make(kind, watched), policy(format="S1E2M3", update_format="S1E2M3"))
    arrays = model()
    arrays["weight"] = Array(np.full(SHAPE, 1e38, np.float32))
    messages = configured(strategy, arrays)
    replies = [ask(client(omc_mod, *mods), message) for message in messages]
    for reply, size in ((replies[0], 3e38), (replies[1], 2e38)):
        huge = encode(torch.full(SHAPE, size), fedomc.FloatFormat(2, 3))
        reply.content["arrays"]["weight"] = packed_array(huge, SHAPE, fedomc.serialization.frame.UPDATE)
    swapped = ArrayRecord()
    for name in ("bias", "weight"):
        swapped[name] = replies[2].content["arrays"][name]
    replies[2].content["arrays"] = swapped
    result, _ = strategy.aggregate_train(1, replies)
    assert sorted(watched.added) == [2, 3, 4] and result is not None
    assert "left out node 1: its change, or the sum of its change and the model, is not finite" in flower_log.text
    assert list(watched.added[3]) == list(arrays)
    bias = watched.added[3]["bias"] - arrays["bias"].numpy()
    assert 0 < np.linalg.norm(bias) <= C * (1 + 1e-5)


def test_nobody_answering_is_no_round_and_no_error() -> None:
    for make, kind, _ in CLIPPING.values():
        strategy = OMCStrategy(make(kind, strategies.FedAvg()), policy())
        configured(strategy)
        assert strategy.aggregate_train(1, []) == (None, None)


def test_the_weight_is_named_by_the_innermost_strategy() -> None:
    strategy = OMCStrategy(fixed(ON_SERVER["server, fixed"][1], Watched(weighted_by_key="seconds")), policy())
    messages = configured(strategy)
    replies = [ask(client(omc_mod), message) for message in messages]
    for reply in replies:
        reply.content["metrics"]["seconds"] = float(reply.metadata.src_node_id)
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None
    added = strategy.inner.strategy.added  # type: ignore[attr-defined]
    expected = sum(node * values["weight"] for node, values in added.items()) / 10
    np.testing.assert_allclose(result["weight"].numpy(), expected, atol=1e-6)


class Books:
    """An accountant that counts; Flower's own needs a package."""

    config = PrivacyConfig(1e-5, 10, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)

    def __init__(self) -> None:
        self.num_releases = 0

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        self.num_releases += count

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        return PrivacySpent(float(self.num_releases), 1e-5, self.num_releases, "count")

    def state_dict(self) -> dict[str, object]:
        return {"releases": self.num_releases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_releases = state["releases"]


@pytest.mark.parametrize("defence", ["server, fixed", "client, fixed"])
def test_with_an_accountant_a_reply_that_is_left_out_costs_the_round_and_no_budget(defence: str) -> None:
    make, kind, mods = CLIPPING[defence]
    books = Books()
    strategy = OMCStrategy(make(kind, strategies.FedAvg(), 0.1, accountant=books), policy())
    for number, damaged, spent in ((1, False, 1), (2, True, 1), (3, False, 2)):
        messages = configured(strategy, None, number)
        replies = [ask(client(omc_mod, *mods), message) for message in messages]
        if damaged:
            replies[0].content["arrays"]["weight"] = Array("float32", SHAPE, STYPE, b"garbage")
        result, _ = strategy.aggregate_train(number, replies)
        assert (result is None) == damaged and books.num_releases == spent


@pytest.mark.parametrize("defence", CLIPPING)
def test_a_resumed_run_goes_on_with_its_norm_its_books_and_its_moments(defence: str, tmp_path: Path) -> None:
    make, kind, mods = CLIPPING[defence]
    app = client(omc_mod, *mods)

    def run(count: int, folder: Path, spent: int = 0) -> tuple[Any, Any, dict[str, bytes]]:
        inner = strategies.FedAdam(tau=1e-3, fraction_evaluate=0.0)
        # What is not adaptive needs noise for its books: so little that it is lost in the model, as it is not repeated.
        wrapped = OMCStrategy(make(kind, inner, 1e-30 * (make is fixed)), policy(), checkpoints=Checkpoints(folder))
        if make is fixed:
            wrapped.inner.accountant = books = Books()  # type: ignore[attr-defined]
            books.num_releases = spent
        result = wrapped.start(Network(CLIENTS, lambda m: ask(app, m)), model(), num_rounds=count)  # type: ignore[arg-type]
        return wrapped.inner, inner, {name: array.data for name, array in result.arrays.items()}

    whole = run(3, tmp_path / "whole", 7)
    run(1, tmp_path / "stopped", 7)
    resumed = run(3, tmp_path / "stopped")
    assert resumed[2] == whole[2]
    assert resumed[0].clipping_norm == whole[0].clipping_norm
    assert (whole[0].clipping_norm == C) == (make is fixed)
    assert {n: a.tobytes() for n, a in resumed[1].m_t.items()} == {n: a.tobytes() for n, a in whole[1].m_t.items()}
    if make is fixed:
        assert resumed[0].accountant.num_releases == whole[0].accountant.num_releases == 10


class LegacyGrid:
    """As much of a grid as a legacy workflow takes; the nodes keep their state between the stages."""

    def __init__(self, app: ClientApp) -> None:
        self.app, self.masked = app, list[np.ndarray]()
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, CLIENTS + 1)}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            message = Message(copy.deepcopy(message.content), message.metadata.dst_node_id, "train")
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            masked = reply.content.config_records[RECORD_KEY_CONFIGS].get(Key.MASKED_PARAMETERS)
            if masked is not None:
                self.masked.append(bytes_to_ndarray(masked[1]))  # type: ignore[index]
            replies.append(reply)
        return replies


class CompressedInMemory(NumPyClient):
    """FP32 in messages, compressed while it trains; it keeps what it trained for the test to see."""

    trained: ClassVar[dict[int, list[np.ndarray]]] = {}

    def __init__(self, node: int) -> None:
        self.node = node

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        layer = nn.Linear(*reversed(SHAPE))
        layer.load_state_dict({n: torch.from_numpy(a) for n, a in zip(layer.state_dict(), parameters, strict=True)})
        fedomc.compress_(layer, how := policy(format="S1E4M8").select(layer, round=1, client=str(self.node)))
        assert how and isinstance(layer.weight, fedomc.CompressedTensor)
        stepping = fedomc.step_in_backward(layer, torch.optim.SGD, lr=1.0)
        torch.manual_seed(self.node)
        layer(torch.randn(16, SHAPE[1])).square().mean().backward()
        stepping.remove()
        fedomc.decompress_(layer)
        self.trained[self.node] = [value.numpy().copy() for value in layer.state_dict().values()]
        return self.trained[self.node], 100, {}


def test_secure_aggregation_adds_up_what_clients_trained_compressed() -> None:
    """In Flower's legacy workflow."""
    grid = LegacyGrid(ClientApp(lambda context: CompressedInMemory(context.node_id).to_client(), mods=[secaggplus_mod]))
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), strategy=legacy.FedAvg(min_fit_clients=CLIENTS))
    for node in grid.contexts:
        context.client_manager.register(GridClientProxy(node, grid, 1))  # type: ignore[arg-type]
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    torch.manual_seed(0)
    start = [value.numpy() for value in nn.Linear(*reversed(SHAPE)).state_dict().values()]
    parameters = ndarrays_to_parameters(start)
    context.state.array_records[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(parameters, True)
    SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, max_weight=100)(grid, context)  # type: ignore[arg-type]
    found = [array.numpy() for array in context.state.array_records[MAIN_PARAMS_RECORD].values()]
    for i, (array, was) in enumerate(zip(found, start, strict=True)):
        mean = np.mean([trained[i] for trained in CompressedInMemory.trained.values()], axis=0)
        np.testing.assert_allclose(array, mean, atol=2 * 16 / 2**22)  # a step of SecAgg+'s own integers, and weights
        assert np.abs(mean - was).max() > 1e-3
    # What the server saw of each client is all over the range of the masks.
    assert len(grid.masked) == CLIENTS and all(np.ptp(masked) > 0.9 * 2**32 for masked in grid.masked)


def test_a_legacy_workflow_is_refused() -> None:
    strategy: Any = OMCStrategy(strategies.FedAvg(), policy())
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), strategy=strategy)
    with pytest.raises(fedomc.PolicyError, match=r"use flwr\.serverapp.*compress_, then decompress_.*docs/defences"):
        default_init_params_workflow(None, context)  # type: ignore[arg-type]


def test_the_guides_examples_run_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {"__name__": "guide"}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)  # noqa: S102
    printed = [float(x) for x in re.findall(r"(?:norm|cosine) (\d\.\d+)", capsys.readouterr().out)]
    assert printed == pytest.approx([1.01, 0.99, 2.51, 0.40, 1.02, 0.98], abs=0.03)  # the table's second row
    names["client"].train()(train)
    names["noisy_client"].train()(train)
    for strategy, app in (
        (names["server_side"], packed_client()),
        (names["client_side"], names["client"]),
        (names["local"], names["noisy_client"]),
    ):
        result, _ = strategy.aggregate_train(1, [ask(app, message) for message in configured(strategy)])
        assert result is not None and strategy.traffic[-1].received == CLIENTS
    start = [value.numpy().copy() for value in nn.Linear(96, 64).state_dict().values()]
    trained, examples, _ = names["Client"]().fit(start, {})
    assert examples == 16 and not np.array_equal(trained[0], start[0])
