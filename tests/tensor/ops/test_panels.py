"""Layers whose weights are larger than what is decoded at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedomc import CompressedTensor, step_in_backward
from fedomc.codec.workspace import PANEL_BYTES, workspace
from tests.conftest import allocations, compressed, randn

IDS = torch.tensor([[900, 3, 4], [0, 3, 999]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(100, 300), randn(2, 3, 100)),
    "linear without bias": (lambda: nn.Linear(100, 300, bias=False), randn(7, 100)),
    "wide linear": (lambda: nn.Linear(20_000, 3), randn(2, 20_000)),
    "embedding": (lambda: nn.Embedding(1000, 33, padding_idx=4), IDS),
    "embedding by frequency": (lambda: nn.Embedding(1000, 33, scale_grad_by_freq=True), IDS),
    "conv1d": (lambda: nn.Conv1d(40, 60, 11, stride=2, padding=3), randn(2, 40, 50)),
    "conv1d, same": (lambda: nn.Conv1d(40, 60, 11, padding="same"), randn(2, 40, 50)),
    "conv1d in groups": (lambda: nn.Conv1d(40, 80, 31, groups=2), randn(2, 40, 50)),
    "conv2d": (lambda: nn.Conv2d(30, 50, (3, 5), dilation=(2, 1), padding=1, bias=False), randn(2, 30, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(9, 40, 4, stride=(1, 2, 1)), randn(1, 9, 6, 6, 6)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(40, 60, 11, 3, output_padding=1), randn(2, 40, 20)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(30, 50, 4, stride=2, dilation=2), randn(2, 30, 5, 5)),
    "one example of conv2d": (lambda: nn.Conv2d(30, 50, 4), randn(30, 9, 9)),
}


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.tensor.compressed.PANEL_BYTES", 2**15)


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = LAYERS[name]
    plain = make()
    packed = compressed(plain, exclude=("bias",))
    assert isinstance(packed.weight, CompressedTensor)
    assert len(packed.weight.panels()) > 2
    return plain, packed, x


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_(x.is_floating_point())


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_plain_layer(name: str) -> None:
    *layers, x = pair(name)
    found = []
    for layer in layers:
        at = leaf(x)
        output = layer(at)
        output *= 1.0  # a result may be changed in place
        output.sin().sum().backward()
        found.append([output, *(p.grad for p in layer.parameters()), *([at.grad] if at.requires_grad else [])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)  # the sums of panels have another order


@pytest.mark.parametrize("name", [name for name in LAYERS if "embedding" not in name])
def test_second_derivatives(name: str) -> None:
    *layers, x = pair(name)
    found = []
    for layer in layers:
        at = leaf(x)
        (first,) = torch.autograd.grad(layer(at).sin().sum(), at, create_graph=True)
        first.square().sum().backward()
        found.append([at.grad, layer.weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv1d", "transposed conv1d"])
def test_autocast(name: str) -> None:
    *layers, x = pair(name)
    found = []
    for layer in layers:
        at = leaf(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(at)
        output.float().sum().backward()
        assert output.dtype is torch.bfloat16 and layer.weight.grad.dtype is torch.float32
        found.append([output, at.grad, layer.weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_weight_has_no_gradient(name: str) -> None:
    _, layer, x = pair(name)
    layer.requires_grad_(False)
    at = leaf(x)
    output = layer(at)
    if at.requires_grad:
        output.sum().backward()
        assert at.grad is not None
    assert all(p.grad is None for p in layer.parameters())


def test_rows_that_an_embedding_does_not_have() -> None:
    layer = compressed(nn.Embedding(10, 40))
    for index in (10, -1):
        with pytest.raises(IndexError, match=f"weight has rows 0 to 9: no row {index}"):
            layer(torch.tensor([2, index]))
    assert layer(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, 40)


def test_an_embedding_decodes_the_rows_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = compressed(nn.Embedding(100_000, 64), "S1E3M7", "scaled-affine")
    decoded = []
    rows = CompressedTensor.decode_rows
    monkeypatch.setattr(
        CompressedTensor, "decode_rows", lambda self, a, b, dtype: decoded.append(b - a) or rows(self, a, b, dtype)
    )
    ids = torch.tensor([5, 99_999, 50_000, 50_001, 5])
    assert torch.equal(layer(ids), layer.weight.dequantize()[ids])
    assert sum(decoded) == 4


SIZE = 3000  # 36 MB of FP32, in panels of 8 MB


@pytest.mark.parametrize("name", ["linear", "conv1d"])
@pytest.mark.parametrize("format", ["S1E3M7", "S1E2M3"])
def test_transients_stay_within_the_bound(name: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    if name == "linear":
        layer, x = nn.Linear(SIZE, SIZE, bias=False), torch.randn(1, SIZE, requires_grad=True)
    else:
        layer, x = nn.Conv1d(SIZE // 4, SIZE, 4, bias=False), torch.randn(1, SIZE // 4, 4, requires_grad=True)
    layer = compressed(layer, format, "scaled-affine")
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()  # fills caches
    workspace.clear()
    lent = workspace.use().lent
    changes = allocations(lambda: layer(x).sum().backward())
    assert workspace.use().peak - lent <= 1.3 * PANEL_BYTES
    temporaries = 0 if name == "linear" else PANEL_BYTES  # what a kernel of convolution reorders
    assert max(changes) <= temporaries + 1_000_000


def test_a_step_in_backward_holds_codes_and_one_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
    model = compressed(model, "S1E3M7", "scaled-affine")
    step_in_backward(model, torch.optim.SGD, lr=0.1)
    x = torch.randn(1, 512)
    model(x).sum().backward()
    workspace.clear()
    lent, weight = workspace.use().lent, 4 * 512 * 512
    level = peak = 0
    for change in allocations(lambda: model(x).sum().backward()):
        level += change
        peak = max(peak, level)
    assert peak < 1.3 * weight  # the gradient
    assert workspace.use().peak - lent < 1.6 * weight  # a decoded weight, or new codes
