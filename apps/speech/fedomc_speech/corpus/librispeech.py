"""LibriSpeech: read English books (Panayotov et al., "LibriSpeech: an ASR corpus based on public domain audio books").

Subsets as published: ``SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac``, and in each chapter the texts in
``SPEAKER-CHAPTER.trans.txt``.
"""

from collections.abc import Sequence
from pathlib import Path

from fedomc_speech.corpus.base import Corpus, Utterance, read_lines, recording
from fedomc_speech.errors import CorpusError


def load_librispeech(
    path: Path, train: Sequence[str] = ("train-clean-100",), test: Sequence[str] = ("test-clean",)
) -> Corpus:
    """Read subsets of LibriSpeech; the vocabulary is open.

    Args:
        path: the folder ``LibriSpeech``, its parent, or the folder of a subset that has the others beside it.
        train: names of the subsets to train on.
        test: names of the subsets to test on.

    Raises:
        CorpusError: a subset or a file is missing or damaged, a text and a file do not match, there are no utterances,
            or one of them has no transcription.
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
    texts: dict[str, tuple[str, str]] = {}
    for place, line in read_lines(transcript, "unpack LibriSpeech again"):
        name, _, text = line.strip().partition(" ")
        texts[name] = (place, text)
    files = {file.stem: file for file in folder.glob("*.flac")}
    if odd := sorted(texts.keys() ^ files.keys()):
        what = "text" if odd[0] in files else "audio"
        raise CorpusError(f"{folder / odd[0]} has no {what}; unpack LibriSpeech again")
    return [recording(speaker, text, files[name], place) for name, (place, text) in sorted(texts.items())]
