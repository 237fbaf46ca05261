"""Variables on a device that decides for itself what is written: the same values, and the host need not look."""

import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fedomc import CompressedTensor, NonFiniteError
from fedomc.methods import Encoding, Packed, encode, parse_method
from tests.conftest import randn

pytest.importorskip("triton", reason="Triton is not installed")

METHODS = ["S1E3M7", "S1E2M3", "S1E8M7", "S1E2M3/64", "INT8", "NF4"]
N = 3000


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU a device that decides for itself."""
    monkeypatch.setattr("fedomc.codec.deferred.DEVICES", {"cpu"})


def trained(method: str, gradients: list[Tensor], device: str = "cpu") -> Packed:
    packed = encode(randn(N).to(device), parse_method(method), name="layer.weight")
    for number, gradient in enumerate(gradients):
        packed.add_(gradient.to(device), -0.1, "scaled", "stochastic", 5, "layer.weight")
        if number == 0:
            values = packed.decode(torch.empty(N, device=device)) * 3.0
            packed.rewrite(lambda start, stop: values[start:stop], "scaled", "stochastic", 5, "layer.weight")  # noqa: B023
    return packed


@pytest.mark.parametrize("method", METHODS)
def test_the_values_are_those_of_the_host(method: str, deferring: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [randn(N, seed=1), 100 * randn(N, seed=2)]
    found = trained(method, gradients)
    monkeypatch.setattr("fedomc.codec.deferred.DEVICES", set())
    expected = trained(method, gradients)
    assert found.draws == expected.draws
    for mine, other in zip(found.fields, expected.fields, strict=True):
        assert torch.equal(mine, other)
    found.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_reported_later_and_spoils_nothing(method: str, bad: float, deferring: None) -> None:
    packed = trained(method, [])
    before = [field.clone() for field in packed.fields]
    gradient = torch.zeros(N)
    gradient[77] = bad
    packed.add_(gradient, 1.0, "scaled", name="layer.weight")
    packed.rewrite(lambda start, stop: gradient[start:stop], "scaled", name="layer.weight")
    assert all(torch.equal(mine, other) for mine, other in zip(packed.fields, before, strict=True))
    with pytest.raises(NonFiniteError, match=r"layer\.weight had a value that was NaN"):
        packed.to("cpu")
    packed.check()  # reported once
    packed.add_(torch.ones(N), 1.0, "scaled", name="layer.weight")
    packed.check()
    assert not torch.equal(packed.codes, before[0])


def test_pickling_reports_it(deferring: None) -> None:
    packed = trained("S1E3M7", [])
    packed.add_(torch.full((N,), float("nan")), 1.0, "scaled", name="layer.weight")
    with pytest.raises(NonFiniteError, match=r"layer\.weight"):
        pickle.dumps(packed)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_changes_nothing_leaves_the_codes(method: str, deferring: None) -> None:
    packed = trained(method, [])
    before = packed.codes.clone()
    packed.add_(torch.zeros(N), 1.0, "scaled", "stochastic", 3, "layer.weight")
    assert torch.equal(packed.codes, before)


@pytest.fixture
def fake() -> Iterator[None]:
    """Replace tensors by ones that have a device but no values: looking at a value is an error."""
    with FakeTensorMode():
        yield


def test_looking_at_a_value_of_a_fake_device_is_an_error(fake: None) -> None:
    with pytest.raises(Exception, match=r"(?i)data.dependent|local_scalar_dense"):
        torch.zeros(1, device="cuda").tolist()


@pytest.mark.parametrize("method", METHODS[:4])
def test_no_step_looks_at_a_value(method: str, fake: None) -> None:
    chosen = parse_method(method)
    packed = Packed(chosen, N, chosen.zeros(N, "cuda"), draws=1)
    values = torch.zeros(N, device="cuda")
    packed.add_(values, 0.1, "scaled", "stochastic", 5, "layer.weight")
    produce = lambda start, stop: values.narrow(0, start, stop - start)  # noqa: E731
    packed.rewrite(produce, "scaled", "stochastic", 5, "layer.weight")
    packed.decode(values)
    assert packed.draws == 3 and packed.codes.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS[:4])
def test_no_step_waits_for_a_device(method: str) -> None:
    weight = CompressedTensor.from_packed(trained(method, [], "cuda"), Encoding.parse(method), (N,), "layer.weight")
    gradient = randn(N, seed=1).cuda()
    part = weight.base
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            part.add_(gradient, -0.1, "scaled", "stochastic", 5, "layer.weight")
            weight.decode()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    part.check()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_device_trains_to_the_bits_of_the_host(method: str) -> None:
    gradients = [randn(N, seed=1), 100 * randn(N, seed=2)]
    found, expected = trained(method, gradients, "cuda"), trained(method, gradients)
    for mine, other in zip(found.fields, expected.fields, strict=True):
        assert torch.equal(mine.cpu(), other)
