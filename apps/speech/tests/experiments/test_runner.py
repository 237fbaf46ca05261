"""From a TOML file to tables, with real worker processes."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedomc_speech.cli import app
from fedomc_speech.errors import ExperimentError
from fedomc_speech.experiments import results
from fedomc_speech.experiments.plan import Experiment, key_of
from fedomc_speech.experiments.runner import LOG, Runs, run_all
from fedomc_speech.run_folder import CHECKPOINT

REPOSITORY = Path(__file__).parents[4]

TEXT = """
title = "Tones"
paper = "none"
model = "Conformer"
seeds = [0, 1]
pooled = true
formats = ["FP32", "S1E3M7@0.9", "S1E2M3+S1E2M1"]
[settings]
corpus = "an4"
rounds = 2
cohort = 2
batch = 2
warmup = 1
evaluate_every = 1
[[rows]]
name = "no transformation"
format = "S1E2M3"
further = true
transform = "none"
"""

CONTRACT = {
    "experiment", "model", "split", "format", "fraction", "seeds", "wer", "wer_fp32", "difference", "ci_low", "ci_high",
    "memory_ratio", "down_ratio", "up_ratio",
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tones.toml"
    path.write_text(TEXT)
    return path


def invoke(file: Path, tmp_path: Path, *more: str) -> str:
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--workers", "2"]
    result = CliRunner().invoke(app, ["experiments", str(file), *places, *more])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.filterwarnings("ignore:.* cannot hold")  # without a transformation
def test_an_experiment_becomes_tables_and_figures(file: Path, tones: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    marks = "before\n<!-- table: tones -->\nold\n<!-- end -->\n<!-- table: pooled -->\n<!-- end -->\nafter\n"
    (results / "README.md").write_text(marks)
    first = invoke(file, tmp_path, "--an4", str(tones), "--row", "S1E3M7@0.9", "--seed", "0")
    assert "0 of 2 runs" in first
    rows = json.loads((results / "summary.json").read_text())
    assert [(row["row"], row["seeds"], row["ci_low"]) for row in rows] == [
        ("FP32", [0], None),
        ("S1E3M7@0.9", [0], None),
    ]

    output = invoke(file, tmp_path, "--an4", str(tones))
    assert "2 of 6 runs" in output and "MB" not in output
    assert "6 of 8 runs" in invoke(file, tmp_path, "--an4", str(tones), "--further")
    rows = json.loads((results / "summary.json").read_text())
    assert [row["row"] for row in rows] == ["FP32", "S1E3M7@0.9", "S1E2M3+S1E2M1", "no transformation"]
    for row in rows:
        assert set(row) >= CONTRACT and row["seeds"] == [0, 1]
        assert row["difference"] == pytest.approx(row["wer"] - row["wer_fp32"])
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
        assert row["difference_compressed"] == pytest.approx(row["wer_compressed"] - row["wer_fp32"])
        assert row["ci_low_compressed"] <= row["difference_compressed"] <= row["ci_high_compressed"]
    assert rows[0]["difference"] == 0 and rows[0]["memory_ratio"] == 1
    assert rows[1]["memory_ratio"] < 0.42 and rows[2]["down_ratio"] < 0.205 and rows[2]["up_ratio"] < 0.145
    text = (results / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| no transformation |") == 2
    assert {path.name for path in (results / "figures").iterdir()} == {
        f"tones-{figure}.{kind}" for figure in ("curves", "layers", "differences", "front") for kind in ("png", "svg")
    }
    assert "round 2/2" in (tmp_path / "runs" / LOG).read_text()
    assert not list((tmp_path / "runs").glob(f"*/{CHECKPOINT}"))

    known = json.loads((results / "tones.json").read_text())
    older = json.loads(json.dumps(known))  # before a setting was there that is at its default now
    for row in older["rows"]:
        assert row["settings"].pop("format_by_name") == ""
    (results / "tones.json").write_text(json.dumps(older))
    again = json.loads((results / "summary.json").read_text())
    invoke(file, tmp_path, "--an4", str(tones), "--row", "FP32", "--seed", "1", "--output", str(tmp_path / "elsewhere"))
    assert json.loads((results / "summary.json").read_text()) == again
    assert json.loads((results / "tones.json").read_text()) == known and str(tmp_path) not in json.dumps(known)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("results.json")}
    assert "8 of 8 runs" in invoke(file, tmp_path, "--an4", str(tones), "--further")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("results.json")}


def test_another_corpus_does_not_get_the_results_of_the_first(
    file: Path, tones: Path, write_tones: Callable[..., Path], tmp_path: Path
) -> None:
    file.write_text(TEXT.replace("rounds = 2", "rounds = 1").replace("seeds = [0, 1]", "seeds = [0]"))
    assert "0 of 1 runs" in invoke(file, tmp_path, "--an4", str(tones), "--row", "FP32")
    other = write_tones(tmp_path / "other", 3, 4)
    arguments = ["experiments", str(file), "--output", str(tmp_path / "runs"), "--row", "FP32", "--an4", str(other)]
    refused = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path / "results")])
    assert refused.exit_code == 2 and "tones.json was made with another corpus an4" in refused.output
    done = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path / "others")])
    assert done.exit_code == 0 and "0 of 1 runs" in done.output
    first, second = (json.loads((tmp_path / name / "tones.json").read_text()) for name in ("results", "others"))
    words = [gathered["rows"][0]["runs"][0]["utterances"]["words"] for gathered in (first, second)]
    assert [len(spoken) for spoken in words] == [6, 4]
    again = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path / "others")])
    assert "1 of 1 runs" in again.output


@pytest.mark.parametrize("path", sorted((REPOSITORY / "apps/speech/experiments").glob("*.toml")), ids=lambda p: p.stem)
def test_the_published_results_are_those_of_the_experiments_files(path: Path, tmp_path: Path) -> None:
    known = json.loads((REPOSITORY / "docs/results" / f"{path.stem}.json").read_text())
    [digest] = {row["settings"]["corpus_digest"] for row in known["rows"]}
    experiment = Experiment.read(path, {"corpus_digest": digest})
    assert results.gather(experiment, Runs(tmp_path), known) == known


def test_tables_of_the_benchmarks_beside_them_are_no_experiments() -> None:
    """The folder of the published results can be written to: it holds more than experiments."""
    found = [gathered["experiment"] for gathered in results.read_all(REPOSITORY / "docs/results")]
    assert set(found) == {path.stem for path in (REPOSITORY / "apps/speech/experiments").glob("*.toml")}


def test_what_has_no_corpus_is_left_out(file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["experiments", str(file), "--output", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert "needs --an4" in result.output and "no experiment to run" in result.output


def test_a_stopped_run_goes_on(file: Path, tones: Path, tmp_path: Path) -> None:
    experiment = Experiment.read(file, {"rounds": 6}).only(["FP32"], [0]).at({"an4": tones}, tmp_path)
    [run] = {key_of(run): run for run in experiment.runs()}.values()
    runs, stop = Runs(tmp_path / "runs"), threading.Event()
    checkpoint = runs.folder(run) / CHECKPOINT

    def stop_soon() -> None:
        while not checkpoint.exists():
            pass
        stop.set()

    watching = threading.Thread(target=stop_soon)
    watching.start()
    assert not run_all([run], runs, 1, Console(quiet=True), stop)
    watching.join()
    assert runs.result(run) is None and 1 <= runs.rounds(run) < 6
    assert run_all([run], runs, 1, Console(quiet=True), threading.Event())
    whole = Runs(tmp_path / "whole")
    assert run_all([run, run], whole, 1, Console(quiet=True), threading.Event())
    one, other = runs.result(run), whole.result(run)
    assert one and other and one["utterances"] == other["utterances"]
    assert [row["loss"] for row in one["history"]] == [row["loss"] for row in other["history"]]


def test_runs_begin_with_a_model_that_is_trained_once(file: Path, tones: Path, tmp_path: Path) -> None:
    text = "\n[pretraining]\ncorpus = 'an4'\nsteps = 3\nbatch = 2\n"
    file.write_text(TEXT + text)
    experiment = Experiment.read(file).only(["S1E3M7@0.9"], [0]).at({"an4": tones}, tmp_path / "runs")
    assert experiment.initial is not None
    runs, stop = Runs(tmp_path / "runs"), threading.Event()
    wanted = list(experiment.runs())
    assert run_all(wanted, runs, 2, Console(quiet=True), stop, [experiment.initial])
    model = tmp_path / "runs" / experiment.initial.name
    made = model.stat().st_mtime_ns
    log = (tmp_path / "runs" / LOG).read_text()
    assert log.count("on the test of an4") == 1
    assert all(runs.result(run) for run in wanted)
    more = list(experiment.only([], [1]).runs())
    assert run_all(more, runs, 2, Console(quiet=True), stop, [experiment.initial])
    assert model.stat().st_mtime_ns == made


def test_runs_that_fail_are_named_and_the_others_go_on(file: Path, tones: Path, tmp_path: Path) -> None:
    bad = Experiment.read(file, {"cohort": 9}).at({"an4": tones}, tmp_path).only(["FP32"], [0, 1])
    good = Experiment.read(file).at({"an4": tones}, tmp_path).only(["FP32"], [1])
    runs = Runs(tmp_path / "runs")
    with pytest.raises(ExperimentError, match=r"2 of 3 runs failed.*an4-speaker-FP32-seed0\S+ cohort=9"):
        run_all([*bad.runs(), *good.runs()], runs, 1, Console(quiet=True), threading.Event())
    assert all(runs.result(run) for run in good.runs())


def test_runs_that_have_not_begun_are_left_when_it_stops(file: Path, tones: Path, tmp_path: Path) -> None:
    experiment = Experiment.read(file, {"rounds": 500}).at({"an4": tones}, tmp_path)
    runs, stop = Runs(tmp_path / "runs"), threading.Event()
    threading.Timer(1.0, stop.set).start()
    assert not run_all(list(experiment.runs()), runs, 1, Console(quiet=True), stop)
    assert sum(path.is_dir() for path in runs.path.iterdir()) <= 2


def test_two_processes_do_not_share_a_folder(file: Path, tones: Path, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    wanted = list(Experiment.read(file).at({"an4": tones}, tmp_path).runs())
    with runs.locked(), pytest.raises(ExperimentError, match="another process"):
        run_all(wanted, Runs(tmp_path), 1, Console(quiet=True), threading.Event())


def test_workers_end_with_the_process_that_started_them(file: Path, tones: Path, tmp_path: Path) -> None:
    arguments = [str(file), "--set", "rounds=500", "--an4", str(tones), "--workers", "1"]
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = [sys.executable, "-m", "fedomc_speech", "experiments", *arguments, *places]
    main = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    deadline = time.monotonic() + 180
    while not list((tmp_path / "runs").glob(f"*/{CHECKPOINT}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    main.kill()
    main.wait()
    time.sleep(5)
    [checkpoint] = (tmp_path / "runs").glob(f"*/{CHECKPOINT}")
    last = checkpoint.stat().st_mtime_ns
    time.sleep(2)
    assert checkpoint.stat().st_mtime_ns == last
