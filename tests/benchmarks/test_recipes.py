"""The matrix of recipes: its design, its runs and its table."""

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.recipes import table, tasks, tuning
from benchmarks.recipes.__main__ import main
from benchmarks.recipes.design import LOCALS, SERVERS, SPLITS, TASKS, Cell, cells
from benchmarks.recipes.federation import FP32, Rates, policy_of, remaining, run, train
from benchmarks.recipes.running import Results, Run, run_all
from benchmarks.recipes.tasks import CLIENTS, Task, UnavailableError
from fedomc_speech import pretraining
from fedomc_speech.settings import Settings

DIGITS = Cell("digits", "1-step", "FedAvg", "iid")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The task speech, with a model that was trained for a step."""
    file = tmp_path_factory.mktemp("speech") / "begun.safetensors"
    pretraining.make(file, Settings(corpus="digits"), pretraining.Pretraining(steps=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDOMC_RECIPES_SPEECH", str(file))
        found: Task = importlib.import_module("benchmarks.recipes.speech").TASK
    return found


@pytest.fixture(params=TASKS)
def any_task(request: pytest.FixtureRequest) -> Task:
    """Each of the tasks."""
    return request.getfixturevalue("speech") if request.param == "speech" else tasks.task(request.param)


# ---- the design ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squares", [1, 2, 3, 4])
def test_the_design_covers_each_pair_of_values(squares: int) -> None:
    axes = {"task": TASKS, "local": LOCALS, "server": SERVERS, "split": SPLITS}
    found = cells(squares=squares)
    assert len(set(found)) == len(found) == 16 * squares
    for one, other in itertools.combinations(axes, 2):
        pairs = {(getattr(cell, one), getattr(cell, other)) for cell in found}
        assert pairs == set(itertools.product(axes[one], axes[other]))


def test_two_squares_of_two_tasks_cover_each_pair_of_local_work_and_server() -> None:
    found = cells(("digits", "text"), squares=2)
    assert {(cell.local, cell.server) for cell in found} == set(itertools.product(LOCALS, SERVERS))


# ---- the tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_clients_share_the_training_examples(any_task: Task, split: str) -> None:
    task = any_task
    parts = task.clients(split, seed=3)
    assert len(parts) == CLIENTS and min(map(len, parts)) >= tasks.LEAST
    assert sum(map(len, parts)) == len(task.examples("train"))
    assert torch.equal(
        torch.cat([part.inputs for part in parts]), torch.cat([p.inputs for p in task.clients(split, 3)])
    )
    groups = [set(part.groups.tolist()) for part in parts]
    if split == "non-iid" and task.skew == "by-group":
        assert not set.intersection(*groups)


@pytest.mark.parametrize(
    "cell",
    [
        *(Cell(name, *pair, "iid") for name in ("digits", "text") for pair in zip(LOCALS, SERVERS, strict=True)),
        Cell("documents", "1-step", "FedProx", "non-iid"),
        Cell("speech", "4-steps", "FedAdam", "non-iid"),
    ],
    ids=str,
)
def test_a_short_run(cell: Cell, request: pytest.FixtureRequest) -> None:
    task = request.getfixturevalue("speech") if cell.task == "speech" else tasks.task(cell.task)
    found = run(task, cell, "S1E2M3", 0, Rates(0.01, 0.001), part="validation", rounds=1)
    assert 0 <= found["score"] <= 100
    assert all(0.18 < found[f"{what}_ratio"] < 0.3 for what in ("memory", "down", "up"))
    assert found["step_kept"] is None or 0 <= found["step_kept"] <= 2
    assert len(found["losses"]) == 1
    pretrained = cell.task == "documents"  # which has variables that S1E2M3 cannot hold
    assert len(found["warnings"]) == pretrained and all("S1E2M3 cannot hold" in text for text in found["warnings"])


def test_a_task_without_what_it_needs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDOMC_RECIPES_SPEECH", raising=False)
    monkeypatch.delitem(importlib.sys.modules, "benchmarks.recipes.speech", raising=False)  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match="fedomc_speech pretrain"):
        tasks.task.__wrapped__("speech")


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
def test_the_same_run_gives_the_same_result_and_learns(server: str) -> None:
    cell, digits = Cell("digits", "epoch-adamw", server, "iid"), tasks.task("digits")
    found = [run(digits, cell, FP32, 1, Rates(0.003, 0.01), part="validation", rounds=2) for _ in range(2)]
    first, second = (one["losses"] for one in found)
    assert first == pytest.approx(second, rel=1e-4)  # where memory lies decides the last bits of torch's sums
    assert first[-1] < first[0]


def test_the_proximal_term_holds_a_model_to_the_one_received() -> None:
    digits = tasks.task("digits")
    moved = []
    for proximal in (0.0, 100.0):
        torch.manual_seed(0)
        model = digits.model()
        before = [one.detach().clone() for one in model.parameters()]
        torch.manual_seed(1)
        train(digits, "4-steps", model, digits.clients("iid", 0)[0], 0.005, proximal)
        moved.append(
            sum(float((a - b).detach().square().sum()) for a, b in zip(model.parameters(), before, strict=True))
        )
    assert moved[1] < 0.8 * moved[0]


def test_rates_fall_from_one_to_nothing() -> None:
    assert [remaining(done, 4) for done in range(5)] == pytest.approx([1, 0.8536, 0.5, 0.1464, 0], abs=1e-4)


@pytest.mark.parametrize("text", ["S1E3M7@0.9", "S1E2M3", "S1E2M3+S1E3M0"])
def test_formats_are_policy_strings(text: str) -> None:
    policy = policy_of(text, tasks.task("digits"), seed=1)
    assert policy is not None and str(policy) == text and policy.rounding == "stochastic"
    assert policy_of(FP32, tasks.task("digits"), seed=1) is None


# ---- results and rates ---------------------------------------------------------------------------------------------


def test_finished_runs_are_not_made_again(tmp_path: Path) -> None:
    results, lines = Results(tmp_path), list[str]()
    wanted = [Run(DIGITS, text, 0, Rates(0.1), rounds=1) for text in (FP32, "S1E3M7")]
    assert run_all(wanted[:1], results, 1, lambda one: 1.0, lines.append)
    written = results.path(wanted[0]).stat().st_mtime_ns
    assert run_all([*wanted, wanted[1]], results, 1, lambda one: 1.0, lines.append)
    assert results.path(wanted[0]).stat().st_mtime_ns == written
    assert "2 runs, 1 of them missing" in lines[2] and len(lines) == 4
    assert all(results.get(one) for one in wanted) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "other",
    [
        Run(DIGITS, "S1E3M4", 0, Rates(0.1)),
        Run(DIGITS, "S1E3M7", 1, Rates(0.1)),
        Run(DIGITS, "S1E3M7", 0, Rates(0.2)),
        Run(DIGITS, "S1E3M7", 0, Rates(0.1), part="validation"),
        Run(DIGITS, "S1E3M7", 0, Rates(0.1), rounds=7),
        Run(Cell("digits", "1-step", "FedAvg", "non-iid"), "S1E3M7", 0, Rates(0.1)),
    ],
)
def test_whatever_decides_a_result_is_in_its_key(other: Run) -> None:
    assert other.key != Run(DIGITS, "S1E3M7", 0, Rates(0.1)).key


def test_another_data_set_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Run(DIGITS, "S1E3M7", 0, Rates(0.1))
    key = one.key
    monkeypatch.setitem(tasks.task("digits").__dict__, "digest", "another")
    assert one.key != key


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    one = Run(DIGITS, FP32, 0, Rates(0.1))
    Results(tmp_path).path(one).write_text("{")
    with pytest.raises(SystemExit, match="delete it"):
        Results(tmp_path).get(one)


def test_the_best_rate_on_validation_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.json")
    results = Results(tmp_path)
    with pytest.raises(tuning.NotTunedError, match="no learning rates"):
        tuning.rates_of(DIGITS)
    for score, one in enumerate(tuning.tried(DIGITS)):
        assert one.part == "validation" and one.format == FP32
        results.add(one, {"score": float(score), "seconds": 2.0})
    tuning.write([DIGITS], results)
    assert tuning.rates_of(DIGITS) == tuning.tried(DIGITS)[-1].rates
    assert len(json.loads(tuning.TABLE.read_text())[0]["tried"]) == len(tuning.tried(DIGITS))


def test_a_dry_run_says_what_the_matrix_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.json")
    results = Results(tmp_path)
    options = ["--only", "digits", "--formats", "S1E3M7", "--folder", str(tmp_path), "--jobs", "2", "--dry-run"]
    monkeypatch.setattr("sys.argv", ["recipes", *options])
    with pytest.raises(SystemExit, match="has no learning rates"):
        main()
    found = cells(("digits",))
    for cell in found:
        for one in tuning.tried(cell):
            results.add(one, {"score": 0.0, "seconds": 100.0})
    tuning.write(found, results)
    with pytest.raises(SystemExit) as ended:
        main()
    minutes = 4 * 3 * (100 + 160) / 60 / 2  # cells, seeds, FP32 and a format, two processes
    assert not ended.value.code and f"about {minutes:.0f} minutes with 2 processes" in capsys.readouterr().out


# ---- the table -----------------------------------------------------------------------------------------------------


def result(score: float, **changed: Any) -> dict[str, Any]:
    return {
        "score": score, "memory_ratio": 0.3, "down_ratio": 0.2, "up_ratio": 0.1, "step_kept": None, "warnings": [],
        **changed,
    }  # fmt: skip


def test_rows_are_paired_by_seed() -> None:
    made = {(FP32, 0): 90.0, (FP32, 1): 92.0, (FP32, 2): 99.0, ("S1E3M7>S1E2M1", 0): 89.0, ("S1E3M7>S1E2M1", 1): 92.0}
    formats, seeds = ("S1E3M7>S1E2M1", "S1E2M3"), (0, 1, 2, 3)

    def found(cell: Cell, format: str, seed: int) -> dict[str, Any] | None:
        score = made.get((format, seed))
        return None if score is None else result(score, step_kept=None if format == FP32 else 0.5 + seed / 10)

    (row,) = table.rows([DIGITS], formats, seeds, found)
    half = 12.7062 * 0.5  # Student's t of one degree of freedom, times the standard error
    assert row == {
        "task": "digits", "local": "1-step", "server": "FedAvg", "split": "iid",
        "format": "S1E3M7", "uplink": "S1E2M1", "seeds": [0, 1],
        "score": 90.5, "score_fp32": 91.0, "difference": -0.5,
        "ci_low": pytest.approx(-0.5 - half, abs=1e-3), "ci_high": pytest.approx(-0.5 + half, abs=1e-3),
        "memory_ratio": pytest.approx(0.3), "down_ratio": pytest.approx(0.2), "up_ratio": pytest.approx(0.1),
        "step_kept": pytest.approx(0.55), "warned": 0,
    }  # fmt: skip


def test_losses_without_a_warning_are_counted() -> None:
    scores = {"loses": 80.0, "warns": 80.0, "alarms": 90.0, FP32: 90.0}
    warnings = {"warns": ["fewer steps"], "alarms": ["fewer steps"]}

    def found(cell: Cell, format: str, seed: int) -> dict[str, Any]:
        return result(scores[format], warnings=warnings.get(format, []))

    rows = table.rows([DIGITS], ("loses", "warns", "alarms"), (0, 1), found)
    counts = [(row["lost"], row["lost_silently"], row["false_alarms"]) for row in table.pooled(rows)]
    assert counts == [(1, 1, 0), (1, 0, 0), (0, 0, 1)]
    text = table.markdown(rows, table.pooled(rows))
    assert "| loses | 1 | -10.00 |" in text and "| digits, 1-step, FedAvg, iid | 90.0 | -10.00 (-10.0 to -10.0)" in text
