import numpy as np
import pytest
import soundfile

from fedomc_speech.corpus import SAMPLE_RATE, CorpusError, load, load_librispeech

TRAIN = {"84-121123-0000": "GO  DO YOU HEAR", "84-121123-0001": "DON'T", "84-121550-0000": "YES", "9-1-0000": "NO"}
TEST = {"61-70968-0000": "HE BEGAN"}


def write(root, **subsets):
    for subset, utterances in (subsets or {"train-clean-100": TRAIN, "test-clean": TEST}).items():
        for length, (name, text) in enumerate(utterances.items(), 1):
            speaker, chapter, _ = name.split("-")
            folder = root / subset / speaker / chapter
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"{name}.flac", np.full(100 * length, 0.5), SAMPLE_RATE)
            with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as transcript:
                transcript.write(f"{name} {text}\n")
    return root


@pytest.mark.parametrize("given", [".", "LibriSpeech", "LibriSpeech/train-clean-100", "LibriSpeech/test-clean"])
def test_load(tmp_path, given):
    write(tmp_path / "LibriSpeech")
    corpus = load("librispeech", tmp_path / given)
    assert corpus.words is None
    assert [(u.speaker, u.text, u.start, u.frames) for u in corpus.train] == [
        ("84", "go do you hear", 0, 100),
        ("84", "don't", 0, 200),
        ("84", "yes", 0, 300),
        ("9", "no", 0, 400),
    ]
    assert [(u.speaker, u.text) for u in corpus.test] == [("61", "he began")]
    np.testing.assert_allclose(corpus.train[0].audio(), np.full(100, 0.5), atol=1e-4)


def test_several_subsets(tmp_path):
    write(tmp_path, **{"dev-clean": TRAIN, "dev-other": TEST, "test-other": TEST})
    corpus = load_librispeech(tmp_path, train=("dev-clean", "dev-other"), test=("test-other",))
    assert (len(corpus.train), len(corpus.test)) == (5, 1)


CHAPTER = "train-clean-100/84/121123"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "test-clean").rename(root / "other"), "holds no test-clean; unpack test-clean.tar.gz"),
        (lambda root: (root / "test-clean/61").rename(root / "61"), "test-clean holds no utterances"),
        (lambda root: (root / CHAPTER / "84-121123-0000.flac").unlink(), "84-121123-0000 has no audio"),
        (lambda root: (root / CHAPTER / "84-121123-0009.flac").write_text(""), "84-121123-0009 has no text"),
        (lambda root: (root / CHAPTER / "84-121123.trans.txt").unlink(), "84-121123.trans.txt cannot be read"),
        (lambda root: (root / CHAPTER / "84-121123-0000.flac").write_text("x"), "0000.flac cannot be read as audio"),
        (
            lambda root: (root / CHAPTER / "84-121123.trans.txt").write_text("84-121123-0000 NO\n84-121123-0001\n"),
            "84-121123.trans.txt line 2: .*0001.flac has no transcription",
        ),
    ],
)
def test_errors(tmp_path, spoil, message):
    spoil(write(tmp_path))
    with pytest.raises(CorpusError, match=message) as error:
        load("librispeech", tmp_path)
    assert str(tmp_path) in str(error.value)


def test_folder_without_corpus(tmp_path):
    with pytest.raises(CorpusError, match="holds no train-clean-100"):
        load("librispeech", tmp_path / "nowhere")
