"""Training of a model on one machine, for a federation to begin with."""

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

# Keys of a file's metadata.
_TOKENS = "tokens"  # the units that the model's outputs stand for, as JSON
_MODEL = "model"  # the model's class: those of different classes may have variables of the same names and shapes


@dataclass(frozen=True)
class Pretraining:
    """The settings of a training on one machine: AdamW, with linear warm-up and half a cosine.

    Attributes:
        steps: number of steps.
        batch: utterances in a step.
        learning_rate: peak learning rate.
        warmup: steps in which the learning rate rises to its peak.
        weight_decay: weight decay of the matrices.
        clip_norm: largest norm of the gradient of all variables together.
        seed: seed of the model and of all other random numbers.

    Raises:
        SettingsError: a value is impossible.
    """

    steps: int = 1500
    batch: int = 16
    learning_rate: float = 2e-3
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
        for name in ("learning_rate", "clip_norm"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise SettingsError(f"{name}={value}: it must be a positive number")

    def learning_rate_in(self, step: int) -> float:
        """Return the learning rate in a step, counted from 1."""
        warm = min(1.0, step / max(1, self.warmup))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))


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
        model: the model.
        utterances: those of all speakers.
        tokenizer: the tokenizer of the corpus.
        settings: how to train.
        augment: varies the features whenever an utterance is used; None leaves them as they are.
        progress: called after each step with its number and its CTC loss.
    """
    draw = random.Random(settings.seed)  # noqa: S311
    torch.manual_seed(settings.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
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
            group["lr"] = settings.learning_rate_in(step)
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
    """Train a model on a corpus and write it to a file.

    Args:
        path: the file, which is written at the end.
        start: settings that name the corpus, the model and the augmentation.
        settings: how to train.
        progress: called after each step with its number and its CTC loss.

    Returns:
        The word error rate on the test part of the corpus, in percent.

    Raises:
        SettingsError: the file cannot be written, or the initial model cannot be taken.
    """
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise SettingsError(f"{path} cannot be written: choose a file in a folder that exists")
    loaded = corpus.load(start.corpus, start.corpus_path, start.corpus_digest)
    tokenizer = tokenizer_for(loaded)
    torch.set_num_threads(1)  # more threads do not make so small a model faster
    model = starting_model(start, tokenizer)
    train(model, loaded.train, tokenizer, settings, Augmentation() if start.augment else None, progress)
    save(model, tokenizer, settings, path)
    return training.word_errors(model, loaded.test, tokenizer).word_error_rate


def save(model: SpeechModel, tokenizer: Tokenizer, settings: Pretraining, path: str | os.PathLike[str]) -> None:
    """Write a model to a file, with the units that its outputs stand for.

    Raises:
        SettingsError: the file cannot be written.
    """
    metadata = {**_description(model, tokenizer), "pretraining": json.dumps(dataclasses.asdict(settings))}
    try:
        fedomc.save_model(model, path, metadata)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error}): choose another file") from error


def load(model: SpeechModel, tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Load into a model what ``save`` wrote.

    Raises:
        SettingsError: the file is missing or damaged, or of another model or vocabulary; the model is then unchanged.
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
            f"initial={path} cannot be loaded ({error}): give a file that pretrain wrote for this model and vocabulary"
        ) from error


def _description(model: SpeechModel, tokenizer: Tokenizer) -> dict[str, str]:
    return {_MODEL: type(model).__name__, _TOKENS: json.dumps(tokenizer.units)}


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) < 60 else f"{text[:50]} ..."
