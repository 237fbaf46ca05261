"""AN4: spelled words, numbers and commands, recorded at Carnegie Mellon University in 1991.

A folder with ``wav/{an4_clstk,an4test_clstk}/SPEAKER/UTTERANCE.wav`` and, in ``etc``, ``an4_{train,test}.fileids`` and
``an4_{train,test}.transcription``.
"""

import re
from pathlib import Path, PurePosixPath

from fedomc_speech.corpus.base import Corpus, Utterance, read_lines, recording, vocabulary
from fedomc_speech.errors import CorpusError

_TRANSCRIPTION = re.compile(r"(.*)\((\S+)\)")
_SENTENCE_MARKS = ("<s>", "</s>")
_ADVICE = "give the folder of AN4 that holds 'etc' and 'wav'"


def load_an4(path: Path) -> Corpus:
    """Read AN4; its vocabulary is the words of both parts.

    Args:
        path: the folder that holds ``wav`` and ``etc``.

    Raises:
        CorpusError: a file is missing or damaged, the lists do not match, there are no utterances, or one of them has
            no transcription or no speaker.
    """
    train, test = _part(path, "train"), _part(path, "test")
    return Corpus("an4", train, test, vocabulary(train + test))


def _part(path: Path, part: str) -> tuple[Utterance, ...]:
    list_of_files = path / "etc" / f"an4_{part}.fileids"
    list_of_texts = path / "etc" / f"an4_{part}.transcription"
    files, texts = read_lines(list_of_files, _ADVICE), read_lines(list_of_texts, _ADVICE)
    if not files:
        raise CorpusError(f"{list_of_files} lists no utterances; {_ADVICE}")
    if len(files) != len(texts):
        raise CorpusError(
            f"{list_of_files} has {len(files)} lines, {list_of_texts} has {len(texts)}; make them match line by line"
        )
    utterances = []
    for (_, file), (place, line) in zip(files, texts, strict=True):
        name = PurePosixPath(file.strip())
        match = _TRANSCRIPTION.fullmatch(line.strip())
        if match is None or match[2] != name.name:
            raise CorpusError(f"{place}: {line!r} does not end with ({name.name}); make the two lists match")
        words = [word for word in match[1].split() if word not in _SENTENCE_MARKS]
        utterances.append(recording(name.parent.name, " ".join(words), path / "wav" / f"{name}.wav", place))
    return tuple(utterances)
