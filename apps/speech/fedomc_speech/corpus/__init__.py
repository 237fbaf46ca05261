"""The corpora that the application knows: two made on the spot, and two that are published."""

from pathlib import Path

from fedomc_speech.corpus.an4 import load_an4
from fedomc_speech.corpus.base import SAMPLE_RATE, Corpus, Utterance, split
from fedomc_speech.corpus.commands import CommandsConfig
from fedomc_speech.corpus.digits import DigitsConfig
from fedomc_speech.corpus.librispeech import load_librispeech
from fedomc_speech.corpus.synthetic import Progress, SyntheticConfig, load_synthetic, progress_bar
from fedomc_speech.errors import CorpusError

SYNTHETIC: dict[str, type[SyntheticConfig]] = {"digits": DigitsConfig, "commands": CommandsConfig}
PUBLISHED = {"an4": load_an4, "librispeech": load_librispeech}
NAMES = (*SYNTHETIC, *PUBLISHED)

__all__ = [
    "NAMES",
    "PUBLISHED",
    "SAMPLE_RATE",
    "CommandsConfig",
    "Corpus",
    "DigitsConfig",
    "SyntheticConfig",
    "Utterance",
    "load",
    "load_an4",
    "load_librispeech",
    "load_synthetic",
    "progress_bar",
    "split",
]


def load(
    name: str,
    path: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    config: SyntheticConfig | None = None,
) -> Corpus:
    """Load a corpus.

    Args:
        name: ``digits`` or ``commands``, which are synthesised the first time, ``an4`` or ``librispeech``.
        path: the folder of a published corpus.
        cache: where a synthetic one is kept; None is ``fedomc`` in the cache directory of the user.
        progress: called with the utterances made and all utterances while one is synthesised.
        config: of a synthetic one; None is the default.

    Raises:
        CorpusError: no such corpus, no path where one is needed, or files that are missing or damaged.
    """
    if name not in NAMES:
        raise CorpusError(f"no corpus is called {name!r}; there are {', '.join(NAMES)}")
    if name in SYNTHETIC:
        if path is not None:
            raise CorpusError(f"the corpus {name} is made on this machine; leave out the path {path}")
        return load_synthetic(config or SYNTHETIC[name](), cache, progress)
    if path is None:
        raise CorpusError(f"the corpus {name} needs the path of the folder that it was unpacked to")
    return PUBLISHED[name](path)
