"""AN4: spelled words, numbers and commands, 1991, from Carnegie Mellon University.

A folder with ``wav/{an4_clstk,an4test_clstk}/SPEAKER/UTTERANCE.wav`` and, in ``etc``, ``an4_{train,test}.fileids`` and
``an4_{train,test}.transcription``.
"""

import re
from pathlib import Path, PurePosixPath

from fedomc_speech.corpus.base import Corpus, Utterance, recording, vocabulary
from fedomc_speech.errors import CorpusError

_TRANSCRIPTION = re.compile(r"(.*)\((\S+)\)")
_SENTENCE_MARKS = ("<s>", "</s>")


def load_an4(path: Path) -> Corpus:
    """Read AN4; its vocabulary is the words of both parts.

    Args:
        path: the folder that holds ``wav`` and ``etc``.

    Raises:
        CorpusError: a file is missing or damaged, the lists do not match, or there are no utterances.
    """
    train, test = _part(path, "train"), _part(path, "test")
    return Corpus("an4", train, test, vocabulary(train + test))


def _part(path: Path, part: str) -> tuple[Utterance, ...]:
    list_of_files = path / "etc" / f"an4_{part}.fileids"
    list_of_texts = path / "etc" / f"an4_{part}.transcription"
    files, texts = _lines(list_of_files), _lines(list_of_texts)
    if not files:
        raise CorpusError(f"{list_of_files} lists no utterances; fetch AN4 again")
    if len(files) != len(texts):
        raise CorpusError(f"{list_of_files} has {len(files)} lines, {list_of_texts} {len(texts)}; fetch AN4 again")
    utterances = []
    for number, (file, line) in enumerate(zip(files, texts, strict=True), 1):
        name = PurePosixPath(file)
        match = _TRANSCRIPTION.fullmatch(line)
        if match is None or match[2] != name.name:
            raise CorpusError(f"utterance {number} of {list_of_texts}, {line!r}, is not of {file}; fetch AN4 again")
        words = [word for word in match[1].split() if word not in _SENTENCE_MARKS]
        utterances.append(recording(name.parent.name, " ".join(words), path / "wav" / f"{file}.wav"))
    return tuple(utterances)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"{path} cannot be read ({error}); give the folder of AN4 that holds 'etc' and 'wav'"
        ) from error
