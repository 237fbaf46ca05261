import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from fedomc_speech.corpus import (
    NAMES,
    SAMPLE_RATE,
    SYNTHETIC,
    CommandsConfig,
    CorpusError,
    DigitsConfig,
    espeak,
    load,
    load_synthetic,
    progress_bar,
    synthetic,
)

TINY = DigitsConfig(train_speakers=3, test_speakers=1, train_utterances=3, test_utterances=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache that holds the tiny corpus."""
    cache = tmp_path_factory.mktemp("built")
    load_synthetic(TINY, cache)
    return cache


def contents(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def folder(cache):
    (only,) = cache.iterdir()
    return only


def test_two_builds_are_identical(built, tmp_path):
    load_synthetic(TINY, tmp_path)
    assert contents(tmp_path) == contents(built)


def test_corpus(built):
    corpus = load("digits", cache=built, config=TINY)
    assert (corpus.name, len(corpus.train), len(corpus.test)) == ("digits", 9, 2)
    assert corpus.words == tuple(sorted(DigitsConfig.words)) and len(set(corpus.words)) == 20
    assert len({utterance.path for utterance in corpus.train}) == 3
    for utterance in corpus.train + corpus.test:
        words = utterance.text.split()
        assert 2 <= len(words) <= 6 and set(words) <= set(corpus.words)
        audio = utterance.audio()
        assert audio.dtype == np.float32 and audio.shape == (utterance.frames,)
        assert 0.2 < len(audio) / SAMPLE_RATE / len(words) < 0.9
        assert 0.4 < abs(audio).max() < 0.7
        assert audio.std() > 0.02


def test_utterances_cover_the_files(built):
    corpus = load_synthetic(TINY, built)
    ends: dict[Path, int] = {}
    for utterance in corpus.train + corpus.test:
        assert utterance.start == ends.get(utterance.path, 0)
        ends[utterance.path] = utterance.start + utterance.frames
    assert all(path.stat().st_size == 44 + 2 * end for path, end in ends.items())


def test_test_speakers_are_new_voices(tmp_path):
    corpus = load_synthetic(DigitsConfig(train_utterances=1, test_utterances=1, max_words=2), tmp_path)
    train = {utterance.speaker.partition("-")[2] for utterance in corpus.train}
    test = {utterance.speaker.partition("-")[2] for utterance in corpus.test}
    assert (len(train), len(test), len(train | test)) == (32, 8, 40)
    accents = {voice.rpartition("-")[0] for voice in test}
    variants = {voice.rpartition("-")[2] for voice in train}
    assert accents == set(synthetic.ACCENTS) and variants == set(synthetic.VARIANTS)


@pytest.mark.parametrize("snr", [10.0, 25.0])
def test_noise(tmp_path, snr):
    config = DigitsConfig(1, 1, 8, 1, min_snr=snr, max_snr=snr)
    for utterance in load_synthetic(config, tmp_path).train:
        audio = utterance.audio().astype(float)
        noise = (audio[:700] ** 2).mean()
        assert 10 * np.log10((audio**2).mean() / noise - 1) == pytest.approx(snr, abs=2)


@pytest.mark.parametrize("other", [{"seed": 1}, {"max_snr": 31.0}])
def test_another_config_is_another_corpus(built, tmp_path, other):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    load_synthetic(DigitsConfig(**{**TINY.__dict__, **other}), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_kept_corpus_is_not_made_again(built):
    before = contents(built)
    load_synthetic(TINY, built, progress=lambda done, total: pytest.fail("made again"))
    assert contents(built) == before


def first_wav(directory):
    return min(directory.glob("*.wav"))


def truncate(directory):
    first_wav(directory).write_bytes(first_wav(directory).read_bytes()[:-100])


def flip(directory):
    data = bytearray(first_wav(directory).read_bytes())
    data[1000] ^= 1
    first_wav(directory).write_bytes(data)


def change_text(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["content"]["utterances"][0]["text"] = "stop"
    (directory / "manifest.json").write_text(json.dumps(manifest))


def replace_by_file(directory):
    shutil.rmtree(directory)
    directory.write_text("a file")


DAMAGE = {
    "shorter": truncate,
    "a bit flipped": flip,
    "text changed": change_text,
    "no file": lambda directory: first_wav(directory).unlink(),
    "no manifest": lambda directory: (directory / "manifest.json").unlink(),
    "manifest not JSON": lambda directory: (directory / "manifest.json").write_bytes(b"\xff{"),
    "manifest a list": lambda directory: (directory / "manifest.json").write_text("[]"),
    "nothing left": lambda directory: [path.unlink() for path in directory.iterdir()],
    "not a directory": replace_by_file,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_repaired(built, tmp_path, caplog, damage):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    damage(folder(tmp_path))
    load_synthetic(TINY, tmp_path)
    assert "made again" in caplog.text and str(folder(tmp_path)) in caplog.text
    assert contents(tmp_path) == contents(built)


def test_damage_after_loading_is_found(built, tmp_path, caplog):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    load_synthetic(TINY, tmp_path)
    flip(folder(tmp_path))
    load_synthetic(TINY, tmp_path)
    assert "made again" in caplog.text


def test_second_to_be_ready_uses_the_corpus_of_the_first(tmp_path):
    firsts = []

    def progress(done, total):
        if done == total:
            load_synthetic(TINY, tmp_path)  # the other process
            firsts.extend(path.stat().st_ino for path in tmp_path.glob("*/manifest.json"))

    load_synthetic(TINY, tmp_path, progress)
    assert [(folder(tmp_path) / "manifest.json").stat().st_ino] == firsts


def test_second_to_be_ready_replaces_a_damaged_corpus(built, tmp_path):
    def progress(done, total):
        if done == total:
            shutil.copytree(folder(built), tmp_path / folder(built).name)
            flip(tmp_path / folder(built).name)

    load_synthetic(TINY, tmp_path, progress)
    assert contents(tmp_path) == contents(built)


def test_interrupt_leaves_nothing(tmp_path):
    def progress(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_synthetic(TINY, tmp_path, progress)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_utterance(tmp_path):
    reports = []
    load_synthetic(TINY, tmp_path, lambda done, total: reports.append((done, total)))
    assert reports == [(done, 11) for done in range(1, 12)]


def test_progress_bar(capsys):
    with progress_bar("Speaking") as report:
        report(1, 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("variable, parts", [("XDG_CACHE_HOME", ()), ("HOME", (".cache",))])
def test_cache_of_the_user(built, tmp_path, monkeypatch, variable, parts):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    shutil.copytree(built, tmp_path.joinpath(*parts, "fedomc"))
    corpus = load("digits", config=TINY)
    assert corpus.train[0].path.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"train_speakers": 0}, "train_speakers"),
        ({"test_utterances": -1}, "test_utterances"),
        ({"min_words": 0}, "min_words"),
        ({"train_speakers": 97}, "104 voices, not 105"),
        ({"min_words": 7}, "max_words"),
        ({"min_snr": 31.0}, "max_snr"),
        ({"min_snr": float("nan")}, "max_snr"),
    ],
)
def test_impossible_config(wrong, message):
    with pytest.raises(CorpusError, match=message):
        DigitsConfig(**wrong)


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"digits-\w+ cannot be written .*another cache"):
        load_synthetic(TINY, tmp_path / "file")


def test_voice_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "ACCENTS", ("xx-nowhere",))
    with pytest.raises(CorpusError, match="no voice 'xx-nowhere"):
        load_synthetic(TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_espeak(tmp_path, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(CorpusError, match="pip install espeakng-loader"):
        load_synthetic(TINY, tmp_path)


def test_process_that_dies(monkeypatch):
    monkeypatch.setattr(espeak.sys, "executable", "/bin/true")
    with pytest.raises(espeak.EspeakError, match="ended"):
        next(espeak.synthesize([espeak.Speech("one", "en", 150, 50)]))


def sine(frequency, rate, samples):
    return 10_000 * np.sin(2 * np.pi * frequency * np.arange(samples) / rate)


@pytest.mark.parametrize("rate, new_rate", [(22_050, 16_000), (16_000, 22_050), (16_000, 16_000), (48_000, 16_000)])
@pytest.mark.parametrize("frequency", [100, 1000, 6500])
def test_resample_keeps_a_tone(rate, new_rate, frequency):
    result = espeak.resample(np.round(sine(frequency, rate, rate)).astype(np.int16), rate, new_rate)
    assert len(result) == new_rate
    middle = slice(200, -200)
    np.testing.assert_allclose(result[middle], sine(frequency, new_rate, new_rate)[middle], atol=3)


@pytest.mark.parametrize("frequency", [9000, 10_500])
def test_resample_keeps_out_what_would_alias(frequency):
    result = espeak.resample(sine(frequency, 22_050, 22_050).astype(np.int16), 22_050, 16_000)
    assert abs(result[200:-200]).max() < 3


@pytest.mark.parametrize("samples, expected", [(1, 1), (440, 320), (441, 320), (442, 321), (2 * 441, 640)])
def test_resampled_length(samples, expected):
    assert len(espeak.resample(np.ones(samples, np.int16), 22_050, 16_000)) == expected


def test_the_digits_are_what_they_were():
    """A change would make every user synthesise them again, and move all results."""
    config = DigitsConfig()
    speakers = synthetic._speakers(config)
    texts = "\n".join(text for speaker in speakers for text in speaker.texts)
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "4bd8b1725f7d25a4"
    assert (speakers[0].voice, speakers[0].rate, speakers[0].pitch) == ("en-gb-x-gbclan+m4", 138, 53)
    assert synthetic._description(config)["config"] == {
        "train_speakers": 32, "test_speakers": 8, "train_utterances": 60, "test_utterances": 20,
        "min_words": 2, "max_words": 6, "min_snr": 15.0, "max_snr": 30.0, "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", SYNTHETIC.values(), ids=SYNTHETIC.keys())
def test_sentences_have_all_words_and_no_others(kind):
    random = Random(0)  # noqa: S311
    words = [word for _ in range(20_000) for word in kind().sentence(random)]
    assert set(words) == set(kind.words) and len(set(kind.words)) == len(kind.words)
    assert set(kind.spellings) <= set(kind.words)
    assert kind.name in NAMES


def test_commands(tmp_path):
    corpus = load("commands", cache=tmp_path, config=CommandsConfig(2, 1, 4, 2))
    assert (corpus.name, len(corpus.train), len(corpus.test)) == ("commands", 8, 2)
    assert corpus.words == tuple(sorted(CommandsConfig.words)) and len(corpus.words) == 101
    for utterance in corpus.train:
        assert 0.1 < utterance.frames / SAMPLE_RATE / len(utterance.text.split()) < 1.2


def test_letters_are_said_as_letters(tmp_path, monkeypatch):
    """Alone, espeak-ng takes the letter a for the article, and z differs by accent."""
    speeches = []

    def synthesize(spoken, seed):
        speeches.extend(spoken)
        raise espeak.EspeakError("enough")
        yield

    monkeypatch.setattr(espeak, "synthesize", synthesize)
    monkeypatch.setattr(CommandsConfig, "sentence", lambda self, random: ["a", "z", "b"])
    with pytest.raises(CorpusError, match="enough"):
        load("commands", cache=tmp_path)
    assert speeches[0].text == "eigh zee b"
