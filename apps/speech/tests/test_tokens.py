from pathlib import Path

import pytest

from fedomc_speech.corpus import CorpusError, Utterance
from fedomc_speech.corpus.base import Corpus
from fedomc_speech.tokens import (
    BLANK,
    CharacterTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
    ctc_collapse,
    tokenizer_for,
)

TEXTS = [
    "the north wind and the sun were disputing which was the stronger",
    "when a traveller came along wrapped in a warm cloak",
    "they agreed that the one who first made the traveller take off his cloak",
    "should be considered stronger than the other",
    "then the north wind blew as hard as he could",
]
TOKENIZERS = {
    "words": WordTokenizer({word for text in TEXTS for word in text.split()}),
    "characters": CharacterTokenizer(TEXTS),
    "pieces": SentencePieceTokenizer.train(TEXTS, 64),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@pytest.mark.parametrize("text", [*TEXTS, "sun and wind", "cloak", ""])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(BLANK < number < tokenizer.vocab_size for number in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "tokenizer, text, ids, vocab_size",
    [
        (WordTokenizer(["two", "one"]), "one two two", [1, 2, 2], 3),
        (CharacterTokenizer(["ab", "b a"]), "a b", [2, 1, 3], 4),
    ],
)
def test_identifiers(tokenizer, text, ids, vocab_size):
    assert tokenizer.encode(text) == ids
    assert tokenizer.vocab_size == vocab_size


@pytest.mark.parametrize(
    "tokenizer, text, message",
    [
        (WordTokenizer(["one"]), "one ten", "the word 'ten' is not in the vocabulary"),
        (CharacterTokenizer(["one"]), "on?", r"the character '\?' is not in the vocabulary"),
    ],
)
def test_unknown_unit(tokenizer, text, message):
    with pytest.raises(CorpusError, match=message):
        tokenizer.encode(text)


def test_pieces_are_deterministic_and_serialisable():
    pieces = SentencePieceTokenizer.train(iter(TEXTS), 64)
    assert pieces.model == TOKENIZERS["pieces"].model
    assert 30 < pieces.vocab_size <= 64
    assert SentencePieceTokenizer(pieces.model).encode(TEXTS[0]) == pieces.encode(TEXTS[0])
    assert len(pieces.encode(TEXTS[0])) < len(TEXTS[0])


def test_unknown_character_in_pieces_is_not_the_blank():
    assert BLANK not in TOKENIZERS["pieces"].encode("the ζ wind")


@pytest.mark.parametrize(
    "texts, vocab_size, message",
    [
        ([], 64, "give more text"),
        ([""], 64, "give more text"),
        (TEXTS, 5, "Vocabulary size is smaller than required_chars"),
    ],
)
def test_pieces_cannot_be_learnt(texts, vocab_size, message):
    with pytest.raises(CorpusError, match=message):
        SentencePieceTokenizer.train(texts, vocab_size)


def test_damaged_model():
    with pytest.raises(CorpusError, match="cannot be read"):
        SentencePieceTokenizer(b"not a model")


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([], []),
        ([0, 0], []),
        ([1, 1, 1], [1]),
        ([1, 0, 1], [1, 1]),
        ([0, 2, 2, 0, 0, 2, 3, 3, 0], [2, 2, 3]),
    ],
)
def test_ctc_collapse(ids, expected):
    assert ctc_collapse(ids) == expected


def test_tokenizer_for():
    train = tuple(Utterance("speaker", text, Path("x.wav"), 0, 1) for text in TEXTS)
    assert isinstance(tokenizer_for(Corpus("closed", train, train, ("one", "two"))), WordTokenizer)
    pieces = tokenizer_for(Corpus("open", train, train, None))
    assert isinstance(pieces, SentencePieceTokenizer)
    assert 30 < pieces.vocab_size <= 256
    assert tokenizer_for(Corpus("open", train, train, None), 40).vocab_size == 40
