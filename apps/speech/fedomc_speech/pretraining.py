"""A model for a federation to begin with, trained in one place."""

import dataclasses
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import fedomc
from fedomc.errors import PayloadError
from fedomc_speech import corpus, features, training
from fedomc_speech.augmentation import Augmentation
from fedomc_speech.corpus import Utterance
from fedomc_speech.errors import SettingsError
from fedomc_speech.model import SpeechModel, build
from fedomc_speech.settings import Settings
from fedomc_speech.tokens import Tokenizer, tokenizer_for

_TOKENS = "tokens"  # in a file's metadata: what the model's outputs stand for, as JSON
_MODEL = "model"  # and its class: models of different classes may have variables of the same names and shapes


@dataclass(frozen=True)
class Pretraining:
    """How a model is trained in one place: AdamW, with a linear warm-up and half a cosine.

    Attributes:
        steps: how many.
        batch: utterances a step.
        rate: highest learning rate.
        warmup: steps in which it rises.
        weight_decay: of the weight matrices.
        clip_norm: of the gradient of all variables together.
        seed: of the model and everything random.

    Raises:
        SettingsError: a value that cannot be.
    """

    steps: int = 1500
    batch: int = 16
    rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: it must be 1 or more")
        for name in ("warmup", "weight_decay", "seed"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise SettingsError(f"{name}={value}: it must not be negative")
        for name in ("rate", "clip_norm"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise SettingsError(f"{name}={value}: it must be a positive number")

    def rate_in(self, step: int) -> float:
        """Return the learning rate in a step; the first is 1."""
        warm = min(1.0, step / max(1, self.warmup))
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))


def train(
    model: SpeechModel,
    utterances: Sequence[Utterance],
    tokenizer: Tokenizer,
    settings: Pretraining,
    augment: Augmentation | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train a model in place.

    Args:
        model: to train.
        utterances: of all speakers.
        tokenizer: of the corpus.
        settings: of the training.
        augment: changes the features at each sight.
        progress: called with the steps done and the CTC loss of the last one.
    """
    draw = random.Random(settings.seed)  # noqa: S311
    torch.manual_seed(settings.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.rate,
        betas=(0.9, 0.98),
    )
    order: list[Utterance] = []
    model.train()
    for step in range(1, settings.steps + 1):
        while len(order) < settings.batch:
            order += draw.sample(utterances, len(utterances))
        chosen, order = order[: settings.batch], order[settings.batch :]
        inputs = [training.features_of(utterance, model) for utterance in chosen]
        ready = features.pad([augment(f, draw) for f in inputs] if augment else inputs)
        loss = model.ctc_loss(ready.features, ready.frames, [tokenizer.encode(u.text) for u in chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_in(step)
        optimizer.step()
        if progress:
            progress(step, float(loss.detach()))


def starting_model(settings: Settings, tokenizer: Tokenizer) -> SpeechModel:
    """Build the model that a run begins with.

    Raises:
        SettingsError: the file of the initial model is missing or damaged, or of another model or vocabulary.
    """
    network = build(settings.model, tokenizer.vocab_size, seed=settings.seed, streaming=settings.streaming)
    if settings.initial:
        load(network, tokenizer, settings.initial)
    return network


def make(
    path: str | os.PathLike[str],
    start: Settings,
    settings: Pretraining,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Train a model on a corpus and write it; returns its word error rate there, in percent.

    Args:
        path: of the file, which is written at the end.
        start: corpus, model and augmentation.
        settings: of the training.
        progress: called with the steps done and the CTC loss of the last one.

    Raises:
        SettingsError: the file cannot be written, or the initial model cannot be taken.
    """
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise SettingsError(f"{path} cannot be written: choose a file in a folder that is there")
    loaded = corpus.load(start.corpus, start.corpus_path, start.corpus_digest)
    tokenizer = tokenizer_for(loaded)
    torch.set_num_threads(1)  # more make so small a model no faster
    model = starting_model(start, tokenizer)
    train(model, loaded.train, tokenizer, settings, Augmentation() if start.augment else None, progress)
    save(model, tokenizer, settings, path)
    return training.word_errors(model, loaded.test, tokenizer).word_error_rate


def save(model: SpeechModel, tokenizer: Tokenizer, settings: Pretraining, path: str | os.PathLike[str]) -> None:
    """Write a model, with what its outputs stand for.

    Raises:
        SettingsError: the file cannot be written.
    """
    metadata = {**_description(model, tokenizer), "pretraining": json.dumps(dataclasses.asdict(settings))}
    try:
        fedomc.save_model(model, path, metadata)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error}): choose another file") from error


def load(model: SpeechModel, tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Make a model what ``save`` wrote.

    Raises:
        SettingsError: the file is missing or damaged, or of another model or vocabulary; the model is as it was.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        for key, wanted in _description(model, tokenizer).items():
            if (found := metadata.get(key)) != wanted:
                raise PayloadError(f"{key}: {_short(found)}, not {_short(wanted)}")
        fedomc.load_model(model, path)
    except (OSError, SafetensorError, PayloadError) as error:
        raise SettingsError(
            f"initial={path} cannot be taken ({error}): give what pretrain wrote for this model and these words"
        ) from error


def _description(model: SpeechModel, tokenizer: Tokenizer) -> dict[str, str]:
    return {_MODEL: type(model).__name__, _TOKENS: json.dumps(tokenizer.units)}


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) < 60 else f"{text[:50]} ..."
