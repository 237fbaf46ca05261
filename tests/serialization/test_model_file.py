"""Files and other sources: a model becomes what was saved, bit by bit; what is wrong changes nothing."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fedomc
from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    NonFiniteError,
    PayloadError,
    PolicyError,
    load_model,
    materialize_,
    save_model,
)
from fedomc.serialization import frame, tensor_file
from tests.conftest import allocations, dense, randn, same_bits
from tests.serialization.forging import signed, signed_again

POLICIES = {
    "fp32": None,
    "one part": CompressionPolicy("S1E3M7", rounding="stochastic", seed=7, fraction=0.7),
    "two parts": CompressionPolicy("S1E2M3", update_format="S1E2M1", rounding="stochastic", seed=3),
    "lossless": CompressionPolicy("S1E8M23", transform="none", weight_matrices_only=False),
}


class Model(nn.Module):
    """Linear layers, a tied one, normalization, buffers of several dtypes."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 40)
        self.inner = nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.Linear(64, 40))
        self.output = nn.Linear(40, 50)
        if tied:
            self.output.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        for dtype in (torch.bool, torch.int16, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
            self.register_buffer("buffer_" + str(dtype).removeprefix("torch."), torch.arange(3).to(dtype))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("temporary", torch.ones(2, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(self.embedding(x))) * self.scale


def step(model: nn.Module, seed: int) -> None:
    x = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def trained(name: str, steps: int = 2) -> Model:
    torch.manual_seed(0)
    model, policy = Model(), POLICIES[name]
    if policy is not None:
        fedomc.compress_(model, policy.select(model, round=1, client="a"))
    stepping = fedomc.step_in_backward(model, torch.optim.SGD, lr=0.1)
    for seed in range(steps):
        step(model, seed)
    stepping.remove()
    return model


def on_meta(tied: bool = True) -> Model:
    with torch.device("meta"):
        return Model(tied)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Describe all that a model's state is, so that any change shows."""
    result: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, CompressedTensor):
            result[name] = [(p.codes.tolist(), p.fields[1].tolist(), p.draws, str(p.method)) for p in value.parts]
            result[name] += [value.variable, value.encoding, value.requires_grad, tuple(value.shape)]
        else:
            raw = "meta" if value.is_meta else value.detach().reshape(-1).view(torch.uint8).tolist()
            result[name] = [raw, value.dtype, tuple(value.shape), value.requires_grad]
    return result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


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


# ---- wrong files -----------------------------------------------------------------------------------------------------


W = "inner.0.weight"
"""A compressed variable."""

Parts = tuple[dict[str, Tensor], dict[str, Any]]


def reframed(fmt: str, kind: int = frame.VARIABLE, shape: tuple[int, ...] = (64, 40)) -> Tensor:
    packed = CompressedTensor.from_dense(randn(*shape), fmt).base
    return torch.tensor(list(frame.to_bytes(packed, shape, kind)), dtype=torch.uint8)


def forge(tensors: dict[str, Tensor], path: Path, texts: dict[str, str]) -> None:
    """Write a file that is wrong, with the digests of what it holds."""
    save_file(tensors, path, texts)
    path.write_bytes(signed_again(path.read_bytes()))


def with_tensor(key: str, value: Tensor | None) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        tensors, content = parts
        tensors = {k: v for k, v in tensors.items() if k != key}
        return ({**tensors, key: value} if value is not None else tensors), content

    return change


def with_field(key: str, value: object) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        parts[1]["variables"][W][key] = value
        return parts

    return change


def with_content(**content: object) -> Callable[[Parts], Parts]:
    return lambda parts: (parts[0], {**parts[1], **content})


def damaged(key: str) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        parts[0][key][100] ^= 1
        return parts

    return change


WRONG = {
    "missing variable": (with_tensor("inner.0.bias", None), r"inner\.0\.bias missing"),
    "missing frame": (with_tensor(W, None), r"inner\.0\.weight missing"),
    "missing update": (with_tensor(W + ".update", None), r"inner\.0\.weight\.update missing"),
    "unknown variable": (with_tensor("else", torch.ones(2)), "else unknown"),
    "wrong shape": (with_tensor("inner.0.bias", torch.ones(63)), r"inner\.0\.bias: shape"),
    "wrong dtype": (with_tensor("inner.0.bias", torch.ones(64).double()), r"inner\.0\.bias: dtype"),
    "half": (with_tensor("inner.0.bias", torch.ones(64).half()), r"inner\.0\.bias: dtype"),
    "nan": (with_tensor("inner.0.bias", torch.full((64,), math.nan)), r"inner\.0\.bias has a value that is NaN"),
    "infinite half": (with_tensor("buffer_float16", torch.full((3,), math.inf).half()), "buffer_float16 has a value"),
    "damaged base": (damaged(W), r"inner\.0\.weight: checksum"),
    "damaged update": (damaged(W + ".update"), r"inner\.0\.weight: checksum"),
    "short frame": (with_tensor(W, torch.zeros(5, dtype=torch.uint8)), r"inner\.0\.weight: 5 bytes"),
    "empty frame": (with_tensor(W, torch.zeros(0, dtype=torch.uint8)), r"inner\.0\.weight: 0 bytes"),
    "not bytes": (with_tensor(W, torch.zeros(64, 40)), r"inner\.0\.weight: the bytes of a frame expected"),
    "bytes in two dimensions": (with_tensor(W, reframed("S1E2M3").view(2, -1)), r"inner\.0\.weight: the bytes"),
    "other format": (with_tensor(W, reframed("S1E3M7")), r"inner\.0\.weight: .* S1E3M7.* S1E2M3"),
    "other kind": (with_tensor(W, reframed("S1E2M3", frame.UPDATE)), r"inner\.0\.weight: .* kind 1"),
    "other frame shape": (with_tensor(W, reframed("S1E2M3", shape=(40, 64))), r"inner\.0\.weight: .* \(40, 64\)"),
    "shape of another model": (
        lambda parts: with_field("shape", [40, 64])(with_tensor(W, reframed("S1E2M3", shape=(40, 64)))(parts)),
        r"inner\.0\.weight: ",
    ),
    "version": (with_content(version=3), "version 3"),
    "no version": (with_content(version=None), "version None"),
    "no variables": (with_content(variables=None), "no variables"),
    "no ties": (with_content(tied=[]), "no tied"),
    "tied to a number": (with_content(tied={"a": 3}), "tied"),
    "tied to nothing": (with_content(tied={"output.weight": "else"}), "else"),
    "tied to another shape": (with_content(tied={"output.weight": "inner.0.bias"}), "output.weight"),
    "unknown tie": (with_content(tied={"else": "embedding.weight"}), "else unknown"),
    "format": (with_field("format", "S1E9M3"), r"inner\.0\.weight: .*S1E9M3"),
    "format of no kind": (with_field("format", ["S1E2M3"]), r"inner\.0\.weight: "),
    "update format": (with_field("update_format", 3), r"inner\.0\.weight: "),
    "update format left out": (with_field("update_format", None), r"inner\.0\.weight: .*draws"),
    "transform": (with_field("transform", "magic"), r"inner\.0\.weight: .*magic"),
    "no transform": (with_field("transform", ""), r"inner\.0\.weight: .*transform"),
    "rounding": (with_field("rounding", None), r"inner\.0\.weight: .*rounding"),
    "seed": (with_field("seed", True), r"inner\.0\.weight: .*seed=True"),
    "shape": (with_field("shape", [64, -40]), r"inner\.0\.weight: .*shape"),
    "shape of texts": (with_field("shape", ["64", "40"]), r"inner\.0\.weight: .*shape"),
    "draws": (with_field("draws", [1, 2**63]), r"inner\.0\.weight: .*draws"),
    "no draws": (with_field("draws", []), r"inner\.0\.weight: .*draws"),
    "update not told": (with_field("draws", [1, 0]), r"inner\.0\.weight\.update unknown"),
    "fields": (lambda parts: (parts[0], {**parts[1], "variables": {W: 3}}), r"inner\.0\.weight: "),
}


@pytest.mark.parametrize("into", [on_meta, lambda: trained("one part")])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_and_the_model_stays(path: Path, name: str, into: Callable[[], Model]) -> None:
    change, says = WRONG[name]
    save_model(trained("two parts"), path)
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["fedomc"])
    tensors, content = change((load_file(path), content))
    forge(tensors, path, {"fedomc": json.dumps(content)})
    model = into()
    before = snapshot(model)
    with pytest.raises(PayloadError, match=says):
        load_model(model, path)
    assert snapshot(model) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"version": 2' + "0" * 5000 + "}", "NaN"])
def test_metadata_that_are_none(path: Path, text: str) -> None:
    forge({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path, {"fedomc": text})
    with pytest.raises(PayloadError, match=r"model\.safetensors: "):
        load_model(nn.Linear(2, 2), path)


def test_metadata_of_any_depth(path: Path) -> None:
    """Somewhere the parser gives up, and what shows a value in an error must not do so earlier."""
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 5):
        shape = "[" * depth + "]" * depth
        text = '{"version":2,"tied":{},"variables":{"weight":{"format":"S1E2M3","seed":0,"transform":"none",'
        text += f'"rounding":"nearest","draws":[0],"shape":{shape}}}}}}}'
        forge({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path, {"fedomc": text})
        with pytest.raises(PayloadError):
            load_model(nn.Linear(2, 2), path)


def test_a_sum_of_two_parts_that_leaves_the_range_is_refused(path: Path) -> None:
    """Each part is finite, the sum is not."""
    model = nn.Linear(40, 40, bias=False)
    fedomc.compress_(model, CompressionPolicy("S1E8M7", update_format="S1E8M7", transform="none").select(model))
    with torch.no_grad():
        model.weight.add_(1.0)
    save_model(model, path)
    with safetensors.safe_open(path, "pt") as file:
        texts = file.metadata()
    tensors = load_file(path)
    for key, kind in (("weight", frame.VARIABLE), ("weight.update", frame.UPDATE)):
        packed = CompressedTensor.from_dense(torch.full((40, 40), 3e38), "S1E8M7", transform="none").base
        tensors[key] = torch.tensor(list(frame.to_bytes(packed, (40, 40), kind)), dtype=torch.uint8)
    forge(tensors, path, texts)
    before = snapshot(model)
    with pytest.raises(PayloadError, match="weight has a value"):
        load_model(model, path)
    assert snapshot(model) == before


def test_a_file_of_others_is_for_materialize(path: Path) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path)
    with pytest.raises(PayloadError, match="materialize_"):
        load_model(nn.Linear(2, 2), path)


def test_no_file_is_no_payload(path: Path) -> None:
    for wrong in (path, path.parent):
        with pytest.raises(OSError):
            load_model(nn.Linear(2, 2), wrong)


def test_a_model_that_is_stepped_in_backward_is_refused_whole(path: Path) -> None:
    model = trained("two parts")
    save_model(model, path)
    other = trained("fp32")
    other.inner.requires_grad_(False)  # so that the first variables could be replaced
    fedomc.step_in_backward(other, torch.optim.SGD, lr=0.1)
    before = snapshot(other)
    with pytest.raises(PolicyError, match=r"remove\(\)"):
        load_model(other, path)
    assert snapshot(other) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6, bias=False))
    encoding = CompressionPolicy("S1E2M3", update_format="S1E2M1").encoding()
    fedomc.compress_(model, dict.fromkeys(("0.weight", "2.weight"), encoding))
    with torch.no_grad():
        model[0].weight.add_(0.1)
    save_model(model, path, {"note": "x"})
    return path, path.read_bytes()


def refused_or_whole(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6, bias=False))
    try:
        load_model(model, path)
    except PayloadError:
        assert all(value.is_meta for value in model.state_dict().values())
        return True
    assert all(bool(torch.isfinite(dense(value)).all()) for value in model.state_dict().values())
    return False


def test_every_truncation_is_found(small: tuple[Path, bytes]) -> None:
    path, data = small
    for length in range(0, len(data), 7):
        assert refused_or_whole(path, data[:length])
    assert refused_or_whole(path, data + b"\0")
    assert not refused_or_whole(path, data)


def test_no_flipped_bit_is_taken_for_a_good_value(small: tuple[Path, bytes]) -> None:
    """One bit of every byte, each of the eight in turn; what loads all the same is what was saved."""
    path, data = small

    def loaded(content: bytes) -> dict[str, Any] | None:
        path.unlink()  # the one before may still be mapped
        path.write_bytes(content)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6, bias=False))
        for fill in (load_model, materialize_):
            try:
                fill(model, path)
            except PayloadError:
                continue
            return snapshot(model)
        return None

    expected = loaded(data)
    assert expected is not None
    accepted = []
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        if loaded(bytes(changed)) is not None:
            accepted.append(at)
    assert accepted == []


@given(st.data())
def test_damaged_files_are_refused_or_harmless(small: tuple[Path, bytes], data: st.DataObject) -> None:
    path, original = small
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        if data.draw(st.booleans()):
            changed[at] = data.draw(st.integers(0, 255))
        else:
            changed[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    refused_or_whole(path, bytes(changed))


NAMES = ("0.weight", "0.weight.update", "0.bias", "1.running_mean", "1.num_batches_tracked", "2.weight", "other")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*NAMES, "S1E2M3", "nearest", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_forged_headers_are_refused_or_harmless(small: tuple[Path, bytes], data: st.DataObject) -> None:
    """Well-formed, so that what is behind the parser is reached."""
    path, original = small
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    content = json.loads(header["__metadata__"]["fedomc"])
    places = [header, content, content["variables"], *content["variables"].values()]
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(places))
        key = data.draw(st.sampled_from(sorted(where)) | st.sampled_from(NAMES))
        if key != "__metadata__":
            where[key] = data.draw(JSON if where is not header else headers())
    header["__metadata__"]["fedomc"] = json.dumps(content)
    refused_or_whole(path, signed(header, original[8 + length :]))


def headers() -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "F4", "F6_E2M3", "F8_E8M0", "U8", "BOOL", "C64", "I64", "?"]),
            "shape": st.lists(st.integers(0, 9) | st.integers(0, 2**64), max_size=3),
            "data_offsets": st.lists(st.integers(0, 3000), min_size=2, max_size=2),
        }
    )


# ---- materialize_ ----------------------------------------------------------------------------------------------------


def state(model: nn.Module, **changes: Tensor | None) -> dict[str, Tensor]:
    changed = {**model.state_dict(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in changed.items() if value is not None}


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
        ({W.replace(".", "__"): torch.ones(40, 64)}, r"inner\.0\.weight: shape"),
        ({W.replace(".", "__"): torch.ones(64, 40).double()}, r"inner\.0\.weight: dtype"),
        ({W.replace(".", "__"): torch.full((64, 40), math.nan)}, r"inner\.0\.weight has a value"),
        ({"inner__0__bias": torch.full((64,), -math.inf)}, r"inner\.0\.bias has a value"),
        (
            {"output__weight": torch.ones(50, 40)},
            "comes twice, or is tied to embedding.weight",
        ),
        ({"buffer_bool": torch.ones(3)}, "buffer_bool: dtype"),
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
    with pytest.raises(PayloadError, match=rf"inner\.0\.weight: .*{says}"):
        materialize_(model, state(trained("fp32"), **{W.replace(".", "__"): value}))
    assert model.scale.is_meta


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        (lambda encoding: {"else.weight": encoding}, r"no parameter 'else\.weight'"),
        (lambda encoding: {"inner.1.running_mean": encoding}, "no parameter"),
        (lambda encoding: {"small": encoding}, "small is torch.float16"),
    ],
)
def test_a_selection_of_another_model(selection: Callable[..., Any], says: str) -> None:
    model = on_meta()
    model.small = nn.Parameter(torch.ones(2, 2, dtype=torch.float16))
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
        with pytest.raises(PayloadError, match=r"inner\.0\.table.*give each its values"):
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


# ---- memory ----------------------------------------------------------------------------------------------------------

WIDTH, LAYERS = 512, 8
DENSE = 4 * WIDTH * WIDTH
"""Bytes of one dense variable."""


def stack() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def peak_and_kept(fill: Callable[[], object], mapped: Path | None = None) -> tuple[int, int]:
    """Return the peak of what torch allocates and what is left, in bytes; a mapped file is neither."""
    sizes = allocations(fill)
    if mapped is not None:
        sizes.remove(mapped.stat().st_size)
        sizes.remove(-mapped.stat().st_size)
    totals = list(accumulate(sizes))
    return max(totals), totals[-1]


@pytest.mark.parametrize("update_format", [None, "S1E2M1"])
def test_one_dense_variable_at_a_time(path: Path, update_format: str | None) -> None:
    """The 8 MB of FP32 never exist: beyond what the model keeps there is one variable and the codec's chunks."""
    policy = CompressionPolicy("S1E2M3", update_format=update_format)
    packed = LAYERS * WIDTH * WIDTH * (10 if update_format else 6) / 8
    models: list[nn.Module] = []

    def from_stream() -> None:
        model = stack()
        names = [name for name, _ in model.named_parameters()]
        stream = ((name, torch.randn(WIDTH, WIDTH)) for name in names)
        models.append(materialize_(model, stream, policy.select(model)))

    peak, kept = peak_and_kept(from_stream)
    assert kept == pytest.approx(packed, rel=0.01)
    assert DENSE < peak < kept + 1.3 * DENSE

    save_model(models[0], path)
    peak, kept = peak_and_kept(lambda: models.append(load_model(stack(), path)), path)
    assert kept == pytest.approx(packed, rel=0.01) and peak < kept + 0.3 * DENSE  # no dense variable at all
    peak, kept = peak_and_kept(lambda: load_model(models[0], path), path)
    assert peak < packed + 0.3 * DENSE  # the new packed model beside the old one

    save_file({f"{i}.weight": torch.randn(WIDTH, WIDTH) for i in range(LAYERS)}, path)
    model = stack()
    peak, kept = peak_and_kept(lambda: materialize_(model, path, policy.select(model)), path)
    assert kept == pytest.approx(packed, rel=0.01) and peak < kept + 0.5 * DENSE  # it lies in the file


def test_resident_memory_of_a_big_file(path: Path) -> None:
    """256 MB of FP32 become 48 MB of codes; besides, the process never holds as much as one variable of 16 MB."""
    count, width = 16, 2048
    save_file({f"{i}.weight": torch.full((width, width), 0.1 * (i + 1)) for i in range(count)}, path)
    script = f"""
import sys, threading, torch, fedomc
from torch import nn

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

torch.set_num_threads(1)
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear({width}, {width}, bias=False) for _ in range({count})))
selection = fedomc.CompressionPolicy("S1E2M3").select(model)
nn.Parameter(fedomc.CompressedTensor.from_dense(torch.ones(70000), "S1E2M3"))  # what is set up once
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
fedomc.materialize_(model, sys.argv[1], selection)
done.set()
watcher.join()
print(max(peak, anonymous()) - before, fedomc.parameter_bytes(model).total / 2**20)
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    peak, held = map(float, done.stdout.split())
    assert held == pytest.approx(48, rel=0.01)
    assert held - 4 < peak < held + 12


def test_an_update_that_processes_share_is_read_again(tmp_path: Path) -> None:
    """Another process may have written to it, so that it is in the file, although this one never rounded it."""
    model = fedomc.compress_(nn.Linear(40, 30), POLICIES["two parts"].select(nn.Linear(40, 30)))
    model.share_memory()
    save_model(model, tmp_path / "model")
    found = load_model(nn.Linear(40, 30), tmp_path / "model")
    assert same_bits(dense(found.weight), dense(model.weight))
