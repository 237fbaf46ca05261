"""Text to token identifiers and back; identifier 0 is the blank of connectionist temporal classification (CTC)."""

import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final, Protocol

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from fedomc_speech.corpus.base import Corpus
from fedomc_speech.errors import CorpusError

BLANK: Final = 0


class Tokenizer(Protocol):
    """The mapping between text and the identifiers that a model puts out."""

    @property
    def vocab_size(self) -> int:
        """Number of identifiers, with the blank."""

    @property
    def units(self) -> list[str]:
        """The units that the identifiers from 1 on stand for."""

    def encode(self, text: str) -> list[int]:
        """Turn text into identifiers; none of them is the blank.

        Raises:
            CorpusError: the text contains a unit that the tokenizer does not know.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Turn identifiers, collapsed and without blanks, into text."""


class _UnitTokenizer:
    """A tokenizer with a closed set of units, numbered from 1 in sorted order."""

    def __init__(self, units: Iterable[str], kind: str, separator: str) -> None:
        self.units = sorted(set(units))
        self._ids = {unit: number for number, unit in enumerate(self.units, 1)}
        self._kind = kind
        self._separator = separator

    @property
    def vocab_size(self) -> int:
        """Number of identifiers, with the blank."""
        return len(self.units) + 1

    def _encode(self, units: Iterable[str]) -> list[int]:
        try:
            return [self._ids[unit] for unit in units]
        except KeyError as error:
            raise CorpusError(
                f"the {self._kind} {error.args[0]!r} is not in the vocabulary; add it, or leave the utterance out"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Turn identifiers, collapsed and without blanks, into text."""
        return self._separator.join(self.units[number - 1] for number in ids)


class WordTokenizer(_UnitTokenizer):
    """A tokenizer whose tokens are the words of a closed vocabulary.

    Args:
        words: the vocabulary.
    """

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__(words, "word", " ")

    def encode(self, text: str) -> list[int]:
        """Turn words separated by spaces into identifiers.

        Raises:
            CorpusError: a word is not in the vocabulary.
        """
        return self._encode(text.split())


class CharacterTokenizer(_UnitTokenizer):
    """A tokenizer whose tokens are characters, including the space.

    Args:
        texts: texts that contain all characters.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        super().__init__((character for text in texts for character in text), "character", "")

    def encode(self, text: str) -> list[int]:
        """Turn characters into identifiers.

        Raises:
            CorpusError: a character occurs in none of the texts that the tokenizer was made from.
        """
        return self._encode(text)


class SentencePieceTokenizer:
    """A tokenizer whose tokens are frequent pieces of words, found by the unigram model of SentencePiece.

    Args:
        model: a serialised SentencePiece model, as ``train`` makes it.

    Raises:
        CorpusError: ``model`` is no such model.
    """

    def __init__(self, model: bytes) -> None:
        self._processor = SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise CorpusError(f"the SentencePiece model cannot be read ({error}); train it again") from error
        if self._processor.pad_id() != BLANK:
            raise CorpusError("the SentencePiece model has no piece for the blank; train it again")
        self.model = model

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 256) -> "SentencePieceTokenizer":
        """Learn pieces from texts; the same texts in the same order give the same model, bit for bit.

        Args:
            texts: the texts to learn from.
            vocab_size: number of identifiers, including the blank; fewer if the texts do not have so many pieces.

        Raises:
            CorpusError: there is no text, or it has more characters than ``vocab_size`` allows.
        """
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                normalization_rule_name="identity",
                pad_id=BLANK,  # the blank
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                num_threads=1,  # the order of sums would depend on their number
                minloglevel=2,
            )
        except RuntimeError as error:
            raise CorpusError(
                f"no {vocab_size} pieces can be learnt from the texts ({error}); give more text or another vocab_size"
            ) from error
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        """Number of identifiers, with the blank."""
        return int(self._processor.get_piece_size())

    @property
    def units(self) -> list[str]:
        """The pieces of the identifiers from 1 on."""
        return [str(self._processor.id_to_piece(number)) for number in range(1, self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Turn text into identifiers; a character that the texts did not contain becomes the unknown piece."""
        return list(self._processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn identifiers, collapsed and without blanks, into text."""
        return str(self._processor.decode(list(ids)))


def ctc_collapse(ids: Sequence[int]) -> list[int]:
    """Merge repeated identifiers, then drop the blanks, as CTC defines it."""
    return [number for number, _ in groupby(ids) if number != BLANK]


def tokenizer_for(corpus: Corpus, vocab_size: int = 256) -> Tokenizer:
    """Return the tokenizer for a corpus: words for a closed vocabulary, pieces of words for an open one.

    Characters would be too many: CTC needs a frame for every token, and the model keeps only one frame in eight.

    Args:
        corpus: the corpus; pieces are learnt from its training texts.
        vocab_size: largest number of identifiers for an open vocabulary.

    Raises:
        CorpusError: the training texts do not allow it.
    """
    if corpus.words is not None:
        return WordTokenizer(corpus.words)
    return SentencePieceTokenizer.train((utterance.text for utterance in corpus.train), vocab_size)
