"""The corpora: two that are synthesised on this machine, two that are published, and a folder of your own."""

from pathlib import Path

from fedomc_speech.corpus.an4 import load_an4
from fedomc_speech.corpus.base import SAMPLE_RATE, Corpus, Utterance, split
from fedomc_speech.corpus.commands import CommandsConfig
from fedomc_speech.corpus.digits import DigitsConfig
from fedomc_speech.corpus.folder import load_folder
from fedomc_speech.corpus.librispeech import load_librispeech
from fedomc_speech.corpus.synthetic import Progress, SyntheticConfig, load_synthetic, progress_bar
from fedomc_speech.errors import CorpusError

SYNTHETIC: dict[str, type[SyntheticConfig]] = {"digits": DigitsConfig, "commands": CommandsConfig}
RECORDED = {"an4": load_an4, "librispeech": load_librispeech, "folder": load_folder}
NAMES = (*SYNTHETIC, *RECORDED)

__all__ = [
    "NAMES",
    "RECORDED",
    "SAMPLE_RATE",
    "CommandsConfig",
    "Corpus",
    "DigitsConfig",
    "SyntheticConfig",
    "Utterance",
    "load",
    "load_an4",
    "load_folder",
    "load_librispeech",
    "load_synthetic",
    "progress_bar",
    "split",
]


def load(
    name: str,
    path: Path | str | None = None,
    digest: str = "",
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    config: SyntheticConfig | None = None,
) -> Corpus:
    """Load a corpus.

    Args:
        name: ``digits`` or ``commands``, which are synthesised the first time, ``an4``, ``librispeech`` or ``folder``.
        path: the folder of a recorded corpus; None or empty for a synthetic one.
        digest: what ``Corpus.digest`` must be; empty accepts any.
        cache: where a synthetic one is kept; None is ``fedomc`` in the cache directory of the user.
        progress: called with the utterances made and all utterances while one is synthesised.
        config: of a synthetic one; None is the default.

    Raises:
        CorpusError: no such corpus, no path where one is needed, files that are missing or damaged, or another digest.
    """
    if name not in NAMES:
        raise CorpusError(f"no corpus is called {name!r}; there are {', '.join(NAMES)}")
    if name in SYNTHETIC:
        if path:
            raise CorpusError(f"the corpus {name} is made on this machine; leave out the path {path}")
        loaded = load_synthetic(config or SYNTHETIC[name](), cache, progress)
    elif path:
        loaded = RECORDED[name](Path(path))
    else:
        raise CorpusError(f"the corpus {name} needs the path of its folder: --corpus-path FOLDER")
    if digest and loaded.digest != digest:
        raise CorpusError(
            f"the lists and transcriptions of {path or name} have the digest {loaded.digest!r}, not {digest!r} "
            "(corpus_digest); give the corpus that the run began with, or start a new run"
        )
    return loaded
