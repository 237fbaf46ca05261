"""Each benchmark runs as its docstring says, on the smallest settings: nothing here measures anything."""

import contextlib
import io
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from benchmarks import deployment, flower_client, models, server, training, transport
from fedomc_speech import client, corpus, model
from fedomc_speech.settings import Settings
from fedomc_speech.tokens import tokenizer_for

Rows = list[dict[str, Any]]
Run = Callable[..., Rows]


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore what the benchmarks set in processes that are usually their own."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    threads, level = torch.get_num_threads(), logging.getLogger("flwr").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("flwr").setLevel(level)


@pytest.fixture
def rows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a benchmark's ``main`` with arguments and return its rows; its own processes run as calls in this one."""

    def call(module: ModuleType, arguments: list[str]) -> str:
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(sys, "argv", [module.__name__, *arguments])
            try:
                module.main()
            except SystemExit as ended:
                assert not ended.code, ended.code
        return out.getvalue()

    def run(module: ModuleType, *arguments: str) -> Rows:
        def start(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
            if command[:3] != [sys.executable, "-m", module.__name__]:
                return real(command, **options)
            return subprocess.CompletedProcess(command, 0, call(module, command[3:]), "")

        file, real = tmp_path / "rows.json", subprocess.run
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", start)
            printed = call(module, [*arguments, "--json", str(file)])
        rows: Rows = json.loads(file.read_text())["rows"]
        assert rows and len(printed.splitlines()) > 1
        return rows

    return run


def test_training(rows_of: Run) -> None:
    variants = [name for name in training.VARIANTS if name != "torchao-int8" or torchao_is_there()]
    small = ["--model", "tiny", "--sizes", "32", "--rounds", "1", "--steps", "1"]
    rows = rows_of(training, *small, "--variants", *variants)
    expected = {(name, checkpointing, None) for name in variants for checkpointing in (False, True)}
    expected |= {(name, None, 32) for name in variants if name in training.IN_TABLE_OF_SIZES}
    assert {(row["variant"], row.get("checkpointing"), row.get("hidden")) for row in rows} == expected
    large = {row["variant"]: row for row in rows if row.get("checkpointing") is False}
    assert large["S1E2M3"]["parameter_bytes"] < large["S1E3M7"]["parameter_bytes"] < large["bf16"]["parameter_bytes"]
    assert all(row["speed_ratio"] > 0 for row in rows)


def torchao_is_there() -> bool:
    try:
        from torchao.prototype.quantized_training import int8_weight_only_quantized_training  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "DifferentialPrivacyServerSideFixedClipping"])
def test_server(strategy: str, rows_of: Run) -> None:
    arguments = ["--model", "tiny", "--rounds", "1", "--clients", "2", "3", "--strategy", strategy, "--apps"]
    rows = rows_of(server, *arguments)
    assert {(row["format"], row["clients"]) for row in rows} == {(f, c) for f in server.FORMATS for c in (2, 3)}
    assert all(row["seconds"] > 0 and row["memcpy_ratio"] > 0 for row in rows)


def test_server_as_a_whole_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(mode: str, job: dict[str, Any], model: str) -> dict[str, Any]:
        assert mode == "--app-worker"
        return server.run_app(**job, size=model)

    monkeypatch.setattr(server, "worker", here)
    jobs = [
        {"framework": framework, "strategy": "FedAdam", "format": format, "clients": 2, "rounds": 2}
        for framework, format in (("flower", "FP32"), ("fedomc", "FP32"), ("fedomc", "S1E2M3+S1E2M1"))
    ]
    flower, dense, packed = server.apps(jobs, "tiny")
    for row in (flower, dense, packed):
        assert row["peak_anonymous_bytes"] > 0 and row["seconds"] > 0 and row["model_bytes"] > 2**20
    assert flower["memcpy_ratio"] is None and dense["memcpy_ratio"] > 0 and packed["memcpy_ratio"] > 0
    assert packed["peak_file_bytes"] > packed["model_bytes"]


def test_server_refuses_a_cohort_that_flower_would_wait_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.server", "--clients", "1"])
    with pytest.raises(SystemExit):
        server.main()
    assert "--clients 1: Flower's strategies wait for 2 clients or more" in capsys.readouterr().err


def test_transport(rows_of: Run, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    small = ["--model", "tiny", "--rounds", "1", "--steps", "1", "--client-steps", "1", "--weights", str(file)]
    formats = ("S1E3M7", "S1E2M3+S1E2M1", "S1E3M7>DRIVE1")
    rows = rows_of(transport, *small, "--formats", *formats)
    assert file.exists()
    assert {(row["format"], row["unquantized_format"]) for row in rows if "change" in row} == {
        (way.format, way.unquantized_format or "FP32") for way in transport.WAYS if way.format in formats
    }
    assert all(0 < row["ratio"] < 1.1 and row["encode_mb_s"] > 0 for row in rows)
    again = rows_of(transport, *small, "--formats", "S1E3M7>DRIVE1", "--client-optimizer", "SGD")
    key = ("S1E3M7>DRIVE1", "down", True)
    sizes = [{(r["format"], r["direction"], r["entropy_coding"]): r["bytes"] for r in each} for each in (rows, again)]
    assert sizes[0][key] == sizes[1][key]  # the same weights


def test_models(rows_of: Run) -> None:
    rows = rows_of(models, "--models", "torch.nn.LSTM", "GPT2LMHeadModel")
    assert [row["model"] for row in rows] == ["GPT2LMHeadModel"] * 2 + ["torch.nn.LSTM"] * 2
    assert all(row["wrong"] == [] and math.isfinite(row["loss_last"]) for row in rows)


def test_flower_client() -> None:
    settings = Settings(corpus="digits", model="tiny", clients=2, cohort=2, batch=1)
    network = model.build("tiny", tokenizer_for(corpus.load("digits")).vocab_size, seed=0)
    content = RecordDict(
        {"arrays": ArrayRecord(network.state_dict()), "config": client_config(settings, server_round=1)}
    )
    message = Message(content=content, dst_node_id=1, message_type="train")
    reply = flower_client.app(message, Context(1, 1, {"partition-id": 1}, RecordDict(), {}))
    assert reply.content["metrics"]["num-examples"] == 1 and math.isfinite(reply.content["metrics"]["loss"])
    assert reply.content["metrics"]["parameter-bytes"] == sum(p.nbytes for p in network.parameters())
    trained = reply.content["arrays"].to_torch_state_dict()
    assert trained.keys() == network.state_dict().keys()
    assert any(not torch.equal(trained[name], value) for name, value in network.state_dict().items())


def client_config(settings: Settings, server_round: int) -> ConfigRecord:
    config = client.write_settings(settings)
    config["server-round"] = server_round
    return config


@pytest.mark.deployment
def test_deployment(rows_of: Run) -> None:
    rows = rows_of(deployment, "--model", "tiny", "--formats", "S1E3M7@0.9")
    formats = (deployment.PLAIN, deployment.SAME, "S1E3M7@0.9")
    assert {(row["format"], row["process"]) for row in rows} == {
        (name, process) for name in formats for process in deployment.PROCESSES.values()
    }
    assert all(row["peak_rss_bytes"] > 2**20 for row in rows)
