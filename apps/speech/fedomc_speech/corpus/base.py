"""What a corpus is: utterances of speakers, and how they are divided among the clients of a federation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import soundfile

from fedomc_speech.errors import CorpusError

SAMPLE_RATE = 16_000
"""Samples a second of all audio."""


@dataclass(frozen=True)
class Utterance:
    """A stretch of an audio file and the words that are spoken in it.

    Attributes:
        speaker: name of the speaker.
        text: lower-case words separated by single spaces.
        path: the audio file: mono, ``SAMPLE_RATE``.
        start: first sample of the stretch.
        frames: length of the stretch in samples.
    """

    speaker: str
    text: str
    path: Path
    start: int
    frames: int

    def audio(self) -> npt.NDArray[np.float32]:
        """Read the stretch from the file.

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
                f"{self.path} has {len(samples)} of the {self.frames} samples from sample {self.start} on; "
                "load the corpus again, or fetch it again"
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
        words: the closed vocabulary, sorted, or None if any word may come.
    """

    name: str
    train: tuple[Utterance, ...]
    test: tuple[Utterance, ...]
    words: tuple[str, ...] | None


def recording(speaker: str, text: str, path: Path) -> Utterance:
    """Make an utterance of a whole audio file; the text is brought to lower case and single spaces.

    Raises:
        CorpusError: the file is missing, unreadable or empty, or is not mono at ``SAMPLE_RATE``.
    """
    try:
        info = soundfile.info(path)
    except (OSError, soundfile.SoundFileError) as error:
        raise _unreadable(path, error) from error
    _check_format(path, info.samplerate, info.channels)
    if info.frames == 0:
        raise CorpusError(f"{path} holds no samples; fetch the corpus again")
    return Utterance(speaker, " ".join(text.lower().split()), path, 0, info.frames)


def vocabulary(utterances: Iterable[Utterance]) -> tuple[str, ...]:
    """List the words of the utterances, sorted."""
    return tuple(sorted({word for utterance in utterances for word in utterance.text.split()}))


def split(
    utterances: Sequence[Utterance], kind: str, clients: int | None = None, seed: int = 0
) -> list[tuple[Utterance, ...]]:
    """Divide utterances among the clients of a federation.

    Args:
        utterances: of any number of speakers.
        kind: ``speaker`` gives each client whole speakers (not identically distributed): one each, sorted by name, or,
            if there are fewer clients, several with about as many utterances for every client. ``iid`` shuffles the
            utterances and gives every client equally many, give or take one.
        clients: how many; None is one for each speaker.
        seed: of the shuffling.

    Returns:
        The utterances of each client; none is empty.

    Raises:
        CorpusError: no utterances, more clients than speakers or utterances, less than one client, or an unknown kind.
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
    for speaker in sorted(speakers, key=lambda name: (-len(speakers[name]), name)):  # the largest first balances best
        smallest = sizes.index(min(sizes))
        shares[smallest].append(speaker)
        sizes[smallest] += len(speakers[speaker])
    return [tuple(u for name in sorted(share) for u in speakers[name]) for share in sorted(shares, key=min)]


def _unreadable(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"{path} cannot be read as audio ({error}); load the corpus again, or fetch it again")


def _check_format(path: Path, rate: int, channels: int) -> None:
    if (rate, channels) != (SAMPLE_RATE, 1):
        raise CorpusError(f"{path} has {channels} channels at {rate} Hz; convert it to one channel at {SAMPLE_RATE} Hz")
