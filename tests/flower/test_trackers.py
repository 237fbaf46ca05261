"""The observers for Weights & Biases and MLflow, each with the real library, offline."""

import builtins
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fedomc
from fedomc.flower import RoundReport
from fedomc.flower.mlflow import MLflow
from fedomc.flower.wandb import WeightsAndBiases

MANY = 1100  # more than MLflow takes at a time


def report(number: int, variables: int = 1) -> RoundReport:
    sizes = Counter({f"layer{i}.weight": 100 * number for i in range(variables)})
    return RoundReport(number, down_bytes=sizes, up_bytes=sizes, errors={"layer0.weight": (1.0, 4.0)})


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return pytest.importorskip("wandb")


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    library = pytest.importorskip("mlflow")
    library.set_tracking_uri((tmp_path / "runs").as_uri())  # it furnishes a new folder
    return library


@pytest.mark.parametrize("variables", [True, False])
def test_weights_and_biases(wandb: Any, variables: bool) -> None:
    with wandb.init(project="fedomc") as run:
        for number in (1, 2):
            WeightsAndBiases(variables=variables)(report(number))
        summary = dict(run.summary)
    assert summary["fedomc.round"] == 2 and summary["fedomc.up-bytes"] == 200
    assert summary["fedomc.compression-error"] == 0.5
    assert ("fedomc.up-bytes/layer0.weight" in summary) == variables


@pytest.mark.parametrize("variables", [True, False])
def test_mlflow(mlflow: Any, variables: bool) -> None:
    with mlflow.start_run() as run:
        observer = MLflow(variables=variables)
        for number in (1, 2):
            observer(report(number, MANY))
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.info.run_id, "fedomc.up-bytes")
    assert [(row.step, row.value) for row in history] == [(1, 100.0 * MANY), (2, 200.0 * MANY)]
    metrics = client.get_run(run.info.run_id).data.metrics
    assert metrics["fedomc.compression-error"] == 0.5
    assert sum(".layer" in name for name in metrics) == (2 * MANY + 1 if variables else 0)


def test_a_run_that_has_ended_is_named_by_its_id(mlflow: Any) -> None:
    with mlflow.start_run() as run:
        pass
    MLflow(run.info.run_id)(report(1))
    assert mlflow.get_run(run.info.run_id).data.metrics["fedomc.down-bytes"] == 100


def test_without_a_run_they_say_so(wandb: Any, mlflow: Any) -> None:
    with pytest.raises(fedomc.OMCError, match=r"wandb\.init"):
        WeightsAndBiases()
    with pytest.raises(fedomc.OMCError, match=r"mlflow\.start_run"):
        MLflow()


@pytest.mark.parametrize("name, observer", [("wandb", WeightsAndBiases), ("mlflow", MLflow)])
def test_without_the_library_the_extra_is_named(name: str, observer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(module: str, *args: Any, **kwargs: Any) -> Any:
        if module == name:
            raise ImportError(name)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=rf"fedomc\[{name}\]"):
        observer()
