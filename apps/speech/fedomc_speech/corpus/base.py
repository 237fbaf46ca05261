"""Corpora: utterances of speakers, and their division among the clients of a federation."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import soundfile

from fedomc_speech.errors import CorpusError

SAMPLE_RATE = 16_000
"""The sample rate of all audio, in Hz."""


@dataclass(frozen=True)
class Utterance:
    """A segment of an audio file and the words that are spoken in it.

    Attributes:
        speaker: name of the speaker.
        text: lower-case words separated by single spaces.
        path: the audio file, mono at ``SAMPLE_RATE``.
        start: first sample of the segment.
        frames: length of the segment in samples.
    """

    speaker: str
    text: str
    path: Path
    start: int
    frames: int

    def audio(self) -> npt.NDArray[np.float32]:
        """Read the segment from the file.

        Returns:
            The samples, [frames], within -1..1.

        Raises:
            CorpusError: the file cannot be read, is too short, or is not mono at ``SAMPLE_RATE``.
        """
        try:
            samples, rate = soundfile.read(self.path, self.frames, self.start, dtype="float32", always_2d=True)
        except (OSError, soundfile.SoundFileError) as error:
            raise _unreadable(self.path, error) from error
        _check_format(self.path, rate, samples.shape[1])
        if len(samples) != self.frames:
            raise CorpusError(
                f"{self.path} has {len(samples)} of the {self.frames} samples from sample {self.start} on: "
                "the file changed after the corpus was loaded; start again"
            )
        mono: npt.NDArray[np.float32] = samples[:, 0]
        return mono


@dataclass(frozen=True)
class Corpus:
    """Recorded speech with its text, for training and for testing.

    Attributes:
        name: as given to ``load``.
        train: utterances that the clients train on.
        test: utterances of speakers who are not in ``train``.
        words: the vocabulary, sorted, if it is closed; None if any word may occur.
        synthetic: whether it is synthesised on this machine, so that its name says everything about it.
    """

    name: str
    train: tuple[Utterance, ...]
    test: tuple[Utterance, ...]
    words: tuple[str, ...] | None
    synthetic: bool = False

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the lists and transcriptions, wherever the files are.

        They cover, in order, each utterance's speaker, text, length and file name without the suffix. The audio itself
        is not read. The digest of a synthetic corpus is empty.
        """
        if self.synthetic:
            return ""
        parts = [
            [(u.speaker, u.text, u.path.stem, u.start, u.frames) for u in part] for part in (self.train, self.test)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def recording(speaker: str, text: str, path: Path, line: str) -> Utterance:
    """Return the utterance that a whole audio file holds.

    Args:
        speaker: name of the speaker.
        text: what is spoken; it is brought to lower case and single spaces.
        path: the audio file.
        line: the place in a list that names the file, for error messages.

    Raises:
        CorpusError: the speaker or the text is empty, or the file is missing, unreadable or empty, or is not mono at
            ``SAMPLE_RATE``. The message begins with ``line``.
    """
    speaker, text = speaker.strip(), " ".join(text.lower().split())
    if not speaker:
        raise CorpusError(f"{line}: {path} has no speaker; name one")
    if not text:
        raise CorpusError(f"{line}: {path} has no transcription; write what is spoken, or remove the line")
    try:
        info = soundfile.info(path)
        _check_format(path, info.samplerate, info.channels)
        if info.frames == 0:
            raise CorpusError(f"{path} has no samples; remove it from the list")
    except (OSError, soundfile.SoundFileError) as error:
        raise CorpusError(f"{line}: {_unreadable(path, error)}") from error
    except CorpusError as error:
        raise CorpusError(f"{line}: {error}") from None
    return Utterance(speaker, text, path, 0, info.frames)


def read_lines(path: Path, advice: str) -> list[tuple[str, str]]:
    """Read the lines of a list that are not blank, each with its place: ``FILE line N``.

    Raises:
        CorpusError: the file cannot be read; the message ends with the advice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read ({error}); {advice}") from error
    return [(f"{path} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def vocabulary(utterances: Iterable[Utterance]) -> tuple[str, ...]:
    """Return the words of the utterances, sorted."""
    return tuple(sorted({word for utterance in utterances for word in utterance.text.split()}))


def split(
    utterances: Sequence[Utterance], kind: str, clients: int | None = None, seed: int = 0
) -> list[tuple[Utterance, ...]]:
    """Divide utterances among the clients of a federation.

    Args:
        utterances: the utterances of any number of speakers.
        kind: ``speaker`` gives each client whole speakers (not identically distributed): one each, sorted by name, or,
            if there are fewer clients, several, so that all clients have about equally many utterances. ``iid``
            shuffles the utterances and gives all clients equally many, up to a difference of one.
        clients: number of clients; None is one for each speaker.
        seed: seed of the shuffling.

    Returns:
        The utterances of each client, at least one.

    Raises:
        CorpusError: there are no utterances, more clients than speakers or utterances, no client, or the kind is
            unknown.
    """
    if kind not in ("speaker", "iid"):
        raise CorpusError(f"no split is called {kind!r}; there are 'speaker' and 'iid'")
    if not utterances:
        raise CorpusError("there are no utterances to divide among clients; check the corpus")
    speakers: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        speakers.setdefault(utterance.speaker, []).append(utterance)
    clients = len(speakers) if clients is None else clients
    most, unit = (len(speakers), "speakers") if kind == "speaker" else (len(utterances), "utterances")
    if not 1 <= clients <= most:
        raise CorpusError(f"{clients} clients cannot share {most} {unit}; choose 1 to {most} clients")
    if kind == "iid":
        shuffled = list(utterances)
        Random(seed).shuffle(shuffled)  # noqa: S311 (not for secrets)
        return [tuple(shuffled[client::clients]) for client in range(clients)]
    shares: list[list[str]] = [[] for _ in range(clients)]
    sizes = [0] * clients
    for speaker in sorted(speakers, key=lambda name: (-len(speakers[name]), name)):  # largest first balances best
        smallest = sizes.index(min(sizes))
        shares[smallest].append(speaker)
        sizes[smallest] += len(speakers[speaker])
    return [tuple(u for name in sorted(share) for u in speakers[name]) for share in sorted(shares, key=min)]


def _unreadable(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"{path} cannot be read as audio ({error}); replace the file, or remove it from the list")


def _check_format(path: Path, rate: int, channels: int) -> None:
    if (rate, channels) != (SAMPLE_RATE, 1):
        raise CorpusError(f"{path} has {channels} channels at {rate} Hz; convert it to one channel at {SAMPLE_RATE} Hz")
