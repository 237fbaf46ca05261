"""What clients can do to a round, in one process; ``deployment`` does it to real ones."""

import re
from pathlib import Path

import pytest
from nodes import Nodes, results_of, run_in_process, state_of

from fedomc_speech.settings import Settings

pytestmark = pytest.mark.usefixtures("identity")

CLIENTS, FAULTY = 3, 1
REASONS = {
    "garbage": "not a (compressed variable|numpy array)",
    "shapes": "shape",
    "nan": "NaN",
    "error": "no memory",
    "killed": "node unavailable",
    "absent": "no reply came in time",
}


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("format", ["S1E3M7@0.9", "S1E2M3+S1E2M1"])
def test_a_round_goes_on_without_the_bad_client(
    format: str, fault: str, tones: Path, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    chosen = Settings(
        formats=(format,), corpus="an4", corpus_path=str(tones), split="iid", clients=CLIENTS, cohort=CLIENTS, rounds=3,
        batch=2, evaluate_every=3, round_timeout=0.5,
    )  # fmt: skip
    nodes = Nodes(CLIENTS, 500, {"2": {str(FAULTY): fault}})
    run_in_process(chosen, tmp_path / "faulty", nodes)
    (named,) = [record.getMessage() for record in flower_log.records if "left out" in record.getMessage()]
    assert named.startswith(f"round 2: left out node {nodes.node_of(FAULTY)}: ")
    assert re.search(REASONS[fault], named)

    run_in_process(chosen, tmp_path / "whole", Nodes(CLIENTS))
    run_in_process(chosen, tmp_path / "without", Nodes(CLIENTS, faults={"2": {str(FAULTY): "absent"}}))
    whole, faulty = (results_of(tmp_path / name)[format]["history"] for name in ("whole", "faulty"))
    assert [row["clients"] for row in faulty] == [3, 2, 3]
    assert faulty[0] == whole[0]
    assert results_of(tmp_path / "faulty") == results_of(tmp_path / "without")
    assert state_of(tmp_path / "faulty") == state_of(tmp_path / "without") != state_of(tmp_path / "whole")
