"""The settings of a run: corpus, model, training, and the formats that it compares."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fedomc
from fedomc.flower.run_config import read_settings
from fedomc.methods import parse_method
from fedomc_speech.errors import SettingsError

FP32 = "FP32"


@dataclass(frozen=True)
class Variant:
    """One of the formats that a run compares.

    Attributes:
        format: ``FP32``, or what ``fedomc.Encoding.parse`` reads: ``S1E3M7`` (one part), ``S1E2M3/64+S1E2M1/64`` (base
            and update), and ``>DRIVE1`` behind it for an uplink.
        fraction: of the compressible parameters that is compressed.
    """

    format: str
    fraction: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Parse ``FP32``, or a format with an optional fraction, as in ``S1E3M7@0.9`` and ``S1E2M3+S1E2M1``.

        Raises:
            SettingsError: the text is neither.
        """
        if text == FP32:
            return cls(FP32)
        format, at, fraction = text.partition("@")
        try:
            fedomc.Encoding.parse(format)
        except fedomc.OMCError as error:
            raise SettingsError(
                f"{text!r} is not a format ({error}): write FP32, S1E3M7, S1E3M7@0.9 (with a fraction), "
                "S1E2M3/64+S1E2M1/64, or S1E3M7>DRIVE1 (with an uplink)"
            ) from None
        try:
            return cls(format, float(fraction) if at else 1.0)
        except ValueError:
            raise SettingsError(f"{text!r}: {fraction!r} is not a number") from None

    def __str__(self) -> str:
        return self.format if self.fraction == 1.0 else f"{self.format}@{self.fraction!r}"

    def policy(self, settings: "Settings") -> fedomc.CompressionPolicy | None:
        """Return the compression policy of this variant; None for FP32."""
        if self.format == FP32:
            return None
        rounding = settings.rounding or ("stochastic" if "+" in self.format else "nearest")
        transforms = fedomc.Encoding.parse(self.format).format.transforms
        transform = settings.transform or ("scaled-affine" if rounding == "nearest" else "scaled")
        return fedomc.CompressionPolicy.parse(
            self.format,
            transform=transform if len(transforms) > 1 else None,
            weight_matrices_only=settings.weight_matrices_only,
            fraction=self.fraction,
            rounding=rounding,
            seed=settings.seed,
            # Biases of the attention that have two dimensions.
            exclude=("*.bias_u", "*.bias_v") if settings.weight_matrices_only else (),
            format_by_name=_by_name(settings.format_by_name),
        )


@dataclass(frozen=True)
class Settings:
    """All settings of a run; the defaults are those of the demo.

    Attributes:
        formats: the variants to compare, as ``Variant.parse`` reads them.
        corpus: ``digits``, ``commands``, ``an4``, ``librispeech`` or ``folder``.
        corpus_path: folder of the corpus; empty for the first two, which are synthesised on the machine.
        corpus_digest: of the corpus' lists and transcriptions (`Corpus.digest`); server and clients refuse a corpus
            with another one. Empty accepts any.
        split: ``speaker`` (a client holds whole speakers) or ``iid``.
        clients: number of clients; 0 means one for each speaker.
        model: ``tiny`` or ``large``.
        streaming: whether the model can recognize speech while it is spoken.
        initial: file of the model to begin with, as ``pretrain`` writes it; empty begins with a random model.
        rounds: number of rounds for each variant.
        cohort: number of clients in each round.
        local_steps: training steps of each client in a round.
        batch: utterances in a local step.
        client_learning_rate: learning rate of the clients' SGD. With one local step it only matters to formats in one
            part: the server's Adam divides by the size of the gradient, so that FP32 trains alike at any rate.
        clip_norm: largest norm of the gradient of each variable.
        augment: whether the clients vary the features of an utterance whenever it is used.
        server_learning_rate: peak learning rate of the server's Adam.
        warmup: rounds in which the server's learning rate rises to its peak, at most a quarter of all; then it falls
            along a cosine.
        evaluate_every: the word error rate is measured every so many rounds.
        format_by_name: formats of variables, or of their bases, by name pattern, instead of the variant's:
            ``*.conv.*=S1E2M3 head.*=S1E2M3``. The first pattern that matches decides.
        transform: the transformation of each variable in formats with one scale; empty is ``scaled`` with stochastic
            rounding, ``scaled-affine`` with rounding to nearest.
        weight_matrices_only: whether biases and normalization stay in FP32.
        rounding: ``nearest`` or ``stochastic``, for variables in one part and for the update part of those in two;
            empty is ``nearest`` in one part and ``stochastic`` in two, as in ``docs/results``.
        aggregate: ``delta`` or ``weights``.
        entropy_coding: which messages are entropy coded: ``none``, ``down``, ``up`` or ``both``.
        unquantized_format: format in which variables are sent that a fraction leaves in FP32, such as ``S1E5M10``;
            empty is FP32.
        activations: format of what a local step keeps for its backward pass, such as ``S1E4M3``; empty is FP32.
        seed: seed of all random numbers.
        round_timeout: seconds to wait for the clients of a round; later replies are left out.
    """

    formats: tuple[str, ...] = (FP32, "S1E3M7@0.9", fedomc.DEFAULT)
    corpus: str = "digits"
    corpus_path: str = ""
    corpus_digest: str = ""
    split: str = "speaker"
    clients: int = 0
    model: str = "tiny"
    streaming: bool = False
    initial: str = ""
    rounds: int = 300
    cohort: int = 8
    local_steps: int = 1
    batch: int = 8
    client_learning_rate: float = 1.0
    clip_norm: float = 0.3
    augment: bool = False
    server_learning_rate: float = 1.5e-3
    warmup: int = 20
    evaluate_every: int = 20
    format_by_name: str = ""
    transform: str = ""
    weight_matrices_only: bool = True
    rounding: str = ""
    aggregate: str = "delta"
    entropy_coding: str = "none"
    unquantized_format: str = ""
    activations: str = ""
    seed: int = 0
    round_timeout: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("rounds", "cohort", "local_steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: it must be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise SettingsError(f"seed={self.seed}: it must lie in 0..{2**32 - 1}")
        if not self.formats:
            raise SettingsError("formats is empty: name at least one, such as FP32")
        for name in ("clients", "warmup"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name}={getattr(self, name)}: it must not be negative")
        for name in ("client_learning_rate", "clip_norm", "server_learning_rate", "round_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{name}={value}: it must be a positive number")
        if self.aggregate not in ("delta", "weights"):
            raise SettingsError(f"aggregate={self.aggregate!r} is unknown: use delta or weights")
        if self.entropy_coding not in ("none", "down", "up", "both"):
            raise SettingsError(f"entropy_coding={self.entropy_coding!r} is unknown: use none, down, up or both")
        _by_name(self.format_by_name)
        if self.unquantized_format:
            fedomc.FloatFormat.parse(self.unquantized_format)
        if self.activations:
            parse_method(self.activations)
        doubled = [str(variant) for variant in self.variants if self.variants.count(variant) > 1]
        if doubled:
            raise SettingsError(f"format {doubled[0]} is given twice")
        for variant in self.variants:
            if variant.fraction == 0:
                raise SettingsError(f"{variant.format}@0 leaves no variable to compress: write FP32")
            variant.policy(self)  # raises the error of a format, a fraction, a transformation or a rounding

    @property
    def variants(self) -> list[Variant]:
        """The formats, parsed."""
        return [Variant.parse(text) for text in self.formats]

    def server_learning_rate_in(self, server_round: int) -> float:
        """Return the server's learning rate in a round, counted from 1: linear warm-up, then half a cosine."""
        warmup = min(self.warmup, self.rounds // 4)
        if server_round <= warmup:
            return self.server_learning_rate * server_round / warmup
        done = (server_round - warmup) / (self.rounds + 1 - warmup)
        return self.server_learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {**dataclasses.asdict(self), "formats": list(self.formats)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Settings":
        """Read settings from a mapping such as a run config: names with dashes or underscores, formats as one string.

        Raises:
            SettingsError: an unknown name or a value of the wrong kind.
        """
        return read_settings(cls, values, SettingsError)


def _by_name(text: str) -> dict[str, fedomc.FloatFormat]:
    """Parse formats by name pattern."""
    pairs = [pair.partition("=") for pair in text.split()]
    for pattern, _, fmt in pairs:
        if not (pattern and fmt):
            raise SettingsError(f"format_by_name={text!r}: write PATTERN=FORMAT, as in *.conv.*=S1E2M3")
    return {pattern: fedomc.FloatFormat.parse(fmt) for pattern, _, fmt in pairs}
