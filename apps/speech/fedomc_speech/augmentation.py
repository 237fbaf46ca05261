"""Augmentation of features: pace, speaker, microphone and gaps are varied at random whenever an utterance is used.

Everything is done to log-mel features, so that audio is read and transformed only once; an utterance takes less than
1 ms.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the features of an utterance, and how large they may be.

    Attributes:
        stretch: the speech becomes faster or slower by at most this fraction (Ko et al., "Audio augmentation for speech
            recognition", 2015).
        warp: its spectrum is stretched along the mel axis by at most this fraction, as by another length of the vocal
            tract (Jaitly and Hinton, "Vocal tract length perturbation (VTLP) improves speech recognition", 2013).
        tilt: standard deviation of each of the three cosines added to the spectrum, as by another microphone; the
            features themselves have a standard deviation of 1.
        time_masks: stretches of frames that are set to 0 (Park et al., "SpecAugment", 2019).
        time_width: the longest, as a fraction of the utterance.
        mel_masks: stretches of mel bands that are set to 0.
        mel_width: the broadest, in bands.
    """

    stretch: float = 0.12
    warp: float = 0.1
    tilt: float = 0.3
    time_masks: int = 2
    time_width: float = 0.1
    mel_masks: int = 2
    mel_width: int = 6

    def __call__(self, features: Tensor, draw: random.Random) -> Tensor:
        """Return changed features.

        Args:
            features: ``[T, mels]``, with mean 0 and variance 1; they are not modified.
            draw: the source of all random numbers.

        Returns:
            New features ``[T', mels]``.
        """
        frames, mels = features.shape
        pace = 1 + draw.uniform(-self.stretch, self.stretch)
        features = _read(features, torch.arange(max(1, round(frames / pace))) * pace)
        features = _read(features.T, torch.arange(mels) * (1 + draw.uniform(-self.warp, self.warp))).T
        position = torch.linspace(0, math.pi, mels)
        features = features + sum(draw.gauss(0, self.tilt) * torch.cos(order * position) for order in (1, 2, 3))
        for _ in range(self.time_masks):
            _mask(features, int(self.time_width * len(features)), draw)
        for _ in range(self.mel_masks):
            _mask(features.T, self.mel_width, draw)
        return features


def _read(values: Tensor, positions: Tensor) -> Tensor:
    """Interpolate linearly between rows; beyond the last row, that one is repeated."""
    positions = positions.clamp(max=len(values) - 1)
    below = positions.floor().long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], (positions - below)[:, None])


def _mask(values: Tensor, widest: int, draw: random.Random) -> None:
    """Set some rows to 0, in place."""
    width = draw.randint(0, min(widest, len(values)))
    start = draw.randint(0, len(values) - width)
    values[start : start + width] = 0
