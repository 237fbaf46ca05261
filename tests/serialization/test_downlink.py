"""What arrives in the method of the downlink is held in that of the variable."""

import pytest
import torch

from fedomc.methods import Encoding, Packed, encode
from fedomc.serialization.downlink import as_held
from tests.conftest import randn

WIDER = ("S1E2M5/64<S1E2M3/256", "S1E2M4/64<S1E2M3/64", "S1E2M5/64<S1E2M2/128", "S1E3M7<S1E2M3", "S1E4M10<S1E3M4")
NARROWER = ("S1E2M3<S1E3M7", "S1E2M3/64<S1E2M5/64", "INT4<S1E3M7", "NF4<S1E2M5/64")


def arrived(encoding: Encoding, numel: int = 3077) -> Packed:
    values = randn(numel, seed=5) * torch.linspace(0.01, 3, numel)
    return encode(values, encoding.sent, encoding.sent_transform)


def decoded(packed: Packed) -> torch.Tensor:
    return packed.decode(torch.empty(packed.numel))


@pytest.mark.parametrize("text", WIDER)
def test_a_method_that_can_represent_what_arrives_loses_nothing(text: str) -> None:
    encoding = Encoding.parse(text, seed=7)
    packed = arrived(encoding)
    held = as_held(packed, encoding, "weight")
    assert held.method == encoding.format != packed.method
    torch.testing.assert_close(decoded(held), decoded(packed), rtol=0, atol=0)


@pytest.mark.parametrize("text", NARROWER)
def test_other_methods_round_without_bias_and_each_client_in_its_own_way(text: str) -> None:
    packed = arrived(Encoding.parse(text))
    clients = [decoded(as_held(packed, Encoding.parse(text, seed=seed), "weight")) for seed in range(64)]
    values = decoded(packed)
    one, mean = clients[0] - values, torch.stack(clients).mean(0) - values
    assert not torch.equal(clients[0], clients[1])
    assert float(mean.norm() / one.norm()) < 0.2  # an eighth, of independent errors without bias


@pytest.mark.parametrize("text", ["S1E3M7", "S1E2M3+S1E2M1", "S1E3M7<S1E3M7"])
def test_without_a_downlink_of_its_own_a_variable_is_not_copied(text: str) -> None:
    encoding = Encoding.parse(text)
    packed = arrived(encoding)
    assert as_held(packed, encoding, "weight") is packed


def test_the_count_of_draws_begins_with_the_first_step() -> None:
    encoding = Encoding.parse("S1E2M5/64<S1E2M3/256")
    assert as_held(arrived(encoding), encoding, "weight").draws == arrived(encoding).draws
