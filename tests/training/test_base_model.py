"""What travels of a model, and the digest of what does not: of its values, however they are held."""

import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedomc
from fedomc.codec import CHUNK
from fedomc.errors import PayloadError, PolicyError
from fedomc.training.base_model import trainable, travelling
from fedomc.training.module_state import ModuleState


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)
    )
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    return model


TAIL = ["2.weight", "2.bias", "3.weight", "3.bias", "3.running_mean", "3.running_var", "3.num_batches_tracked"]


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ("trainable", [*TAIL, "4.weight", "4.bias"]),
        (["4.*", "2.bias"], ["2.bias", "4.weight", "4.bias"]),
        ("all", list(build().state_dict())),
    ],
)
def test_what_travels(variables: str | list[str], names: list[str]) -> None:
    assert travelling(ModuleState.of(build()), variables) == names


def test_everything_travels_where_nothing_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False))
    assert travelling(ModuleState.of(model)) == list(model.state_dict())
    model[0].weight.requires_grad_(False)
    assert trainable(ModuleState.of(model)) == ["0.bias"]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ("adapters", "'adapters' is unknown"),
        (["2.*", "*lora*"], r"'\*lora\*' matches none"),
        ([], "nothing"),
        ("", "''"),
    ],
)
def test_what_cannot_travel_is_named(variables: str | list[str], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        fedomc.base_digest(build(), variables)


def test_a_model_that_is_all_frozen_sends_nothing_unless_told() -> None:
    model = build().requires_grad_(False)
    with pytest.raises(PolicyError, match="nothing of the model travels"):
        fedomc.base_digest(model)
    assert fedomc.base_digest(model, "all") == fedomc.base_digest(nn.Sequential(), "all")


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["S1E3M7", "S1E2M3/64", "NF4", "MXFP8", "S1E2M3+S1E2M1"]),
    st.sampled_from([1, 5, 1024, CHUNK // 64, CHUNK // 64 + 1]),
)
def test_packed_and_decompressed_are_one_base_and_what_was_rounded_is_another(format: str, rows: int) -> None:
    torch.manual_seed(rows)
    model = nn.Sequential(nn.Linear(64, rows), nn.Linear(rows, 1))
    model[0].requires_grad_(False)
    before = fedomc.base_digest(model)
    fedomc.compress_(model, fedomc.CompressionPolicy.parse(format, weight_matrices_only=False, include=["0.weight"]))
    packed = fedomc.base_digest(model)
    assert packed != before
    assert fedomc.base_digest(fedomc.decompress_(model)) == packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_are_one_base_with_the_same_values_in_fp32(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    narrow = fedomc.base_digest(model)
    assert fedomc.base_digest(model.float()) == narrow != fedomc.base_digest(build())
    assert fedomc.base_digest(model.double()) != narrow


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda m: m[0].weight.data[5, 5].add_(1e-6), True),
        (lambda m: m[1].running_mean[3].add_(1), True),
        (lambda m: m[1].num_batches_tracked.add_(1), True),
        (lambda m: m[4].weight.data.zero_(), False),
        (lambda m: m[3].running_var.add_(1), False),
        (lambda m: m.eval(), False),
    ],
)
def test_the_digest_is_of_the_base_alone(change: object, differs: bool) -> None:
    model = build()
    before = fedomc.base_digest(model)
    change(model)  # type: ignore[operator]
    assert (fedomc.base_digest(model) != before) is differs


def test_names_and_shapes_count() -> None:
    model = build()
    renamed = nn.Sequential(nn.Identity(), *model)
    assert fedomc.base_digest(renamed) != fedomc.base_digest(model)
    flat = build()
    flat[0].weight = nn.Parameter(flat[0].weight.detach().reshape(32, 128), requires_grad=False)
    assert fedomc.base_digest(flat) != fedomc.base_digest(model)


def test_the_digest_is_what_its_documentation_says() -> None:
    """Built by hand, because clients and servers may have different versions."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        model[0].bias.copy_(torch.tensor([3.0, -0.0]))
    bias = b'["0.bias", "float32", [2]]' + struct.pack("<2f", 3.0, -0.0)
    weight = b'["0.weight", "float32", [2, 2]]' + struct.pack("<4f", 1.0, -2.0, 0.5, 0.0)
    assert fedomc.base_digest(model) == xxhash.xxh3_128_hexdigest(bias + weight)


def test_a_base_without_values_has_no_digest() -> None:
    with torch.device("meta"):
        model = build()
    with pytest.raises(PayloadError, match=r"0\.bias is frozen.*meta device"):
        fedomc.base_digest(model)


def test_decompressing_adapters_leaves_the_base_packed() -> None:
    model = fedomc.compress_(build(), "S1E3M7")
    assert fedomc.decompress_(model, ["2.*"]) is model
    packed = {name for name, p in model.named_parameters() if isinstance(p, fedomc.CompressedTensor)}
    assert packed == {"0.weight", "4.weight"}
    for include, says in ((["lora*"], "'lora*' matches none"), ("4.*", "must be a list")):
        with pytest.raises(PolicyError, match=says.replace("*", r"\*")):
            fedomc.decompress_(model, include)
