"""The rounds of a run, with the clients called one after the other in this process, and by the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from typer.testing import CliRunner

from fedomc.flower.in_process import InProcess
from fedomc_llm import cli, federation, models, report
from fedomc_llm.client import app
from fedomc_llm.cost import cost_of
from fedomc_llm.errors import RunStopped, SettingsError
from fedomc_llm.run_folder import RESULTS, RunFolder
from fedomc_llm.settings import DEMO, Settings, Variant


class Watcher:
    """Keeps what it sees and stops after some rounds."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.rows: list[dict[str, Any]] = []
        self.stop_after = stop_after

    def started(self, variant: Variant) -> None:
        pass

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def stop_requested(self) -> bool:
        return len(self.rows) >= self.stop_after


def settings(tiny: Path, four: Path, **kwargs: Any) -> Settings:
    small = {"rounds": 2, "local_steps": 4, "batch": 4, "length": 32, "held_out": 8, "sample_tokens": 8, "rank": 4}
    return Settings(**{"model": str(tiny), "texts": str(four), **small, **kwargs})


def run(chosen: Settings, path: Path, *, resume: bool = False, watcher: Watcher | None = None, first: int = 1) -> Any:
    folder = RunFolder(path, chosen, resume=resume)
    federation.run(chosen, chosen.model, InProcess(app, 4, first), folder, watcher or Watcher())
    return {result["variant"]: result for result in folder.runs}


def test_a_run_measures_each_variant(tiny: Path, four: Path, tmp_path: Path) -> None:
    chosen = settings(tiny, four)
    runs = run(chosen, tmp_path)
    assert tuple(runs) == DEMO
    assert list(json.loads((tmp_path / RESULTS).read_text())["runs"]) == list(runs.values())
    for result in runs.values():
        assert result["after"]["loss"] < result["before"]["loss"] - 0.1
        assert [row["round"] for row in result["history"]] == [1, 2]
        assert result["history"][-1]["loss"] == result["after"]["loss"]
        assert len(result["after"]["clients"]) == 4
        mean = sum(result["after"]["clients"].values()) / 4  # all measure as many tokens
        assert result["after"]["loss"] == pytest.approx(mean, rel=1e-3)
        assert all(text.startswith(chosen.prompt) for text in result["samples"].values())
    fp32, packed, lora = runs.values()
    assert fp32["down_ratio"] == fp32["up_ratio"] == pytest.approx(1, rel=0.01) and fp32["held_ratio"] == pytest.approx(
        3, rel=0.01
    )
    assert packed["down_ratio"] < 0.21 and packed["up_ratio"] < 0.14 and packed["held_ratio"] < 0.9
    assert lora["down_bytes"] < 0.2 * fp32["down_bytes"] and lora["held_ratio"] < 1

    page = report.write_report(tmp_path, chosen, list(runs.values())).read_text()
    links = _Links()
    links.feed(page)
    assert links.loaded == [] and page.count("<pre>") == 6
    for name in (*runs, *fp32["after"]["clients"]):
        assert name in page


class _Links(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for key, value in attrs if key in ("src", "href")]


def test_a_stopped_run_goes_on_to_the_same_end_whatever_the_nodes_are_called(
    tiny: Path, four: Path, tmp_path: Path
) -> None:
    chosen = settings(tiny, four, variants=DEMO[1:], rounds=2)
    whole = run(chosen, tmp_path / "whole")
    with pytest.raises(RunStopped):
        run(chosen, tmp_path / "stopped", watcher=Watcher(stop_after=3))
    assert run(chosen, tmp_path / "stopped", resume=True, first=70) == whole
    with pytest.raises(SettingsError, match="other settings \\(rank\\)"):
        run(settings(tiny, four, variants=DEMO[1:], rank=3), tmp_path / "stopped", resume=True)
    with pytest.raises(SettingsError, match="nothing to resume"):
        run(chosen, tmp_path / "nowhere", resume=True)


def test_a_client_with_another_base_is_left_out(tiny: Path, four: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = models.load(str(tiny))
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(other)
    models.byte_tokenizer().save_pretrained(other)

    class Nodes(InProcess):
        def answers(self, message: Message) -> list[Message]:
            if message.metadata.dst_node_id == 2:
                config = ConfigRecord({**message.content["config"], "model": str(other)})
                message.content = RecordDict({**dict(message.content.items()), "config": config})
            return super().answers(message)

    chosen = settings(tiny, four, variants=("lora:S1E4M3/64",), rounds=1)
    folder = RunFolder(tmp_path / "run", chosen, resume=False)
    federation.run(chosen, chosen.model, Nodes(app, 4), folder, Watcher())
    assert len(folder.runs[0]["after"]["clients"]) == 3


@pytest.mark.parametrize("nodes", [3, 5])
def test_each_text_needs_a_node(nodes: int, tiny: Path, four: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(federation, "WAIT", 0.0)
    chosen = settings(tiny, four)
    grid: Grid = InProcess(app, nodes)
    with pytest.raises(SettingsError, match=f"{nodes} nodes, but 4 texts"):
        federation.run(chosen, chosen.model, grid, RunFolder(tmp_path, chosen, resume=False), Watcher())


def test_the_cost_is_what_a_round_then_takes(tiny: Path, four: Path, tmp_path: Path) -> None:
    chosen = settings(tiny, four, rounds=1)
    runs = run(chosen, tmp_path)
    for variant in chosen.parsed:
        cost, found = cost_of(chosen, variant, chosen.model), runs[str(variant)]
        assert (cost.down_bytes, cost.up_bytes) == (found["down_bytes"], found["up_bytes"])
        assert cost.held_bytes == found["held_bytes"] and cost.step_seconds > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variant", "half:FP32"], "full:FORMAT"),
        (["--rounds", "0"], "rounds=0"),
        (["--texts", "{empty}"], "has no file"),
        (["--cohort", "13"], "only 12 texts"),
        (["--resume"], "nothing to resume"),
        (["--model", "{empty}"], "cannot be read"),
        (["--model", "{empty}/model.gguf"], "does not exist"),
        (["--output", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    given = [text.format(empty=tmp_path / "empty") for text in arguments]
    result = CliRunner().invoke(cli.app, ["finetune", "--output", str(tmp_path / "runs"), *given])
    assert result.exit_code == 2 and says in result.output, result.output
    assert result.output.count("\n") == 1 and "Traceback" not in result.output


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_simulation_stops_on_a_signal_and_resumes(number: int, tiny: Path, four: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fedomc_llm", "finetune", "--model", str(tiny), "--texts", str(four), "--rounds", "6",
        "--local-steps", "2", "--batch", "4", "--length", "32", "--held-out", "8", "--sample-tokens", "8",
        "--rank", "4", "--variant", "lora:S1E2M3/64:S1E4M3/64", "--output", str(tmp_path), "--name", "run",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("run/checkpoints/*/round-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "The run will send about" in output and "Stopped" in output
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)  # noqa: S603
    assert result.returncode == 0, result.stdout + result.stderr
    (stored,) = json.loads((tmp_path / "run" / RESULTS).read_text())["runs"]
    assert [row["round"] for row in stored["history"]] == list(range(1, 7))
    chosen = Settings.from_mapping(json.loads((tmp_path / "run" / RESULTS).read_text())["settings"])
    assert run(chosen, tmp_path / "here") == {stored["variant"]: stored}
