from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedomc_speech import corpus
from fedomc_speech.errors import SettingsError
from fedomc_speech.experiments.plan import Experiment, key_of
from fedomc_speech.settings import FP32, Settings

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))

TEXT = """
title = "Title"
seeds = [0, 3]
pooled = true
formats = ["FP32", "S1E3M7@0.9"]
[settings]
rounds = 7
corpus = "an4"
[[rows]]
name = "plain"
format = "S1E2M3"
transform = "none"
weight_matrices_only = false
[[rows]]
name = "four steps"
format = "S1E2M3"
local_steps = 4
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return read(tmp_path, TEXT)


def read(folder: Path, text: str, **overrides: object) -> Experiment:
    (folder / "mine.toml").write_text(text)
    return Experiment.read(folder / "mine.toml", overrides)


def test_a_file_is_read(experiment: Experiment) -> None:
    assert (experiment.name, experiment.title, experiment.seeds, experiment.pooled) == ("mine", "Title", (0, 3), True)
    assert [row.name for row in experiment.rows] == ["FP32", "S1E3M7@0.9", "plain", "four steps"]
    assert {row.settings.rounds for row in experiment.rows} == {7}
    plain = experiment.rows[2].settings
    assert (plain.formats, plain.transform, plain.weight_matrices_only) == (("S1E2M3",), "none", False)


def test_rows_that_differ_in_compression_alone_share_a_baseline(experiment: Experiment) -> None:
    fp32, one, plain, steps = experiment.rows
    assert fp32.run(0) == fp32.baseline == one.baseline == plain.baseline
    assert plain.baseline.formats == (FP32,) and plain.baseline.transform == Settings().transform
    assert steps.baseline.local_steps == 4
    keys = [key_of(run) for run in experiment.runs()]
    assert len(keys) == 2 * 4 * 2 and len(set(keys)) == 2 * 5


def test_fp32_with_one_local_step_has_one_client_learning_rate(tmp_path: Path) -> None:
    text = TEXT.replace("local_steps = 4", "local_steps = 4\nclient_learning_rate = 0.5").replace(
        "rounds = 7", "client_learning_rate = 30.0"
    )
    fp32, one, _, steps = read(tmp_path, text).rows
    assert one.run(0).client_learning_rate == 30.0
    assert fp32.run(0) == one.baseline and one.baseline.client_learning_rate == 0.1
    assert steps.baseline.client_learning_rate == 0.5


def test_the_key_names_everything_but_where_the_corpus_lies(
    experiment: Experiment, tones: Path, write_tones: Callable[..., Path], tmp_path: Path
) -> None:
    def run_at(path: Path) -> Settings:
        return experiment.at({"an4": path}, tmp_path).rows[1].run(3)

    run = run_at(tones)
    assert key_of(run).startswith("an4-speaker-S1E3M7@0.9-seed3-")
    in_blocks = replace(run, formats=("S1E2M3/64+S1E2M1/64",))
    assert key_of(in_blocks).startswith("an4-speaker-S1E2M3_64+S1E2M1_64-seed3-")
    assert key_of(replace(run, batch=9)) != key_of(run)
    assert experiment.needs_path() == {"an4"}
    assert {row.settings.corpus_path for row in experiment.at({"an4": tones}, tmp_path).rows} == {str(tones)}
    elsewhere = write_tones(tmp_path / "elsewhere")
    assert key_of(run_at(elsewhere)) == key_of(run)
    texts = elsewhere / "etc" / "an4_test.transcription"
    texts.write_text(texts.read_text().replace("LOW", "HIGH"))
    assert key_of(run_at(elsewhere)) != key_of(run)


def test_a_file_may_name_a_corpus_of_your_own(tones: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for part in ("train", "test"):
        audio = tones / "wav/an4_clstk/speaker0/speaker0-0.wav"
        (tmp_path / "folder" / f"{part}.tsv").write_text(f"audio\ttext\tspeaker\n{audio}\tlow\t{part}er\n")
    text = TEXT.replace('corpus = "an4"', f'corpus = "folder"\ncorpus_path = "{tmp_path / "folder"}"')
    experiment = read(tmp_path, text)
    assert experiment.needs_path() == set()
    [settings] = {(row.settings.corpus_path, row.settings.corpus_digest) for row in experiment.at({}, tmp_path).rows}
    assert settings == (str(tmp_path / "folder"), corpus.load("folder", tmp_path / "folder").digest)
    with pytest.raises(SettingsError, match="corpus_path") as caught:
        read(tmp_path, TEXT.replace('"an4"', '"folder"'))
    assert "mine.toml" in str(caught.value)


def test_a_part_of_an_experiment(experiment: Experiment) -> None:
    part = experiment.only(["plain"], [5, 5])
    assert [run.seed for run in part.runs()] == [5, 5]
    assert [run.formats for run in part.runs()] == [(FP32,), ("S1E2M3",)]
    marked = replace(experiment, rows=tuple(replace(row, further=row.name == "plain") for row in experiment.rows))
    others = [row.name for row in experiment.rows if row.name != "plain"]
    assert [row.name for row in marked.only([], [], further=False).rows] == others
    assert marked.only(["plain"], [], further=False).rows == marked.only(["plain"], []).rows != ()
    assert marked.only([], []).rows == marked.rows
    with pytest.raises(SettingsError, match="no row fancy"):
        experiment.only(["fancy"], [])


def test_settings_can_be_given_for_all_rows(tmp_path: Path) -> None:
    assert {row.settings.model for row in read(tmp_path, TEXT, model="large").rows} == {"large"}


def test_all_rows_begin_with_the_same_model(tmp_path: Path) -> None:
    text = TEXT + "[pretraining]\ncorpus = 'digits'\naugment = true\nsteps = 5\n"
    experiment = read(tmp_path, text, streaming=True)
    initial = experiment.initial
    assert initial is not None and initial.name.startswith("initial-digits-")
    assert (initial.start.streaming, initial.start.augment, initial.training.steps) == (True, True, 5)
    placed = experiment.at({}, tmp_path)
    assert {run.initial for run in placed.runs()} == {str(tmp_path / initial.name)}
    assert [key_of(run) for run in placed.runs()] == [key_of(run) for run in experiment.at({}, Path("/else")).runs()]
    others = [
        read(tmp_path, text.replace("steps = 5", other)).initial for other in ("steps = 6", "steps = 5\nseed = 1")
    ]
    assert len({one.name for one in (initial, *others) if one}) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("formats = ['FP32']\n[pretraining]\nsteps = 0", "steps=0"),
        ("formats = ['FP32']\n[pretraining]\nspeed = 1", "speed"),
        ("formats = ['FP32']\n[pretraining]\nsteps = 2.5", "steps=2.5"),
        ("formats = ['FP32']\n[settings]\ninitial = 'x'\n[pretraining]\nsteps = 2", "initial and pretraining"),
        ("formats = ['FP32']\npooled = 'no'", "pooled"),
        ("[[rows]]\nformat = 'FP32'\nfurther = 'no'", "further='no'"),
        ("[[rows]]\nname = 'a | b'\nformat = 'FP32'", "without"),
        ("formats = [", "cannot be read"),
        ("colour = 3", "colour is unknown"),
        ("seeds = []\nformats = ['FP32']", "seeds"),
        ("seeds = [1, 1]\nformats = ['FP32']", "seeds"),
        ("seeds = ['a']\nformats = ['FP32']", "seed"),
        ("seeds = [-1]\nformats = ['FP32']", "seed"),
        ("formats = 'FP32'", "lists"),
        ("formats = []", "at least one"),
        ("formats = ['FP32', 'FP32']", "name of its own"),
        ("formats = ['S9']", "S9"),
        ("formats = ['FP32']\nsettings = 3", "settings must be a table"),
        ("formats = ['FP32']\n[settings]\nspeed = 3", "speed"),
        ("formats = ['FP32']\n[settings]\nseed = 3", "seed does not belong"),
        ("[[rows]]\nname = 'x'", "format is expected"),
        ("[[rows]]\nformat = 'S1E3M7'\ntransform = 'log'", "log"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        read(tmp_path, text)
    assert "mine.toml" in str(caught.value)


def test_the_experiments_of_the_project_can_be_read() -> None:
    experiments = [Experiment.read(path) for path in FILES]
    assert sum(experiment.pooled for experiment in experiments) >= 3
    for experiment in experiments:
        assert experiment.rows[0].settings.formats == (FP32,), experiment.name
        assert experiment.title and experiment.paper and experiment.model
