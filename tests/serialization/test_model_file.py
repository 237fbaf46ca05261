"""Model files: a model becomes what was saved, bit by bit."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

import fedomc
from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    NonFiniteError,
    PayloadError,
    load_model,
    save_model,
)
from fedomc.serialization import frame, tensor_file
from tests.conftest import allocations, dense, same_bits
from tests.serialization.models import POLICIES, Model, on_meta, snapshot, step, trained


@pytest.mark.parametrize("into", ["meta", "plain", "compressed"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_a_loaded_model_is_the_saved_one_and_trains_on_like_it(path: Path, name: str, steps: int, into: str) -> None:
    model = trained(name, steps)
    save_model(model, path)
    other = {"meta": on_meta, "plain": Model, "compressed": lambda: trained("lossless")}[into]()
    assert load_model(other, path) is other
    assert snapshot(other) == snapshot(model)
    assert other.output.weight is other.embedding.weight
    for one in (model, other):
        fedomc.step_in_backward(one, torch.optim.SGD, lr=0.1)
        step(one, 9)
    assert snapshot(other) == snapshot(model)


def test_a_file_is_safetensors_with_readable_metadata(path: Path) -> None:
    model = trained("two parts")
    save_model(model, path, {"note": "round 7", "by": "me"})
    with safetensors.safe_open(path, "pt") as file:
        texts = file.metadata()
    assert texts.pop("note") == "round 7" and texts.pop("by") == "me"
    content = json.loads(texts.pop("fedomc"))
    assert (
        texts.keys() == {"fedomc.digest", "fedomc.digests"}
        and content["version"] == 2
        and content["tied"] == {"output.weight": "embedding.weight"}
    )
    encoding = model.embedding.weight.encoding
    assert content["variables"]["embedding.weight"] == {
        "format": "S1E2M3", "update_format": "S1E2M1", "transform": "scaled", "rounding": "stochastic",
        "seed": encoding.seed, "shape": [50, 40], "draws": [1, 2],
    }  # fmt: skip
    tensors = load_file(path)
    assert "output.weight" not in tensors and "temporary" not in tensors
    assert torch.equal(tensors["inner.1.running_mean"], model.inner[1].running_mean)
    part = model.embedding.weight.update
    assert bytes(tensors["embedding.weight.update"].tolist()) == frame.to_bytes(part, (50, 40), frame.UPDATE)


@pytest.mark.parametrize("dtype", tensor_file._DTYPES)
def test_every_dtype_is_stored_as_it_is(path: Path, dtype: torch.dtype) -> None:
    model, other = nn.Module(), nn.Module()
    model.register_buffer("values", torch.tensor([[1, 0, 2], [3, 1, 7]]).to(dtype).T)  # not contiguous
    other.register_buffer("values", torch.zeros(3, 2).to(dtype))
    save_model(model, path)
    stored = load_file(path)["values"]
    load_model(other, path)
    assert stored.dtype == other.values.dtype == dtype
    assert torch.equal(other.values.float(), model.values.float()) and torch.equal(stored.float(), model.values.float())


def test_parameters_are_saved_however_they_lie_in_memory(path: Path) -> None:
    def build() -> nn.ParameterList:
        return nn.ParameterList([torch.arange(10.0)[::2], torch.ones(()).expand(5), torch.arange(6.0).view(2, 3).t()])

    save_model(build(), path)
    loaded = load_model(nn.ParameterList(torch.zeros_like(each) for each in build()), path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), build(), strict=True))


def test_a_file_is_as_small_as_the_model(path: Path) -> None:
    model = nn.Linear(500, 500)
    fedomc.compress_(model, CompressionPolicy("S1E2M3", update_format="S1E2M1").select(model))
    save_model(model, path)
    assert path.stat().st_size < 250_000 * 6 / 8 + 2000 + 1000  # no bytes for an update that has not begun
    step_by = torch.full((500, 500), 0.01)
    with torch.no_grad():
        model.weight.add_(step_by)
    save_model(model, path)
    assert 250_000 * 10 / 8 < path.stat().st_size < 250_000 * 10 / 8 + 2000 + 1000


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_model_gives_the_same_bytes(path: Path, name: str) -> None:
    model = trained(name)
    save_model(model, path, {str(i): "x" for i in range(20)})
    first = path.read_bytes()
    for again in (copy.deepcopy(model), load_model(on_meta(), path)):
        save_model(again, path, {str(i): "x" for i in reversed(range(20))})
        assert path.read_bytes() == first


@pytest.mark.parametrize("steps", [0, 2])
def test_a_file_that_was_replaced_or_removed_does_not_change_the_model(path: Path, steps: int) -> None:
    model = trained("two parts", steps)
    save_model(model, path)
    other = load_model(on_meta(), path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert snapshot(other) == snapshot(model)


@pytest.mark.parametrize("tied_in_file", [True, False])
@pytest.mark.parametrize("tied_in_model", [True, False])
@pytest.mark.parametrize("name", ["fp32", "two parts"])
def test_ties(path: Path, name: str, tied_in_file: bool, tied_in_model: bool) -> None:
    model = trained(name)
    if not tied_in_file:
        model.output.weight = nn.Parameter(model.embedding.weight.detach().clone())
        model.output.weight.variable = "output.weight"
    save_model(model, path)
    other = load_model(on_meta(tied_in_model), path)
    assert (other.output.weight is other.embedding.weight) == (tied_in_file or tied_in_model)
    assert same_bits(dense(other.output.weight), dense(model.embedding.weight))
    if not tied_in_file:
        with torch.no_grad():
            model.output.weight.add_(1)
        save_model(model, path)
        if tied_in_model:
            before = snapshot(other)
            with pytest.raises(PayloadError, match=r"output\.weight"):
                load_model(other, path)
            assert snapshot(other) == before
        else:
            assert snapshot(load_model(other, path)) == snapshot(model)


def test_a_variable_goes_by_its_first_name_in_the_model_that_is_filled(path: Path) -> None:
    def pair(*names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in names})

    one, other = pair("a", "b"), pair("b", "a")
    one["b"].weight = one["a"].weight
    save_model(one, path)
    load_model(other, path)
    assert other["a"].weight is other["b"].weight and same_bits(dense(other["a"].weight), dense(one["a"].weight))


def test_tied_buffers_stay_tied(path: Path) -> None:
    model = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
    model[1].running_mean = model[0].running_mean
    save_model(model, path)
    for other in (copy.deepcopy(model), nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])):
        load_model(other, path)
        assert other[0].running_mean is other[1].running_mean


# ---- writing ---------------------------------------------------------------------------------------------------------


def broken(*args: object) -> None:
    raise OSError("no space left")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failed_save_leaves_the_former_file(path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(trained("one part"), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, where, broken)
    with pytest.raises(OSError, match="no space left"):
        save_model(trained("two parts"), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def infinite(model: Model) -> None:
    with torch.no_grad():
        model.inner[0].bias[3] = math.inf


def unknown_layout(model: Model) -> None:
    model.register_buffer("sparse", torch.eye(3).to_sparse())


def unknown_dtype(model: Model) -> None:
    model.register_buffer("buffer_complex", torch.ones(3, dtype=torch.complex64))


def nine_dimensions(model: Model) -> None:
    model.wide = nn.Parameter(CompressedTensor.from_dense(torch.ones((2,) * 9), "S1E2M3"))


def without_values(model: Model) -> None:
    model.inner[1].to("meta")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (infinite, NonFiniteError, r"inner\.0\.bias"),
        (unknown_layout, PayloadError, "sparse"),
        (unknown_dtype, PayloadError, "complex"),
        (nine_dimensions, PayloadError, "wide has 9 dimensions"),
        (without_values, PayloadError, r"inner\.1\.weight.*materialize_"),
    ],
)
def test_what_no_file_can_hold(path: Path, change: Callable[[Model], None], error: Any, says: str) -> None:
    save_model(trained("one part"), path)
    before = path.read_bytes()
    model = trained("one part")
    change(model)
    with pytest.raises(error, match=says):
        save_model(model, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"fedomc": "x"}, "reserved"),
        ({"fedomc.digest": "x"}, "reserved"),
        ({"a": 1}, "must be strings"),
        ({1: "a"}, "must be strings"),
        ({"a": "\ud800"}, "UTF-8"),
    ],
)
def test_metadata_are_texts(path: Path, metadata: Any, says: str) -> None:
    with pytest.raises(PayloadError, match=says):
        save_model(nn.Linear(2, 2), path, metadata)
    assert not path.exists()


def test_extra_state_is_not_lost_silently(path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"steps": 3}

    with pytest.raises(PayloadError, match="1 has extra state"):
        save_model(nn.Sequential(nn.ReLU(), Extra(2, 2)), path)


def test_a_link_is_written_through_and_the_mask_decides_who_may_read(path: Path) -> None:
    link = path.with_name("latest")
    link.symlink_to(path.name)
    before = os.umask(0o027)
    try:
        save_model(nn.Linear(2, 2), link)
    finally:
        os.umask(before)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640


def test_saving_holds_one_frame_at_a_time(path: Path) -> None:
    layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    fedomc.compress_(layers, CompressionPolicy("S1E3M7").select(layers))
    assert max(allocations(lambda: save_model(layers, path)), default=0) <= 256 * 256 * 11 / 8


def test_an_update_that_processes_share_is_read_again(tmp_path: Path) -> None:
    """Another process may have written to it, so that it is in the file, although this one never rounded it."""
    model = fedomc.compress_(nn.Linear(40, 30), POLICIES["two parts"].select(nn.Linear(40, 30)))
    model.share_memory()
    save_model(model, tmp_path / "model")
    found = load_model(nn.Linear(40, 30), tmp_path / "model")
    assert same_bits(dense(found.weight), dense(model.weight))
