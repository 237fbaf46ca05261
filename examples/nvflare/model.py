"""A small convolutional network, and images of stripes for it to tell apart, made on the machine."""

import math

import torch
from torch import Tensor, nn

CLASSES, SIZE = 8, 16


class Net(nn.Module):
    """Tells the direction of stripes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            *(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) for _ in range(2)),
            nn.Flatten(),
            nn.Linear(32 * SIZE, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return scores ``[N, classes]`` of images ``[N, 1, SIZE, SIZE]``."""
        scores: Tensor = self.layers(images)
        return scores


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noisy images ``[N, 1, SIZE, SIZE]`` of stripes and the class ``[N]`` of their direction."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    angle = (math.pi * labels / CLASSES).view(-1, 1, 1)
    phase, pitch = torch.rand(2, count, 1, 1, generator=random)
    at = torch.arange(SIZE)
    along = torch.cos(angle) * at.view(1, -1, 1) + torch.sin(angle) * at.view(1, 1, -1)  # [N, SIZE, SIZE]
    images = torch.sin(along * (0.8 + 0.6 * pitch) + 2 * math.pi * phase)
    return (images + 0.8 * torch.randn(images.shape, generator=random)).unsqueeze(1), labels


def accuracy(model: nn.Module) -> float:
    """Measure the share of images, which no site has, that a model tells right."""
    images, labels = stripes(2000, seed=1)
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())
