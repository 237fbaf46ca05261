"""Everything that comes from outside is checked."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.shareable import Shareable, make_copy, make_reply

import fedomc
from fedomc.nvflare import ALGORITHM
from fedomc.serialization import frame
from tests.conftest import randn
from tests.nvflare.messages import (
    NAMES,
    client_in,
    client_out,
    context_of,
    data_of,
    message,
    model,
    policy,
    same,
    send,
    server_in,
    server_out,
)


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
    "garbage": (put(W, b"garbage"), rf"site-3 sent {W}: 7 bytes are not enough"),
    "another magic": (put(W, b"\x80\x04cos" * 99), rf"site-3 sent {W}: not a compressed variable"),
    "nothing": (put(W, b""), rf"{W}: 0 bytes"),
    "NaN": (put(W, np.full((48, 40), np.nan, "f")), rf"site-3 sent {W} with a value that is NaN"),
    "infinity": (put("layers.0.bias", np.full(48, np.inf, "f")), r"site-3 sent layers.0.bias with a value that is NaN"),
    "another shape": (put(W, np.zeros((40, 48), "f")), rf"{W} of shape \(40, 48\), but \(48, 40\) was sent"),
    "another shape, compressed": (
        put(W, of_other_shape()),
        rf"{W}: .*has shape \(48, 41\), but \(48, 40\) is expected",
    ),
    "differences": (put(W, of_differences()), rf"{W} as a frame of kind 1, but .*WEIGHTS have kind 0"),
    "compressed counter": (
        put("norm.count", frame.to_bytes(frame.Packed.zeros(fedomc.FloatFormat(3, 7), 1, "cpu"), ())),
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
