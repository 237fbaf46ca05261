"""Log-mel features of utterances, whole or in pieces, and padded batches."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from fedomc_speech.corpus.base import SAMPLE_RATE

WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FFT = 512

# The mean and deviation of log-mel energies that a streaming model assumes before it has heard any speech, and how many
# frames this assumption weighs. They lie between those of two corpora: -7.0 and 2.8 in digits, -10.9 and 4.3 in AN4.
MEAN = -9.0
DEVIATION = 4.0
PRIOR_FRAMES = 50


@dataclass(frozen=True)
class Batch:
    """Utterances of different lengths, padded.

    Attributes:
        features: float32 ``[B, T, mels]``.
        frames: int64 ``[B]``, the number of frames of each that are not padding.
    """

    features: Tensor
    frames: Tensor


def log_mel(audio: np.ndarray, mels: int, *, streaming: bool = False) -> Tensor:
    """Compute log-mel features.

    Args:
        audio: float32 ``[samples]`` at 16 kHz.
        mels: number of mel bands.
        streaming: whether each frame is normalised by the mean and deviation of the frames up to it, as they are known
            while the utterance is spoken, instead of those of the whole utterance.

    Returns:
        float32 ``[1 + samples // HOP, mels]``, 100 frames a second.
    """
    energies = _log_energies(F.pad(_tensor(audio), (FFT // 2, FFT // 2)), mels)
    if streaming:
        return _RunningNormalization().normalise(energies)
    return (energies - energies.mean()) / (energies.std() + 1e-5)


class LogMelStream:
    """Computes features from audio in pieces, the same as ``log_mel(..., streaming=True)`` of all audio.

    A frame is returned as soon as its window is full, 16 ms after its centre.

    Args:
        mels: number of mel bands.
    """

    def __init__(self, mels: int) -> None:
        self.mels = mels
        self._normalization = _RunningNormalization()
        self._samples = torch.zeros(FFT // 2)  # from the first sample of the next frame on

    def push(self, audio: np.ndarray) -> Tensor:
        """Take float32 samples ``[samples]`` and return the frames that they complete, ``[T, mels]``."""
        return self._take(_tensor(audio))

    def finish(self) -> Tensor:
        """End the utterance and return its last frames, ``[T, mels]``."""
        return self._take(torch.zeros(FFT // 2))

    def _take(self, more: Tensor) -> Tensor:
        self._samples = torch.cat([self._samples, more])
        frames = (len(self._samples) - FFT) // HOP + 1
        if frames < 1:
            return torch.zeros(0, self.mels)
        energies = _log_energies(self._samples, self.mels)
        self._samples = self._samples[frames * HOP :].clone()
        return self._normalization.normalise(energies)


class _RunningNormalization:
    """Normalises each frame by the mean and deviation of all frames so far, which adapts to a recording's level.

    ``PRIOR_FRAMES`` frames with ``MEAN`` and ``DEVIATION`` count as heard before the first. Sums are float64, so that
    pieces of any length give the same result.
    """

    def __init__(self) -> None:
        self._frames = PRIOR_FRAMES
        self._sums = PRIOR_FRAMES * torch.tensor([MEAN, DEVIATION**2 + MEAN**2], dtype=torch.float64)

    def normalise(self, energies: Tensor) -> Tensor:
        """Normalise the next frames ``[T, mels]``."""
        exact = energies.double()
        sums = self._sums + torch.stack([exact.mean(1), exact.square().mean(1)], 1).cumsum(0)  # [T, 2]
        counts = self._frames + torch.arange(1, len(exact) + 1)
        mean, square = (sums / counts[:, None]).T
        deviation = (square - mean.square()).clamp_min(1e-6).sqrt()
        self._frames, self._sums = self._frames + len(exact), sums[-1]
        normalised: Tensor = (exact - mean[:, None]) / deviation[:, None]
        return normalised.float()


def _tensor(audio: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))


def _log_energies(signal: Tensor, mels: int) -> Tensor:
    """Compute the log-mel energies ``[T, mels]`` of all whole windows of a signal ``[samples]``."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(signal, FFT, HOP, WINDOW, window, center=False, return_complex=True)
    power = spectrum.abs().square()  # [FFT // 2 + 1, T]
    return (_mel_filters(mels) @ power).clamp_min(1e-10).log().T  # [T, mels]


def pad(features: Sequence[Tensor]) -> Batch:
    """Pad features ``[T_i, mels]`` with zeros to the length of the longest."""
    frames = torch.tensor([len(f) for f in features])
    return Batch(torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True), frames)


@functools.cache
def _mel_filters(mels: int) -> Tensor:
    filters = mel_filter_bank(FFT // 2 + 1, mels, 20.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.T.astype(np.float32)).contiguous()  # [mels, FFT // 2 + 1]
