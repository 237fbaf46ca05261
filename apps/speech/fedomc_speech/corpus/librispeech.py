"""LibriSpeech: read English books (Panayotov et al., "LibriSpeech: an ASR corpus based on public domain audio books").

Subsets as published: ``SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac``, and in each chapter the texts in
``SPEAKER-CHAPTER.trans.txt``.
"""

from collections.abc import Sequence
from pathlib import Path

from fedomc_speech.corpus.base import Corpus, Utterance, recording
from fedomc_speech.errors import CorpusError


def load_librispeech(
    path: Path, train: Sequence[str] = ("train-clean-100",), test: Sequence[str] = ("test-clean",)
) -> Corpus:
    """Read subsets of LibriSpeech; the vocabulary is open.

    Args:
        path: the folder ``LibriSpeech``, the one that holds it, or one of the subsets with the others beside it.
        train: names of the subsets to train on.
        test: names of the subsets to test on.

    Raises:
        CorpusError: a subset or a file is missing or damaged, a text and a file do not match, or there are no
            utterances.
    """
    bases = [path, path / "LibriSpeech"]
    if path.name in (*train, *test):
        bases.append(path.parent)
    return Corpus("librispeech", _subsets(bases, train), _subsets(bases, test), None)


def _subsets(bases: Sequence[Path], names: Sequence[str]) -> tuple[Utterance, ...]:
    utterances: list[Utterance] = []
    for name in names:
        folder = next((base / name for base in bases if (base / name).is_dir()), None)
        if folder is None:
            raise CorpusError(f"{bases[0]} holds no {name}; unpack {name}.tar.gz of LibriSpeech there")
        found = [utterance for chapter in sorted(folder.glob("*/*/")) for utterance in _chapter(chapter)]
        if not found:
            raise CorpusError(f"{folder} holds no utterances; unpack {name}.tar.gz of LibriSpeech again")
        utterances += found
    return tuple(utterances)


def _chapter(folder: Path) -> list[Utterance]:
    speaker = folder.parent.name
    transcript = folder / f"{speaker}-{folder.name}.trans.txt"
    try:
        lines = transcript.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{transcript} cannot be read ({error}); unpack LibriSpeech again") from error
    texts = dict(line.strip().partition(" ")[::2] for line in lines if line.strip())
    files = {file.stem: file for file in folder.glob("*.flac")}
    if odd := sorted(texts.keys() ^ files.keys()):
        what = "text" if odd[0] in files else "audio"
        raise CorpusError(f"{folder / odd[0]} has no {what}; unpack LibriSpeech again")
    return [recording(speaker, text, files[name]) for name, text in sorted(texts.items())]
