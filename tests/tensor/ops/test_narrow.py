"""Products in bfloat16 and float16: a weight goes from its codes to the product's dtype, by no float32 copy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedomc import codec
from fedomc._torch import tree_leaves
from fedomc.codec.workspace import Workspace
from fedomc.tensor import compressed
from fedomc.tensor.compressed import is_compressed
from tests.conftest import compressed as packed_copy

NARROW = (torch.bfloat16, torch.float16)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(256, 512), (3, 256)),
    "convolution": (lambda: nn.Conv1d(64, 128, 5), (2, 64, 7)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(128, 64, 5), (2, 128, 7)),
    "matmul": (lambda: Matmul(256, 512), (3, 512)),
}
FORMATS = ("S1E3M7", "S1E2M3+S1E2M1", "NF4", "S1E2M3/64+S1E2M1/64", "NF4+S1E3M7")


def held(layer: nn.Module, format: str) -> nn.Module:
    """Return a copy of a layer whose weight alone is compressed."""
    base, _, update = format.partition("+")
    how = {"update_format": update or None, "transform": None, "weight_matrices_only": True}
    return packed_copy(layer.requires_grad_(False), base, **how)


class Matmul(nn.Linear):
    """A product without a handler that decodes in panels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight)


class Float32Seen(TorchDispatchMode):
    """Records how many values the largest float32 tensor has that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:  # memory of the workspace, which is recorded by itself
            return result
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not is_compressed(x) and x.dtype is torch.float32:
                self.largest = max(self.largest, x.numel())
        return result


@pytest.fixture(params=[False, True], ids=["whole", "panels"])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(compressed, "PANEL_BYTES", 32 * 1024)


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """Every size and dtype that the workspace lends."""
    found, empty = [], Workspace.empty

    def recorded(self: Workspace, numel: int, device: Any, dtype: torch.dtype = torch.float32, **how: Any) -> Tensor:
        found.append((numel, dtype))
        return empty(self, numel, device, dtype, **how)

    monkeypatch.setattr(Workspace, "empty", recorded)
    return found


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_no_float32_copy_of_a_weight_is_made(
    name: str, format: str, dtype: torch.dtype, autocast: bool, lent: list[tuple[int, torch.dtype]]
) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().requires_grad_(False), torch.randn(shape)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    packed = held(layer, format)
    layer.load_state_dict({"weight": packed.weight.dequantize(), "bias": layer.bias})
    x.requires_grad_()
    lent.clear()
    with Float32Seen() as seen, torch.autocast("cpu", dtype, enabled=autocast):
        out = packed(x)
        out.sum().backward()
    assert seen.largest <= max(x.numel(), out.numel())
    wide = [numel for numel, lent_as in lent if lent_as is torch.float32]
    # Parts of two kinds are summed in float32, a chunk at a time.
    assert max(wide, default=0) <= (codec.CHUNK if format == "NF4+S1E3M7" else 0)
    with torch.autocast("cpu", dtype, enabled=autocast):
        expected = layer(x)
    assert out.dtype is expected.dtype is dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("format", FORMATS[:-1])
def test_no_float32_copy_of_a_narrow_gradient_is_made(
    format: str, dtype: torch.dtype, lent: list[tuple[int, torch.dtype]]
) -> None:
    weights = [held(nn.Linear(256, 512).to(dtype), format).weight for _ in range(2)]
    weights[1].copy_(weights[0])
    gradient = (torch.randn(512, 256) * 0.01).to(dtype)
    weights[0].add_(gradient.float(), alpha=-0.1)
    lent.clear()
    with Float32Seen() as seen:
        weights[1].add_(gradient, alpha=-0.1)
    wide = [numel for numel, lent_as in lent if lent_as is torch.float32]
    assert seen.largest <= codec.BLOCK and max(wide) <= codec.BLOCK  # the sample of StepRecord
    assert torch.equal(weights[0].decode(), weights[1].decode())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("format", FORMATS)
def test_decoding_is_torch_s_rounding(dtype: torch.dtype, format: str) -> None:
    weight = held(nn.Linear(130, 77), format).weight
    weight.add_(torch.randn(77, 130), alpha=1e-3)
    rounded = weight.decode().to(dtype)
    assert weight.decode(dtype).dtype is dtype
    assert torch.equal(weight.decode(dtype), rounded)
    assert torch.equal(weight.decode_rows(5, 60, dtype), rounded[5:60])
    assert torch.equal(weight.to(dtype).dequantize(), rounded)
