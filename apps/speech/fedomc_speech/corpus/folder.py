"""A corpus of your own: a folder with a list of the utterances to train on and a list of those to test on.

The lists are ``train.tsv`` and ``test.tsv``, or ``train.jsonl`` and ``test.jsonl``. Each line names an audio file, as
an absolute path or relative to the folder, what is spoken in it, and who speaks. A TSV file begins with a line that
names its columns; columns and keys other than these three are ignored::

    audio	text	speaker
    anna/1.wav	turn the light on	anna

    {"audio": "anna/1.wav", "text": "turn the light on", "speaker": "anna"}

Audio is WAV, FLAC or anything else that libsndfile reads, mono at 16 kHz. No speaker may be in both lists, because
word error rates are measured on speakers that no client has.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from fedomc_speech.corpus.base import Corpus, Utterance, read_lines, recording
from fedomc_speech.errors import CorpusError

_COLUMNS = ("audio", "text", "speaker")
_ADVICE = "save it as UTF-8 text"


def load_folder(path: Path) -> Corpus:
    """Read a corpus from the lists in a folder; the vocabulary is open.

    Args:
        path: the folder that holds the two lists.

    Raises:
        CorpusError: a list is missing, empty or malformed; an utterance has no transcription, no speaker or no readable
            audio; or a speaker is in both lists. The message names the file and the line.
    """
    train, test = ([*_utterances(_list_of(path, part))] for part in ("train", "test"))
    trained = {utterance.speaker: place for place, utterance in train}
    for place, utterance in test:
        if utterance.speaker in trained:
            raise CorpusError(
                f"{place}: the speaker {utterance.speaker!r} is in the training list, too "
                f"({trained[utterance.speaker]}); keep each speaker in one list"
            )
    return Corpus("folder", tuple(u for _, u in train), tuple(u for _, u in test), None)


def _list_of(folder: Path, part: str) -> Path:
    """Find the list of a part of the corpus."""
    names = [f"{part}.tsv", f"{part}.jsonl"]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        has = f"both {' and '.join(names)}" if found else f"neither {' nor '.join(names)}"
        raise CorpusError(f"{folder} has {has}; it needs one of them, with {', '.join(_COLUMNS)} of each utterance")
    return found[0]


def _utterances(path: Path) -> Iterator[tuple[str, Utterance]]:
    """Read the utterances of a list, each with its place."""
    empty = True
    for place, (audio, text, speaker) in _from_json(path) if path.suffix == ".jsonl" else _from_table(path):
        if not audio.strip():
            raise CorpusError(f"{place}: audio is empty; name a file")
        yield place, recording(speaker, text, path.parent / audio.strip(), place)
        empty = False
    if empty:
        raise CorpusError(f"{path} lists no utterances; write {', '.join(_COLUMNS)} of at least one")


def _from_table(path: Path) -> Iterator[tuple[str, list[str]]]:
    lines = read_lines(path, _ADVICE)
    place, header = lines[0] if lines else (str(path), "")
    columns = [name.strip() for name in header.split("\t")]
    if missing := [name for name in _COLUMNS if columns.count(name) != 1]:
        raise CorpusError(
            f"{place}: the columns are {', '.join(columns)}; name {', '.join(missing)} once, with tabs between columns"
        )
    for place, line in lines[1:]:
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise CorpusError(f"{place}: {len(cells)} columns, the first line names {len(columns)}; use a tab for each")
        yield place, [cells[columns.index(name)] for name in _COLUMNS]


def _from_json(path: Path) -> Iterator[tuple[str, list[str]]]:
    for place, line in read_lines(path, _ADVICE):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{place}: this is not JSON ({error}); write one object a line") from None
        for name in _COLUMNS:
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                raise CorpusError(f"{place}: {name} is missing or not a string; write {', '.join(_COLUMNS)}")
        yield place, [entry[name] for name in _COLUMNS]
