"""What a client sends is the same, byte for byte, as on Flower: one function decides it."""

from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from nvflare.apis.dxo import DataKind
from nvflare.apis.fl_context import FLContextManager
from torch import Tensor, nn

import fedomc
from fedomc.flower import collect, omc_mod
from fedomc.flower.arrays import framed_array
from fedomc.flower.config import CONFIG, to_config
from fedomc.methods import Encoding
from fedomc.serialization import frame
from tests.conftest import randn
from tests.flower.conftest import identity  # noqa: F401  (an autouse fixture)
from tests.nvflare.messages import (
    NAMES,
    client_in,
    client_out,
    context_of,
    data_of,
    decoded,
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

SHAPE = (48, 40)
WEIGHTS = ("changed", "unchanged")
POLICIES: list[dict[str, Any]] = [
    {"format": "S1E2M1"},
    {"format": "S1E2M5/64", "downlink": "S1E2M3/256"},
    {"format": "S1E2M1", "rounding": "stochastic"},
    {"format": "S1E3M7", "transform": "none"},
    {"format": "NF4", "rounding": "stochastic"},
    {"format": "MXFP4"},
    {"format": "S1E3M7", "update_format": "S1E2M3"},
    {"format": "INT8", "update_format": "INT4", "rounding": "nearest"},
    {"format": "S1E3M7", "uplink": "DRIVE1"},
    {"format": "S1E3M7", "uplink": "S1E2M1", "rounding": "nearest"},
    {"format": "S1E3M7", "update_format": "S1E2M3", "uplink": "DRIVE2"},
]


class Model(nn.Module):
    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))


def over_flower(frames: dict[str, bytes], encoding: Encoding) -> RecordDict:
    arrays = ArrayRecord({name: framed_array(data, SHAPE) for name, data in frames.items()})
    return RecordDict({"arrays": arrays, CONFIG: to_config(encoding)})


def collected(frames: dict[str, bytes], encoding: Encoding, trained: dict[str, Tensor]) -> dict[str, bytes]:
    record = collect(Model(trained), over_flower(frames, encoding))
    return {name: bytes(array.data) for name, array in record.items()}


def through_mod(frames: dict[str, bytes], encoding: Encoding, trained: dict[str, Tensor]) -> dict[str, bytes]:
    def app(received: Message, context: object) -> Message:
        arrays = ArrayRecord({name: Array(value.numpy()) for name, value in trained.items()})
        return Message(RecordDict({"arrays": arrays}), reply_to=received)

    sent = Message(over_flower(frames, encoding), 1, "train")
    reply = omc_mod(sent, None, app)  # type: ignore[arg-type]
    return {name: bytes(array.data) for name, array in reply.content["arrays"].items()}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("how", POLICIES, ids=lambda how: "-".join(how.values()))
def test_the_same_change_gives_the_same_bytes(server: FLContextManager, how: dict[str, Any], library: str) -> None:
    chosen = policy(**{**how, "fraction": 1.0})
    original: dict[str, Any] = {name: randn(*SHAPE, seed=i, scale=0.05) for i, name in enumerate(WEIGHTS)}
    if library == "numpy":
        original = {name: value.numpy() for name, value in original.items()}
    sent = send(server_out(chosen), message(original), "site-1", server)
    client = FLContextManager(identity_name="site-1", job_id="job")
    received = client_in().process(sent, context_of("site-1", "server", client))
    before = {name: torch.as_tensor(value).clone() for name, value in data_of(received).items()}
    trained = {"changed": before["changed"] + randn(*SHAPE, seed=9, scale=1e-2), "unchanged": before["unchanged"]}
    whole = chosen.update_format is None and chosen.uplink is None
    kind = DataKind.WEIGHTS if whole else DataKind.WEIGHT_DIFF
    answer = trained if kind == DataKind.WEIGHTS else {name: trained[name] - before[name] for name in WEIGHTS}
    data = {name: value.numpy() if library == "numpy" else value for name, value in answer.items()}
    reply = data_of(client_out(chosen).process(message(data, kind), context_of("site-1", "server", client)))
    frames = data_of(sent)
    encoding = chosen.encoding(round=1, client="site-1")
    assert reply == collected(frames, encoding, trained) == through_mod(frames, encoding, trained)
    if kind == DataKind.WEIGHTS and chosen.downlink is None:
        assert reply["unchanged"] == frames["unchanged"] and reply["changed"] != frames["changed"]


def test_what_came_in_full_precision_is_not_compared_with_an_earlier_round(server: FLContextManager) -> None:
    chosen, client = policy(format="S1E2M1", fraction=1.0), FLContextManager(identity_name="site-1", job_id="job")
    first = send(server_out(chosen), message({"w": randn(*SHAPE)}, round=1), "site-1", server)
    received = data_of(client_in().process(first, context_of("site-1", "server", client)))
    client_in().process(message({"w": randn(*SHAPE, seed=1)}, round=2), context_of("site-1", "server", client))
    reply = client_out(chosen).process(message(received, round=2), context_of("site-1", "server", client))
    expected = client_out(chosen).process(message(received, round=2), context_of("site-1", "server"))
    assert data_of(reply) == data_of(expected)


def test_a_trained_variable_of_another_shape_is_named(server: FLContextManager) -> None:
    chosen, client = policy(fraction=1.0), FLContextManager(identity_name="site-1", job_id="job")
    sent = send(server_out(chosen), message({"w": randn(*SHAPE)}), "site-1", server)
    client_in().process(sent, context_of("site-1", "server", client))
    with pytest.raises(fedomc.PayloadError, match=r"^w is returned as torch.float32 \(40, 48\)"):
        client_out(chosen).process(message({"w": randn(*SHAPE).t()}), context_of("site-1", "server", client))


@pytest.mark.parametrize("text", ["S1E4M10>DRIVE1", "S1E4M10+S1E4M10>S1E2M1"])
def test_with_an_uplink_every_compressible_variable_goes_up_in_it(server: FLContextManager, text: str) -> None:
    """Also those that partial quantization leaves in FP32, and the server gets the mean of what was changed."""
    chosen, count = policy(fraction=0.6, **parts(text)), 8
    task, errors = message(model()), []
    steps = {name: randn(48, 40, seed=i, scale=1e-2).numpy() for i, name in enumerate(NAMES)}
    rest = {name: value for name, value in model(seed=1).items() if name not in NAMES}
    for client in range(count):
        name = f"site-{client}"
        sent = send(server_out(chosen), task, name, server)
        assert 0 < len(packed_names(sent)) < len(NAMES)
        client_in().process(sent, context_of(name, "server"))
        reply = client_out(chosen).process(message({**steps, **rest}, DataKind.WEIGHT_DIFF), context_of(name, "server"))
        assert packed_names(reply) == set(NAMES)
        frames = [frame.from_bytes(data_of(reply)[name]) for name in NAMES]
        assert {(str(each.packed.method), each.kind) for each in frames} == {(str(chosen.uplink), frame.UPDATE)}
        back = data_of(server_in().process(over_the_wire(reply), context_of("server", name, server)))
        assert all(same(back[other], rest[other]) for other in rest)
        errors.append(torch.stack([torch.as_tensor(back[name]) - torch.as_tensor(steps[name]) for name in NAMES]))
    mean = torch.stack(errors).mean(0).square().sum()
    single = torch.stack(errors).square().sum() / count
    assert 0.7 < float(mean) * count / float(single) < 1.3


def test_the_update_of_a_packed_model_goes_up_in_the_uplink(server: FLContextManager) -> None:
    chosen = policy(fraction=1.0, **parts("S1E4M10+S1E4M10>DRIVE1"))
    sent = send(server_out(chosen), message(model("torch")), "site-1", server)
    received = data_of(client_in(compressed=True).process(sent, context_of("site-1", "server")))
    step = randn(48, 40, scale=1e-2)
    with torch.no_grad():
        received[NAMES[0]].add_(step)
    data = {name: received[name] for name in NAMES}
    reply = client_out(chosen).process(message(data, DataKind.WEIGHT_DIFF), context_of("site-1", "server"))
    found = frame.from_bytes(data_of(reply)[NAMES[0]])
    assert (str(found.packed.method), found.kind) == ("DRIVE1", frame.UPDATE)
    assert float(torch.cosine_similarity(decoded(data_of(reply)[NAMES[0]]), step.view(-1), dim=0)) > 0.7


def parts(text: str) -> dict[str, Any]:
    """Return the arguments of ``policy`` for a policy string."""
    read = fedomc.CompressionPolicy.parse(text)
    return {"format": read.format, "update_format": read.update_format, "uplink": read.uplink}
