"""Streaming recognition: audio comes in pieces and becomes text while the speaker speaks."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc_speech.errors import RecognitionError
from fedomc_speech.features import LogMelStream
from fedomc_speech.model import LOOKAHEAD, StreamingSpeechModel
from fedomc_speech.tokens import BLANK, Tokenizer


class ChunkedModel:
    """Runs a streaming model on one utterance, chunk by chunk, with the same results as on the whole utterance.

    Encoder frame i needs feature frames up to ``subsampling * i``, so the first chunk of ``1 + lookahead`` encoder
    frames takes ``1 + lookahead * subsampling`` feature frames, and each later one ``(1 + lookahead) * subsampling``.
    Between chunks it keeps the keys and values of the frames that can still be attended to, and the last inputs of each
    convolution, so that memory does not grow with the utterance.

    Args:
        model: a plain or compressed model; it is put into evaluation mode.
        lookahead: number of encoder frames in a chunk, minus one.

    Raises:
        RecognitionError: ``lookahead`` is negative.
    """

    def __init__(self, model: StreamingSpeechModel, lookahead: int = LOOKAHEAD) -> None:
        if lookahead < 0:
            raise RecognitionError(f"lookahead={lookahead}: it must be 0 or more encoder frames")
        self.model = model.eval()
        self.lookahead = lookahead
        self._waiting = torch.zeros(0, model.mels)
        self._needed = 1 + lookahead * model.subsampling
        self._caches = {"past_key_values": None, "padding_cache": None}
        self._started = self._finished = False

    def push(self, features: Tensor) -> Tensor:
        """Take feature frames ``[T, mels]``, return log-probabilities ``[N, vocabulary]`` of the chunks they complete.

        Raises:
            RecognitionError: `finish` was called before.
        """
        if self._finished:
            raise RecognitionError("the utterance is finished: make a new object for the next one")
        self._waiting = torch.cat([self._waiting, features])
        done = [torch.zeros(0, self.model.head.out_features)]
        while len(self._waiting) >= self._needed:
            chunk, self._waiting = self._waiting[: self._needed], self._waiting[self._needed :].clone()
            done.append(self._run(chunk))
        return torch.cat(done)

    def finish(self) -> Tensor:
        """End the utterance and return the log-probabilities ``[N, vocabulary]`` of its last frames."""
        last = self.push(self._waiting[:0])
        self._finished = True
        if not len(self._waiting):
            return last
        missing = (int(not self._started) - len(self._waiting)) % self.model.subsampling
        return self._run(F.pad(self._waiting, (0, 0, 0, missing)))

    def _run(self, chunk: Tensor) -> Tensor:
        with torch.no_grad():
            encoded = self.model.encoder(
                chunk[None], num_lookahead_tokens=self.lookahead, use_cache=True, **self._caches
            )
            log_probabilities = F.log_softmax(self.model.head(encoded.last_hidden_state[0]), -1)
        self._caches = {key: encoded[key] for key in self._caches}
        self._started, self._needed = True, (1 + self.lookahead) * self.model.subsampling
        return log_probabilities


class StreamingRecognizer:
    """Recognizes one utterance by greedy decoding while its audio arrives.

    Args:
        model: a plain or compressed model; it is put into evaluation mode.
        tokenizer: the tokenizer of the model's corpus.
        lookahead: number of encoder frames in a chunk, minus one. Text is one chunk late, and each frame is 80 ms.

    Attributes:
        tokens: the identifiers so far, collapsed and without blanks. They are final: later audio only appends to them.

    Raises:
        RecognitionError: ``lookahead`` is negative.
    """

    def __init__(self, model: StreamingSpeechModel, tokenizer: Tokenizer, lookahead: int = LOOKAHEAD) -> None:
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._features = LogMelStream(model.mels)
        self._model = ChunkedModel(model, lookahead)
        self._last = BLANK

    @property
    def text(self) -> str:
        """The text so far."""
        return self._tokenizer.decode(self.tokens)

    def push(self, audio: np.ndarray) -> str:
        """Take float32 audio ``[samples]`` at 16 kHz and return the text so far.

        Raises:
            RecognitionError: `finish` was called before.
        """
        return self._collapse(self._model.push(self._features.push(audio)))

    def finish(self) -> str:
        """End the utterance and return its whole text."""
        return self._collapse(torch.cat([self._model.push(self._features.finish()), self._model.finish()]))

    def _collapse(self, log_probabilities: Tensor) -> str:
        for token in log_probabilities.argmax(-1).tolist():
            if token not in (self._last, BLANK):
                self.tokens.append(token)
            self._last = token
        return self.text
