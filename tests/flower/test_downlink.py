"""Rounds of Flower in which what comes down has a method of its own."""

import pytest
import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg

import fedomc
from fedomc.errors import PolicyError
from fedomc.flower import OMCStrategy, collect, install
from fedomc.flower.arrays import STYPE, read_packed
from fedomc.methods import parse_method
from fedomc.serialization import frame
from fedomc.tensor.compressed import is_compressed
from tests.flower.test_aggregation import Nodes
from tests.flower.test_uplink import CLIENTS, STEPS, answer, build, round_of

POLICY = "S1E2M5/64<S1E2M3/256"


@pytest.mark.parametrize("text", [POLICY, POLICY + "@0.7", "S1E3M7<S1E2M3", POLICY + ">DRIVE2"])
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("coding", ["none", "both"])
def test_six_bits_come_down_and_what_is_held_or_its_change_goes_up(text: str, client: str, coding: str) -> None:
    policy = fedomc.CompressionPolicy.parse(text)
    strategy = OMCStrategy(FedAvg(), policy, entropy_coding=coding)
    before, after, records = round_of(strategy, CLIENTS[client], 2)
    compressed = 0
    for record in records:
        for name, array in record.items():
            if array.stype == STYPE:
                found = read_packed(array, name, copy=True)
                expected = (frame.VARIABLE, policy.format) if policy.uplink is None else (frame.UPDATE, policy.uplink)
                assert (found.kind, found.packed.method) == expected
                compressed += 1
    assert compressed
    moved = torch.cat([torch.from_numpy(after[n].numpy() - before[n].numpy()).view(-1) for n in STEPS])
    step = torch.cat([STEPS[name].view(-1) for name in STEPS])
    assert float(torch.cosine_similarity(moved, step, dim=0)) > 0.75


def test_the_bytes_sent_are_those_of_the_downlink_and_the_bytes_held_those_of_the_format() -> None:
    arrays = collect(build())
    strategy = OMCStrategy(FedAvg(), POLICY)
    first, *_ = strategy.configure_train(1, arrays, ConfigRecord(), Nodes(2))  # type: ignore[arg-type]
    with torch.device("meta"):
        model = build()
    sent = {name: array for name, array in first.content["arrays"].items() if array.stype == STYPE}
    for name, array in sent.items():
        assert read_packed(array, name, copy=True).packed.method == parse_method("S1E2M3/256")
    install(model, first, consume=True)
    for name, parameter in model.named_parameters():
        if is_compressed(parameter):
            assert parameter.format == parse_method("S1E2M5/64")
            assert parameter.base.nbytes > len(sent[name].data)
    assert {name for name, parameter in model.named_parameters() if is_compressed(parameter)} == set(sent)


def test_what_a_client_did_not_change_goes_back_without_error() -> None:
    def client(message: Message) -> Message:
        model = build()
        install(model, message)
        return answer(message, collect(model, message))

    before, after, _ = round_of(OMCStrategy(FedAvg(), POLICY), client, 2)
    for name in before:
        torch.testing.assert_close(
            torch.from_numpy(after[name].numpy()), torch.from_numpy(before[name].numpy()), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "S1E2M3", "update_format": "S1E2M1", "downlink": "S1E2M2"}, "sends the base S1E2M3"),
        ({"format": "S1E3M7", "downlink": "DRIVE1"}, "DRIVE1 can only be used for the uplink"),
        ({"format": "S1E3M7", "downlink": "S1E2M3", "format_by_name": {"*": "S1E4M3"}}, "format_by_name"),
    ],
)
def test_a_downlink_that_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        fedomc.CompressionPolicy(**arguments)  # type: ignore[arg-type]
