"""The model: the FastConformer of ``transformers`` with a CTC head, made fit for federated averaging."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ParakeetEncoder, ParakeetEncoderConfig

from fedomc_speech.errors import SettingsError


@dataclass(frozen=True)
class ModelSize:
    """The shape of an encoder; the names are those of ``ParakeetEncoderConfig``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    conv_kernel_size: int
    subsampling_factor: int
    subsampling_conv_channels: int
    num_mel_bins: int
    dropout: float


SIZES = {
    "tiny": ModelSize(144, 2, 4, 576, 15, 8, 32, 40, 0.1),
    "large": ModelSize(512, 18, 8, 2048, 9, 8, 256, 80, 0.1),
}
"""``tiny`` has about 1 M parameters; ``large`` is the FastConformer-Large of about 115 M."""


class SpeechModel(nn.Module):
    """A Conformer encoder and a linear CTC head.

    Two changes against the library's defaults. BatchNorm in the convolution modules becomes GroupNorm with one group:
    running statistics of different clients do not average to anything. And the weights are initialised as Xavier
    (linear) and Kaiming (two-dimensional convolution): with the default of std 0.02 training stays on the plateau
    where CTC emits only blanks.
    """

    def __init__(self, size: ModelSize, vocabulary: int) -> None:
        super().__init__()
        rate = size.dropout
        config = ParakeetEncoderConfig(
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_hidden_layers,
            num_attention_heads=size.num_attention_heads,
            intermediate_size=size.intermediate_size,
            conv_kernel_size=size.conv_kernel_size,
            subsampling_factor=size.subsampling_factor,
            subsampling_conv_channels=size.subsampling_conv_channels,
            num_mel_bins=size.num_mel_bins,
            dropout=rate,
            attention_dropout=rate,
            activation_dropout=rate,
            layerdrop=0.0,
            scale_input=False,
        )
        self.mels = size.num_mel_bins
        self.encoder = ParakeetEncoder(config)
        for layer in self.encoder.layers:
            layer.get_submodule("conv").norm = nn.GroupNorm(1, size.hidden_size)
        self.head = nn.Linear(size.hidden_size, vocabulary)
        positions = self.encoder.encode_positions
        with torch.device("cpu"):  # a buffer that no checkpoint and no message carries
            positions.inv_freq = nn.Buffer(
                positions.compute_default_relative_positional_parameters(config), persistent=False
            )

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the log-probabilities of the tokens.

        Args:
            features: ``[B, T, mels]``.
            frames: ``[B]``, how many of T are real.

        Returns:
            Log-probabilities ``[B, T / subsampling, vocabulary]`` and how many of their frames are real, ``[B]``.
        """
        mask = torch.arange(features.shape[1]) < frames[:, None]  # [B, T]
        encoded = self.encoder(features, attention_mask=mask)
        return F.log_softmax(self.head(encoded.last_hidden_state), -1), encoded.attention_mask.sum(-1)

    def ctc_loss(self, features: Tensor, frames: Tensor, targets: list[list[int]]) -> Tensor:
        """Compute the CTC loss, averaged over the utterances; token 0 is the blank.

        An utterance too short for its transcript counts as 0.
        """
        log_probabilities, lengths = self(features, frames)
        flat = torch.tensor([token for target in targets for token in target], dtype=torch.long)
        target_lengths = torch.tensor([len(target) for target in targets])
        return F.ctc_loss(log_probabilities.transpose(0, 1), flat, lengths, target_lengths, zero_infinity=True)


def build(size: str, vocabulary: int, *, seed: int | None = None) -> SpeechModel:
    """Build a model.

    Args:
        size: ``tiny`` or ``large``.
        vocabulary: number of tokens, blank included.
        seed: initialises the weights; None builds it on the meta device, to be filled from a message.

    Raises:
        SettingsError: no such size.
    """
    check_size(size)
    if seed is None:
        with torch.device("meta"):
            return SpeechModel(SIZES[size], vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SpeechModel(SIZES[size], vocabulary)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return model


def check_size(size: str) -> None:
    """Check that a size exists.

    Raises:
        SettingsError: it does not.
    """
    if size not in SIZES:
        raise SettingsError(f"model size {size!r} is unknown: use one of {', '.join(SIZES)}")
