"""The settings of a run: model, texts, training, and the variants that it compares."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fedomc
from fedomc.flower.run_config import read_settings
from fedomc_llm.errors import SettingsError

FP32 = "FP32"
FULL, LORA = "full", "lora"


@dataclass(frozen=True)
class Variant:
    """One of the ways of fine-tuning that a run compares.

    Attributes:
        method: ``full`` trains all parameters, ``lora`` adapters on a frozen base model.
        format: in which a client holds the model, or the frozen base: ``FP32`` or a format of ``fedomc``.
        adapter_format: in which adapters travel; FP32 in full fine-tuning, where the model travels in ``format``.
    """

    method: str
    format: str
    adapter_format: str = FP32

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Parse ``full:FORMAT``, ``lora:FORMAT`` or ``lora:FORMAT:ADAPTER_FORMAT``.

        Raises:
            SettingsError: it is none of these.
        """
        method, *formats = text.split(":")
        if (method, len(formats)) not in ((FULL, 1), (LORA, 1), (LORA, 2)):
            raise SettingsError(
                f"{text!r} is no way of fine-tuning: write full:FORMAT, lora:BASE_FORMAT or "
                "lora:BASE_FORMAT:ADAPTER_FORMAT, as in full:FP32 or lora:S1E2M3/64"
            )
        for format in formats:
            try:
                parsed = None if format == FP32 else fedomc.Encoding.parse(format)
            except fedomc.OMCError as error:
                raise SettingsError(f"{text!r}: {format!r} is not a format ({error}): write FP32, S1E3M7 ...") from None
            if method == LORA and parsed is not None and parsed.update_format is not None:
                raise SettingsError(f"{text!r}: what is frozen or an adapter has one part, as in lora:S1E2M3/64")
        return cls(method, *formats)

    def __str__(self) -> str:
        formats = [self.format] if self.adapter_format == FP32 else [self.format, self.adapter_format]
        return ":".join([self.method, *formats])

    def policy(self, seed: int) -> fedomc.CompressionPolicy | None:
        """Return the policy in which messages are compressed; None sends FP32."""
        travels = self.format if self.method == FULL else self.adapter_format
        return None if travels == FP32 else fedomc.CompressionPolicy.parse(travels, seed=seed)


DEMO = ("full:FP32", f"full:{fedomc.DEFAULT}", "lora:S1E2M3/64:S1E4M3/64")
"""FP32; the library's default; adapters in a byte a value on a base of six bits."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run; the defaults are those of the demo.

    Attributes:
        variants: what is compared, as ``Variant.parse`` reads it.
        model: a model's folder or a GGUF file; empty is the embedded model, which the run pretrains first.
        texts: a folder with a text file for each client; empty is twelve roles of Shakespeare.
        rounds: number of rounds of each variant.
        cohort: number of clients that train in a round; 0 is all.
        local_steps: training steps of each client in a round.
        batch: sequences in a step.
        length: tokens of a sequence.
        learning_rate: of the clients' AdamW in full fine-tuning.
        lora_learning_rate: of the clients' AdamW on adapters.
        rank: of the adapters.
        targets: the names of the layers that get adapters; ``all-linear`` is all but the head.
        held_out: sequences of each client's held-out text that are measured after a round; 0 is all.
        checkpointing: whether layers are computed again in the backward pass, for less memory and more time.
        activations: format in which activations are held; empty leaves them as they are.
        head_slice: entries of a large vocabulary whose logits are in memory at a time; 0 is all.
        prompt: the beginning of the samples.
        sample_tokens: tokens of a sample.
        pretraining_steps: steps in which the embedded model is pretrained.
        seed: of all random numbers.
        round_timeout: seconds to wait for the clients of a round.
    """

    variants: tuple[str, ...] = DEMO
    model: str = ""
    texts: str = ""
    rounds: int = 6
    cohort: int = 0
    local_steps: int = 8
    batch: int = 8
    length: int = 128
    learning_rate: float = 1e-3
    lora_learning_rate: float = 4e-3
    rank: int = 8
    targets: str = "all-linear"
    held_out: int = 16
    checkpointing: bool = False
    activations: str = ""
    head_slice: int = 0
    prompt: str = "What is "
    sample_tokens: int = 160
    pretraining_steps: int = 400
    seed: int = 0
    round_timeout: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("rounds", "local_steps", "batch", "rank", "sample_tokens", "pretraining_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: it must be 1 or more")
        if self.length < 2:
            raise SettingsError(f"length={self.length}: a sequence has 2 tokens or more, as each predicts the next")
        for name in ("cohort", "held_out", "head_slice"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name}={getattr(self, name)}: it must not be negative")
        if not 0 <= self.seed < 2**32:
            raise SettingsError(f"seed={self.seed}: it must lie in 0..{2**32 - 1}")
        for name in ("learning_rate", "lora_learning_rate", "round_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{name}={value}: it must be a positive number")
        if not self.variants:
            raise SettingsError("variants is empty: name at least one, such as full:FP32")
        if self.activations:
            fedomc.Encoding.parse(self.activations)
        for each in self.parsed:
            if self.parsed.count(each) > 1:
                raise SettingsError(f"variant {each} is given twice")
            each.policy(self.seed)

    @property
    def parsed(self) -> list[Variant]:
        """The variants."""
        return [Variant.parse(text) for text in self.variants]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {**dataclasses.asdict(self), "variants": list(self.variants)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Settings":
        """Read settings from a run config, or from what ``to_dict`` returned: with dashes or underscores in names.

        Raises:
            SettingsError: an unknown name or a value of the wrong kind.
        """
        return read_settings(cls, values, SettingsError)
