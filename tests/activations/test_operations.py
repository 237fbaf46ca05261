"""The table of operations: what each of them packs, and what that does to its gradient."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc import compress_activations
from fedomc.activations.operations import SMALLEST
from tests.activations.conftest import Function, error, gradients
from tests.conftest import randn, same_bits

X = randn(4, 32, 64)  # one unit: 8192 values
UNIT = 4 * X.numel()
IMAGE = X.view(4, 32, 8, 8)
Call = Callable[[Tensor, Tensor], Tensor]


def ctc(x: Tensor, w: Tensor) -> Tensor:
    lengths = torch.full((32,), 4)
    return F.ctc_loss(x.log_softmax(-1), torch.arange(1, 129) % 64, lengths, lengths, reduction="none")


def attention(x: Tensor, w: Tensor) -> Tensor:
    """The formula with probabilities, which dropout makes torch choose."""
    return F.scaled_dot_product_attention(x[None] / 4, x[None] + 1, x[None] + 2, dropout_p=0.25)


def multi_head(x: Tensor, w: Tensor) -> Tensor:
    bias = torch.zeros(192)
    return F.multi_head_attention_forward(
        x, x, x, 64, 4, torch.cat([w, w, w]), bias, None, None, False, 0.0, w, bias[:64]
    )[0]


CODES: dict[str, tuple[Call, Tensor, tuple[int, ...], float]] = {
    "linear": (F.linear, X, (64, 64), 1),
    "linear of a computed weight": (lambda x, w: F.linear(x, w.tanh()), X, (128, 64), 2),  # the second is of tanh
    "conv1d": (F.conv1d, X, (8, 32, 3), 1),
    "conv2d": (F.conv2d, IMAGE, (8, 32, 3, 3), 1),
    "conv_transpose2d": (F.conv_transpose2d, IMAGE, (32, 8, 3, 3), 1),
    "matmul of two": (lambda x, w: x @ (x + 1).mT, X, (1,), 2),
    "matmul with a parameter": (lambda x, w: x @ w, X, (64, 64), 1),
    "rmatmul": (lambda x, w: x.__rmatmul__(w), X, (16, 32), 1),
    "bmm": (lambda x, w: torch.bmm(x, (x + 1).mT), X, (1,), 2),
    "addmm": (lambda x, w: torch.addmm(w[0], x[0], w), X.repeat(1, 4, 1), (64, 64), 0.25),
    "einsum": (lambda x, w: torch.einsum("bij,bkj->bik", x, x + 1), X, (1,), 2),
    "mul": (lambda x, w: x * (x + 1), X, (1,), 2),
    "square": (lambda x, w: x.square(), X, (1,), 0),
    "pow": (lambda x, w: x**3, X, (1,), 1),
    "layer_norm": (lambda x, w: F.layer_norm(x, (64,), w), X, (64,), 1),
    "group_norm": (lambda x, w: F.group_norm(x, 4, w), X, (32,), 1),
    "batch_norm": (lambda x, w: F.batch_norm(x, None, None, w, training=True), X, (32,), 1),
    "gelu": (lambda x, w: F.gelu(x), X, (1,), 1),
    "silu": (lambda x, w: F.silu(x), X, (1,), 1),
    "tanh": (lambda x, w: x.tanh(), X, (1,), 1),
    "sigmoid": (lambda x, w: torch.sigmoid(x), X, (1,), 1),
    "elu": (lambda x, w: F.elu(x), X, (1,), 1),
    "softplus": (lambda x, w: F.softplus(x), X, (1,), 1),
    "glu": (lambda x, w: F.glu(x), X, (1,), 1),
    "multi_head_attention_forward": (multi_head, X, (64, 64), 1),
}
"""Operations with codes: function, input, shape of the parameter, and how many units are packed."""

BITS: dict[str, Call] = {
    "relu": lambda x, w: x.relu(),
    "relu in place": lambda x, w: F.relu(x + 0, inplace=True),
    "leaky_relu": lambda x, w: F.leaky_relu(x, 0.3),
    "dropout": lambda x, w: F.dropout(x, 0.25),
    "dropout in place": lambda x, w: F.dropout(x + 0, 0.25, inplace=True),
    "mask that is a factor": lambda x, w: x * (w > 0).float(),
}
EXACT: dict[str, Call] = {
    "softmax": lambda x, w: x.softmax(-1),
    "log_softmax": lambda x, w: F.log_softmax(x, -1),
    "cross entropy": lambda x, w: F.cross_entropy(x.view(-1, 64), torch.arange(128) % 64, reduction="none"),
    "ctc": ctc,
    "probabilities times values": lambda x, w: x.softmax(-1) @ torch.ones(64, 4),
    "exp": lambda x, w: x.exp(),
    "div": lambda x, w: w / (2 + x.abs()),
    "logsumexp": lambda x, w: x.logsumexp(-1),
    "root": lambda x, w: x.abs().add(1) ** 0.5,
    "few values": lambda x, w: F.linear(x.view(-1)[: SMALLEST - 64].view(-1, 64), w[0, :4]),
    "doubles": lambda x, w: F.linear(x.double(), w[0, :4].double()),
    "parameters": lambda x, w: x + w * (w + 1)[:1].detach() + F.linear(w[0], w[1]).sum(),
    "an expanded tensor": lambda x, w: (x[:1, :1] + 1).expand(4, 32, 64) * w,
}


def packed_gradients(model: Function, x: Tensor, format: str, seed: int = 0) -> tuple[list[Tensor], int, int]:
    with compress_activations(model, format, seed=seed) as packed:
        return gradients(model, x), packed.last.saved, packed.last.held


@pytest.mark.parametrize("name", CODES)
class TestCodes:
    def test_what_is_packed(self, name: str) -> None:
        function, x, shape, units = CODES[name]
        _, saved, held = packed_gradients(Function(function, *shape), x, "S1E4M3")
        assert saved == units * UNIT * x.numel() // X.numel()
        assert held <= 0.26 * saved

    def test_a_lossless_format_gives_the_gradient_of_torch(self, name: str, lossless: str) -> None:
        function, x, shape, _ = CODES[name]
        model = Function(function, *shape)
        found = packed_gradients(model, x, lossless)[0]
        assert all(map(same_bits, found, gradients(model, x)))

    def test_eight_bits_give_nearly_the_gradient_of_torch(self, name: str) -> None:
        function, x, shape, units = CODES[name]
        model = Function(function, *shape)
        found = error(packed_gradients(model, x, "S1E4M3")[0], gradients(model, x))
        assert found < 0.1 and (found > 0) == (units > 0)


@pytest.mark.parametrize("name", BITS)
def test_bits_are_exact(name: str) -> None:
    model = Function(BITS[name], 4, 32, 64)
    found, saved, held = packed_gradients(model, X, "S1E2M1")
    assert all(map(same_bits, found, gradients(model, X)))
    assert (saved, held) == (UNIT, UNIT // 32)


@pytest.mark.parametrize("name", EXACT)
def test_all_else_is_exact(name: str) -> None:
    model = Function(EXACT[name], 4, 32, 64)
    found, saved, _ = packed_gradients(model, X, "S1E2M1")
    assert all(map(same_bits, found, gradients(model, X)))
    assert saved == 0


def test_attention_with_dropout(lossless: str) -> None:
    model = Function(attention, 1)
    expected = gradients(model, X)
    assert all(map(same_bits, packed_gradients(model, X, lossless)[0], expected))
    found, saved, held = packed_gradients(model, X, "S1E4M3")
    assert 0 < error(found, expected) < 0.05 and saved >= 3 * UNIT and held < 0.26 * saved


@pytest.mark.parametrize("mask", ["none", "causal", "given", "trained"])
def test_attention_without_dropout(mask: str, lossless: str) -> None:
    """The backward pass of fused attention is linear in nothing that it saves: see ``activations.attention``."""

    def fused(x: Tensor, w: Tensor) -> Tensor:
        how = {"none": None, "causal": None, "given": w.detach(), "trained": w}[mask]
        return F.scaled_dot_product_attention(2 * x[None], x[None] + 1, x[None] + 2, how, is_causal=mask == "causal")

    model = Function(fused, 32, 32)
    expected = gradients(model, X)
    assert all(map(same_bits, packed_gradients(model, X, lossless)[0], expected))
    found, saved, _ = packed_gradients(model, X, "S1E4M3")
    assert saved == 3 * UNIT and 0 < error(found, expected) < 0.1
    assert error(packed_gradients(model, X, "S1E2M1/32")[0], expected) < 0.6


@pytest.mark.parametrize("format", ["S1E4M3", "S1E2M1/32", "INT4", "S1E2M1"])
def test_codes_are_unbiased(format: str) -> None:
    """The error of the mean over many seeds falls with the root of their number, as that of an unbiased estimate."""
    model = Function(F.linear, 64, 64)
    expected, runs = gradients(model, X), 64
    found = [packed_gradients(model, X, format, seed)[0] for seed in range(runs)]
    single = error(found[0], expected)
    mean = [torch.stack(each).mean(0) for each in zip(*found, strict=True)]
    assert 0 < error(mean, expected) < 2 * single / runs**0.5
