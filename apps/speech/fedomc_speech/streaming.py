"""Recognition while the speaker speaks: audio in pieces to log-probabilities to text."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc_speech.errors import RecognitionError
from fedomc_speech.features import LogMelStream
from fedomc_speech.model import LOOKAHEAD, StreamingSpeechModel
from fedomc_speech.tokens import BLANK, Tokenizer


class ChunkedModel:
    """Runs a streaming model on one utterance, chunk by chunk: computes what the model does with all of it at once.

    Encoder frame i needs feature frames up to ``subsampling * i``, so the first chunk of ``1 + lookahead`` encoder
    frames takes ``1 + lookahead * subsampling`` feature frames, and each later one ``(1 + lookahead) * subsampling``.
    Between chunks it holds the keys and values of the frames that can still be attended to, and the last inputs of
    each convolution: memory does not grow with the utterance.

    Args:
        model: plain or compressed; it is put into evaluation mode.
        lookahead: encoder frames in a chunk, less one.
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
            RecognitionError: after `finish`.
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
        """Return the log-probabilities ``[N, vocabulary]`` of what is left: the utterance has ended."""
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
    """Turns the audio of one utterance into text by greedy decoding, while it comes.

    Args:
        model: plain or compressed; it is put into evaluation mode.
        tokenizer: of the model's corpus.
        lookahead: encoder frames in a chunk, less one; text comes a chunk late, 80 ms a frame.

    Attributes:
        tokens: the identifiers so far, collapsed and without blanks. They are final: later audio only adds to them.
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
        """Take float32 ``[samples]`` at 16 kHz, return the text so far.

        Raises:
            RecognitionError: after `finish`.
        """
        return self._collapse(self._model.push(self._features.push(audio)))

    def finish(self) -> str:
        """Return the whole text: the utterance has ended."""
        return self._collapse(torch.cat([self._model.push(self._features.finish()), self._model.finish()]))

    def _collapse(self, log_probabilities: Tensor) -> str:
        for token in log_probabilities.argmax(-1).tolist():
            if token not in (self._last, BLANK):
                self.tokens.append(token)
            self._last = token
        return self.text
