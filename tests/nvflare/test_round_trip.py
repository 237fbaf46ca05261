"""From the server to a client and back."""

from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.filter import FilterChainType
from nvflare.apis.fl_context import FLContextManager
from nvflare.fuel.utils import fobs
from torch import nn

import fedomc
from fedomc.nvflare import DecompressFilter
from tests.conftest import bits_of, randn
from tests.nvflare.messages import (
    CLIENTS,
    NAMES,
    client_in,
    client_out,
    context_of,
    data_of,
    in_chain,
    message,
    model,
    over_the_wire,
    packed_names,
    policy,
    same,
    send,
    server_in,
    server_out,
)


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
    [("S1E2M3", DataKind.WEIGHTS, "w has two parts"), (None, DataKind.WEIGHT_DIFF, "w has one part")],
)
def test_a_compressed_tensor_that_does_not_fit_what_is_sent(update_format: str | None, kind: str, error: str) -> None:
    value = fedomc.CompressedTensor.from_dense(randn(64, 64), "S1E3M7", update_format=update_format)
    with pytest.raises(fedomc.PolicyError, match=error):
        client_out(policy()).process(message({"w": value, "v": randn(64, 64)}, kind), context_of("site-1", "server"))
