"""The application's speech Conformer on spoken digits, from a model that has begun to learn them.

In the few rounds of a run a Conformer learns little from scratch. The model to begin with is a file:

    python -m fedomc_speech pretrain begun.safetensors --corpus digits --steps 300
    FEDOMC_RECIPES_SPEECH=begun.safetensors python -m benchmarks.recipes --only speech
"""

import functools
import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.recipes.tasks import Examples, Task, UnavailableError
from fedomc_speech import corpus, features, pretraining, training
from fedomc_speech.augmentation import Augmentation
from fedomc_speech.corpus.base import Utterance
from fedomc_speech.model import SpeechModel, build
from fedomc_speech.settings import Settings
from fedomc_speech.tokens import Tokenizer, tokenizer_for

VARIABLE = "FEDOMC_RECIPES_SPEECH"
SPEAKERS = {"train": (0, 12), "validation": (12, 16)}
"""Of the corpus' training speakers; the test speakers are its own."""


class Speech(Task):
    """The score is 100 less the word error rate, on speakers that no client has."""

    name = "speech"
    skew = "by-group"
    batch = 8
    rounds = {"1-step": 40, "4-steps": 12, "epoch-sgdm": 4, "epoch-adamw": 4}  # noqa: RUF012
    rates = {  # noqa: RUF012
        "1-step": (0.03, 0.1, 0.3),
        "4-steps": (0.03, 0.1, 0.3),
        "epoch-sgdm": (0.003, 0.01, 0.03),
        "epoch-adamw": (0.0001, 0.0003, 0.001),
    }
    server_rates = (0.0003, 0.001, 0.003)
    exclude = ("*.bias_u", "*.bias_v")

    def __init__(self, initial: str) -> None:
        self.corpus = corpus.load("digits")
        self.tokenizer: Tokenizer = tokenizer_for(self.corpus)
        self.initial = initial
        self.speakers = sorted({one.speaker for one in self.corpus.train})

    @functools.cached_property
    def digest(self) -> str:
        """Of the corpus, the examples and the model that training begins with."""
        file = hashlib.sha256(Path(self.initial).read_bytes()).hexdigest()
        return hashlib.sha256(f"{super().digest} {self.corpus.digest} {file}".encode()).hexdigest()[:16]

    @functools.cache  # noqa: B019
    def examples(self, part: str) -> Examples:
        """Return the numbers of utterances, for inputs and targets alike, and their speakers."""
        found = self.utterances[part]
        speakers = {name: number for number, name in enumerate(dict.fromkeys(one.speaker for one in found))}
        start = sum(len(self.utterances[p]) for p in list(self.utterances)[: list(self.utterances).index(part)])
        numbers = torch.arange(start, start + len(found))
        return Examples(numbers, numbers, torch.tensor([speakers[one.speaker] for one in found]))

    @functools.cached_property
    def utterances(self) -> dict[str, list[Utterance]]:
        """The utterances of each part."""
        parts = {}
        for part, (start, end) in SPEAKERS.items():
            chosen = set(self.speakers[start:end])
            parts[part] = [one for one in self.corpus.train if one.speaker in chosen]
        return {**parts, "test": list(self.corpus.test)}

    def model(self) -> nn.Module:
        """Read the model that training begins with."""
        return pretraining.starting_model(Settings(initial=self.initial), self.tokenizer)

    def skeleton(self) -> nn.Module:
        """Build the model on the meta device."""
        with torch.device("meta"):
            return build("tiny", self.tokenizer.vocab_size)

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the CTC loss of augmented utterances."""
        assert isinstance(model, SpeechModel)
        draw = random.Random(int(torch.randint(2**31, ())))  # noqa: S311
        chosen = self._chosen(batch)
        varied = [Augmentation()(training.features_of(one, model), draw) for one in chosen]
        ready = features.pad(varied)
        return model.ctc_loss(ready.features, ready.frames, [self.tokenizer.encode(one.text) for one in chosen])

    def score(self, model: nn.Module, examples: Examples) -> float:
        """Return 100 less the word error rate, but no less than 0."""
        assert isinstance(model, SpeechModel)
        return max(0.0, 100 - training.word_errors(model, self._chosen(examples), self.tokenizer).word_error_rate)

    def _chosen(self, examples: Examples) -> Sequence[Utterance]:
        every = [one for part in self.utterances.values() for one in part]
        return [every[number] for number in examples.inputs.tolist()]


if not os.environ.get(VARIABLE):
    raise UnavailableError(
        f"speech needs a model to begin with: python -m fedomc_speech pretrain FILE --corpus digits --steps 300, "
        f"then set {VARIABLE}=FILE"
    )
TASK = Speech(os.environ[VARIABLE])
