import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fedomc_speech.corpus import SAMPLE_RATE, CorpusError, load
from fedomc_speech.tokens import tokenizer_for

TRAIN = [("anna/1.wav", "Turn the  LIGHT on", "anna"), ("ben/1.wav", "off", "ben"), ("ben/2.wav", "on", "ben")]
TEST = [("carl.wav", "light off", "carl")]


def table(rows):
    return "".join("\t".join(row) + "\n" for row in [("audio", "text", "speaker"), *rows])


def objects(rows):
    return "".join(json.dumps(dict(zip(("audio", "text", "speaker"), row, strict=True))) + "\n" for row in rows)


def write(root, listed=table, kind="tsv", train=TRAIN, test=TEST):
    for part, rows in (("train", train), ("test", test)):
        (root / f"{part}.{kind}").write_text(listed(rows), encoding="utf-8")
        for length, (audio, *_) in enumerate(rows, 1):
            (root / audio).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(root / audio, np.full(100 * length, 0.5), SAMPLE_RATE)
    return root


@pytest.mark.parametrize("listed, kind", [(table, "tsv"), (objects, "jsonl")])
def test_load(tmp_path, listed, kind):
    corpus = load("folder", write(tmp_path, listed, kind))
    assert (corpus.name, corpus.words) == ("folder", None)
    assert [(u.speaker, u.text, u.frames) for u in corpus.train] == [
        ("anna", "turn the light on", 100),
        ("ben", "off", 200),
        ("ben", "on", 300),
    ]
    assert [(u.speaker, u.text) for u in corpus.test] == [("carl", "light off")]
    assert corpus.train[1].audio().tolist() == [0.5] * 200
    tokenizer = tokenizer_for(corpus)
    assert tokenizer.decode(tokenizer.encode("light on")) == "light on"


def test_columns_may_come_in_any_order_with_others_between_and_paths_be_absolute(tmp_path):
    write(tmp_path)
    lines = ["speaker\tage\taudio\ttext", "", f"anna\t30\t{tmp_path / 'anna/1.wav'}\tgo"]
    (tmp_path / "train.tsv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    [only] = load("folder", tmp_path).train
    assert (only.speaker, only.text, only.path) == ("anna", "go", tmp_path / "anna/1.wav")


HEADER = "audio\ttext\tspeaker\n"


def overwrite(name, text):
    return lambda root: (root / name).write_text(text)


def in_train(lines):
    return overwrite("train.tsv", HEADER + lines)


def as_objects(text):
    def spoil(root):
        (root / "train.tsv").unlink()
        (root / "train.jsonl").write_text(text)

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "test.tsv").unlink(), r"has neither test\.tsv nor test\.jsonl"),
        (overwrite("train.jsonl", ""), r"has both train\.tsv and train\.jsonl"),
        (in_train(""), r"train\.tsv lists no utterances"),
        (overwrite("train.tsv", ""), r"train\.tsv: the columns are .*name audio, text, speaker once"),
        (overwrite("train.tsv", "audio\ttext\nanna/1.wav\tgo\n"), r"train\.tsv line 1: .*name speaker once"),
        (in_train("\nanna/1.wav\tgo\n"), r"train\.tsv line 3: 2 columns, the first line names 3"),
        (in_train("anna/1.wav\t \tanna\n"), r"train\.tsv line 2: .*1\.wav has no transcription"),
        (in_train("anna/1.wav\tgo\t\n"), r"train\.tsv line 2: .*1\.wav has no speaker"),
        (in_train("\tgo\tanna\n"), r"train\.tsv line 2: audio is empty"),
        (in_train("9.wav\tgo\tanna\n"), r"train\.tsv line 2: .*9\.wav cannot be read as audio"),
        (
            overwrite("test.tsv", HEADER + "carl.wav\tgo\tben\n"),
            r"test\.tsv line 2: the speaker 'ben' .*train\.tsv line 4",
        ),
        (as_objects('{"audio": "anna/1.wav", "text": "go"}'), r"train\.jsonl line 1: speaker is missing"),
        (as_objects('{"audio": "anna/1.wav", "text": "", "speaker": "a"}'), r"train\.jsonl line 1: .*no transcription"),
        (as_objects('{"audio": "anna/1.wav", "text": 3, "speaker": "a"}'), r"train\.jsonl line 1: text is missing"),
        (as_objects("\n[1]"), r"train\.jsonl line 2: audio is missing"),
        (as_objects("{"), r"train\.jsonl line 1: this is not JSON"),
        (lambda root: (root / "train.tsv").write_bytes(b"\xff\xfe\x00"), r"train\.tsv cannot be read .*UTF-8"),
        (
            lambda root: soundfile.write(root / "carl.wav", np.zeros(9), 8000),
            r"test\.tsv line 2: .*at 8000 Hz; convert",
        ),
        (lambda root: soundfile.write(root / "carl.wav", np.zeros(0), SAMPLE_RATE), r"test\.tsv line 2: .*no samples"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, spoil, message):
    spoil(write(tmp_path))
    with pytest.raises(CorpusError, match=message) as error:
        load("folder", tmp_path)
    assert str(tmp_path) in str(error.value) and "again" not in str(error.value)


def digest_of(root, **changes):
    root.mkdir()
    return load("folder", write(root, **changes)).digest


def test_the_digest_is_of_lists_and_transcriptions_wherever_they_lie(tmp_path):
    digest = digest_of(tmp_path / "one")
    assert len(digest) == 16 and digest == digest_of(tmp_path / "two", listed=objects, kind="jsonl")
    others = [
        digest_of(tmp_path / "text", train=[TRAIN[0], ("ben/1.wav", "of", "ben"), TRAIN[2]]),
        digest_of(tmp_path / "speaker", test=[("carl.wav", "light off", "karl")]),
        digest_of(tmp_path / "order", train=TRAIN[::-1]),
        digest_of(tmp_path / "fewer", train=TRAIN[:2]),
        digest_of(tmp_path / "name", test=[("c.wav", "light off", "carl")]),
    ]
    assert len({digest, *others}) == 6
    assert load("folder", tmp_path / "one", digest).digest == digest
    with pytest.raises(CorpusError, match=f"{others[0]}.*{digest}") as error:
        load("folder", tmp_path / "text", digest)
    assert str(Path(tmp_path / "text")) in str(error.value)
