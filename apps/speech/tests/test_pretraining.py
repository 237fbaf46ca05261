"""A model trained in one place, kept in a file, and begun with."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.serverapp import Grid
from nodes import Nodes, Watcher
from safetensors import safe_open
from typer.testing import CliRunner

import fedomc
from fedomc_speech import corpus, federation, model, pretraining, training
from fedomc_speech.augmentation import Augmentation
from fedomc_speech.cli import app
from fedomc_speech.errors import SettingsError
from fedomc_speech.pretraining import Pretraining
from fedomc_speech.run_folder import RunFolder
from fedomc_speech.settings import Settings
from fedomc_speech.tokens import WordTokenizer, tokenizer_for


@pytest.fixture
def loaded(tones: Path) -> corpus.Corpus:
    return corpus.load("an4", tones)


def values(network: torch.nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in network.parameters()]


def test_training_learns_the_tones_the_same_each_time(loaded: corpus.Corpus) -> None:
    tokenizer = tokenizer_for(loaded)
    networks, losses = [], []
    for _ in range(2):
        losses.clear()
        network = model.build("tiny", tokenizer.vocab_size, seed=0)
        pretraining.train(
            network, loaded.train, tokenizer, Pretraining(steps=25, batch=8, warmup=5), Augmentation(),
            lambda step, loss: losses.append((step, loss)),
        )  # fmt: skip
        networks.append(network)
    assert [step for step, _ in losses] == list(range(1, 26))
    assert sum(loss for _, loss in losses[-5:]) < 0.5 * sum(loss for _, loss in losses[:5])
    assert all(torch.equal(*pair) for pair in zip(*map(values, networks), strict=True))


def test_the_rate_rises_and_falls() -> None:
    settings = Pretraining(steps=100, warmup=10, learning_rate=2.0)
    rates = [settings.learning_rate_in(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and rates.index(max(rates)) == 9
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
    ],
)
def test_what_is_wrong_is_named(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name}={value}"):
        Pretraining(**{name: value})


def test_a_file_gives_the_model_back(tmp_path: Path) -> None:
    tokenizer = WordTokenizer(["one", "two"])
    network, other = (model.build("tiny", 3, seed=seed) for seed in (1, 2))
    pretraining.save(network, tokenizer, Pretraining(steps=7), tmp_path / "model")
    pretraining.load(other, tokenizer, tmp_path / "model")
    assert all(torch.equal(*pair) for pair in zip(values(network), values(other), strict=True))
    with safe_open(tmp_path / "model", "pt") as file:
        assert json.loads(file.metadata()["pretraining"])["steps"] == 7
    with pytest.raises(SettingsError, match="choose another file"):
        pretraining.save(network, tokenizer, Pretraining(), tmp_path / "no folder" / "model")


def whole(path: Path) -> None:
    pretraining.save(model.build("tiny", 3, seed=1), WordTokenizer(["one", "two"]), Pretraining(), path)


def truncated(path: Path) -> None:
    whole(path)
    path.write_bytes(path.read_bytes()[:-10])


def of_other_words(path: Path) -> None:
    pretraining.save(model.build("tiny", 3, seed=1), WordTokenizer(["one", "ten"]), Pretraining(), path)


def of_fewer_words(path: Path) -> None:
    pretraining.save(model.build("tiny", 2, seed=1), WordTokenizer(["one"]), Pretraining(), path)


def without_words(path: Path) -> None:
    fedomc.save_model(model.build("tiny", 3, seed=1), path)


def of_another_model(path: Path) -> None:
    network = model.build("tiny", 3, seed=1)
    network.head = torch.nn.Linear(144, 4)
    pretraining.save(network, WordTokenizer(["one", "two"]), Pretraining(), path)


class AnotherModel(model.SpeechModel):
    """Of the same variables."""


def of_another_class(path: Path) -> None:
    pretraining.save(AnotherModel(model.SIZES["tiny"], 3), WordTokenizer(["one", "two"]), Pretraining(), path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b"nothing"), "cannot be loaded"),
        (truncated, "cannot be loaded"),
        (of_other_words, r'tokens: \["one", "ten"\], not \["one", "two"\]'),
        (of_fewer_words, r'tokens: \["one"\], not'),
        (without_words, "model: nothing, not SpeechModel"),
        (of_another_class, "model: AnotherModel, not SpeechModel"),
        (of_another_model, "head"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(make: Any, says: str, tmp_path: Path) -> None:
    make(tmp_path / "model")
    network = model.build("tiny", 3, seed=2)
    before = values(network)
    with pytest.raises(SettingsError, match=says) as error:
        pretraining.load(network, WordTokenizer(["one", "two"]), tmp_path / "model")
    assert str(tmp_path / "model") in str(error.value)
    assert all(torch.equal(*pair) for pair in zip(before, values(network), strict=True))


@pytest.mark.usefixtures("identity")
def test_a_federation_begins_with_the_file(tones: Path, loaded: corpus.Corpus, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(loaded)
    pretrain = ["pretrain", str(tmp_path / "model"), "--corpus", "an4", "--corpus-path", str(tones), "--steps", "25",
                "--batch", "8", "--warmup", "5"]  # fmt: skip
    result = CliRunner().invoke(app, pretrain)
    assert result.exit_code == 0, result.output
    assert "25 steps will take about" in result.output and "step 25/25" in result.output and "WER" in result.output
    losses = {}
    for initial in ("", str(tmp_path / "model")):
        chosen = Settings(
            formats=("S1E3M7",), corpus="an4", corpus_path=str(tones), initial=initial, augment=True, rounds=1,
            cohort=4, server_learning_rate=1e-9,
        )  # fmt: skip
        folder = RunFolder(tmp_path / f"run{len(losses)}", chosen, resume=False)
        federation.run(chosen, cast(Grid, Nodes(4)), folder, Watcher())
        losses[initial] = folder.runs[0]["history"][0]["loss"]
        network = pretraining.starting_model(chosen, tokenizer)
        assert folder.runs[0]["wer"] == training.word_errors(network, loaded.test, tokenizer).word_error_rate
    assert losses[str(tmp_path / "model")] < 0.5 * losses[""]


def test_a_wrong_file_is_one_clear_line(tones: Path, tmp_path: Path) -> None:
    options = ["--corpus", "an4", "--corpus-path", str(tones), "--initial", str(tmp_path / "none")]
    for command in (["compare", "--cohort", "2", "--output", str(tmp_path)], ["pretrain", str(tmp_path / "model")]):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 2 and result.output.count("\n") == 1 and "none" in result.output
    assert list(tmp_path.iterdir()) == []
