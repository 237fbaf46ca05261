"""Files for other programs: read by safetensors, numpy, ml_dtypes, torch and torchao, and by fedomc again."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4

import fedomc
from fedomc import CompressedTensor, PayloadError, codec, load_model, materialize_, save_model
from fedomc.methods import parse_method
from tests import independent_reader
from tests.conftest import allocations, randn, same_bits
from tests.serialization.forging import signed

MX = {
    "MXFP8": ("F8_E4M3", 8, ml_dtypes.float8_e4m3fn),
    "MXFP8E5M2": ("F8_E5M2", 8, ml_dtypes.float8_e5m2),
    "MXFP6": ("F6_E2M3", 6, ml_dtypes.float6_e2m3fn),
    "MXFP6E3M2": ("F6_E3M2", 6, ml_dtypes.float6_e3m2fn),
    "MXFP4": ("F4", 4, ml_dtypes.float4_e2m1fn),
}
SHAPES = [
    (64, 32), (3, 64), (2, 3, 96), (32,), (300, 256),  # scales of whole rows
    (5, 40), (7, 9), (4, 3, 5), (33,), (1,), (1025, 2), (2048, 33), (65537,),  # blocks across rows
    (), (0,), (0, 32), (3, 0), (0, 3),
]  # fmt: skip
formats = pytest.mark.parametrize("fmt", MX)


def model_of(fmt: str, **shapes: tuple[int, ...]) -> nn.Module:
    """A module of compressed parameters, and a dense one."""
    model = nn.Module()
    for seed, (name, shape) in enumerate(shapes.items()):
        values = randn(*shape, seed=seed) * torch.exp(3 * randn(*shape, seed=seed + 1))
        tensor = CompressedTensor.from_dense(values, fmt, rounding="stochastic", seed=seed, name=name)
        model.register_parameter(name, nn.Parameter(tensor))
    model.bias = nn.Parameter(randn(3))
    return model


def tensors_of(data: bytes) -> dict[str, tuple[str, list[int], np.ndarray]]:
    """Read a file as safetensors' page describes it: dtype, shape and bytes of each tensor."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    raw = np.frombuffer(data, np.uint8, offset=8 + length)
    return {name: (e["dtype"], e["shape"], raw[slice(*e["data_offsets"])]) for name, e in header.items()}


def values_of(data: bytes, name: str, shape: tuple[int, ...]) -> Tensor:
    """Decode a variable with numpy and ml_dtypes."""
    dtypes = {dtype: (bits, numpy) for dtype, bits, numpy in MX.values()}
    tensors = tensors_of(data)
    bits, dtype = dtypes[tensors[name][0]]
    strings = np.unpackbits(tensors[name][2], bitorder="little").reshape(-1, bits)
    codes = np.packbits(strings, axis=1, bitorder="little").reshape(-1)
    assert tensors[name + "_scale"][0] == "F8_E8M0"
    scales = tensors[name + "_scale"][2].view(ml_dtypes.float8_e8m0fnu).astype(np.float32).repeat(32)
    numel = math.prod(shape)
    values = codes.view(dtype).astype(np.float32)[:numel] * scales[:numel]
    return torch.from_numpy(values.reshape(shape))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_codes_and_scales_are_the_same_to_every_reader(path: Path, fmt: str, shape: tuple[int, ...]) -> None:
    model = model_of(fmt, weight=shape)
    save_model(model, path, interchange=True)
    data = path.read_bytes()
    assert same_bits(values_of(data, "weight", shape), model.weight.dequantize())
    read = torch.from_numpy(independent_reader.read_model(data)["weight"])
    assert same_bits(read, model.weight.dequantize())
    rust = {name: (found["dtype"], found["shape"]) for name, found in safetensors.deserialize(data)}
    assert rust == {name: (dtype, list(sizes)) for name, (dtype, sizes, _) in tensors_of(data).items()}
    other = load_model(model_of("MXFP8", weight=shape), path)
    assert all(map(torch.equal, other.weight.base.fields, model.weight.base.fields))
    assert other.weight.encoding == model.weight.encoding and other.weight.base.draws == model.weight.base.draws


@pytest.mark.parametrize(
    ("fmt", "shape", "elements", "scales"),
    [
        ("MXFP4", (6, 64), [6, 64], [6, 2]),
        ("MXFP4", (2, 3, 96), [2, 3, 96], [2, 3, 3]),
        ("MXFP4", (6, 40), [6, 40], [8]),
        ("MXFP4", (6, 3), [32], [1]),  # a row of one byte and a half
        ("MXFP4", (), [32], [1]),
        ("MXFP6", (6, 4), [6, 4], [1]),
        ("MXFP6", (20, 2), [64], [2]),
        ("MXFP6E3M2", (33,), [64], [2]),
        ("MXFP8", (6, 3), [6, 3], [1]),
        ("MXFP8E5M2", (), [], [1]),
        ("MXFP8", (3, 0), [3, 0], [3, 0]),
        ("MXFP4", (0, 3), [0], [0]),
    ],
)
def test_dtypes_and_shapes(path: Path, fmt: str, shape: tuple[int, ...], elements: Any, scales: Any) -> None:
    save_model(model_of(fmt, weight=shape), path, interchange=True)
    found = {name: (dtype, sizes) for name, (dtype, sizes, _) in tensors_of(path.read_bytes()).items()}
    assert found == {"bias": ("F32", [3]), "weight": (MX[fmt][0], elements), "weight_scale": ("F8_E8M0", scales)}


@formats
def test_torch_reads_what_it_has_dtypes_for(path: Path, fmt: str) -> None:
    model = model_of(fmt, weight=(6, 64))
    save_model(model, path, interchange=True)
    with safetensors.safe_open(path, "pt") as file:
        stored = file.get_slice("weight")
        assert (stored.get_dtype(), stored.get_shape()) == (MX[fmt][0], [6, 64])
        assert torch.equal(file.get_tensor("bias"), model.bias)
        scales = file.get_tensor("weight_scale").float().repeat_interleave(32, dim=-1)
    if fmt.startswith("MXFP6"):
        with pytest.raises(safetensors.SafetensorError, match="F6"):  # of torch, not of the file
            load_file(path)
        return
    elements = load_file(path)["weight"]
    if fmt == "MXFP4":
        assert elements.dtype is torch.float4_e2m1fn_x2 and elements.shape == (6, 32)
        numbers = f4_unpacked_to_f32(unpack_uint4(elements.view(torch.uint8)))
    else:
        assert elements.dtype is {"MXFP8": torch.float8_e4m3fn, "MXFP8E5M2": torch.float8_e5m2}[fmt]
        numbers = elements.float()
    assert same_bits(numbers * scales, model.weight.dequantize())


def with_codes(fmt: str, codes: Tensor, scales: Tensor) -> nn.Module:
    model = model_of(fmt, weight=(len(codes),))
    words, stored = model.weight.base.fields
    codec.pack(codes.int(), parse_method(fmt).code_bits, words)
    stored.copy_(scales)
    return model


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("S1E2M3/32", "MXFP6"), ("S1E3M2/32", "MXFP6E3M2"), ("S1E2M1/32", "MXFP4"),
        ("S1E2M3/64", None), ("S1E4M3/32", None), ("S1E5M2/32", None), ("S1E2M2/32", None),
    ],
)  # fmt: skip
def test_floats_by_block_are_those_of_ocp_where_blocks_and_codes_are(path: Path, name: str, twin: str | None) -> None:
    model = model_of(name, weight=(6, 64))
    if twin is None:
        with pytest.raises(PayloadError, match=name):
            save_model(model, path, interchange=True)
        return
    save_model(model, path, interchange=True)
    assert tensors_of(path.read_bytes())["weight"][0] == MX[twin][0]
    loaded = load_model(model_of(name, weight=(6, 64)), path)
    assert same_bits(loaded.weight.dequantize(), model.weight.dequantize())
    assert torch.equal(loaded.weight.base.codes, model.weight.base.codes)


@formats
@pytest.mark.parametrize("scale", [0, 1, 120, 239])
def test_every_code_has_its_value_and_reserved_ones_the_largest(path: Path, fmt: str, scale: int) -> None:
    """Codes that other programs take for NaN or infinity come into a variable from foreign frames alone."""
    count = 2 ** MX[fmt][1]
    model = with_codes(fmt, torch.arange(count).repeat(2), torch.tensor([scale]))
    save_model(model, path, interchange=True)
    values = values_of(path.read_bytes(), "weight", (2 * count,))
    assert same_bits(values, model.weight.dequantize()) and bool(torch.isfinite(values).all())
    other = load_model(model_of(fmt, weight=(2 * count,)), path)
    assert same_bits(other.weight.dequantize(), model.weight.dequantize())


class Model(nn.Module):
    """Linear layers, a tied one, normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 40)
        self.inner = nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.Linear(64, 40))
        self.output = nn.Linear(40, 50)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(self.embedding(x)))


def built(fmt: str, **options: Any) -> Model:
    torch.manual_seed(0)
    return fedomc.compress_(Model(), fedomc.CompressionPolicy.parse(fmt, **options))


def step(model: nn.Module, seed: int) -> None:
    stepping = fedomc.step_in_backward(model, torch.optim.SGD, lr=0.1)
    model(torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    stepping.remove()


def described(model: nn.Module) -> dict[str, Any]:
    """Describe all that a model's state is."""
    result: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, CompressedTensor):
            parts = [([field.tolist() for field in part.fields], part.draws) for part in value.parts]
            result[name] = [parts, value.encoding, value.variable, tuple(value.shape)]
        else:
            result[name] = [value.tolist(), value.dtype]
    return result


@formats
@pytest.mark.parametrize("fill", [load_model, materialize_])
def test_a_loaded_model_is_the_saved_one_and_trains_on_like_it(path: Path, fmt: str, fill: Any) -> None:
    model = built(fmt, rounding="stochastic", seed=3)
    step(model, 0)
    save_model(model, path, {"note": "round 7"}, interchange=True)
    with torch.device("meta"):
        other = Model()
    fill(other, path)
    assert described(other) == described(model) and other.output.weight is other.embedding.weight
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "round 7" and "output.weight" not in file.keys()
    data = path.read_bytes()
    save_model(other, path, interchange=True, metadata={"note": "round 7"})
    assert path.read_bytes() == data
    for one in (model, other):
        step(one, 1)
    assert described(other) == described(model)


def test_an_update_that_has_not_begun_is_left_out(path: Path) -> None:
    model = built("MXFP8+S1E2M1")
    save_model(model, path, interchange=True)
    assert described(load_model(built("INT8"), path)) == described(model)


def test_a_plain_model_is_written_as_it_is(path: Path) -> None:
    model = Model()
    save_model(model, path, interchange=True)
    assert load_file(path).keys() == {name for name in model.state_dict() if name != "output.weight"}
    assert described(load_model(Model(), path)) == described(model)


def test_saving_and_loading_hold_no_dense_variable(path: Path) -> None:
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    fedomc.compress_(layers, "MXFP6")
    packed, dense = 1024 * 1024 * 6 // 8, 1024 * 1024 * 4
    with torch.device("meta"):
        other = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    for function in (lambda: save_model(layers, path, interchange=True), lambda: load_model(other, path)):
        sizes = [abs(size) for size in allocations(function) if abs(size) != path.stat().st_size]  # which is mapped
        assert sizes.count(packed) >= 4 and max(sizes) == packed
        assert max(size for size in sizes if size != packed) <= dense // 16  # a chunk


# ---- what cannot be written ------------------------------------------------------------------------------------------


def moved() -> nn.Module:
    model = built("MXFP8+S1E3M0")
    step(model, 0)
    return model


def mixed() -> nn.Module:
    return fedomc.compress_(
        Model(), fedomc.CompressionPolicy("MXFP4", format_by_name={"inner.*": "S1E4M3", "embedding.*": "NF4"})
    )


def named_like_scales(alias: bool) -> nn.Module:
    model = model_of("MXFP4", weight=(6, 64))
    if alias:
        model.weight_scale = model.bias
    else:
        model.register_buffer("weight_scale", torch.ones(6))
    return model


UNREADABLE = {
    "one scale": (lambda: built("S1E4M3"), r"S1E4M3: embedding\.weight, inner\.0\.weight.*MXFP8.*without interchange"),
    "INT8": (lambda: built("INT8"), r"INT8: embedding\.weight.*MXFP8"),
    "NF4 base": (lambda: built("NF4+MXFP8"), r"NF4: embedding\.weight"),
    "some": (mixed, r"NF4: embedding\.weight; S1E4M3: inner\.0\.weight, inner\.2\.weight"),
    "update": (moved, r"the base and the update of embedding\.weight, inner\.0\.weight.*decompress_"),
    "scales' name": (lambda: named_like_scales(False), "weight_scale is a variable.*scales of weight.*rename"),
    "scales' alias": (lambda: named_like_scales(True), "weight_scale is a variable.*scales of weight.*rename"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_no_other_program_reads_is_refused_before_anything_is_written(path: Path, name: str) -> None:
    make, says = UNREADABLE[name]
    path.write_bytes(b"the former file")
    with pytest.raises(PayloadError, match=says):
        save_model(make(), path, interchange=True)
    assert path.read_bytes() == b"the former file" and list(path.parent.iterdir()) == [path]


# ---- wrong files -----------------------------------------------------------------------------------------------------

Header = dict[str, Any]
Change = Callable[[Header, bytearray], None]
"""Changes a file's header and the tensors' bytes."""


def entry(key: str, **fields: Any) -> Change:
    return lambda header, _: header[key].update(fields)


def content(**fields: Any) -> Change:
    def change(header: Header, _: bytearray) -> None:
        texts = header["__metadata__"]
        texts["fedomc"] = json.dumps({**json.loads(texts["fedomc"]), **fields})

    return change


def field(variable: str, **fields: Any) -> Change:
    def change(header: Header, data: bytearray) -> None:
        variables = json.loads(header["__metadata__"]["fedomc"])["variables"]
        content(variables={**variables, variable: {**variables[variable], **fields}})(header, data)

    return change


def byte(key: str, at: int, value: int) -> Change:
    def change(header: Header, data: bytearray) -> None:
        begin, end = header[key]["data_offsets"]
        data[begin + at % (end - begin)] = value

    return change


def without(key: str) -> Change:
    """Leave a tensor out; its bytes go to another one."""

    def change(header: Header, _: bytearray) -> None:
        begin, end = header.pop(key)["data_offsets"]
        header["else"] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}

    return change


def both(*changes: Change) -> Change:
    def change(header: Header, data: bytearray) -> None:
        for one in changes:
            one(header, data)

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "other elements": (entry("eight", dtype="F8_E5M2"), r"eight: F8_E5M2\(6, 64\), but MXFP8 .* F8_E4M3\(6, 64\)"),
    "bytes": (entry("eight", dtype="U8"), r"eight: U8"),
    "transposed": (entry("eight", shape=[64, 6]), r"eight: F8_E4M3\(64, 6\)"),
    "flat": (entry("eight", shape=[384]), r"eight: F8_E4M3\(384,\)"),
    "flat scales": (entry("eight_scale", shape=[12]), r"eight_scale: F8_E8M0\(12,\)"),
    "scales of bytes": (entry("eight_scale", dtype="U8"), r"eight_scale: U8"),
    "scales by row": (entry("ragged_scale", shape=[2, 1]), r"ragged_scale: F8_E8M0\(2, 1\)"),
    "no scales": (without("eight_scale"), "lacks eight_scale"),
    "no elements": (without("eight"), "lacks eight"),
    "NaN": (byte("eight", 5, 0x7F), "eight: an element is NaN or infinite"),
    "negative NaN": (byte("eight", 5, 0xFF), "eight: an element is NaN or infinite"),
    "infinity": (byte("wide", 5, 0x7C), "wide: an element is NaN or infinite"),
    "scale of NaN": (byte("eight_scale", 3, 255), "eight: a scale is NaN"),
    "scale too large": (byte("eight_scale", 3, 247), "eight: a scale of 2"),
    "last element of six bits": (byte("ragged", -1, 4), "ragged: the padding of its last block is not zero"),
    "format of no dtype": (field("eight", format="S1E3M7"), r"eight: safetensors has no dtype for S1E3M7"),
    "other format": (field("eight", format="MXFP8E5M2"), r"eight: F8_E4M3"),
    "other shape": (field("eight", shape=[64, 6]), r"eight: F8_E4M3|eight_scale"),
    "shape of another model": (
        both(field("eight", shape=[3, 128]), entry("eight", shape=[3, 128]), entry("eight_scale", shape=[3, 4])),
        r"eight has shape \(3, 128\)",
    ),
    "huge shape": (field("eight", shape=[2**52, 2**52]), "eight: shape .* is too large"),
    "huge shape of nothing": (
        both(field("nothing", shape=[0, 2**40, 2**40]), entry("nothing", shape=[0, 2**40, 2**40]),
             entry("nothing_scale", shape=[0, 2**40, 2**35])),
        "nothing: shape .* is too large",
    ),
    "an update": (field("eight", update_format="S1E2M1", draws=[1, 1]), "the updates of eight"),
    "neither true nor false": (content(interchange=1), "interchange=1"),
    "frames": (content(interchange=False), "eight_scale.* unknown"),
    "a dense variable": (entry("bias", dtype="I32"), "bias has dtype"),
    "no name": (content(variables={}), "unknown"),
}  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    model = model_of("MXFP8", eight=(6, 64), nothing=(0, 32))
    for fmt, name, shape in (("MXFP8E5M2", "wide", (40,)), ("MXFP6", "ragged", (6, 6)), ("MXFP4", "four", (3, 3))):
        setattr(model, name, getattr(model_of(fmt, **{name: shape}), name))
    return model


@pytest.mark.parametrize("fill", [load_model, materialize_])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_change_nothing(path: Path, model: nn.Module, name: str, fill: Any) -> None:
    save_model(model, path, interchange=True)
    change, says = WRONG[name]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    change(header, tensors)
    path.write_bytes(signed(header, bytes(tensors)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.eight.mul_(0.5)
    before = described(other)
    with pytest.raises(PayloadError, match=says):
        fill(other, path)
    assert described(other) == before


def test_frames_are_not_taken_for_elements(path: Path) -> None:
    model = built("MXFP8")
    save_model(model, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    content(interchange=True)(header, bytearray())
    path.write_bytes(signed(header, data[8 + length :]))
    with pytest.raises(PayloadError, match="lacks"):
        load_model(model, path)


@given(data=st.data())
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flipped") / "model"
    model = model_of(data.draw(st.sampled_from(list(MX))), weight=(5, 40))
    save_model(model, path, interchange=True)
    file = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(file) - 1))
    file[at] ^= 1 << data.draw(st.integers(0, 7))
    path.unlink()
    path.write_bytes(file)
    try:
        load_model(model, path)
    except PayloadError:
        return
    raise AssertionError(f"the byte at {at} was changed, and the file loaded")


def test_a_file_that_is_replaced_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The elements come from the file whose header was checked, whatever has its name by then."""
    model = model_of("MXFP6", weight=(5, 40))
    save_model(model, path, interchange=True)
    other = model_of("MXFP6", weight=(5, 40))
    check = fedomc.serialization.model_file.ModuleState.check_names

    def replaced(*args: Any) -> None:
        save_model(model_of("MXFP4", weight=(3, 3)), path, interchange=True)
        check(*args)

    monkeypatch.setattr(fedomc.serialization.model_file.ModuleState, "check_names", replaced)
    load_model(other, path)
    assert all(map(torch.equal, other.weight.base.fields, model.weight.base.fields))
