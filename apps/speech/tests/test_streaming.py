"""Chunk by chunk is all at once: from audio to features, from features to log-probabilities, from audio to text."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pytest
import torch

import fedomc
from fedomc_speech import corpus, features, model, training
from fedomc_speech.errors import RecognitionError
from fedomc_speech.model import StreamingSpeechModel
from fedomc_speech.settings import Settings, Variant
from fedomc_speech.streaming import ChunkedModel, StreamingRecognizer
from fedomc_speech.tokens import ctc_collapse, tokenizer_for

MELS = 40
Frames = TypeVar("Frames", torch.Tensor, np.ndarray)


def built(seed: int = 0, vocabulary: int = 21) -> StreamingSpeechModel:
    return cast(StreamingSpeechModel, model.build("tiny", vocabulary, seed=seed, streaming=True).eval())


def in_pieces(whole: Frames, size: int) -> Iterator[Frames]:
    """Cut into pieces of a size; 0 means pieces of random sizes, some empty."""
    random = np.random.default_rng(0)
    at = 0
    while at < len(whole):
        piece = size or int(random.integers(0, 2 + len(whole) // 3))
        yield whole[at : at + piece]
        at += piece


def run_chunked(network: StreamingSpeechModel, inputs: torch.Tensor, size: int, lookahead: int) -> torch.Tensor:
    chunked = ChunkedModel(network, lookahead)
    return torch.cat([*(chunked.push(piece) for piece in in_pieces(inputs, size)), chunked.finish()])


def run_whole(network: StreamingSpeechModel, inputs: torch.Tensor, lookahead: int) -> torch.Tensor:
    with torch.no_grad():
        log_probabilities, lengths = network(inputs[None], torch.tensor([len(inputs)]), lookahead)
    assert int(lengths[0]) == log_probabilities.shape[1]
    return log_probabilities[0]


@pytest.mark.parametrize("samples", [1, 159, 160, 400, 16000, 16161])
@pytest.mark.parametrize("size", [1000, 160, 7, 0, 100_000])
def test_features_of_pieces_are_those_of_the_whole(samples: int, size: int) -> None:
    audio = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    stream = features.LogMelStream(MELS)
    found = torch.cat([*(stream.push(piece) for piece in in_pieces(audio, size)), stream.finish()])
    whole = features.log_mel(audio, MELS, streaming=True)
    assert found.shape == whole.shape == (1 + samples // features.HOP, MELS)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_features_normalised_over_the_utterance_or_not_differ_by_a_scale_and_a_shift_alone() -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    streaming = features.log_mel(audio, MELS, streaming=True)
    normalised = (streaming - streaming.mean()) / streaming.std()
    torch.testing.assert_close(features.log_mel(audio, MELS), normalised, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lookahead", [0, 1, 3, model.LOOKAHEAD, 13, 80])
@pytest.mark.parametrize("frames", [1, 2, 8, 9, 10, 48, 49, 50, 105, 106, 300, 1500])
def test_chunk_by_chunk_gives_what_all_at_once_does(lookahead: int, frames: int) -> None:
    torch.manual_seed(frames)
    network, inputs = built(), torch.randn(frames, MELS)
    whole = run_whole(network, inputs, lookahead)
    assert len(whole) == 1 + -(-(frames - 1) // 8)
    for size in (1, 56, 0, frames) if frames < 500 else (0, frames):
        torch.testing.assert_close(run_chunked(network, inputs, size, lookahead), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["S1E8M23", "S1E3M7", "S1E2M3+S1E2M1"])
def test_chunk_by_chunk_with_compressed_weights(format: str) -> None:
    network = built()
    policy = Variant.parse(format).policy(Settings())
    assert policy is not None
    fedomc.compress_(network, policy.select(network))
    inputs = torch.randn(333, MELS)
    whole = run_whole(network, inputs, 3)
    torch.testing.assert_close(run_chunked(network, inputs, 10, 3), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_chunk_is_given_out_as_soon_as_its_last_frame_is_there(lookahead: int) -> None:
    chunked, given = ChunkedModel(built(), lookahead), []
    for _ in range(100):
        given.append(len(chunked.push(torch.randn(1, MELS))))
    size = 1 + lookahead
    due = {lookahead * 8 + i * size * 8 for i in range(100)}
    assert given == [size if at in due else 0 for at in range(100)]


def test_memory_does_not_grow_with_the_utterance() -> None:
    chunked, held = ChunkedModel(built(), 6), []
    for _ in range(30):
        chunked.push(torch.randn(56, MELS))
        keys = [layer.keys for layer in chunked._caches["past_key_values"].layers]
        held.append(sum(key.numel() for key in keys))
    assert held[0] < held[-1] == held[len(held) // 2]


def test_two_utterances_at_a_time_do_not_mix() -> None:
    network = built()
    inputs = [torch.randn(150, MELS), torch.randn(150, MELS)]
    both = [ChunkedModel(network, 1) for _ in inputs]
    outputs: list[list[torch.Tensor]] = [[], []]
    for at in range(0, 150, 25):
        for chunked, whole, done in zip(both, inputs, outputs, strict=True):
            done.append(chunked.push(whole[at : at + 25]))
    for chunked, whole, done in zip(both, inputs, outputs, strict=True):
        found = torch.cat([*done, chunked.finish()])
        torch.testing.assert_close(found, run_whole(network, whole, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [4000, 1234, 100_000])
def test_audio_in_pieces_becomes_the_text_of_the_whole(tones: Path, size: int) -> None:
    loaded = corpus.load("an4", tones)
    tokenizer = tokenizer_for(loaded)
    network = built(vocabulary=tokenizer.vocab_size)
    spoken = 0
    for utterance in loaded.test:
        audio = utterance.audio()
        recognizer = StreamingRecognizer(network, tokenizer)
        so_far: list[int] = []
        for piece in in_pieces(audio, size):
            recognizer.push(piece)
            assert recognizer.tokens[: len(so_far)] == so_far
            so_far = list(recognizer.tokens)
        text = recognizer.finish()
        whole = features.log_mel(audio, network.mels, streaming=True)
        assert recognizer.tokens == ctc_collapse(run_whole(network, whole, model.LOOKAHEAD).argmax(-1).tolist())
        assert [text] == training.recognize(network, [whole], tokenizer)
        spoken += len(recognizer.tokens)
    assert spoken > 0


def test_what_cannot_be_is_refused() -> None:
    network = built()
    with pytest.raises(RecognitionError, match="lookahead=-1"):
        ChunkedModel(network, -1)
    chunked = ChunkedModel(network)
    assert chunked.finish().shape == (0, 21)
    with pytest.raises(RecognitionError, match="new object"):
        chunked.push(torch.zeros(1, MELS))
