"""The corpora that the application knows: one made on the spot, and two that are published."""

from pathlib import Path

from fedomc_speech.corpus.an4 import load_an4
from fedomc_speech.corpus.base import SAMPLE_RATE, Corpus, Utterance, split
from fedomc_speech.corpus.digits import DigitsConfig, Progress, load_digits, progress_bar
from fedomc_speech.corpus.librispeech import load_librispeech
from fedomc_speech.errors import CorpusError

NAMES = ("digits", "an4", "librispeech")
MADE = ("digits",)
"""Those that are made on the machine and need no path."""

__all__ = [
    "MADE",
    "NAMES",
    "SAMPLE_RATE",
    "Corpus",
    "DigitsConfig",
    "Utterance",
    "load",
    "load_an4",
    "load_digits",
    "load_librispeech",
    "progress_bar",
    "split",
]


def load(
    name: str,
    path: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    config: DigitsConfig | None = None,
) -> Corpus:
    """Load a corpus.

    Args:
        name: ``digits``, which is synthesised the first time, ``an4`` or ``librispeech``.
        path: the folder of a published corpus.
        cache: where ``digits`` is kept; None is ``fedomc`` in the cache directory of the user.
        progress: called with the utterances made and all utterances while ``digits`` is synthesised.
        config: of ``digits``; None is the default.

    Raises:
        CorpusError: no such corpus, no path where one is needed, or files that are missing or damaged.
    """
    if name not in NAMES:
        raise CorpusError(f"no corpus is called {name!r}; there are {', '.join(NAMES)}")
    if name == "digits":
        if path is not None:
            raise CorpusError(f"the corpus digits is made on this machine; leave out the path {path}")
        return load_digits(config, cache, progress)
    if path is None:
        raise CorpusError(f"the corpus {name} needs the path of the folder that it was unpacked to")
    return load_an4(path) if name == "an4" else load_librispeech(path)
