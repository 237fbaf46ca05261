"""Models in bfloat16 and float16: packed losslessly they compute and train as the plain ones."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import fedomc
from fedomc import CompressedTensor, CompressionPolicy, NonFiniteError, compress_, decompress_
from fedomc.tensor.dtypes import DTYPES
from tests.conftest import randn

NARROW = [torch.bfloat16, torch.float16]
LOSSLESS = {torch.bfloat16: "S1E8M7", torch.float16: "S1E5M10", torch.float32: "S1E8M23"}


class Layers(nn.Module):
    """An embedding tied to the head, a convolution, a fused stack of matrices and a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.convolution = nn.Conv1d(64, 64, 3, padding=1)
        self.inner = nn.Linear(64, 64)
        self.experts = nn.Parameter(randn(2, 64, 64, seed=5) * 0.1)
        self.norm = nn.LayerNorm(64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # [B, T, 64]
        x = x + self.convolution(x.mT).mT
        x = x + torch.bmm(x, self.experts) + F.linear(x, self.experts[1])
        return F.linear(self.norm(self.inner(x)), self.embedding.weight)


def lossless(dtype: torch.dtype) -> CompressionPolicy:
    return CompressionPolicy(LOSSLESS[dtype], transform="none", rounding="nearest")


def pair(dtype: torch.dtype) -> tuple[Layers, Layers]:
    torch.manual_seed(0)
    plain = Layers().to(dtype)
    return plain, compress_(copy.deepcopy(plain), lossless(dtype))  # type: ignore[return-value]


def values(x: Tensor) -> Tensor:
    return x.dequantize() if isinstance(x, CompressedTensor) else x.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda p: optim.SGD(p, lr=0.125, momentum=0.875, weight_decay=2**-7), lambda p: optim.AdamW(p, lr=0.01, eps=1e-4)],
    ids=["SGD", "AdamW"],
)
def test_a_lossless_format_trains_as_the_plain_model(dtype: torch.dtype, make: Callable[..., optim.Optimizer]) -> None:
    plain, packed = pair(dtype)
    tokens = torch.arange(12).view(2, 6)
    optimizers = [make(model.parameters()) for model in (plain, packed)]
    for step in range(5):
        losses = []
        for model, optimizer in zip((plain, packed), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == losses[1] if step == 0 else losses[0] == pytest.approx(losses[1], rel=0.02)
        for (name, p), q in zip(plain.named_parameters(), packed.parameters(), strict=True):
            assert q.grad is not None and q.grad.dtype is dtype
            if step == 0:  # torch rounds between the operations of a step, chunks are computed in float32
                assert torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()
    assert losses[1] < 1


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_step_in_backward(dtype: torch.dtype) -> None:
    plain, packed = pair(dtype)
    tokens = torch.arange(12).view(2, 6)
    for model in (plain, packed):
        stepping = fedomc.step_in_backward(model, optim.SGD, lr=0.125)  # torch rounds the rate to the dtype
        for _ in range(2):
            F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()).backward()
        stepping.remove()
    for p, q in zip(plain.parameters(), packed.parameters(), strict=True):
        assert torch.equal(p.detach(), values(q))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("encoding", ["S1E2M3/64", "S1E3M7", "S1E2M3/64+S1E2M1/64", "NF4"])
def test_a_packed_model_computes_as_the_decompressed_one(dtype: torch.dtype, encoding: str) -> None:
    torch.manual_seed(0)
    packed = compress_(Layers().to(dtype), encoding)
    assert isinstance(packed.experts, CompressedTensor) and packed.experts.dtype is dtype
    dense = decompress_(copy.deepcopy(packed))
    assert all(type(p) is nn.Parameter and p.dtype is dtype for p in dense.parameters())
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(packed(tokens), dense(tokens))
    for copied in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed)):  # noqa: S301
        assert copied.experts.dtype is dtype and torch.equal(copied(tokens), dense(tokens))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_panels_add_up_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.tensor.compressed.PANEL_BYTES", 4 * 128)
    torch.manual_seed(0)
    layer = nn.Linear(64, 512, dtype=dtype)
    packed = compress_(copy.deepcopy(layer), lossless(dtype))
    assert len(packed.weight.panels()) > 100
    x, gradient = randn(4, 64).to(dtype), randn(4, 512, seed=1).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, given in zip((layer, packed), inputs, strict=True):
        model(given).backward(gradient)
    exact = gradient.double() @ layer.weight.double()
    plain, panels = ((given.grad.double() - exact).abs().max() for given in inputs)
    assert panels <= 1.01 * plain + torch.finfo(dtype).tiny
    assert torch.equal(layer.weight.grad, packed.weight.grad)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_conversion_keeps_the_codes(dtype: torch.dtype) -> None:
    packed = compress_(nn.Linear(64, 64), "S1E3M7")
    codes, exact = packed.weight.base.codes.clone(), packed.weight.dequantize()
    packed.to(dtype)
    assert torch.equal(packed.weight.base.codes, codes) and torch.equal(packed.weight.dequantize(), exact.to(dtype))
    assert torch.equal(packed.float().weight.dequantize(), exact)


def test_other_dtypes_are_refused() -> None:
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(fedomc.PolicyError, match=r"weight is torch\.\w+, but only float32, bfloat16, float16"):
            compress_(nn.Linear(64, 64, dtype=dtype), "S1E3M7")


def test_what_leaves_float16_is_refused() -> None:
    largest = torch.full((64, 64), torch.finfo(torch.float16).max, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match=r"w has values that S1E2M1 rounds beyond torch\.float16"):
        CompressedTensor.from_dense(largest, "S1E2M1", name="w")
    x = CompressedTensor.from_dense(largest / 2, "S1E3M7", name="w")
    before = x.dequantize()
    with pytest.raises(NonFiniteError, match="w would have a value beyond its dtype"), torch.no_grad():
        x.mul_(torch.full((64, 64), 4.0))
    assert torch.equal(x.dequantize(), before)
