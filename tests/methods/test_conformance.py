"""What holds for every registered method, and for one that only the tests know."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fedomc
from fedomc import CompressedTensor, CompressionPolicy, Encoding, PayloadError, codec
from fedomc.methods import FloatFormat, Method, Packed, encode, parse_method, register, registered, unregister
from fedomc.methods.method import Fields
from fedomc.serialization import entropy, frame
from fedomc.training.selection import held_bytes
from tests.conftest import randn, same_bits
from tests.methods.signs import Signs

# name: root mean square error of N(0, 1) to nearest, relative
METHODS = {
    "S1E2M1": 0.151,
    "S1E2M3": 0.037,
    "S1E3M7": 0.0017,
    "S1E8M23": 0.0,
    "INT8": 0.0059,
    "INT8/256": 0.0070,
    "INT4": 0.108,
    "INT4/32": 0.097,
    "NF4": 0.092,
    "NF4/256": 0.105,
    "MXFP8": 0.0277,
    "MXFP8E5M2": 0.0537,
    "MXFP6": 0.0280,
    "MXFP6E3M2": 0.0537,
    "MXFP4": 0.116,
    "S1E1M2/32": 0.138,
    "S1E2M1/32": 0.112,
    "S1E2M3/64": 0.028,
    "S1E3M0/64": 0.194,
    "S1E4M3/256": 0.028,
    "S1E5M6/64": 0.0034,
    "DRIVE1": 0.756,
    "DRIVE2": 0.365,
    "SIGNS": 2.8,
}
SENT = ("DRIVE1", "DRIVE2")  # what is sent once, and not held
NUMEL = codec.CHUNK + 1500
names = pytest.mark.parametrize("name", METHODS)
held = pytest.mark.parametrize("name", [name for name in METHODS if name not in SENT])


@pytest.fixture(autouse=True, scope="module")
def signs() -> Iterator[None]:
    register(Signs)
    yield
    unregister(Signs)


def transform_of(method: Method, rounding: str = "nearest") -> str:
    """Choose the transformation without a fit, which does not reproduce its own values."""
    return "scaled" if isinstance(method, FloatFormat) else method.default_transform()


def decoded(packed: Packed) -> Tensor:
    return packed.decode(torch.empty(packed.numel))


def test_every_method_is_in_the_table() -> None:
    assert {type(parse_method(name)) for name in METHODS} == set(registered())


@names
def test_name_and_header(name: str) -> None:
    method = parse_method(name)
    assert str(method) == name and parse_method(method) is method
    again = fedomc.methods.method_from_header(method.tag, method.header())
    assert again == method and hash(again) == hash(method) and len(method.header()) <= frame.MAX_METHOD_HEADER


@names
@pytest.mark.parametrize("numel", [0, 1, 31, 1024, 1025, NUMEL])
def test_fields_are_what_they_are_said_to_be(name: str, numel: int) -> None:
    method = parse_method(name)
    packed = encode(randn(numel), method)
    described = [(field.dtype, (field.length,)) for field in method.fields(numel)]
    for fields in (packed.fields, method.zeros(numel, "cpu")):
        assert [(field.dtype, tuple(field.shape)) for field in fields] == described
    assert packed.nbytes == method.nbytes(numel) == sum(field.nbytes for field in packed.fields)
    assert method.fields(numel)[0].length == codec.words_of(numel, method.code_bits)
    zeros = Packed.zeros(method, numel, "cpu")
    assert zeros.is_zero and (name == "SIGNS" or same_bits(decoded(zeros), torch.zeros(numel)))


@names
def test_the_error_is_that_of_the_table(name: str) -> None:
    values = randn(NUMEL)
    error = decoded(encode(values, parse_method(name))) - values
    assert float(error.norm() / values.norm()) == pytest.approx(METHODS[name], rel=0.1)
    for scale in (1e-20, 1e20):
        scaled = decoded(encode(values * scale, parse_method(name), transform_of(parse_method(name))))
        assert float((scaled / scale - values).norm() / values.norm()) <= METHODS[name] * 1.5 + 1e-6


@names
@pytest.mark.parametrize("scale", [1e-35, 1e-3, 1e3])
def test_encoding_again_changes_nothing(name: str, scale: float) -> None:
    """Of a last block that is not full, a method that is only for sending loses what it rotates into the padding."""
    method, numel = parse_method(name), 5120 if name in SENT else 5000
    first = decoded(encode(randn(numel) * torch.exp(randn(numel, seed=1)) * scale, method, transform_of(method)))
    again = decoded(encode(first, method, transform_of(method)))
    if name in SENT:  # its scale is a quotient of sums, which rounding shifts by a few units
        torch.testing.assert_close(again, first, rtol=1e-6, atol=0)
    else:
        assert torch.equal(again, first)


@names
def test_rounding_at_random_is_unbiased(name: str) -> None:
    """Within six standard errors, and ten draws that are too rare to show in them; for values that do not saturate."""
    method, count = parse_method(name), 600
    values = torch.rand(1024, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    values[::32] = 1.0
    transform = transform_of(method, "stochastic")
    draws = torch.stack([decoded(encode(values, method, transform, "stochastic", seed)) for seed in range(count)])
    error = draws.double().mean(0) - values.double()
    step = float((draws - values).abs().max())
    bound = 6 * draws.double().std(0) / math.sqrt(count) + 10 * step / count + 2.0**-14
    assert bool((error.abs() <= bound).all()), float((error.abs() - bound).max())
    assert abs(float(error.mean())) <= 6 * step / math.sqrt(count * len(values)) + 2.0**-14
    again = [encode(values, method, transform, "stochastic", seed).codes for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1])
    assert name == "S1E8M23" or not torch.equal(again[0], again[2])


@names
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_an_update_in_place_is_the_encoding_of_the_sum(name: str, rounding: str) -> None:
    method = parse_method(name)
    values, gradient, transform = randn(NUMEL), randn(NUMEL, seed=2), transform_of(method)
    packed = encode(values, method, transform)
    expected = encode(decoded(packed).add_(gradient, alpha=-0.1), method, transform)
    packed.add_(gradient, -0.1, transform, rounding, name="w")
    if rounding == "nearest":
        assert all(torch.equal(a, b) for a, b in zip(packed.fields, expected.fields, strict=True))
    assert packed.draws == 2


@names
@pytest.mark.parametrize("transform", ["none", "affine", "scaled", "scaled-affine"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_step_of_nothing_changes_nothing(name: str, transform: str, rounding: str) -> None:
    packed = encode(randn(5000), parse_method(name), transform)
    state = packed.state
    packed.add_(torch.zeros(5000), 1.0, transform, rounding)
    packed.add_(randn(5000), 0.0, transform, rounding)
    assert packed.state is state


@names
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_largest_floats_stay_finite(name: str, rounding: str) -> None:
    packed = encode(torch.full((32,), 3.4e38), parse_method(name), "", rounding)
    assert decoded(packed).isfinite().all() and packed.method.validate(packed.fields, 32) is None


@names
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(name: str, bad: float) -> None:
    method, values = parse_method(name), randn(NUMEL)
    packed = encode(values, method)
    state, values[-1] = packed.state, bad
    with pytest.raises(fedomc.NonFiniteError, match="encoder"):
        packed.add_(values, 1.0, "none", name="encoder")
    with pytest.raises(fedomc.NonFiniteError, match="encoder"):
        packed.rewrite(lambda start, stop: values[start:stop], "none", name="encoder")
    with pytest.raises(fedomc.NonFiniteError, match="encoder"):
        encode(values, method, name="encoder")
    assert packed.state is state


@names
def test_sums_and_differences(name: str) -> None:
    """From any multiple of the block on, with an update and a subtrahend of any method."""
    method, start = parse_method(name), 2048
    packed, other = encode(randn(NUMEL), method), encode(randn(NUMEL, seed=1) * 0.1, parse_method("S1E3M4"))
    a, b = decoded(packed)[start:], decoded(other)[start:]
    for first, second, x, y in ((packed, other, a, b), (other, packed, b, a)):
        out = torch.empty(len(a))
        assert torch.equal(first.decode(out, start), x)
        torch.testing.assert_close(first.decode_with(second, out, start), x + y)
        torch.testing.assert_close(first.add_to(torch.ones(len(a)), 0.3, start), 1 + 0.3 * x)
        difference = first.add_difference_to(torch.ones(len(a)), second, 0.3, start)
        torch.testing.assert_close(difference, 1 + 0.3 * (x - y))
    assert packed.bound >= float(decoded(packed).abs().max())


@held
@pytest.mark.parametrize("part", ["base", "update"])
def test_two_parts(name: str, part: str) -> None:
    formats = (name, "S1E3M4") if part == "base" else ("S1E3M7", name)
    values, gradient = randn(60, 70), randn(60, 70, seed=3)
    p = CompressedTensor.from_dense(values, formats[0], update_format=formats[1])
    before = p.dequantize()
    assert torch.equal(before, decoded(p.base).view(60, 70)) and p.nbytes == p.encoding.nbytes(4200)
    p.add_(gradient, alpha=-0.01)
    assert not torch.equal(p.dequantize(), before) and torch.equal(decoded(p.base).view(60, 70), before)
    error = p.dequantize() - (before - 0.01 * gradient)
    assert float(error.norm() / (0.01 * gradient).norm()) < METHODS.get(formats[1], 0.01) * 1.5 + 1e-4


@names
@pytest.mark.parametrize("shape", [(), (7, 9), (1025, 2), (0, 3)])
def test_frames(name: str, shape: tuple[int, ...]) -> None:
    method = parse_method(name)
    packed = encode(randn(*shape), method)
    data = frame.to_bytes(packed, shape, frame.UPDATE)
    assert len(data) == frame.size_of(packed, shape)
    for copy in (True, False):
        found = frame.from_bytes(data, copy=copy, shape=shape)
        assert (found.packed.method, found.shape, found.kind) == (method, shape, frame.UPDATE)
        assert all(torch.equal(a, b) for a, b in zip(found.packed.fields, packed.fields, strict=True))


@names
def test_every_damaged_byte_of_a_frame_is_found(name: str) -> None:
    data = frame.to_bytes(encode(randn(7, 9), parse_method(name)), (7, 9))
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(PayloadError):
            frame.from_bytes(bytes(damaged), shape=(7, 9))


@names
def test_entropy_coding_keeps_every_code(name: str) -> None:
    method = parse_method(name)
    sent = encode(randn(5000) * 0.1, method)
    packed = encode(decoded(sent) + 0.01 * (randn(5000, seed=1) > 2), method)
    for reference in (None, sent):
        data = frame.to_bytes(packed, (5000,), lossless=True, sent=reference)
        assert len(data) <= frame.size_of(packed, (5000,))
        found = frame.from_bytes(data, shape=(5000,), sent=reference)
        assert all(torch.equal(a, b) for a, b in zip(found.packed.fields, packed.fields, strict=True))
    if method.code_bits > 1 and name not in SENT:  # of which small steps change all rotated values
        arguments = packed.codes, 5000, method.code_bits
        found = entropy.compress(*arguments, sent.codes, method.code_order)
        assert found is not None and found[1]  # small steps are small differences


@settings(max_examples=25)
@given(st.sampled_from(list(METHODS)), st.integers(0, 2000), st.integers(0, 2**32))
def test_any_fields_are_refused_or_decode_to_finite_values(name: str, numel: int, seed: int) -> None:
    register(Signs)
    method, generator = parse_method(name), torch.Generator().manual_seed(seed)

    def random(length: int, dtype: torch.dtype) -> Tensor:
        raw = torch.randint(0, 256, (length * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        return raw.view(dtype)

    fields: Fields = tuple(random(field.length, field.dtype) for field in method.fields(numel))
    if method.validate(fields, numel) is None:
        assert method.decode(fields, torch.empty(numel)).isfinite().all()


@held
@pytest.mark.filterwarnings("ignore:.* cannot hold")  # of SIGNS
def test_memory_is_accounted_for(name: str) -> None:
    shapes = {"weight": (300, 40), "bias": (300,)}
    selection = CompressionPolicy(name).select(shapes)
    p = CompressedTensor.from_dense(randn(300, 40), name)
    assert held_bytes(shapes, selection) == p.nbytes + 1200
    model = nn.Linear(40, 300)
    report = fedomc.memory_report(model, randn(2, 40), loss=lambda y: y.square().mean(), formats=[name], lr=0.01)
    assert report.predicted[name].parameters == report.measured[name].parameters == p.nbytes + 1200


@held
def test_training_learns(name: str) -> None:
    """With an update in a part of its own, whatever the base."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 8))
    policy = CompressionPolicy(name, update_format="S1E4M7")
    fedomc.compress_(model, policy.select(model))
    fedomc.step_in_backward(model, torch.optim.SGD, lr=0.05)
    x, y, losses = randn(64, 40), randn(64, 8, seed=1), []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@held
def test_model_files(name: str, tmp_path: Path) -> None:
    model = nn.Linear(40, 30)
    encoding = Encoding(parse_method("S1E3M7"), parse_method(name))
    fedomc.compress_(model, {"weight": encoding})
    with torch.no_grad():
        model.weight.add_(randn(30, 40), alpha=0.01)
    fedomc.save_model(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = nn.Linear(40, 30)
    fedomc.load_model(other, tmp_path / "model.safetensors")
    assert other.weight.encoding == encoding and same_bits(other.weight.dequantize(), model.weight.dequantize())


@held
@pytest.mark.parametrize("shape", [(6, 64), (30, 41), (3, 5)], ids=str)
def test_a_file_for_other_programs_is_exact_or_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model, path = nn.ParameterList([CompressedTensor.from_dense(randn(*shape), name)]), tmp_path / "model.safetensors"
    if parse_method(name).interchange is None:
        with pytest.raises(PayloadError, match=f"no dtype.*{name}: 0"):
            fedomc.save_model(model, path, interchange=True)
        assert not path.exists()
        return
    fedomc.save_model(model, path, interchange=True)
    other = fedomc.load_model(nn.ParameterList([torch.zeros(shape)]), path)
    assert all(map(torch.equal, other[0].base.fields, model[0].base.fields))


FORMS = ("{}", "S1E3M7+{}", "S1E3M7<{}", "S1E3M7>{}", "S1E4M3+S1E2M1>{}", "S1E3M7<{}>DRIVE1")


@pytest.mark.parametrize(
    "text", [form.format(name) for form in FORMS for name in METHODS if form.endswith(">{}") or name not in SENT]
)
def test_an_encoding_says_how_it_is_read_again(text: str) -> None:
    encoding = Encoding.parse(text, seed=3)
    assert str(encoding) == text and Encoding.parse(str(encoding), seed=3) == encoding
    assert frame.read_encoding(frame.encoding_fields(encoding)) == encoding
    policy = CompressionPolicy.parse(f"{text}@0.5")
    assert str(policy) == f"{text}@0.5" and CompressionPolicy.parse(str(policy)) == policy
    assert policy.encoding() == Encoding.parse(text, seed=policy.encoding().seed)


@pytest.mark.parametrize("name", SENT)
def test_what_is_only_for_sending_is_not_held(name: str) -> None:
    assert not parse_method(name).holds
    for refused in (
        lambda: Encoding.parse(name),
        lambda: Encoding.parse(f"S1E3M7+{name}"),
        lambda: CompressionPolicy(name),
        lambda: CompressionPolicy("S1E3M7", format_by_name={"*.weight": name}),
        lambda: CompressedTensor.from_dense(randn(4, 5), name),
    ):
        with pytest.raises(fedomc.PolicyError, match=f"{name} can only be used for the uplink.*write it after >"):
            refused()


def test_a_tag_belongs_to_one_method() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Signs):
        pass

    with pytest.raises(fedomc.FormatError, match="200"):
        register(Other)
