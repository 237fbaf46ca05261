"""What a run is: corpus, model, recipe, and the formats that it compares."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fedomc
from fedomc_speech.errors import SettingsError

FP32 = "FP32"

_VARIANT = re.compile(r"(?P<base>S1E\d+M\d+)(\+(?P<update>S1E\d+M\d+))?(@(?P<fraction>[0-9.]+))?")


@dataclass(frozen=True)
class Variant:
    """One of the formats that a run compares.

    Attributes:
        format: ``FP32``, ``S1E3M7`` (one part) or ``S1E2M3+S1E2M1`` (base and update).
        fraction: of the compressible parameters that is compressed.
    """

    format: str
    fraction: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Read ``FP32``, or a format with an optional fraction, as in ``S1E3M7@0.9`` and ``S1E2M3+S1E2M1``.

        Raises:
            SettingsError: it is neither.
        """
        if text == FP32:
            return cls(FP32)
        match = _VARIANT.fullmatch(text)
        if match is None:
            raise SettingsError(
                f"{text!r} is not a format: write FP32, S1E3M7, S1E3M7@0.9 (with a fraction) or S1E2M3+S1E2M1"
            )
        fraction = match["fraction"] or "1"
        try:
            return cls(text.partition("@")[0], float(fraction))
        except ValueError:
            raise SettingsError(f"{text!r}: {fraction!r} is not a number") from None

    def __str__(self) -> str:
        return self.format if self.fraction == 1.0 else f"{self.format}@{self.fraction!r}"

    def policy(self, settings: "Settings") -> fedomc.CompressionPolicy | None:
        """Return how this variant compresses; None for FP32."""
        if self.format == FP32:
            return None
        base, _, update = self.format.partition("+")
        return fedomc.CompressionPolicy(
            format=base,
            update_format=update or None,
            transform=settings.transform or None,
            weight_matrices_only=settings.weight_matrices_only,
            fraction=self.fraction,
            rounding=settings.rounding or None,
            seed=settings.seed,
            # The attention's biases, which happen to have two dimensions.
            exclude=("*.bias_u", "*.bias_v") if settings.weight_matrices_only else (),
            format_by_name=_by_name(settings.format_by_name),
        )


@dataclass(frozen=True)
class Settings:
    """All settings of a run, with the demo's values.

    Attributes:
        formats: what to compare, as ``Variant.parse`` reads it.
        corpus: ``digits``, ``commands``, ``an4`` or ``librispeech``.
        corpus_path: folder of the corpus; empty for the first two, which are made on the machine.
        split: ``speaker`` (a client is a speaker) or ``iid``.
        clients: number of clients; 0 means one a speaker.
        model: ``tiny`` or ``large``.
        streaming: whether the model is one that can be run while the speaker speaks.
        initial: file of the model to begin with, as ``pretrain`` writes it; empty begins with a random one.
        rounds: how many.
        cohort: clients a round.
        local_steps: of each client in a round.
        batch: utterances a local step.
        client_rate: learning rate of the clients' SGD; with one local step it counts for formats in one part alone.
        clip_norm: of the gradient of each variable.
        augment: whether the clients change the features at each sight.
        server_rate: highest learning rate of the server's Adam.
        warmup: rounds in which it rises, at most a quarter of all; then it falls along a cosine.
        evaluate_every: rounds between two measurements of the word error rate.
        format_by_name: formats of variables, or of their bases, by name pattern, instead of the format that a variant
            names: ``*.conv.*=S1E2M3 head.*=S1E2M3``; the first pattern that matches counts.
        transform: the per-variable transformation; empty is the library's default for the format.
        weight_matrices_only: leave biases and normalization in FP32.
        rounding: ``nearest`` or ``stochastic``: of variables in one part, of the update part of those in two; empty is
            the library's default for the format.
        aggregate: ``delta`` or ``weights``.
        entropy_coding: which messages go through entropy coding: ``none``, ``down``, ``up`` or ``both``.
        unquantized_format: in which what a fraction leaves in FP32 travels, such as ``S1E5M10``; empty is FP32.
        seed: of everything random.
        round_timeout: seconds to wait for the clients of a round; who is later is left out.
    """

    formats: tuple[str, ...] = (FP32, "S1E3M7@0.9", "S1E2M3+S1E3M0")
    corpus: str = "digits"
    corpus_path: str = ""
    split: str = "speaker"
    clients: int = 0
    model: str = "tiny"
    streaming: bool = False
    initial: str = ""
    rounds: int = 300
    cohort: int = 8
    local_steps: int = 1
    batch: int = 8
    client_rate: float = 1.0
    clip_norm: float = 0.3
    augment: bool = False
    server_rate: float = 1.5e-3
    warmup: int = 20
    evaluate_every: int = 20
    format_by_name: str = ""
    transform: str = ""
    weight_matrices_only: bool = True
    rounding: str = ""
    aggregate: str = "delta"
    entropy_coding: str = "none"
    unquantized_format: str = ""
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
        for name in ("client_rate", "clip_norm", "server_rate", "round_timeout"):
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
        doubled = [str(variant) for variant in self.variants if self.variants.count(variant) > 1]
        if doubled:
            raise SettingsError(f"format {doubled[0]} is given twice")
        for variant in self.variants:
            if variant.fraction == 0:
                raise SettingsError(f"{variant.format}@0 leaves no variable to compress: write FP32")
            variant.policy(self)  # raises what is wrong with a format, a fraction, a transformation or a rounding

    @property
    def variants(self) -> list[Variant]:
        """The formats, parsed."""
        return [Variant.parse(text) for text in self.formats]

    def server_rate_in(self, server_round: int) -> float:
        """Return the server's learning rate in a round (the first is 1): linear warm-up, then half a cosine."""
        warmup = min(self.warmup, self.rounds // 4)
        if server_round <= warmup:
            return self.server_rate * server_round / warmup
        done = (server_round - warmup) / (self.rounds + 1 - warmup)
        return self.server_rate * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {**dataclasses.asdict(self), "formats": list(self.formats)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Settings":
        """Read settings from a mapping, as from a run config: dashes or underscores, formats separated by spaces.

        Raises:
            SettingsError: an unknown name or a value of the wrong kind.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        read: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in fields:
                raise SettingsError(f"setting {key!r} is unknown: there are {', '.join(fields)}")
            if name == "formats":
                read[name] = tuple(value.split()) if isinstance(value, str) else tuple(value)
                continue
            kind: type[Any] = type(fields[name].default)
            try:
                read[name] = _to_bool(value) if kind is bool else kind(value)
                if kind is int and read[name] != float(value):
                    raise ValueError
            except (KeyError, TypeError, ValueError, OverflowError):
                raise SettingsError(f"{key}={value!r}: a value of type {kind.__name__} is expected") from None
        return cls(**read)


def _by_name(text: str) -> dict[str, fedomc.FloatFormat]:
    """Read formats by name pattern."""
    pairs = [pair.partition("=") for pair in text.split()]
    for pattern, _, fmt in pairs:
        if not (pattern and fmt):
            raise SettingsError(f"format_by_name={text!r}: PATTERN=FORMAT expected, as in *.conv.*=S1E2M3")
    return {pattern: fedomc.FloatFormat.parse(fmt) for pattern, _, fmt in pairs}


def _to_bool(value: Any) -> bool:
    """Read what TOML and run configs write for a truth value."""
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[value]
