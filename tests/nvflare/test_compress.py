"""Compressing models for clients and for the server: nothing is mutated, and each client gets its own."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable

import fedomc
from fedomc.nvflare import CompressFilter, add_filters, compress
from tests.conftest import randn
from tests.nvflare.messages import (
    CLIENTS,
    NAMES,
    client_in,
    client_out,
    context_of,
    data_of,
    decoded,
    message,
    model,
    packed_names,
    policy,
    recipe,
    same,
    send,
    server_in,
    server_out,
)


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
    real = compress.encode

    def counted(*args: Any) -> Any:
        encoded.append(args[5])
        return real(*args)

    monkeypatch.setattr(compress, "encode", counted)
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
        assert first[name] == again[name] != other[name]
        assert first[name] == later[name]  # what a server sends is rounded to nearest
    assert decoded(doubled[NAMES[0]]).max() > 1.5 * decoded(first[NAMES[0]]).max()
    del values, doubled
    assert all(source() is None for source, _, _ in out._frames.values())  # no model is kept alive


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


REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("is not part of a filter chain", lambda: CompressFilter(policy()).process(message(model()), context_of("a", "b"))),
    ("encoded already, by 'fedomc'", lambda: twice()),
    ("does not name the client", lambda: client_out(policy()).process(message(model()), FLContext())),
    (
        r"none of \d+ variables can be compressed",
        lambda: client_out(policy()).process(message({"b": np.zeros(3, "f")}), context_of("a", "b")),
    ),
    ("compressed=True needs a job that exchanges tensors", lambda: compressed_numpy()),
    (
        "a sends whole weights, but update_format=S1E2M1 is for what a client changed",
        lambda: client_out(policy(update_format="S1E2M1")).process(message(model()), context_of("a", "b")),
    ),
    (
        "a sends whole weights, but uplink=DRIVE1 is for what a client changed.*a policy without uplink",
        lambda: client_out(policy(uplink="DRIVE1")).process(message(model()), context_of("a", "b")),
    ),
    ("the recipe's clients send whole weights, but uplink=", lambda: add_filters(recipe(), policy(uplink="DRIVE1"))),
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
