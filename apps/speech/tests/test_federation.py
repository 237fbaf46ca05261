"""The rounds of a run, with the clients called one after the other in this process."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from nodes import Nodes, Watcher, without_times

import fedomc
from fedomc.flower import OMCStrategy, collect, install
from fedomc_speech import corpus, federation
from fedomc_speech.client import client_data
from fedomc_speech.errors import CorpusError, RoundError, SettingsError
from fedomc_speech.run_folder import RESULTS, RunFolder
from fedomc_speech.settings import Settings

CONTRACT = {
    "format", "wer", "wer_compressed", "parameter_bytes", "parameter_ratio", "down_bytes", "up_bytes", "down_ratio",
    "up_ratio", "rounds_per_minute", "history",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("identity")


def settings(tones: Path, **kwargs: Any) -> Settings:
    values = {
        "formats": ("FP32", "S1E3M7@0.9", "S1E2M3+S1E2M1"), "corpus": "an4", "corpus_path": str(tones), "rounds": 3,
        "cohort": 2, "batch": 3, "warmup": 1, "evaluate_every": 2, **kwargs,
    }  # fmt: skip
    return Settings(**values)


def run(chosen: Settings, path: Path, *, resume: bool = False, watcher: Watcher | None = None, first: int = 100) -> Any:
    folder = RunFolder(path, chosen, resume=resume)
    grid = cast(Grid, Nodes(4, first))
    done = federation.run(chosen, grid, folder, watcher or Watcher())
    return done, {run["variant"]: run for run in folder.runs}


def test_a_run_gives_what_the_contract_names(tones: Path, tmp_path: Path) -> None:
    chosen = settings(tones)
    done, _ = run(chosen, tmp_path)
    assert done
    stored = json.loads((tmp_path / RESULTS).read_text())
    assert [r["format"] for r in stored["runs"]] == ["FP32", "S1E3M7", "S1E2M3+S1E2M1"]
    for result in stored["runs"]:
        assert set(result) >= CONTRACT
        assert [row["round"] for row in result["history"]] == [1, 2, 3]
        assert [row["wer"] is None for row in result["history"]] == [True, False, False]
        assert result["history"][-1]["down_bytes"] == pytest.approx(result["down_bytes"] * 2 * 3, abs=3)
        for row in result["history"]:
            assert set(row["server_seconds"]) == {"encode", "decode", "aggregate"}
            assert (row["compression_error"] > 0) == (result["format"] != "FP32")
        last = result["history"][-1]["down_bytes"] - result["history"][-2]["down_bytes"]
        assert sum(row["down-bytes"] for row in result["variables"].values()) == last
    fp32, one, two = stored["runs"]
    assert fp32["parameter_ratio"] == fp32["down_ratio"] == fp32["up_ratio"] == 1
    assert fp32["wer"] == fp32["wer_compressed"]
    for key, limits in {
        "parameter_ratio": (0.42, 0.33),
        "down_ratio": (0.42, 0.205),
        "up_ratio": (0.42, 0.145),
    }.items():
        assert one[key] < limits[0] and two[key] < limits[1]
        assert one[key.replace("ratio", "bytes")] / fp32[key.replace("ratio", "bytes")] == pytest.approx(one[key], 1e-3)


def test_a_streaming_model_is_trained_by_the_same_rounds(tones: Path, tmp_path: Path) -> None:
    variants = run(settings(tones, streaming=True), tmp_path)[1].values()
    assert [variant["finished"] for variant in variants] == [True, True, True]
    assert all("encoder.layers.0.conv.norm.weight" in variant["variables"] for variant in variants)
    first = [variant["history"][0]["loss"] for variant in variants]
    assert first == pytest.approx([first[0]] * 3, rel=0.25) and len(set(first)) == 3


def test_the_same_seed_gives_the_same_run_whatever_the_nodes_are_called(tones: Path, tmp_path: Path) -> None:
    chosen = settings(tones, formats=("S1E2M3+S1E2M1@0.9",), rounds=2)
    runs = [without_times(run(chosen, tmp_path / str(first), first=first)[1]) for first in (100, 7000)]
    assert runs[0] == runs[1]
    other = run(settings(tones, formats=("S1E2M3+S1E2M1@0.9",), rounds=2, seed=1), tmp_path / "other")[1]
    assert without_times(other) != runs[0]


def test_entropy_coding_changes_the_bytes_of_a_run_alone(tones: Path, tmp_path: Path) -> None:
    results = []
    for entropy_coding in ("none", "both"):
        chosen = settings(tones, formats=("S1E3M7@0.9", "S1E2M3+S1E2M1"), rounds=2, entropy_coding=entropy_coding)
        results.append(run(chosen, tmp_path / entropy_coding)[1])
    for name, plain in results[0].items():
        smaller = results[1][name]
        assert [row["loss"] for row in plain["history"]] == [row["loss"] for row in smaller["history"]]
        assert plain["wer"] == smaller["wer"]
        assert smaller["down_bytes"] < plain["down_bytes"] and smaller["up_bytes"] < 0.9 * plain["up_bytes"]
    chosen = settings(tones, formats=("S1E3M7@0.9",), rounds=2, entropy_coding="both", unquantized_format="S1E5M10")
    rest = run(chosen, tmp_path / "rest")[1]["S1E3M7@0.9"]
    assert rest["down_bytes"] < results[1]["S1E3M7@0.9"]["down_bytes"]


def test_augmentation_changes_what_clients_hear_the_same_in_each_run(tones: Path, tmp_path: Path) -> None:
    losses = []
    for number, augment in enumerate((False, True, True)):
        chosen = settings(tones, formats=("FP32",), rounds=1, augment=augment)
        losses.append(run(chosen, tmp_path / str(number))[1]["FP32"]["history"][0]["loss"])
    plain, one, same = losses
    assert one == same != plain


def test_the_client_learning_rate_has_no_effect_with_one_local_step_in_fp32(tones: Path, tmp_path: Path) -> None:
    losses: dict[str, list[list[float]]] = {"FP32": [], "S1E2M3": []}
    for rate in (0.1, 30.0):
        found = run(settings(tones, formats=tuple(losses), client_learning_rate=rate), tmp_path / str(rate))[1]
        for format, known in losses.items():
            known.append([row["loss"] for row in found[format]["history"]])
    slow, fast = losses["FP32"]
    assert slow != fast and slow == pytest.approx(fast, rel=2e-2)
    slow, fast = losses["S1E2M3"]
    assert slow != pytest.approx(fast, rel=2e-2)


def test_a_stopped_run_keeps_what_it_has_and_resumes_to_the_same_end(tones: Path, tmp_path: Path) -> None:
    chosen = settings(tones, formats=("FP32", "S1E3M7@0.9"))
    _, whole = run(chosen, tmp_path / "whole")
    done, stopped = run(chosen, tmp_path / "parts", watcher=Watcher(stop_after=5))
    assert not done
    assert stopped["FP32"]["finished"] and not stopped["S1E3M7@0.9"]["finished"]
    assert stopped["S1E3M7@0.9"]["rounds"] == 2
    watcher = Watcher()
    done, resumed = run(chosen, tmp_path / "parts", resume=True, watcher=watcher)
    assert done
    assert [(name, row["round"]) for name, row in watcher.rows] == [("S1E3M7@0.9", 3)]
    assert without_times(resumed) == without_times(whole)


def test_resuming_needs_the_same_settings_and_whole_files(tones: Path, tmp_path: Path) -> None:
    chosen = settings(tones, formats=("FP32",), rounds=2)
    with pytest.raises(SettingsError, match="nothing to resume"):
        RunFolder(tmp_path / "none", chosen, resume=True)
    run(chosen, tmp_path, watcher=Watcher(stop_after=1))
    with pytest.raises(SettingsError, match="rounds"):
        RunFolder(tmp_path, settings(tones, formats=("FP32",), rounds=3), resume=True)
    checkpoint = tmp_path / "checkpoint.safetensors"
    data = checkpoint.read_bytes()
    for damaged in (data[:100], data[:-1], b"", b"\xff" * 200):
        checkpoint.write_bytes(damaged)
        with pytest.raises(SettingsError, match="damaged"):
            RunFolder(tmp_path, chosen, resume=True).load()
    (tmp_path / RESULTS).write_text("{")
    with pytest.raises(SettingsError, match="damaged"):
        RunFolder(tmp_path, chosen, resume=True)


def test_a_corpus_of_your_own_is_trained_on(tones: Path, tmp_path: Path) -> None:
    spoken = corpus.load("an4", tones)
    for part, utterances in (("train", spoken.train), ("test", spoken.test)):
        lines = [f"{utterance.path}\t{utterance.text}\t{utterance.speaker}\n" for utterance in utterances]
        (tmp_path / f"{part}.tsv").write_text("audio\ttext\tspeaker\n" + "".join(lines))
    chosen = settings(tones, corpus="folder", corpus_path=str(tmp_path), formats=("S1E3M7",), rounds=2)
    done, runs = run(chosen, tmp_path / "run")
    assert done and [row["clients"] for row in runs["S1E3M7"]["history"]] == [2, 2]
    assert sum(runs["S1E3M7"]["utterances"]["words"]) == sum(len(one.text.split()) for one in spoken.test)


def test_a_corpus_with_another_digest_is_refused_by_server_and_clients(tones: Path, tmp_path: Path) -> None:
    chosen = settings(tones, corpus_digest="0123456789abcdef")
    for act in (lambda: run(chosen, tmp_path), lambda: client_data(chosen)):
        with pytest.raises(CorpusError, match=r"'0123456789abcdef' \(corpus_digest\)"):
            act()


def test_a_round_without_a_client_and_a_federation_without_nodes_are_named(tones: Path, tmp_path: Path) -> None:
    chosen = settings(tones, formats=("FP32",))
    with pytest.raises(RoundError, match="no memory"):
        federation.run(
            chosen,
            cast(Grid, Nodes(4, faults={"*": dict.fromkeys("0123", "error")})),
            RunFolder(tmp_path, chosen, resume=False),
            Watcher(),
        )
    with pytest.raises(SettingsError, match="4 parts"):
        federation.Clients.identify(cast(Grid, Nodes(4)), 5, wait=0.1)


def test_training_learns_the_tones(tones: Path, tmp_path: Path) -> None:
    chosen = settings(
        tones, formats=("FP32", "S1E2M3+S1E2M1"), rounds=40, cohort=4, batch=6, warmup=5, evaluate_every=40,
        server_learning_rate=3e-3,
    )  # fmt: skip
    _, runs = run(chosen, tmp_path)
    for result in runs.values():
        losses = [row["loss"] for row in result["history"]]
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("text", ["S1E3M7@0.5", "S1E3M7>DRIVE1@0.5", "S1E2M3+S1E2M1>DRIVE2"])
def test_the_bytes_of_a_visit_are_those_of_a_round(text: str) -> None:
    """Up, in the method of the uplink too; down, a model in one part is what the client holds."""
    policy = fedomc.CompressionPolicy.parse(text)
    network = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
    strategy, arrays = OMCStrategy(FedAvg(), policy, client_name=lambda node: 0), collect(network)

    class Two:
        def get_node_ids(self) -> list[int]:
            return [1, 2]

    message, _ = strategy.configure_train(1, arrays, ConfigRecord(), Two())  # type: ignore[arg-type]
    down = sum(len(array.data) for array in message.content["arrays"].values())
    up = sum(len(array.data) for array in collect(install(network, message), message).values())
    left = policy.select({name: array.shape for name, array in arrays.items()}, round=1, client=0).unquantized
    found = federation.bytes_of_a_visit(network, left)  # type: ignore[arg-type]
    headers = 0 if policy.update_format is None else 0.1 * down  # those of bases are not counted
    assert 0 <= down + up - found <= headers
