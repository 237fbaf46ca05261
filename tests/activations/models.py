"""Models whose activations the tests pack."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedomc import compress_
from tests.conftest import randn

X = randn(64, 4, 64)
SEQUENCE = randn(32, 16, 64)
IMAGES = randn(8, 3, 32, 32)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(64, 64), inner or network(), nn.Linear(64, 64)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.after(checkpoint(self.inner, self.before(x), use_reentrant=self.reentrant))


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class SelfAttention(nn.Module):
    """Three projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64), nn.LayerNorm(64), nn.ReLU(inplace=True)
    )


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, groups=16),
        nn.SiLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "network": (network, X),
    "images": (images, IMAGES),
    "module called twice": (Twice, X),
    "self-attention": (SelfAttention, SEQUENCE),
    "multi-head attention": (lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), SEQUENCE),
    "lstm": (lambda: nn.Sequential(network(), First(nn.LSTM(64, 32, batch_first=True))), SEQUENCE),
    "checkpoint": (lambda: Checkpointed(False), X),
    "reentrant checkpoint": (lambda: Checkpointed(True), X),
    "attention in a checkpoint": (lambda: Checkpointed(False, SelfAttention()), SEQUENCE),
    "attention in a reentrant checkpoint": (lambda: Checkpointed(True, SelfAttention()), SEQUENCE),
}


def build(name: str = "network", compressed: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make()
    model(x)
    return compress_(model, "S1E3M7@1.0") if compressed else model, x
