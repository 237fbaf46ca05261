"""The corpus ``digits``: spoken digits and commands, to try things on."""

from dataclasses import dataclass
from random import Random

from fedomc_speech.corpus.synthetic import SyntheticConfig
from fedomc_speech.errors import CorpusError


@dataclass(frozen=True)
class DigitsConfig(SyntheticConfig):
    """The configuration of ``digits``, whose utterances are sequences of independent words.

    Attributes:
        min_words: smallest number of words in an utterance.
        max_words: largest number of words in an utterance.
    """

    name = "digits"
    version = 1
    words = (
        *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
    )
    rates = (120, 170)
    pitches = (35, 65)

    min_words: int = 2
    max_words: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_words <= self.max_words:
            raise CorpusError(
                f"the corpus digits cannot have utterances of {self.min_words} to {self.max_words} words; "
                "choose min_words of 1 or more and max_words not below it"
            )

    def sentence(self, random: Random) -> list[str]:
        """Draw the words of an utterance."""
        return random.choices(self.words, k=random.randint(self.min_words, self.max_words))
