"""The filters for NVFlare: nothing mutated, right for every client, everything from outside checked; and a real job."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable, make_copy, make_reply
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.decomposers import common_decomposers, numpy_decomposers
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.fuel.utils import fobs
from torch import nn

import fedomc
from fedomc.nvflare import ALGORITHM, CompressFilter, DecompressFilter, add_filters
from fedomc.nvflare import filters as nvflare
from fedomc.serialization import frame
from tests.conftest import bits_of, randn

EXAMPLE = Path(__file__).parents[2] / "examples" / "nvflare"
CLIENTS = ("site-1", "site-2", "site-3", "site-4")
NAMES = [f"layers.{i}.weight" for i in range(8)]


@pytest.fixture(scope="module", autouse=True)
def decomposers() -> None:
    """What NVFlare's processes register when they start."""
    flare_decomposers.register()
    common_decomposers.register()
    numpy_decomposers.register()
    fobs.register(TensorDecomposer)


@pytest.fixture
def server() -> FLContextManager:
    return FLContextManager(identity_name="server", job_id="job")


def policy(**kwargs: object) -> fedomc.CompressionPolicy:
    return fedomc.CompressionPolicy(**{"format": "S1E3M7", "fraction": 0.6, "seed": 5, **kwargs})  # type: ignore[arg-type]


def context_of(name: str, peer: str, manager: FLContextManager | None = None) -> FLContext:
    """Make the context that a filter gets: of one call, with the props of its process and who is at the other end."""
    context = (manager or FLContextManager(identity_name=name, job_id="job")).new_context()
    other = FLContext()
    other.put(ReservedKey.IDENTITY_NAME, peer, private=False, sticky=False)
    context.set_peer_context(other)
    return context


def in_chain(chain: str, found: nvflare._ModelFilter) -> Any:
    found.set_prop(FilterContextKey.CHAIN_TYPE, chain)
    return found


def server_out(chosen: fedomc.CompressionPolicy) -> CompressFilter:
    return in_chain(FilterChainType.TASK_DATA_CHAIN, CompressFilter(chosen))


def client_in(compressed: bool = False) -> DecompressFilter:
    return in_chain(FilterChainType.TASK_DATA_CHAIN, DecompressFilter(compressed))


def client_out(chosen: fedomc.CompressionPolicy) -> CompressFilter:
    return in_chain(FilterChainType.TASK_RESULT_CHAIN, CompressFilter(chosen))


def server_in() -> DecompressFilter:
    return in_chain(FilterChainType.TASK_RESULT_CHAIN, DecompressFilter())


def model(library: str = "numpy", seed: int = 0) -> dict[str, Any]:
    """Weights of a model as NVFlare has them: matrices, a bias, and a counter that is no float."""
    values = {name: randn(48, 40, seed=seed + i, scale=0.05) for i, name in enumerate(NAMES)}
    values |= {"layers.0.bias": randn(48, seed=seed + 99), "norm.count": torch.tensor(seed + 3)}
    return {name: value.numpy() for name, value in values.items()} if library == "numpy" else values


def message(
    data: dict[str, Any], kind: str = DataKind.WEIGHTS, round: int | None = 1, meta: dict[str, Any] | None = None
) -> Shareable:
    shareable = DXO(kind, data=data, meta=meta).to_shareable()
    if round is not None:
        shareable.set_header(AppConstants.CURRENT_ROUND, round)
    return shareable


def data_of(shareable: Shareable) -> dict[str, Any]:
    return from_shareable(shareable).data


def over_the_wire(shareable: Shareable) -> Shareable:
    return fobs.loads(fobs.dumps(shareable))


def same(a: Any, b: Any) -> bool:
    """Compare recursively, type by type and bit by bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, DXO):
        return same(a.to_dict(), b.to_dict())
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and same(a.numpy(), b.numpy())
    return bool(a == b)


def packed_names(shareable: Shareable) -> set[str]:
    return {name for name, value in data_of(shareable).items() if isinstance(value, bytes)}


def send(found: CompressFilter, task: Shareable, client: str, manager: FLContextManager) -> Shareable:
    """Filter a task for one client as the server does: of a shallow copy."""
    return found.process(make_copy(task), context_of("server", client, manager))


# The server's side


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_the_servers_model_is_the_same_before_and_after_every_client(
    server: FLContextManager, library: str, kind: str
) -> None:
    task = message(model(library), kind, meta={MetaKey.FILTER_HISTORY: ["Earlier"], "props": {"a": [1]}})
    before, dxo, values = copy.deepcopy(task), task["DXO"], dict(data_of(task))
    out = server_out(policy(update_format="S1E2M1"))
    with ThreadPoolExecutor(len(CLIENTS)) as pool:  # NVFlare's requests come in threads
        sent = list(pool.map(lambda client: send(out, task, client, server), CLIENTS))
    assert same(dict(task), dict(before)) and task["DXO"] is dxo
    assert all(data_of(task)[name] is value for name, value in values.items())
    for client, received in zip(CLIENTS, sent, strict=True):
        history = from_shareable(received).get_filter_history()
        assert history == ["Earlier", "CompressFilter"], client
        back = client_in().process(received, context_of(client, "server"))
        assert from_shareable(back).meta["props"] == {"a": [1]}
        assert from_shareable(back).get_meta_prop(MetaKey.PROCESSED_ALGORITHM) is None
        assert packed_names(received) and not packed_names(back)  # what came was not written to either
    assert same(dict(task), dict(before))


def test_every_client_and_round_has_its_own_variables_in_fp32(server: FLContextManager) -> None:
    chosen = policy()
    out, shapes = server_out(chosen), {name: (48, 40) for name in NAMES}
    drawn = {}
    for round in range(3):
        task = message(model(seed=round), round=round)
        for client in CLIENTS:
            drawn[round, client] = packed_names(send(out, task, client, server))
            assert drawn[round, client] == set(chosen.select(shapes, round=round, client=client))
    assert len({frozenset(names) for names in drawn.values()}) > len(drawn) / 2
    assert len({frozenset(drawn[1, client]) for client in CLIENTS}) == len(CLIENTS)


def test_a_variable_is_encoded_once_a_round_however_many_clients(
    server: FLContextManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    real = nvflare.encode

    def counted(*args: Any) -> Any:
        encoded.append(args[5])
        return real(*args)

    monkeypatch.setattr(nvflare, "encode", counted)
    out = server_out(policy())
    for round in (1, 2):
        encoded.clear()
        task = message(model(), round=round)
        with ThreadPoolExecutor(len(CLIENTS)) as pool:
            sent = list(pool.map(lambda client, task=task: send(out, task, client, server), CLIENTS))
        assert sorted(encoded) == sorted(set.union(*map(packed_names, sent)))


def test_what_was_encoded_is_of_these_values_and_this_round(server: FLContextManager) -> None:
    values, out = model(), server_out(policy(fraction=1.0, rounding="stochastic"))
    first = data_of(send(out, message(values), "site-1", server))
    other = data_of(send(out, message(model(seed=50)), "site-1", server))  # another model in the same round
    again = data_of(send(out, message(values), "site-2", server))
    later = data_of(send(out, message(values, round=2), "site-1", server))
    values[NAMES[0]] *= 2  # in place, between rounds
    doubled = data_of(send(out, message(values, round=3), "site-1", server))
    for name in NAMES:
        assert first[name] == again[name] != other[name] and first[name] != later[name]
    assert decoded(doubled[NAMES[0]]).max() > 1.5 * decoded(first[NAMES[0]]).max()
    del values, doubled
    assert all(source() is None for source, _, _ in out._frames.values())  # no model is kept alive


def decoded(data: bytes) -> torch.Tensor:
    parsed = frame.from_bytes(data)
    return parsed.packed.decode(torch.empty(parsed.packed.numel))


def test_collections_are_copied_too(server: FLContextManager) -> None:
    inner = {"a": DXO(DataKind.WEIGHTS, model()), "b": DXO(DataKind.WEIGHTS, model(seed=20))}
    task = message({**inner, "c": DXO(DataKind.METRICS, {"x": 1.0})}, DataKind.COLLECTION)
    before = copy.deepcopy(task)
    sent = send(server_out(policy(fraction=1.0)), task, "site-1", server)
    assert same(dict(task), dict(before))
    back = data_of(client_in().process(sent, context_of("site-1", "server")))
    for key, of in inner.items():
        assert all(isinstance(data_of(sent)[key].data[name], bytes) for name in NAMES)
        assert all(np.allclose(back[key].data[name], of.data[name], atol=0.002) for name in NAMES)
    assert back["c"].data == {"x": 1.0}


def test_replies_of_several_models_are_checked_against_their_own(server: FLContextManager) -> None:
    models = {"a": {"w": randn(64, 64).numpy()}, "b": {"v": randn(32, 96).numpy()}}

    def collection() -> Shareable:
        return message({key: DXO(DataKind.WEIGHTS, dict(data)) for key, data in models.items()}, DataKind.COLLECTION)

    send(server_out(policy(fraction=1.0)), collection(), "site-1", server)
    reply = client_out(policy(fraction=1.0)).process(collection(), context_of("site-1", "server"))
    back = data_of(server_in().process(reply, context_of("server", "site-1", server)))
    assert all(np.allclose(back[key].data[name], models[key][name], atol=0.05) for key, name in ("aw", "bv"))
    data_of(reply)["b"].data["v"] = models["a"]["w"]
    with pytest.raises(fedomc.PayloadError, match=r"site-1 sent v of shape \(64, 64\)"):
        server_in().process(reply, context_of("server", "site-1", server))


# There and back


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("kind", "format"), [(DataKind.WEIGHTS, "S1E3M7"), (DataKind.WEIGHT_DIFF, "S1E2M3")], ids=["weights", "differences"]
)
def test_the_round_trip_loses_what_the_format_loses(
    server: FLContextManager, library: str, kind: str, format: str
) -> None:
    chosen = policy(update_format="S1E2M3" if kind == DataKind.WEIGHT_DIFF else None, rounding="nearest")
    task, values = message(model(library)), model(library, seed=30)
    sent = over_the_wire(send(server_out(chosen), task, "site-2", server))
    received = client_in().process(sent, context_of("site-2", "server"))
    reply = client_out(chosen).process(message(values, kind), context_of("site-2", "server"))
    result = server_in().process(over_the_wire(reply), context_of("server", "site-2", server))
    assert len(fobs.dumps(reply)) < 0.75 * len(fobs.dumps(message(values, kind)))
    assert packed_names(reply) == packed_names(sent) and from_shareable(result).data_kind == kind
    for original, came, of in ((task, received, "S1E3M7"), (message(values, kind), result, format)):
        packed = packed_names(sent)
        for name, value in data_of(original).items():
            back = data_of(came)[name]
            assert type(back) is type(value) and back.dtype == value.dtype and back.shape == value.shape
            if name not in packed:
                assert same(back, value)
                continue
            value, back = torch.as_tensor(value), torch.as_tensor(back)
            expected = fedomc.CompressedTensor.from_dense(value, of).dequantize()
            assert np.array_equal(bits_of(back), bits_of(expected)), name
            worst = value.abs().max() * 2.0 ** -fedomc.FloatFormat.parse(of).mantissa_bits
            assert 0 < float((back - value).abs().max()) <= worst


def test_stochastic_rounding_is_the_clients_own() -> None:
    chosen = policy(rounding="stochastic", fraction=1.0)
    results = {
        (client, round): data_of(
            client_out(chosen).process(message(model(), round=round), context_of(client, "server"))
        )
        for client in CLIENTS[:2]
        for round in (1, 2)
    }
    assert len({result[NAMES[0]] for result in results.values()}) == 4
    again = client_out(chosen).process(message(model(), round=2), context_of("site-2", "server"))
    assert data_of(again)[NAMES[0]] == results["site-2", 2][NAMES[0]]


def test_read_only_and_strided_arrays_and_no_round() -> None:
    values = {"a": np.ones((64, 64), np.float32).T[::2], "b": np.broadcast_to(np.float32(0.5), (32, 64))}
    values["b"].flags.writeable = False
    reply = client_out(policy(fraction=1.0)).process(message(values, round=None), context_of("site-1", "server"))
    back = data_of(in_chain(FilterChainType.TASK_RESULT_CHAIN, DecompressFilter()).process(reply, context_of("s", "c")))
    assert all(np.array_equal(back[name], values[name]) for name in values)


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40))


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({}, DataKind.WEIGHTS),
        ({"update_format": "S1E2M3"}, DataKind.WEIGHT_DIFF),
        ({"update_format": "S1E2M3", "format_by_name": {"0.*": "S1E4M8"}}, DataKind.WEIGHT_DIFF),
    ],
    ids=["one part", "two parts", "formats by name"],
)
def test_a_client_may_train_compressed_tensors(server: FLContextManager, how: dict[str, Any], kind: str) -> None:
    chosen = policy(fraction=1.0, **how)
    torch.manual_seed(0)
    original = {name: value.clone() for name, value in build().state_dict().items()}
    sent = over_the_wire(send(server_out(chosen), message(original), "site-1", server))
    written = {name: bytearray(data_of(sent)[name]) for name in packed_names(sent)}
    params = data_of(client_in(compressed=True).process(sent, context_of("site-1", "server")))
    assert {n for n, v in params.items() if isinstance(v, fedomc.CompressedTensor)} == {"0.weight", "2.weight"}
    with torch.device("meta"):
        net = build()
    net.load_state_dict(params, assign=True)
    assert all(params[name].format == chosen.format_of(name) for name in ("0.weight", "2.weight"))
    before = {name: value.dequantize() for name, value in params.items() if name in ("0.weight", "2.weight")}
    fedomc.step_in_backward(net, torch.optim.SGD, lr=0.5)
    net(randn(16, 40)).square().mean().backward()
    state = net.state_dict()
    if kind == DataKind.WEIGHT_DIFF:  # of variables in two parts the update travels
        state |= {name: state[name] - original[name] for name in ("0.bias", "2.bias")}
    reply = client_out(chosen).process(message(state, kind), context_of("site-1", "server"))
    result = data_of(server_in().process(over_the_wire(reply), context_of("server", "site-1", server)))
    assert written == {name: data_of(sent)[name] for name in written}  # the codes' memory is not the message's
    for name, base in before.items():
        after = net.get_parameter(name).dequantize()
        assert not torch.equal(after, base)
        assert torch.allclose(result[name] + (base if kind == DataKind.WEIGHT_DIFF else 0), after, atol=1e-7), name


@pytest.mark.parametrize(
    ("update_format", "kind", "error"),
    [("S1E2M3", DataKind.WEIGHTS, "w is in two parts"), (None, DataKind.WEIGHT_DIFF, "w is in one part")],
)
def test_a_compressed_tensor_that_does_not_fit_what_is_sent(update_format: str | None, kind: str, error: str) -> None:
    value = fedomc.CompressedTensor.from_dense(randn(64, 64), "S1E3M7", update_format=update_format)
    with pytest.raises(fedomc.PolicyError, match=error):
        client_out(policy()).process(message({"w": value, "v": randn(64, 64)}, kind), context_of("site-1", "server"))


# What comes from outside


def sent_and_reply(manager: FLContextManager, kind: str = DataKind.WEIGHTS) -> Shareable:
    """Send a model to site-3 and return what it answers."""
    chosen = policy()
    send(server_out(chosen), message(model()), "site-3", manager)
    return client_out(chosen).process(message(model(seed=7), kind), context_of("site-3", "server"))


def put(name: str, value: Any) -> Callable[[DXO], None]:
    return lambda dxo: dxo.data.update({name: value})


def meta(key: str, value: Any) -> Callable[[DXO], None]:
    return lambda dxo: dxo.meta.update({key: value})


def of_other_shape() -> bytes:
    return frame.to_bytes(fedomc.CompressedTensor.from_dense(randn(48, 41), "S1E3M7").base, (48, 41))


def of_differences() -> bytes:
    packed = fedomc.CompressedTensor.from_dense(randn(48, 40), "S1E3M7").base
    return frame.to_bytes(packed, (48, 40), frame.UPDATE)


W = NAMES[3]
HOSTILE: dict[str, tuple[Callable[[DXO], None], str]] = {
    "garbage": (put(W, b"garbage"), rf"site-3 sent {W}: 7 bytes are too few"),
    "another magic": (put(W, b"\x80\x04cos" * 99), rf"site-3 sent {W}: not a compressed variable"),
    "nothing": (put(W, b""), rf"{W}: 0 bytes"),
    "NaN": (put(W, np.full((48, 40), np.nan, "f")), rf"site-3 sent {W} with a value that is NaN"),
    "infinity": (put("layers.0.bias", np.full(48, np.inf, "f")), r"site-3 sent layers.0.bias with a value that is NaN"),
    "another shape": (put(W, np.zeros((40, 48), "f")), rf"{W} of shape \(40, 48\), but \(48, 40\) was sent"),
    "another shape, compressed": (put(W, of_other_shape()), rf"{W}: .*has shape \(48, 41\), \(48, 40\) expected"),
    "differences": (put(W, of_differences()), rf"{W} as a frame of kind 1, but .*WEIGHTS have kind 0"),
    "compressed counter": (
        put("norm.count", frame.to_bytes(frame.Packed.empty(fedomc.FloatFormat(3, 7), 1, "cpu"), ())),
        r"norm.count compressed, but int64 was sent",
    ),
    "float64": (put(W, np.zeros((48, 40))), rf"{W} as float64 of numpy, but float32 of numpy was sent"),
    "a tensor": (put(W, torch.zeros(48, 40)), rf"{W} as float32 of torch, but float32 of numpy was sent"),
    "complex": (put(W, np.zeros((48, 40), "F")), rf"{W} as complex64, plain numbers are expected"),
    "objects": (put(W, np.full((48, 40), None)), rf"{W} as object, plain numbers are expected"),
    "text": (put(W, "zeros"), rf"site-3 sent {W} as a str, an array"),
    "a list": (put(W, [[0.0]]), rf"{W} as a list"),
    "another variable": (put("backdoor", np.zeros(3, "f")), r"'backdoor', which is not a variable of the model"),
    "a number as name": (put(7, np.zeros(3, "f")), r"site-3 sent 7, which is not a variable"),  # type: ignore[arg-type]
    "another algorithm": (meta(MetaKey.PROCESSED_ALGORITHM, "zip"), "encoded by 'zip'"),
    "no algorithm": (meta(MetaKey.PROCESSED_ALGORITHM, None), "as bytes, but nothing in the meta"),
    "no encoding": (meta(ALGORITHM, None), "encoded by 'fedomc'"),
    "half an encoding": (meta(ALGORITHM, {"library": "numpy", "format": "S1E3M7"}), "the encoding has no 'seed'"),
    "another library": (meta(ALGORITHM, {"library": ["jax"]}), r"arrays of \['jax'\]"),
    "another kind": (
        lambda dxo: setattr(dxo, "data_kind", DataKind.APP_DEFINED),
        "where weights, differences or metrics",
    ),
    "a list as kind": (lambda dxo: setattr(dxo, "data_kind", ["WEIGHTS"]), "where weights, differences or metrics"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_client_must_not_send(server: FLContextManager, name: str) -> None:
    change, error = HOSTILE[name]
    reply = sent_and_reply(server)
    dxo = from_shareable(copy.deepcopy(reply))
    change(dxo)
    hostile = dxo.update_shareable(make_copy(reply))
    before = copy.deepcopy(hostile)
    filters = server_in()
    with pytest.raises(fedomc.PayloadError, match=f"site-3 sent .*{error.removeprefix('site-3 sent ')}"):
        filters.process(hostile, context_of("server", "site-3", server))
    assert same(dict(hostile), dict(before))
    assert len(data_of(filters.process(reply, context_of("server", "site-3", server)))) == 10  # the good one as ever


@given(st.data())
def test_any_damaged_byte_is_noticed(data: st.DataObject) -> None:
    manager = FLContextManager(identity_name="server", job_id="job")
    dxo = from_shareable(sent_and_reply(manager))
    name = data.draw(st.sampled_from([name for name, value in dxo.data.items() if isinstance(value, bytes)]))
    damaged = bytearray(dxo.data[name])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    hostile = message({**dxo.data, name: bytes(damaged)}, meta=dxo.meta)
    with pytest.raises(fedomc.PayloadError, match=f"site-3 sent {name}"):
        server_in().process(hostile, context_of("server", "site-3", manager))


def test_differences_do_not_pass_for_weights(server: FLContextManager) -> None:
    reply = sent_and_reply(server, DataKind.WEIGHT_DIFF)
    dxo = from_shareable(reply)
    dxo.data_kind = DataKind.WEIGHTS
    with pytest.raises(
        fedomc.PayloadError, match=r"site-3 sent layers.* as a frame of kind 1, but .*WEIGHTS have kind 0"
    ):
        server_in().process(dxo.update_shareable(reply), context_of("server", "site-3", server))


def test_a_client_refuses_a_damaged_model(server: FLContextManager) -> None:
    sent = send(server_out(policy(fraction=1.0)), message(model()), "site-1", server)
    data_of(sent)[W] = data_of(sent)[W][:-4]
    with pytest.raises(fedomc.PayloadError, match=f"server sent {W}: "):
        client_in().process(sent, context_of("site-1", "server"))


def test_what_is_no_model_passes(server: FLContextManager) -> None:
    sent_and_reply(server)
    plain = Shareable()
    plain["text"] = "no DXO"
    others = [message({"accuracy": 0.5}, DataKind.METRICS), make_reply(ReturnCode.EXECUTION_EXCEPTION), plain]
    for other in others:
        for found in (client_out(policy()), server_in(), server_out(policy()), client_in()):
            result = found.process(other, context_of("server", "site-3", server))
            assert {k: v for k, v in result.items() if k != "DXO"} == {k: v for k, v in other.items() if k != "DXO"}
            assert "DXO" not in other or result["DXO"]["data"] == other["DXO"]["data"]


def test_a_server_that_sent_nothing_still_checks_what_it_can() -> None:
    reply = client_out(policy()).process(message(model()), context_of("site-1", "server"))
    found = server_in()
    assert len(data_of(found.process(reply, context_of("server", "site-1")))) == 10
    with pytest.raises(fedomc.PayloadError, match="site-1 sent w with a value that is NaN"):
        found.process(message({"w": np.array([np.nan])}), context_of("server", "site-1"))


REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("is in no chain of filters", lambda: CompressFilter(policy()).process(message(model()), context_of("a", "b"))),
    ("encoded already, by 'fedomc'", lambda: twice()),
    ("does not name the client", lambda: client_out(policy()).process(message(model()), FLContext())),
    (
        "no variable to compress",
        lambda: client_out(policy()).process(message({"b": np.zeros(3, "f")}), context_of("a", "b")),
    ),
    ("compressed=True needs a job that exchanges tensors", lambda: compressed_numpy()),
    (
        "a sends whole weights, but update_format=S1E2M1 is for what a client changed",
        lambda: client_out(policy(update_format="S1E2M1")).process(message(model()), context_of("a", "b")),
    ),
    ("would filter nothing", lambda: add_filters(recipe(), policy(), tasks=["*"])),
]


def twice() -> Shareable:
    once = client_out(policy()).process(message(model()), context_of("a", "b"))
    return client_out(policy()).process(once, context_of("a", "b"))


def compressed_numpy() -> Shareable:
    sent = send(server_out(policy()), message(model()), "a", FLContextManager(identity_name="server"))
    return client_in(compressed=True).process(sent, context_of("a", "server"))


@pytest.mark.parametrize(("error", "act"), REFUSED, ids=[error for error, _ in REFUSED])
def test_misuse_is_told(error: str, act: Callable[[], object]) -> None:
    with pytest.raises(fedomc.PolicyError, match=error):
        act()


@pytest.mark.parametrize("round", [-1, "1", 1.5, True])
def test_a_round_that_is_none(round: Any) -> None:
    with pytest.raises(fedomc.PayloadError, match="is not the number of a round"):
        client_out(policy()).process(message(model(), round=round), context_of("site-1", "server"))


# Jobs


def example_net() -> nn.Module:
    """Make the example's model; NVFlare looks for its file by the name of its module."""
    spec = importlib.util.spec_from_file_location("model", EXAMPLE / "model.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Net()


def recipe(transfer: TransferType = TransferType.FULL) -> FedAvgRecipe:
    script = str(EXAMPLE / "client.py")
    return FedAvgRecipe(model=example_net(), min_clients=2, train_script=script, params_transfer_type=transfer)


def test_an_update_format_for_clients_that_send_whole_weights_is_refused_before_the_job_starts() -> None:
    chosen = policy(update_format="S1E2M1", include=["*weight"])
    with pytest.raises(fedomc.PolicyError, match=r"update_format=S1E2M1 .*params_transfer_type=TransferType.DIFF"):
        add_filters(recipe(), chosen)
    add_filters(recipe(TransferType.DIFF), chosen)
    add_filters(recipe(), policy(include=["*weight"]))
    by_site = recipe()
    by_site.set_per_site_config({f"site-{i}": {"params_transfer_type": TransferType.DIFF} for i in (1, 2)})
    add_filters(by_site, chosen)


def test_a_job_names_the_filters_and_does_not_carry_the_library(tmp_path: Path) -> None:
    job = recipe(TransferType.DIFF)
    add_filters(job, policy(update_format="S1E2M1", include=["*weight"]), compressed=True, tasks=["train", "validate"])
    job.export(str(tmp_path))
    assert not list(tmp_path.rglob("fedomc*")) and list(tmp_path.rglob("client.py"))
    found = {}
    for side in ("server", "client"):
        config = json.loads(next(tmp_path.rglob(f"config_fed_{side}.json")).read_text())
        for direction in ("task_data_filters", "task_result_filters"):
            (chain,) = config[direction]
            assert sorted(chain["tasks"]) == ["train", "validate"]
            (found[side, direction],) = chain["filters"]
    assert {key: value["path"].rpartition(".")[2] for key, value in found.items()} == {
        ("server", "task_data_filters"): "CompressFilter",
        ("client", "task_data_filters"): "DecompressFilter",
        ("client", "task_result_filters"): "CompressFilter",
        ("server", "task_result_filters"): "DecompressFilter",
    }
    assert found["client", "task_data_filters"]["args"] == {"compressed": True}
    assert found["server", "task_result_filters"]["args"] == {}
    assert found["server", "task_data_filters"]["args"] == found["client", "task_result_filters"]["args"]


def test_the_example_in_the_simulator(tmp_path: Path) -> None:
    """Two real jobs: the compressed one learns as the one in FP32, and draws anew for every client and round."""
    command = [sys.executable, str(EXAMPLE / "job.py"), "--rounds", "4", "--workspace", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)  # noqa: S603
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

    accuracy = dict(re.findall(r"^\| (FP32|S1E3M7) \| ([\d.]+)%", done.stdout, re.MULTILINE))
    assert float(accuracy["FP32"]) > 90 and abs(float(accuracy["FP32"]) - float(accuracy["S1E3M7"])) < 4
    curve = re.findall(r"round (\d): accuracy [\d.]+ as received, loss ([\d.]+) at the end", done.stdout)
    losses = [[float(loss) for at, loss in curve if int(at) == round] for round in range(4)]
    assert [len(of) for of in losses] == [4, 4, 4, 4]  # two jobs with two clients each
    assert max(losses[3]) < 0.5 * min(losses[0])

    net, chosen = example_net(), fedomc.CompressionPolicy("S1E3M7", fraction=0.7)
    fp32 = sum(value.nbytes for value in net.state_dict().values())
    logs = "\n".join(path.read_text() for path in (tmp_path / "S1E3M7").glob("*/log.txt"))
    pattern = r"round (\d), (to|from) (\S+): (\d+) of 10 .*, (\d+) -> (\d+) bytes; drawn to stay FP32: (.+)"
    found = {(int(r), way, client): rest for r, way, client, *rest in re.findall(pattern, logs)}
    assert len(found) == 4 * 2 * 2
    for (round, _, client), (count, before, after, left) in found.items():
        selection = chosen.select(net, round=round, client=client)
        assert int(count) == len(selection)
        assert set(left.split(", ")) == set(chosen.compressible(net)) - set(selection)
        dense = fp32 - sum(net.get_parameter(name).nbytes for name in selection)
        packed = sum(11 * net.get_parameter(name).numel() / 8 for name in selection)
        assert int(before) == fp32 and 0 <= int(after) - dense - packed < 100 * len(selection)
    assert len({left for *_, left in found.values()}) > 2
