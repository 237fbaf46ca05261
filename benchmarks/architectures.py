"""Models that nobody here wrote, small and with random weights, each with a batch: for benchmarks and tests.

The configurations are those of ``transformers``, and torch's own ``nn.Transformer`` and ``nn.LSTM``. Nothing is
downloaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
"""The encoder layers of most of the models."""


@dataclass(frozen=True)
class Architecture:
    """A model and what it is trained on.

    Attributes:
        name: of the model's class.
        build: makes it, with weights from torch's generator.
        batch: makes the keyword arguments of its forward pass.
        learning_rate: of SGD, one with which the model memorises its batch.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Mapping[str, Any]]
    learning_rate: float = 0.1

    def make(self, seed: int = 0) -> tuple[nn.Module, Mapping[str, Any]]:
        """Build the model and its batch, always the same ones for a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().train(), self.batch()


def loss(output: Any) -> Tensor:
    """Return a model's own loss; of one that has none, how far its first output is from a fixed target."""
    if getattr(output, "loss", None) is not None:
        found: Tensor = output.loss
        return found
    values = output if isinstance(output, Tensor) else output[0]
    target = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return (values - target).square().mean()


def tokens(vocabulary: int, *shape: int) -> Tensor:
    """Draw tokens; never the first two, which stand for padding and blanks."""
    return torch.randint(2, vocabulary, shape)


def wav2vec2_conformer() -> nn.Module:
    """Build a Wav2Vec2-Conformer with a CTC head: one-dimensional convolutions, relative positions."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

    return Wav2Vec2ConformerForCTC(
        Wav2Vec2ConformerConfig(
            **LAYERS, vocab_size=32, conv_dim=(32, 32, 32), conv_kernel=(10, 3, 3), conv_stride=(5, 4, 4),
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, conv_depthwise_kernel_size=15,
            layerdrop=0.0, apply_spec_augment=False, ctc_loss_reduction="mean", ctc_zero_infinity=True,
        )
    )  # fmt: skip


def whisper() -> nn.Module:
    """Build a Whisper: encoder and decoder, the output tied to the embedding."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=96, num_mel_bins=20, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50,
            max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
        )
    )  # fmt: skip


def parakeet() -> nn.Module:
    """Build a FastConformer with a CTC head: two-dimensional, depthwise and pointwise convolutions."""
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    return ParakeetForCTC(
        ParakeetCTCConfig(
            vocab_size=32, pad_token_id=0,
            encoder_config={**LAYERS, "subsampling_conv_channels": 16, "num_mel_bins": 40, "layerdrop": 0.0},
        )
    )  # fmt: skip


def nemotron() -> nn.Module:
    """Build the causal encoder of Nemotron ASR, which sees a window of the frames."""
    from transformers import NemotronAsrStreamingEncoder, NemotronAsrStreamingEncoderConfig

    return NemotronAsrStreamingEncoder(
        NemotronAsrStreamingEncoderConfig(
            **LAYERS, subsampling_conv_channels=16, num_mel_bins=40, layerdrop=0.0, sliding_window=9,
            default_num_lookahead_tokens=3,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    """Build a GPT-2: transposed linear layers, the output tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    model.loss_type = "ForCausalLM"  # its default, of which it would warn
    return model


def bert() -> nn.Module:
    """Build a BERT that fills in masked words."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**LAYERS, vocab_size=96, max_position_embeddings=32))


def vit() -> nn.Module:
    """Build a vision transformer that classifies images."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**LAYERS, image_size=16, patch_size=4, num_labels=8))


def resnet() -> nn.Module:
    """Build a ResNet that classifies images: convolutions and batch normalization."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="basic", num_labels=8)
    )


def images() -> dict[str, Tensor]:
    """Draw images with a class each."""
    return {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4)}


def frames() -> dict[str, Tensor]:
    """Draw mel frames of two utterances, one of them shorter."""
    return {"input_features": torch.randn(2, 96, 40), "attention_mask": torch.arange(96) < torch.tensor([[96], [80]])}


def sentences() -> dict[str, Tensor]:
    """Draw sentences that are their own targets."""
    words = tokens(96, 2, 16)
    return {"input_ids": words, "labels": words}


ARCHITECTURES = (
    Architecture(
        "Wav2Vec2ConformerForCTC",
        wav2vec2_conformer,
        lambda: {"input_values": torch.randn(2, 2000), "labels": tokens(32, 2, 5)},
    ),
    Architecture(
        "WhisperForConditionalGeneration",
        whisper,
        lambda: {"input_features": torch.randn(2, 20, 100), "labels": tokens(96, 2, 8)},
    ),
    Architecture("ParakeetForCTC", parakeet, lambda: {**frames(), "labels": tokens(32, 2, 4)}),
    Architecture("NemotronAsrStreamingEncoder", nemotron, lambda: {**frames(), "num_lookahead_tokens": 3}),
    Architecture("GPT2LMHeadModel", gpt2, sentences),
    Architecture("BertForMaskedLM", bert, sentences),
    Architecture("ViTForImageClassification", vit, images),
    Architecture("ResNetForImageClassification", resnet, images),
    Architecture(
        "torch.nn.Transformer",
        lambda: nn.Transformer(64, 4, 2, 2, 128, batch_first=True),
        lambda: {"src": torch.randn(2, 12, 64), "tgt": torch.randn(2, 8, 64)},
    ),
    Architecture(
        "torch.nn.LSTM",
        lambda: nn.LSTM(40, 64, num_layers=2, bidirectional=True, batch_first=True),
        lambda: {"input": torch.randn(2, 20, 40)},
        learning_rate=40.0,
    ),
)
"""All of them."""
