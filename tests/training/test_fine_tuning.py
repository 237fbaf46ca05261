"""Fine-tuning a pretrained model in three lines: compress, choose an optimizer, train."""

import copy
import statistics

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fedomc
from fedomc import CompressionPolicy

SEEDS = (0, 1, 2)
TEST = 600  # of 1797 images


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(digits)[order]


def train(model: nn.Module, images: Tensor, digits: Tensor, rate: float, steps: int, batch: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(0, len(digits), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), digits[chosen]).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def pretrained(images: tuple[Tensor, Tensor]) -> nn.Module:
    """A network that knows the digits 0 to 4."""
    pixels, digits = images[0][TEST:], images[1][TEST:]
    known = digits < 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    train(model, pixels[known], digits[known], 1e-3, 400, 64, 0)
    return model


def accuracy(model: nn.Module, images: tuple[Tensor, Tensor], policy: CompressionPolicy | None, seed: int) -> float:
    """Fine-tune a copy on all digits, and return the percentage of test images that it gets right."""
    model = copy.deepcopy(model)
    if policy is not None:
        fedomc.compress_(model, policy)
    train(model, images[0][TEST:], images[1][TEST:], 3e-4, 300, 16, seed)
    with torch.no_grad():
        return 100 * float((model(images[0][:TEST]).argmax(1) == images[1][:TEST]).float().mean())


def test_a_compressed_model_is_fine_tuned_as_a_plain_one(pretrained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    """Of three seeds a mean differs by about 0.5 points by chance, and rounding to nearest costs 40 points."""
    plain = [accuracy(pretrained, images, None, seed) for seed in SEEDS]
    policies = [CompressionPolicy.parse(fedomc.DEFAULT, seed=seed) for seed in SEEDS]
    found = [accuracy(pretrained, images, policy, seed) for policy, seed in zip(policies, SEEDS, strict=True)]
    assert abs(statistics.mean(found) - statistics.mean(plain)) < 1.5, (found, plain)
    with pytest.warns(RuntimeWarning, match="most of the training steps are lost"):
        lost = accuracy(pretrained, images, CompressionPolicy("S1E2M3", rounding="nearest"), 0)
    assert lost < plain[0] - 20
