"""The models: FastConformers of ``transformers`` with a CTC head, adapted to federated averaging."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    NemotronAsrStreamingEncoder,
    NemotronAsrStreamingEncoderConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
)

from fedomc_speech.errors import SettingsError

LEFT_CONTEXT = 70
"""Number of encoder frames before its own chunk that a frame of the streaming model can attend to."""

LOOKAHEAD = 6
"""Number of later encoder frames that the streaming model is trained to wait for; with one more they make 0.56 s."""


@dataclass(frozen=True)
class ModelSize:
    """The size of an encoder, with the field names of ``ParakeetEncoderConfig``."""

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

    It differs from the library's defaults in two ways. BatchNorm in the convolution modules becomes GroupNorm with one
    group, because averages of different clients' running statistics are meaningless. Weights are initialised as Xavier
    (linear) and Kaiming (two-dimensional convolution), because with the default standard deviation of 0.02 training
    stays on the plateau where CTC emits only blanks.

    Attributes:
        mels: number of mel bands of the features.
        streaming: whether the model takes features that need no later audio, and can run chunk by chunk.
    """

    streaming = False

    def __init__(self, size: ModelSize, vocabulary: int) -> None:
        super().__init__()
        self.mels = size.num_mel_bins
        self.encoder = self._make_encoder(size)
        self.head = nn.Linear(size.hidden_size, vocabulary)
        positions = self.encoder.encode_positions
        with torch.device("cpu"):  # a buffer that no checkpoint and no message carries
            positions.inv_freq = nn.Buffer(
                positions.compute_default_relative_positional_parameters(self.encoder.config), persistent=False
            )

    def _make_encoder(self, size: ModelSize) -> Any:
        encoder = ParakeetEncoder(ParakeetEncoderConfig(**_encoder_settings(size)))
        for layer in encoder.layers:
            layer.get_submodule("conv").norm = nn.GroupNorm(1, size.hidden_size)
        return encoder

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the log-probabilities of the tokens.

        Args:
            features: ``[B, T, mels]``.
            frames: ``[B]``, how many of the T frames are not padding.

        Returns:
            Log-probabilities ``[B, T / subsampling, vocabulary]``, and how many of their frames are not padding,
            ``[B]``.
        """
        mask = torch.arange(features.shape[1]) < frames[:, None]  # [B, T]
        encoded = self.encoder(features, attention_mask=mask)
        return F.log_softmax(self.head(encoded.last_hidden_state), -1), encoded.attention_mask.sum(-1)

    def ctc_loss(self, features: Tensor, frames: Tensor, targets: list[list[int]]) -> Tensor:
        """Compute the CTC loss, averaged over the utterances; token 0 is the blank.

        The loss of an utterance that is too short for its transcript counts as 0.
        """
        log_probabilities, lengths = self(features, frames)
        flat = torch.tensor([token for target in targets for token in target], dtype=torch.long)
        target_lengths = torch.tensor([len(target) for target in targets])
        return F.ctc_loss(log_probabilities.transpose(0, 1), flat, lengths, target_lengths, zero_infinity=True)


class StreamingSpeechModel(SpeechModel):
    """A Conformer that can run while the speaker speaks; `fedomc_speech.streaming` runs it.

    [Note: why it can stream]
    Convolutions are causal; encoder frame i needs feature frames up to ``subsampling * i``. Normalization is LayerNorm
    over channels, never over time. Encoder frames come in chunks of ``1 + lookahead``: a frame attends to all of its
    own chunk and to the whole chunks that fit into the ``LEFT_CONTEXT`` frames before it, so it waits for the last
    frame of its chunk and for nothing else, however many layers there are.

    The library's encoder pads the end of an utterance with zeros before each convolution, but not when it runs chunk by
    chunk. Here, an utterance is extended with zero features to the next full encoder frame, so that nothing is left to
    pad, be it alone, in a batch or chunk by chunk.
    """

    streaming = True

    def __init__(self, size: ModelSize, vocabulary: int) -> None:
        super().__init__(size, vocabulary)
        self.subsampling = size.subsampling_factor

    def _make_encoder(self, size: ModelSize) -> Any:
        return NemotronAsrStreamingEncoder(
            NemotronAsrStreamingEncoderConfig(
                **_encoder_settings(size), sliding_window=LEFT_CONTEXT + 1, default_num_lookahead_tokens=LOOKAHEAD
            )
        )

    def forward(self, features: Tensor, frames: Tensor, lookahead: int = LOOKAHEAD) -> tuple[Tensor, Tensor]:
        """Compute the log-probabilities of the tokens; running chunk by chunk gives the same.

        Args:
            features: ``[B, T, mels]``, zero in the padding.
            frames: ``[B]``, how many of the T frames are not padding, at least 1.
            lookahead: number of encoder frames in a chunk, minus one.

        Returns:
            Log-probabilities ``[B, 1 + ceil((T - 1) / subsampling), vocabulary]`` and how many of their frames are
            not padding, ``[B]``.
        """
        lengths = 1 + (frames - 1 + self.subsampling - 1) // self.subsampling  # in encoder frames
        full = 1 + (lengths - 1) * self.subsampling  # the last feature frame that the last of them needs
        longest = int(full.max())
        features = F.pad(features, (0, 0, 0, max(0, longest - features.shape[1])))[:, :longest]
        encoded = self.encoder(
            features,
            attention_mask=torch.arange(longest) < full[:, None],  # [B, longest]
            num_lookahead_tokens=lookahead,
        )
        return F.log_softmax(self.head(encoded.last_hidden_state), -1), lengths


def _encoder_settings(size: ModelSize) -> dict[str, Any]:
    """Return what the configurations of both encoders have in common."""
    return {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "intermediate_size": size.intermediate_size,
        "conv_kernel_size": size.conv_kernel_size,
        "subsampling_factor": size.subsampling_factor,
        "subsampling_conv_channels": size.subsampling_conv_channels,
        "num_mel_bins": size.num_mel_bins,
        "dropout": size.dropout,
        "attention_dropout": size.dropout,
        "activation_dropout": size.dropout,
        "layerdrop": 0.0,
        "scale_input": False,
    }


def build(size: str, vocabulary: int, *, seed: int | None = None, streaming: bool = False) -> SpeechModel:
    """Build a model.

    Args:
        size: ``tiny`` or ``large``.
        vocabulary: number of tokens, including the blank.
        seed: seed of the initial weights; None builds the model on the meta device, to be filled from a message.
        streaming: whether to build a `StreamingSpeechModel`.

    Raises:
        SettingsError: there is no such size.
    """
    check_size(size)
    kind = StreamingSpeechModel if streaming else SpeechModel
    if seed is None:
        with torch.device("meta"):
            return kind(SIZES[size], vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(SIZES[size], vocabulary)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return model


def check_size(size: str) -> None:
    """Check that a size exists.

    Raises:
        SettingsError: it does not exist.
    """
    if size not in SIZES:
        raise SettingsError(f"model size {size!r} is unknown: use one of {', '.join(SIZES)}")
