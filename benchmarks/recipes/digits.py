"""A small CNN on the handwritten digits that scikit-learn carries, with augmentation."""

import functools
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.recipes.tasks import Examples, Task

SIZES = {"train": 900, "validation": 297, "test": 600}
VIEWS = 4
"""How often each image is measured, turned and moved differently, which makes a small test finer."""
DEGREES, PIXELS = 15.0, 1.0


class Digits(Task):
    """Ten classes, 8 x 8 pixels; the score is the accuracy on augmented images that are the same in every run."""

    name = "digits"
    skew = "dirichlet-0.3"
    batch = 16
    rounds = {"1-step": 100, "4-steps": 40, "epoch-sgdm": 15, "epoch-adamw": 15}  # noqa: RUF012
    rates = {  # noqa: RUF012
        "1-step": (0.1, 0.3, 1.0),
        "4-steps": (0.03, 0.1, 0.3),
        "epoch-sgdm": (0.01, 0.03, 0.1),
        "epoch-adamw": (0.001, 0.003, 0.01),
    }

    @functools.cache  # noqa: B019
    def examples(self, part: str) -> Examples:
        """Return images ``[N, 1, 8, 8]`` from 0 to 1; those that are measured are augmented."""
        loaded = load_digits()
        order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
        start = sum(list(SIZES.values())[: list(SIZES).index(part)])
        chosen = order[start : start + SIZES[part]]
        images = torch.from_numpy(loaded.images).float()[chosen, None] / 16
        labels = torch.from_numpy(loaded.target).long()[chosen]
        if part != "train":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                images, labels = torch.cat([augmented(images) for _ in range(VIEWS)]), labels.repeat(VIEWS)
        return Examples(images, labels, labels)

    def model(self) -> nn.Module:
        """Build the CNN, of about 26 000 parameters."""
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the cross entropy of augmented images."""
        return F.cross_entropy(model(augmented(batch.inputs)), batch.targets)

    def score(self, model: nn.Module, examples: Examples) -> float:
        """Return the accuracy in per cent."""
        return 100 * float((model(examples.inputs).argmax(-1) == examples.targets).float().mean())


def augmented(images: Tensor) -> Tensor:
    """Turn and move images ``[N, 1, H, W]``, each differently."""
    angles = (torch.rand(len(images)) * 2 - 1) * math.radians(DEGREES)
    moves = (torch.rand(len(images), 2) * 2 - 1) * 2 * PIXELS / images.shape[-1]
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turns, moves[..., None]], -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


TASK = Digits()
