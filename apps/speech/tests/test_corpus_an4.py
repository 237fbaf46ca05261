import numpy as np
import pytest
import soundfile

from fedomc_speech.corpus import SAMPLE_RATE, CorpusError, load

TRAIN = {
    "an4_clstk/fash/an251-fash-b": "<s> YES </s> (an251-fash-b)",
    "an4_clstk/mmxg/cen1-mmxg-b": "<s> P I  T </s> (cen1-mmxg-b)",
}
TEST = {"an4test_clstk/fcaw/an406-fcaw-b": "RUBOUT G NINE (an406-fcaw-b)"}


def write(root, train=TRAIN, test=TEST, rate=SAMPLE_RATE, channels=1, samples=800):
    for part, utterances in (("train", train), ("test", test)):
        (root / "etc").mkdir(exist_ok=True)
        (root / "etc" / f"an4_{part}.fileids").write_text("".join(f"{file}\n" for file in utterances))
        (root / "etc" / f"an4_{part}.transcription").write_text("".join(f"{text}\n" for text in utterances.values()))
        for number, file in enumerate(utterances):
            wav = root / "wav" / f"{file}.wav"
            wav.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(wav, np.full((samples, channels), 0.25 * (number + 1)), rate)
    return root


def test_load(tmp_path):
    corpus = load("an4", write(tmp_path))
    assert corpus.name == "an4"
    assert [(u.speaker, u.text) for u in corpus.train] == [("fash", "yes"), ("mmxg", "p i t")]
    assert [(u.speaker, u.text) for u in corpus.test] == [("fcaw", "rubout g nine")]
    assert corpus.words == ("g", "i", "nine", "p", "rubout", "t", "yes")
    audio = corpus.train[1].audio()
    assert audio.dtype == np.float32 and audio.tolist() == [0.5] * 800


def unlink(name):
    return lambda root: (root / name).unlink()


def overwrite(name, text):
    return lambda root: (root / name).write_text(text)


WAV = "wav/an4_clstk/fash/an251-fash-b.wav"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (unlink("etc/an4_test.fileids"), "an4_test.fileids cannot be read .*folder of AN4"),
        (unlink("etc/an4_train.transcription"), "an4_train.transcription cannot be read"),
        (unlink(WAV), f"{WAV} cannot be read as audio"),
        (overwrite(WAV, "not audio"), f"{WAV} cannot be read as audio"),
        (overwrite("etc/an4_train.fileids", "\n"), "an4_train.fileids lists no utterances"),
        (overwrite("etc/an4_test.transcription", ""), "an4_test.fileids has 1 lines, .*an4_test.transcription has 0"),
        (overwrite("etc/an4_test.transcription", "YES (an1-fcaw-b)\n"), "test.transcription line 1: .*not end with"),
        (
            overwrite("etc/an4_test.transcription", "\nYES\n"),
            "test.transcription line 2: 'YES' does not",
        ),
        (
            overwrite("etc/an4_test.transcription", "<s> </s> (an406-fcaw-b)\n"),
            r"test.transcription line 1: .*an406-fcaw-b.wav has no transcription",
        ),
        (
            lambda root: write(root, test={"an406-fcaw-b": "YES (an406-fcaw-b)"}),
            r"test.transcription line 1: .*an406-fcaw-b.wav has no speaker",
        ),
        (lambda root: write(root, rate=8000), "1 channels at 8000 Hz; convert"),
        (lambda root: write(root, channels=2), "2 channels at 16000 Hz; convert"),
        (lambda root: write(root, samples=0), "has no samples"),
    ],
)
def test_errors(tmp_path, spoil, message):
    spoil(write(tmp_path))
    with pytest.raises(CorpusError, match=message) as error:
        load("an4", tmp_path)
    assert str(tmp_path) in str(error.value) and "fetch" not in str(error.value)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.unlink(), "cannot be read as audio"),
        (lambda path: soundfile.write(path, np.zeros(700), SAMPLE_RATE), "has 700 of the 800 samples"),
        (lambda path: soundfile.write(path, np.zeros(800), 22_050), "1 channels at 22050 Hz"),
    ],
)
def test_file_that_changed_after_loading(tmp_path, spoil, message):
    (first, _), path = load("an4", write(tmp_path)).train, tmp_path / WAV
    spoil(path)
    with pytest.raises(CorpusError, match=message) as error:
        first.audio()
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, path, message",
    [
        ("timit", None, "'timit'; there are digits, commands, an4, librispeech, folder"),
        ("an4", None, "an4 needs the path"),
        ("librispeech", None, "librispeech needs the path"),
        ("folder", "", "folder needs the path"),
        ("digits", "somewhere", "leave out the path somewhere"),
    ],
)
def test_load_refuses(name, path, message):
    with pytest.raises(CorpusError, match=message):
        load(name, path)
