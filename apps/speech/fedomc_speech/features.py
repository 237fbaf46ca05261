"""Log-mel features of utterances, and batches of them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from fedomc_speech.corpus.base import SAMPLE_RATE

WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FFT = 512


@dataclass(frozen=True)
class Batch:
    """Utterances of different lengths, padded.

    Attributes:
        features: float32 ``[B, T, mels]``.
        frames: int64 ``[B]``, how many of T are real.
    """

    features: Tensor
    frames: Tensor


def log_mel(audio: np.ndarray, mels: int) -> Tensor:
    """Compute log-mel features, normalised to mean 0 and variance 1 over the utterance.

    Args:
        audio: float32 ``[samples]`` at 16 kHz.
        mels: number of mel bands.

    Returns:
        float32 ``[T, mels]``, 100 frames a second.
    """
    signal = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))
    spectrum = torch.stft(
        signal, FFT, HOP, WINDOW, torch.hann_window(WINDOW), center=True, pad_mode="constant", return_complex=True
    )
    power = spectrum.abs().square()  # [FFT // 2 + 1, T]
    energies = (_mel_filters(mels) @ power).clamp_min(1e-10).log().T  # [T, mels]
    return (energies - energies.mean()) / (energies.std() + 1e-5)


def pad(features: Sequence[Tensor]) -> Batch:
    """Pad features ``[T_i, mels]`` with zeros to the longest."""
    frames = torch.tensor([len(f) for f in features])
    return Batch(torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True), frames)


@functools.cache
def _mel_filters(mels: int) -> Tensor:
    filters = mel_filter_bank(FFT // 2 + 1, mels, 20.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.T.astype(np.float32)).contiguous()  # [mels, FFT // 2 + 1]
