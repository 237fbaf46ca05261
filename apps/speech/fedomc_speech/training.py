"""Local training on a client, and the word error rate of a model."""

import functools
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jiwer
import torch
from torch import Tensor

import fedomc
from fedomc_speech import features
from fedomc_speech.augmentation import Augmentation
from fedomc_speech.corpus.base import SAMPLE_RATE, Utterance
from fedomc_speech.model import SpeechModel
from fedomc_speech.tokens import Tokenizer, ctc_collapse

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class LocalResult:
    """The result of local training on a client.

    Attributes:
        loss: CTC loss, averaged over the local steps.
        examples: number of utterances used, with repetitions.
        parameter_bytes: bytes that the model's parameters hold.
    """

    loss: float
    examples: int
    parameter_bytes: int


def train_locally(
    model: SpeechModel,
    utterances: Sequence[Utterance],
    tokenizer: Tokenizer,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    clip_norm: float,
    seed: int,
    augment: Augmentation | None = None,
    activations: str = "",
) -> LocalResult:
    """Train a model in place by SGD, stepping in the backward pass.

    Args:
        model: a plain or compressed model.
        utterances: the client's utterances.
        tokenizer: the tokenizer of the corpus.
        steps: number of steps.
        batch: utterances in a step, drawn without replacement while there are enough.
        learning_rate: learning rate of SGD.
        clip_norm: largest norm of the gradient of each variable.
        seed: seed of the batches, of dropout and of the augmentation.
        augment: varies the features whenever an utterance is used; None leaves them as they are.
        activations: format of what is kept for the backward pass; empty is FP32.
    """
    order = list(utterances)
    draw = random.Random(seed)  # noqa: S311
    draw.shuffle(order)
    torch.manual_seed(seed)
    stepping = fedomc.step_in_backward(model, torch.optim.SGD, lr=learning_rate, clip_norm=clip_norm)
    packing: AbstractContextManager[Any] = (
        fedomc.compress_activations(model, activations, seed=seed) if activations else nullcontext()
    )
    model.train()
    losses, seen = [], 0
    try:
        with packing:
            for step in range(steps):
                chosen = [order[(step * batch + i) % len(order)] for i in range(min(batch, len(order)))]
                inputs = [features_of(utterance, model) for utterance in chosen]
                ready = features.pad([augment(f, draw) for f in inputs] if augment else inputs)
                targets = [tokenizer.encode(utterance.text) for utterance in chosen]
                loss = model.ctc_loss(ready.features, ready.frames, targets)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(float(loss.detach()))
                seen += len(chosen)
    finally:
        stepping.remove()
    return LocalResult(sum(losses) / len(losses), seen, fedomc.parameter_bytes(model).total)


@dataclass(frozen=True)
class Errors:
    """The word errors of a model on each utterance of a test.

    Attributes:
        errors: number of words substituted, deleted or inserted, by utterance.
        words: number of words spoken, by utterance.
    """

    errors: tuple[int, ...]
    words: tuple[int, ...]

    @property
    def word_error_rate(self) -> float:
        """The word error rate in percent."""
        return 100.0 * sum(self.errors) / sum(self.words)


def word_errors(model: SpeechModel, utterances: Sequence[Utterance], tokenizer: Tokenizer) -> Errors:
    """Count the word errors of a model with greedy decoding."""
    errors, words = [], []
    for at in range(0, len(utterances), EVALUATION_BATCH):
        part = utterances[at : at + EVALUATION_BATCH]
        hypotheses = recognize(model, [features_of(utterance, model) for utterance in part], tokenizer)
        for utterance, hypothesis in zip(part, hypotheses, strict=True):
            found = jiwer.process_words(utterance.text, hypothesis)
            errors.append(found.substitutions + found.deletions + found.insertions)
            words.append(found.hits + found.substitutions + found.deletions)
    return Errors(tuple(errors), tuple(words))


def recognize(model: SpeechModel, inputs: Sequence[Tensor], tokenizer: Tokenizer) -> list[str]:
    """Decode features ``[T_i, mels]`` greedily."""
    ready = features.pad(inputs)
    model.eval()
    with torch.no_grad():
        log_probabilities, lengths = model(ready.features, ready.frames)
    best = log_probabilities.argmax(-1)  # [B, T]
    return [
        tokenizer.decode(ctc_collapse(ids[:length].tolist()))
        for ids, length in zip(best, lengths.tolist(), strict=True)
    ]


def features_of(utterance: Utterance, model: SpeechModel) -> Tensor:
    """Return the features of an utterance for a model; those of short utterances are cached, at most 160 kB each."""
    if utterance.frames > 5 * SAMPLE_RATE:
        return features.log_mel(utterance.audio(), model.mels, streaming=model.streaming)
    return _kept_features(utterance, model.mels, model.streaming)


@functools.lru_cache(maxsize=4096)
def _kept_features(utterance: Utterance, mels: int, streaming: bool) -> Tensor:
    return features.log_mel(utterance.audio(), mels, streaming=streaming)
