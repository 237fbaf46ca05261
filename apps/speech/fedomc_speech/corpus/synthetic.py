"""Corpora of speech that is synthesised on this machine, without any download.

Every speaker has a voice of their own: a pair of an accent and a voice variant, with a pitch and a rate. The test's
speakers have pairs that no training speaker has. A corpus is cached in the user's cache directory as one WAV file for
each speaker and a manifest with the SHA-256 of every file. A damaged one is synthesised again, with the same result.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import soundfile
from rich.console import Console
from rich.progress import Progress as RichProgress

from fedomc_speech.corpus import espeak
from fedomc_speech.corpus.base import SAMPLE_RATE, Corpus, Utterance
from fedomc_speech.errors import CorpusError

ACCENTS = (
    *("en", "en-us", "en-029", "en-us-nyc"),
    *("en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
)
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5")

Progress = Callable[[int, int], None]

_PEAK = 0.5  # of the speech, which leaves room for the noise
_SILENCE = (0.05, 0.2)  # seconds, before and after

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyntheticConfig(ABC):
    """The configuration of a synthetic corpus; a subclass defines what the speakers say.

    Attributes:
        train_speakers: number of speakers to train on, who are the clients of the federation.
        test_speakers: number of other speakers to test on; there are at most 104 in all.
        train_utterances: number of utterances of each training speaker.
        test_utterances: number of utterances of each test speaker.
        min_snr: lowest signal-to-noise ratio in dB; it is drawn uniformly for every utterance.
        max_snr: highest signal-to-noise ratio in dB.
        seed: seed of all random numbers.

    Raises:
        CorpusError: a count is below one, there are too many speakers, or the range of ratios is empty.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    """Version of the corpus; each version has a place of its own in the cache."""
    words: ClassVar[tuple[str, ...]]
    """The closed vocabulary."""
    rates: ClassVar[tuple[int, int]]
    """The lowest and highest rate of the speakers, in words a minute."""
    pitches: ClassVar[tuple[int, int]]
    """The lowest and highest pitch of the speakers, on espeak-ng's scale."""
    spellings: ClassVar[Mapping[str, str]] = {}
    """Spellings for espeak-ng of words that it would pronounce differently."""

    train_speakers: int = 32
    test_speakers: int = 8
    train_utterances: int = 60
    test_utterances: int = 20
    min_snr: float = 15.0
    max_snr: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_speakers", "test_speakers", "train_utterances", "test_utterances"):
            if getattr(self, name) < 1:
                raise CorpusError(f"{name} of the corpus {self.name} is {getattr(self, name)}; choose 1 or more")
        voices = len(ACCENTS) * len(VARIANTS)
        if (speakers := self.train_speakers + self.test_speakers) > voices:
            raise CorpusError(f"the corpus {self.name} has {voices} voices, not {speakers}; choose fewer speakers")
        if not self.min_snr <= self.max_snr:
            raise CorpusError(f"a range of the corpus {self.name} is empty; choose max_snr not below min_snr")

    @abstractmethod
    def sentence(self, random: Random) -> list[str]:
        """Draw the words of an utterance."""


@dataclass(frozen=True)
class _Speaker:
    name: str
    voice: str
    rate: int
    pitch: int
    texts: tuple[str, ...]


def load_synthetic(config: SyntheticConfig, cache: Path | None = None, progress: Progress | None = None) -> Corpus:
    """Load a corpus, and synthesise it first if it is not in the cache or damaged there.

    Two processes may synthesise the same corpus at the same time; the one that finishes second discards its copy.

    Args:
        config: the configuration of the corpus.
        cache: the cache directory; None is ``fedomc`` in the user's cache directory.
        progress: called with the number of utterances done and of all utterances while the corpus is synthesised.

    Raises:
        CorpusError: the cache cannot be written, or espeak-ng does not work.
    """
    cache = cache or _user_cache()
    description = _description(config)
    directory = cache / f"{config.name}-{hashlib.sha256(_json(description)).hexdigest()[:16]}"
    if directory.exists():
        try:
            return _open(directory, config)
        except CorpusError as error:
            _logger.warning("%s; the corpus is made again", error)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{directory.name}.", dir=cache) as scratch:
            built = Path(scratch) / "built"
            built.mkdir()
            _build(built, config, description, progress)
            _install(built, directory, config, Path(scratch))
    except espeak.EspeakError as error:
        raise CorpusError(f"espeak-ng failed ({error}); install espeakng-loader again") from error
    except (OSError, soundfile.SoundFileError) as error:
        raise CorpusError(f"{directory} cannot be written ({error}); make room, or give another cache") from error
    return _open(directory, config)


@contextmanager
def progress_bar(description: str = "Synthesising speech") -> Iterator[Progress]:
    """Show a bar on the terminal (standard error) once progress is reported.

    Yields:
        The function to pass to ``load`` as ``progress``.
    """
    console = Console(stderr=True)
    with RichProgress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _user_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fedomc"


def _description(config: SyntheticConfig) -> dict[str, Any]:
    """Return everything that determines how the corpus sounds."""
    try:
        synthesiser = importlib.metadata.version("espeakng-loader")
    except importlib.metadata.PackageNotFoundError as error:
        raise CorpusError(f"the corpus {config.name} needs espeak-ng; pip install espeakng-loader") from error
    return {"version": config.version, "synthesiser": synthesiser, "config": asdict(config)}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def _random(config: SyntheticConfig, purpose: str) -> Random:
    return Random(f"{config.seed} {purpose}")  # noqa: S311 (not for secrets)


def _speakers(config: SyntheticConfig) -> list[_Speaker]:
    """Draw the speakers, training speakers first."""
    random = _random(config, "speakers")
    accents, variants = random.sample(ACCENTS, len(ACCENTS)), random.sample(VARIANTS, len(VARIANTS))
    speakers = []
    for number in range(config.train_speakers + config.test_speakers):
        # 8 accents and 13 variants have no common factor, so that no pair repeats before all 104 have occurred.
        accent, variant = accents[number % len(accents)], variants[number % len(variants)]
        name = f"{number:03}-{accent}-{variant}"
        utterances = config.train_utterances if number < config.train_speakers else config.test_utterances
        words = _random(config, f"words {name}")
        texts = tuple(" ".join(config.sentence(words)) for _ in range(utterances))
        rate, pitch = random.randint(*config.rates), random.randint(*config.pitches)
        speakers.append(_Speaker(name, f"{accent}+{variant}", rate, pitch, texts))
    return speakers


def _spelled(text: str, config: SyntheticConfig) -> str:
    return " ".join(config.spellings.get(word, word) for word in text.split())


def _record(speech: npt.NDArray[np.int16], snr: float, random: Random) -> npt.NDArray[np.int16]:
    """Resample speech, normalise its loudness, surround it with silence, and add noise."""
    voice = espeak.resample(speech, espeak.SAMPLE_RATE, SAMPLE_RATE)
    voice *= _PEAK / abs(voice).max()
    before, after = (round(random.uniform(*_SILENCE) * SAMPLE_RATE) for _ in range(2))
    noise_level = math.sqrt((voice**2).mean() / 10 ** (snr / 10))
    noise = np.random.default_rng(random.getrandbits(64)).standard_normal(before + len(voice) + after)
    mixed = np.pad(voice, (before, after)) + noise_level * noise
    return np.round(np.clip(mixed, -1, 1) * 32767).astype(np.int16)


def _build(directory: Path, config: SyntheticConfig, description: dict[str, Any], progress: Progress | None) -> None:
    speakers = _speakers(config)
    speeches = [
        espeak.Speech(_spelled(text, config), speaker.voice, speaker.rate, speaker.pitch)
        for speaker in speakers
        for text in speaker.texts
    ]
    utterances: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    with closing(espeak.synthesize(speeches, config.seed)) as sounds:
        for speaker in speakers:
            file = directory / f"{speaker.name}.wav"
            random = _random(config, f"recording {speaker.name}")
            recordings = []
            start = 0
            for text, sound in zip(speaker.texts, sounds, strict=False):
                recordings.append(_record(sound, random.uniform(config.min_snr, config.max_snr), random))
                frames = len(recordings[-1])
                utterances.append(
                    {"speaker": speaker.name, "text": text, "file": file.name, "start": start, "frames": frames}
                )
                start += frames
                if progress:
                    progress(len(utterances), len(speeches))
            soundfile.write(file, np.concatenate(recordings), SAMPLE_RATE, subtype="PCM_16")
            files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    content = {**description, "files": files, "utterances": utterances}
    manifest = {"sha256": hashlib.sha256(_json(content)).hexdigest(), "content": content}
    (directory / "manifest.json").write_bytes(_json(manifest))


def _open(directory: Path, config: SyntheticConfig) -> Corpus:
    """Read the corpus from the cache; raise a CorpusError if anything in it has changed."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        content = manifest["content"]
        if hashlib.sha256(_json(content)).hexdigest() != manifest["sha256"]:
            raise CorpusError(f"{directory / 'manifest.json'} is damaged")
        for name, digest in content["files"].items():
            status = (directory / name).stat()
            if _file_digest(directory / name, status.st_size, status.st_mtime_ns) != digest:
                raise CorpusError(f"{directory / name} is damaged")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorpusError(f"{directory} is damaged ({error!r})") from error
    utterances = tuple(
        Utterance(u["speaker"], u["text"], directory / u["file"], u["start"], u["frames"])
        for u in content["utterances"]
    )
    train = config.train_speakers * config.train_utterances
    return Corpus(config.name, utterances[:train], utterances[train:], tuple(sorted(config.words)), synthetic=True)


@functools.cache
def _file_digest(path: Path, size: int, modified: int) -> str:
    """Return the SHA-256 of a file, computed anew only if its size or modification time has changed."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _install(built: Path, directory: Path, config: SyntheticConfig, scratch: Path) -> None:
    """Move the corpus to its place atomically, unless another process has put a whole one there."""
    while True:
        try:
            built.rename(directory)
            return
        except OSError:
            if not directory.exists():
                raise
        try:
            _open(directory, config)
            return
        except CorpusError:
            with suppress(FileNotFoundError):
                directory.rename(scratch / "damaged")
