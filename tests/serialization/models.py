"""A model with variables of every kind, its policies, and what its state is."""

from typing import Any

import torch
from torch import Tensor, nn

import fedomc
from fedomc import (
    CompressedTensor,
    CompressionPolicy,
)

W = "inner.0.weight"
"""A compressed variable."""

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


def state(model: nn.Module, **changes: Tensor | None) -> dict[str, Tensor]:
    changed = {**model.state_dict(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in changed.items() if value is not None}
