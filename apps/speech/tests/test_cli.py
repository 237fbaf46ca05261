"""The command line: bad input is one clear line and exit code 2; a real simulation runs, stops, and resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from nodes import Watcher, results_of
from typer.testing import CliRunner

from fedomc.flower.in_process import InProcess
from fedomc_speech import corpus, federation
from fedomc_speech.cli import app
from fedomc_speech.client import app as client_app
from fedomc_speech.run_folder import RunFolder
from fedomc_speech.settings import Settings


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "S1E3"], "S1E3"),
        (["--format", "S1E9M7"], "1 to 8 exponent bits"),
        (["--format", "S1E3M7@1.5"], "from 0 to 1"),
        (["--format", "S1E3M7@0"], "no variable"),
        (["--seed", "-1"], "seed=-1"),
        (["--corpus", "an4", "--corpus-path", "{tones}", "--cohort", "2", "--output", "/dev/null"], "/dev/null"),
        (["--corpus", "nothing"], "digits, commands, an4, librispeech, folder"),
        (["--corpus", "an4"], "path"),
        (["--corpus", "folder", "--corpus-path", "{empty}"], "{empty} has neither train.tsv nor train.jsonl"),
        (["--corpus", "an4", "--corpus-path", "{tones}", "--corpus-digest", "ff"], "not 'ff'"),
        (["--corpus", "an4", "--corpus-path", "{empty}"], "{empty}"),
        (["--corpus", "librispeech", "--corpus-path", "{empty}"], "{empty}"),
        (["--corpus", "an4", "--corpus-path", "{tones}", "--cohort", "9"], "only 4 clients"),
        (["--corpus", "an4", "--corpus-path", "{tones}", "--split", "random"], "random"),
        (["--corpus", "an4", "--corpus-path", "{tones}", "--model", "huge"], "huge"),
        (["--corpus", "an4", "--corpus-path", "{tones}", "--cohort", "2", "--resume"], "nothing to resume"),
        (["--corpus", "an4", "--corpus-path", "{damaged}", "--cohort", "1"], "speaker0-0.wav"),
        (["--rounds", "0"], "rounds=0"),
        (["--server-learning-rate", "nan"], "server_learning_rate=nan"),
        (["--rounding", "up"], "nearest, stochastic"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], says: str, tones: Path, write_tones: Callable[..., Path], tmp_path: Path
) -> None:
    places = {"empty": tmp_path / "empty", "tones": tones, "damaged": write_tones(tmp_path / "damaged", 1, 1)}
    places["empty"].mkdir()
    broken = places["damaged"] / "wav/an4_clstk/speaker0/speaker0-0.wav"
    broken.write_bytes(broken.read_bytes()[:20])
    command = ["compare", "--output", str(tmp_path / "runs"), *(text.format(**places) for text in arguments)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert says.format(**places) in result.output
    assert result.output.count("\n") == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_resumed_on_another_corpus(write_tones: Callable[..., Path], tmp_path: Path) -> None:
    where = write_tones(tmp_path / "corpus", 2, 2)
    given = Settings(("FP32",), "an4", str(where), corpus.load("an4", where).digest, rounds=1, cohort=1, batch=1)
    RunFolder(tmp_path / "run", given, resume=False)
    texts = where / "etc" / "an4_train.transcription"
    texts.write_text(texts.read_text().replace("LOW", "HIGH"))
    arguments = ["--corpus", "an4", "--corpus-path", str(where), "--format", "FP32", "--rounds", "1", "--cohort", "1"]
    places = ["--output", str(tmp_path), "--name", "run", "--batch", "1", "--resume"]
    result = CliRunner().invoke(app, ["compare", *arguments, *places])
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert "made with another corpus" in result.output and str(where) in result.output


class _Links(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            value or "" for key, value in attrs if key in ("src", "href") and not (value or "").startswith("#")
        ]


def test_a_simulation_stops_on_interrupt_and_resumes(tones: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fedomc_speech", "compare", "--corpus", "an4", "--corpus-path", str(tones),
        "--format", "S1E3M7@0.9", "--format", "S1E2M3+S1E2M1", "--rounds", "6", "--cohort", "2", "--batch", "2",
        "--evaluate-every", "3", "--output", str(tmp_path), "--name", "run",
    ]  # fmt: skip
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more make other last bits of the reported errors
    process = subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_thread
    )
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    deadline = time.monotonic() + 180
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(stored["runs"]) == 1 and not stored["runs"][0]["finished"]
    finished = stored["runs"][0]["rounds"]
    assert 1 <= finished < 6

    result = subprocess.run(  # noqa: S603
        [*command, "--resume"], capture_output=True, text=True, timeout=300, env=one_thread
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WER" in result.stdout and "S1E2M3+S1E2M1" in result.stdout
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [run["finished"] for run in stored["runs"]] == [True, True]
    assert all([row["round"] for row in run["history"]] == list(range(1, 7)) for run in stored["runs"])

    page = (tmp_path / "run" / "report.html").read_text()
    links = _Links()
    links.feed(page)
    assert links.loaded == []
    assert page.count("<svg") == 1 and "S1E2M3+S1E2M1" in page

    settings = Settings.from_mapping(stored["settings"])
    here = tmp_path / "here"
    federation.run(settings, InProcess(client_app, 4), RunFolder(here, settings, resume=False), Watcher())
    assert results_of(here) == results_of(tmp_path / "run")
