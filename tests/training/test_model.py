import copy
import math
import weakref

import pytest
import torch
from torch import nn

from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    FormatError,
    NonFiniteError,
    PolicyError,
    compress_,
    decompress_,
    materialize_,
    parameter_bytes,
)
from tests.conftest import allocations, assert_same_parameters, compressed, dense, randn, same_bits

POLICY = CompressionPolicy("S1E2M3")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(50, 40), nn.Linear(40, 50)
        self.output.weight = self.embedding.weight


def model() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Linear(40, 60), nn.LayerNorm(60), nn.LSTM(60, 10), nn.MultiheadAttention(8, 2), Tied()
    result = nn.ModuleList(parts)
    result[0].weight.requires_grad_(False)
    return result


def test_compresses_what_is_selected_and_nothing_else() -> None:
    plain = model()
    packed = copy.deepcopy(plain)
    selection = POLICY.select(packed)
    assert compress_(packed, selection) is packed
    for (name, p), q in zip(plain.named_parameters(), packed.parameters(), strict=True):
        assert isinstance(q, nn.Parameter) and q.requires_grad == p.requires_grad and q.shape == p.shape
        assert isinstance(q, CompressedTensor) == (name in selection)
        if isinstance(q, CompressedTensor):
            expected = CompressedTensor.from_dense(p, "S1E2M3")
            assert q.variable == name and q.encoding == selection[name]
            assert torch.equal(q.base.codes, expected.base.codes)
        else:
            assert same_bits(p, q)


WRITTEN = {
    "S1E3M7": CompressionPolicy("S1E3M7"),
    "S1E2M3+S1E2M1": CompressionPolicy("S1E2M3", update_format="S1E2M1"),
    "S1E3M7@0.5": CompressionPolicy("S1E3M7", fraction=0.5),
    "S1E2M3+S1E3M0@0.5": CompressionPolicy("S1E2M3", update_format="S1E3M0", fraction=0.5),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_a_format_or_a_policy_is_enough(text: str) -> None:
    policy = WRITTEN[text]
    expected = compress_(model(), policy.select(model()))
    with torch.device("meta"):
        empty = [model(), model()]
    for found in (
        compress_(model(), text),
        compress_(model(), policy),
        materialize_(empty[0], model().state_dict(), text),
        materialize_(empty[1], model().state_dict(), policy),
    ):
        assert_same_parameters(expected, found)
        for p, q in zip(expected.parameters(), found.parameters(), strict=True):
            assert getattr(p, "encoding", None) == getattr(q, "encoding", None)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("S9E3M7", FormatError, "S9E3M7"),
        ("", FormatError, "''"),
        ("S1E3M7+", FormatError, "''"),
        ("S1E3M7@", PolicyError, "'S1E3M7@'"),
        ("S1E3M7@nine", PolicyError, "nine"),
        ("S1E3M7@1.5", PolicyError, "1.5"),
        ("S1E3M7@0", PolicyError, "fraction"),
    ],
)
def test_a_text_that_is_no_format_is_refused(text: str, error: type[Exception], says: str) -> None:
    layer = nn.Linear(40, 60)
    for compress in (lambda: compress_(layer, text), lambda: materialize_(layer, layer.state_dict(), text)):
        with pytest.raises(error, match=says):
            compress()
    assert not isinstance(layer.weight, CompressedTensor)


def test_round_trip() -> None:
    plain = model()
    packed = compressed(plain)
    assert decompress_(packed) is packed
    assert not any(isinstance(p, CompressedTensor) for p in packed.parameters())
    assert_same_parameters(plain, packed)
    for p, q in zip(plain.parameters(), packed.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
    assert all(w is p for w, p in zip(packed[2]._flat_weights, packed[2].parameters(), strict=True))
    once = dict((n, dense(p)) for n, p in compress_(packed, POLICY.select(packed)).named_parameters())
    assert_same_parameters(packed, copy.deepcopy(packed))
    for name, p in decompress_(packed).named_parameters():
        assert same_bits(once[name], p)


def test_ties_stay_tied() -> None:
    packed = compressed(Tied(), "S1E3M7")
    assert packed.embedding.weight is packed.output.weight
    assert isinstance(packed.output.weight, CompressedTensor)
    twin = copy.deepcopy(packed)
    assert twin.embedding.weight is twin.output.weight
    decompress_(packed)
    assert packed.embedding.weight is packed.output.weight and not isinstance(packed.output.weight, CompressedTensor)


def test_gradients_are_kept() -> None:
    layer = nn.Linear(10, 12)
    layer.weight.grad = torch.ones(12, 10)
    compress_(layer, POLICY.select(layer))
    assert torch.equal(layer.weight.grad, torch.ones(12, 10))
    assert torch.equal(decompress_(layer).weight.grad, torch.ones(12, 10))


def test_frees_the_dense_values() -> None:
    layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    selection = POLICY.select(layers)
    former = [weakref.ref(p) for p in layers.parameters()]
    kept = sum(allocations(lambda: compress_(layers, selection)))
    assert kept == pytest.approx(8 * 256 * 256 * 6 / 8, rel=0.01)
    former += [weakref.ref(p) for p in layers.parameters()]
    decompress_(layers)
    assert all(reference() is None for reference in former)


def test_errors_change_nothing() -> None:
    layer = nn.Linear(10, 12)
    selection = POLICY.select(layer)
    with pytest.raises(PolicyError, match=r"no parameter 'else\.weight'"):
        compress_(layer, {**selection, "else.weight": selection["weight"]})
    assert not isinstance(layer.weight, CompressedTensor)
    compress_(layer, selection)
    before = layer.weight
    with pytest.raises(PolicyError, match="weight is compressed already"):
        compress_(layer, selection)
    assert layer.weight is before


def test_a_nan_names_its_variable_and_loses_none() -> None:
    layers = nn.Sequential(nn.Linear(10, 11), nn.Linear(11, 12), nn.Linear(12, 13))
    values = [p.detach().clone() for p in layers.parameters()]
    with torch.no_grad():
        layers[1].weight[2, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"1\.weight"):
        compress_(layers, POLICY.select(layers))
    assert [isinstance(layer.weight, CompressedTensor) for layer in layers] == [True, False, False]
    assert torch.equal(layers[2].weight, values[4]) and layers[1].weight.isnan().sum() == 1


@pytest.mark.parametrize(("name", "bits"), [("S1E2M1", 4), ("S1E2M3", 6), ("S1E3M7", 11), ("S1E8M23", 32)])
def test_bytes(name: str, bits: int) -> None:
    packed = model()
    compress_(packed, CompressionPolicy(name, exclude=["3.*"]).select(packed))
    found = parameter_bytes(packed)
    expected = {}
    for parameter_name, p in packed.named_parameters():
        expected[parameter_name] = 4 * p.numel()
        if isinstance(p, CompressedTensor):
            rows = math.ceil(p.numel() % 1024 / 32)
            lane_words = p.numel() // 1024 * bits + math.ceil(rows * bits / 32)
            expected[parameter_name] = 4 * 32 * lane_words + 8
    assert dict(found) == expected and list(found) == [n for n, _ in packed.named_parameters()]
    assert "4.output.weight" not in found  # tied: counted once
    assert found.total == sum(expected.values())
    assert found.fp32 == 4 * sum(p.numel() for p in packed.parameters())
    assert found.ratio == found.total / found.fp32
    assert parameter_bytes(nn.ReLU()).ratio == 1


def test_a_selection_is_for_the_whole_model() -> None:
    """One policy, two clients: the same values where both compress."""
    policy = CompressionPolicy("S1E2M3", fraction=0.5)
    clients = [compress_(model(), policy.select(model(), client=client)) for client in (0, 2)]
    kinds = [[isinstance(p, CompressedTensor) for p in client.parameters()] for client in clients]
    assert kinds[0] != kinds[1]
    for p, q in zip(*(client.parameters() for client in clients), strict=True):
        if isinstance(p, CompressedTensor) and isinstance(q, CompressedTensor):
            assert torch.equal(p.base.codes, q.base.codes)


def test_compressed_while_in_inference_mode() -> None:
    layer = nn.Linear(8, 8)
    with torch.inference_mode():
        compress_(layer, POLICY.select(layer))
    layer(randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None


def test_only_floats_with_values_are_taken() -> None:
    layer = nn.Linear(8, 8, dtype=torch.float64)
    with pytest.raises(PolicyError, match="float64"):
        compress_(layer, POLICY.select(layer))
    with torch.device("meta"):
        layer = nn.Linear(8, 8)
    with pytest.raises(PolicyError, match=r"weight is on the meta device.*materialize_"):
        compress_(layer, POLICY.select(layer))
    with pytest.raises(PolicyError, match=r"a list cannot select variables: .*'S1E3M7'.*result of its select\(model\)"):
        compress_(layer, ["weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [POLICY, CompressionPolicy("S1E2M3", update_format="S1E2M1")])
def test_compressed_where_new_tensors_are_made_on_the_meta_device(policy: CompressionPolicy) -> None:
    layer = nn.Linear(40, 60)
    expected = compress_(copy.deepcopy(layer), policy.select(layer)).weight.dequantize()
    with torch.device("meta"):
        compress_(layer, policy.select(layer))
        assert torch.equal(layer.weight.dequantize(), expected)
        layer(torch.ones(2, 40, device="cpu")).sum().backward()
        with torch.no_grad():
            layer.weight.sub_(layer.weight.grad)
            layer.weight.mul_(0.5)
        assert not torch.equal(decompress_(layer).weight, expected)
