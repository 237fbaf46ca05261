"""Log-mel features of utterances, and batches of them."""

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

# Of log-mel energies of speech, for streaming models. Between two corpora: digits has -7.0 and 2.8, AN4 -10.9 and 4.3.
MEAN = -9.0
DEVIATION = 4.0


@dataclass(frozen=True)
class Batch:
    """Utterances of different lengths, padded.

    Attributes:
        features: float32 ``[B, T, mels]``.
        frames: int64 ``[B]``, how many of T are real.
    """

    features: Tensor
    frames: Tensor


def log_mel(audio: np.ndarray, mels: int, *, streaming: bool = False) -> Tensor:
    """Compute log-mel features.

    Args:
        audio: float32 ``[samples]`` at 16 kHz.
        mels: number of mel bands.
        streaming: normalise by the constants ``MEAN`` and ``DEVIATION``, which are known before the utterance ends,
            instead of to mean 0 and variance 1 over the utterance.

    Returns:
        float32 ``[1 + samples // HOP, mels]``, 100 frames a second.
    """
    energies = _log_energies(F.pad(_tensor(audio), (FFT // 2, FFT // 2)), mels)
    if streaming:
        return (energies - MEAN) / DEVIATION
    return (energies - energies.mean()) / (energies.std() + 1e-5)


class LogMelStream:
    """Computes the features of a streaming model from audio in pieces: the same as ``log_mel`` of the whole.

    A frame is given out as soon as its window is full, 16 ms after its centre.

    Args:
        mels: number of mel bands.
    """

    def __init__(self, mels: int) -> None:
        self.mels = mels
        self._samples = torch.zeros(FFT // 2)  # from the first sample of the next frame on

    def push(self, audio: np.ndarray) -> Tensor:
        """Take float32 samples ``[samples]``, return the frames that they complete, ``[T, mels]``."""
        return self._take(_tensor(audio))

    def finish(self) -> Tensor:
        """Return the last frames ``[T, mels]``: the utterance has ended."""
        return self._take(torch.zeros(FFT // 2))

    def _take(self, more: Tensor) -> Tensor:
        self._samples = torch.cat([self._samples, more])
        frames = (len(self._samples) - FFT) // HOP + 1
        if frames < 1:
            return torch.zeros(0, self.mels)
        energies = _log_energies(self._samples, self.mels)
        self._samples = self._samples[frames * HOP :].clone()
        return (energies - MEAN) / DEVIATION


def _tensor(audio: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))


def _log_energies(signal: Tensor, mels: int) -> Tensor:
    """Compute the log-mel energies ``[T, mels]`` of all windows that lie in a signal ``[samples]``."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(signal, FFT, HOP, WINDOW, window, center=False, return_complex=True)
    power = spectrum.abs().square()  # [FFT // 2 + 1, T]
    return (_mel_filters(mels) @ power).clamp_min(1e-10).log().T  # [T, mels]


def pad(features: Sequence[Tensor]) -> Batch:
    """Pad features ``[T_i, mels]`` with zeros to the longest."""
    frames = torch.tensor([len(f) for f in features])
    return Batch(torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True), frames)


@functools.cache
def _mel_filters(mels: int) -> Tensor:
    filters = mel_filter_bank(FFT // 2 + 1, mels, 20.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.T.astype(np.float32)).contiguous()  # [mels, FFT // 2 + 1]
