"""``materialize_``: a model is filled from any source of dense values, or not at all."""

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fedomc
from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    PayloadError,
    PolicyError,
    load_model,
    materialize_,
    save_model,
)
from tests.conftest import randn
from tests.serialization.models import POLICIES, Model, W, on_meta, snapshot, state, step, trained


def as_mapping(values: dict[str, Tensor], path: Path) -> Any:
    return values


def as_pairs(values: dict[str, Tensor], path: Path) -> Any:
    return ((name, value) for name, value in values.items())


def as_file(values: dict[str, Tensor], path: Path) -> Any:
    save_file({name: value.clone() for name, value in values.items()}, path)
    return path


SOURCES = (as_mapping, as_pairs, as_file)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["one part", "two parts"])
def test_materialized_is_what_compress_makes(path: Path, name: str, source: Callable[..., Any]) -> None:
    policy = POLICIES[name]
    assert policy is not None
    plain, model = trained("fp32"), on_meta()
    selection = policy.select(model, round=1, client="a")
    assert materialize_(model, source(state(plain), path), selection) is model
    expected = fedomc.compress_(copy.deepcopy(plain), selection)
    assert snapshot(model) == snapshot(expected)
    assert model.output.weight is model.embedding.weight
    step(model, 3)


@pytest.mark.parametrize("format", ["S1E2M3", "S1E2M3/64"])
@pytest.mark.parametrize("source", SOURCES)
def test_one_warning_names_what_the_format_cannot_hold(path: Path, source: Callable[..., Any], format: str) -> None:
    plain = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    with torch.no_grad():
        for layer in plain[1:]:
            layer.weight[0, 0] = 100.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        materialize_(copy.deepcopy(plain).to("meta"), source(plain.state_dict(keep_vars=True), path), format)
    assert len(caught) == (format == "S1E2M3")
    for warning in caught:
        assert warning.filename == __file__
        assert re.match(
            r"S1E2M3 cannot hold 2 of 3 variables.*% of [12]\.weight, \d+% of [12]\.weight", str(warning.message)
        )


@pytest.mark.parametrize("source", SOURCES)
def test_without_a_selection_it_is_a_plain_model_of_its_own(path: Path, source: Callable[..., Any]) -> None:
    plain = trained("fp32")
    model = materialize_(on_meta(), source(state(plain), path))
    assert snapshot(model) == snapshot(plain)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    assert not torch.equal(model.embedding.weight, plain.embedding.weight)


def test_from_a_model_file(path: Path) -> None:
    model = trained("two parts")
    save_model(model, path)
    assert snapshot(materialize_(on_meta(), path)) == snapshot(model)
    assert snapshot(materialize_(on_meta(), str(path))) == snapshot(model)
    with pytest.raises(PolicyError, match="compressed already"):
        materialize_(on_meta(), path, POLICIES["one part"].select(model))


def test_from_the_state_of_a_compressed_model() -> None:
    model = trained("two parts")
    other = materialize_(on_meta(), model.state_dict())
    assert snapshot(other) == snapshot(model)
    before = snapshot(model)
    fedomc.step_in_backward(other, torch.optim.SGD, lr=0.1)
    step(other, 1)
    assert snapshot(model) == before != snapshot(other)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("left_out", ["embedding.weight", "output.weight"])
def test_a_tied_weight_may_come_under_any_of_its_names(path: Path, left_out: str, source: Callable[..., Any]) -> None:
    plain = trained("fp32")
    values = {name: value for name, value in plain.state_dict().items() if name != left_out}
    model = materialize_(on_meta(), source(values, path), {"output.weight": POLICIES["two parts"].encoding()})
    assert model.output.weight is model.embedding.weight and isinstance(model.output.weight, CompressedTensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_fill_float32(path: Path, dtype: torch.dtype) -> None:
    values = {"weight": randn(30, 40).to(dtype), "bias": randn(30).to(dtype)}
    save_file(values, path)
    with torch.device("meta"):
        model = nn.Linear(40, 30)
    materialize_(model, path, CompressionPolicy("S1E8M23", transform="none").select(model))
    assert torch.equal(model.weight.dequantize(), values["weight"].float())
    assert model.bias.dtype is torch.float32 and torch.equal(model.bias, values["bias"].float())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inner__0__bias": None}, r"inner\.0\.bias missing"),
        ({"else": torch.ones(2)}, "else"),
        ({W.replace(".", "__"): torch.ones(40, 64)}, r"inner\.0\.weight has shape"),
        ({W.replace(".", "__"): torch.ones(64, 40).double()}, r"inner\.0\.weight has dtype"),
        ({W.replace(".", "__"): torch.full((64, 40), math.nan)}, r"inner\.0\.weight has a value"),
        ({"inner__0__bias": torch.full((64,), -math.inf)}, r"inner\.0\.bias has a value"),
        (
            {"output__weight": torch.ones(50, 40)},
            "occurs twice, or is tied to embedding.weight",
        ),
        ({"buffer_bool": torch.ones(3)}, "buffer_bool has dtype"),
    ],
)
def test_wrong_values_change_nothing(
    path: Path, changes: dict[str, Tensor], says: str, source: Callable[..., Any]
) -> None:
    model = on_meta()
    before = snapshot(model)
    with pytest.raises(PayloadError, match=says):
        materialize_(model, source(state(trained("fp32"), **changes), path), POLICIES["two parts"].select(model))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.empty(64, 40, device="meta"), "meta"),
        (torch.ones(64, 40).to_sparse(), "sparse"),
        ([[1.0]], "list"),
    ],
)
def test_values_that_are_no_dense_tensors(value: Any, says: str) -> None:
    model = on_meta()
    with pytest.raises(PayloadError, match=rf"inner\.0\.weight is .*{says}"):
        materialize_(model, state(trained("fp32"), **{W.replace(".", "__"): value}))
    assert model.scale.is_meta


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        (lambda encoding: {"else.weight": encoding}, r"no parameter 'else\.weight'"),
        (lambda encoding: {"inner.1.running_mean": encoding}, "no parameter"),
        (lambda encoding: {"small": encoding}, "small is torch.float64"),
    ],
)
def test_a_selection_of_another_model(selection: Callable[..., Any], says: str) -> None:
    model = on_meta()
    model.small = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(PolicyError, match=says):
        materialize_(model, iter(()), selection(POLICIES["two parts"].encoding()))


def test_a_stream_that_breaks_changes_nothing() -> None:
    def values() -> Iterator[tuple[str, Tensor]]:
        yield from list(state(trained("fp32")).items())[:3]
        raise ConnectionError("lost")

    model = on_meta()
    with pytest.raises(ConnectionError):
        materialize_(model, values(), POLICIES["one part"].select(model))
    assert all(value.is_meta for value in model.state_dict().values())


def test_a_buffer_that_nothing_can_fill_is_named(path: Path) -> None:
    save_model(trained("one part"), path)
    model = on_meta()
    model.inner[0].register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    for fill in (lambda: load_model(model, path), lambda: materialize_(model, state(trained("fp32")))):
        with pytest.raises(PayloadError, match=r"inner\.0\.table.*assign their values"):
            fill()
    assert model.scale.is_meta
    model.inner[0].table = torch.arange(3.0)  # the way out
    load_model(model, path)


def test_filled_while_in_inference_mode_it_can_be_trained(path: Path) -> None:
    plain = trained("fp32")
    save_model(trained("two parts"), path)
    with torch.inference_mode():
        models = [
            load_model(on_meta(), path),
            materialize_(on_meta(), state(plain), POLICIES["one part"].select(plain)),
        ]
    for model in models:
        fedomc.step_in_backward(model, torch.optim.SGD, lr=0.1)
        step(model, 0)


@pytest.mark.parametrize("name", POLICIES)
def test_filled_where_new_tensors_are_made_on_the_meta_device(path: Path, name: str) -> None:
    plain, saved, policy = trained("fp32"), trained(name), POLICIES[name]
    selection = {} if policy is None else policy.select(plain)
    expected = materialize_(on_meta(), state(plain), selection)
    save_model(saved, path)
    with torch.device("meta"):
        models = [
            load_model(Model(), path),
            materialize_(Model(), path),
            materialize_(Model(), state(plain), selection),
        ]
    for model, like in zip(models, (saved, saved, expected), strict=True):
        assert snapshot(model) == snapshot(like)
        with torch.device("meta"):
            model(torch.arange(4, device="cpu")).square().mean().backward()


def test_frozen_stays_frozen(path: Path) -> None:
    save_model(trained("one part"), path)
    model = on_meta()
    model.inner[0].requires_grad_(False)
    load_model(model, path)
    assert not model.inner[0].weight.requires_grad and model.inner[2].weight.requires_grad
