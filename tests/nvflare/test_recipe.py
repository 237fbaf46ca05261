"""The filters in a job's recipe, and a real job."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nvflare.client.config import TransferType

import fedomc
from fedomc.nvflare import add_filters
from tests.nvflare.messages import EXAMPLE, example_net, policy, recipe


def test_an_update_format_for_clients_that_send_whole_weights_is_refused_before_the_job_starts() -> None:
    chosen = policy(update_format="S1E2M1", include=["*weight"])
    with pytest.raises(fedomc.PolicyError, match=r"update_format=S1E2M1 .*params_transfer_type=TransferType.DIFF"):
        add_filters(recipe(), chosen)
    add_filters(recipe(TransferType.DIFF), chosen)
    add_filters(recipe(), policy(include=["*weight"]))
    by_site = recipe()
    by_site.set_per_site_config({f"site-{i}": {"params_transfer_type": TransferType.DIFF} for i in (1, 2)})
    add_filters(by_site, chosen)


def test_a_job_names_the_filters_and_does_not_carry_the_library(tmp_path: Path) -> None:
    job = recipe(TransferType.DIFF)
    add_filters(job, policy(update_format="S1E2M1", include=["*weight"]), compressed=True, tasks=["train", "validate"])
    job.export(str(tmp_path))
    assert not list(tmp_path.rglob("fedomc*")) and list(tmp_path.rglob("client.py"))
    found = {}
    for side in ("server", "client"):
        config = json.loads(next(tmp_path.rglob(f"config_fed_{side}.json")).read_text())
        for direction in ("task_data_filters", "task_result_filters"):
            (chain,) = config[direction]
            assert sorted(chain["tasks"]) == ["train", "validate"]
            (found[side, direction],) = chain["filters"]
    assert {key: value["path"].rpartition(".")[2] for key, value in found.items()} == {
        ("server", "task_data_filters"): "CompressFilter",
        ("client", "task_data_filters"): "DecompressFilter",
        ("client", "task_result_filters"): "CompressFilter",
        ("server", "task_result_filters"): "DecompressFilter",
    }
    assert found["client", "task_data_filters"]["args"] == {"compressed": True}
    assert found["server", "task_result_filters"]["args"] == {}
    assert found["server", "task_data_filters"]["args"] == found["client", "task_result_filters"]["args"]


def test_the_example_in_the_simulator(tmp_path: Path) -> None:
    """Two real jobs: the compressed one learns as the one in FP32, and draws anew for every client and round."""
    command = [sys.executable, str(EXAMPLE / "job.py"), "--rounds", "4", "--workspace", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)  # noqa: S603
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

    accuracy = dict(re.findall(r"^\| (FP32|S1E3M7) \| ([\d.]+)%", done.stdout, re.MULTILINE))
    assert float(accuracy["FP32"]) > 90 and abs(float(accuracy["FP32"]) - float(accuracy["S1E3M7"])) < 4
    curve = re.findall(r"round (\d): accuracy [\d.]+ as received, loss ([\d.]+) at the end", done.stdout)
    losses = [[float(loss) for at, loss in curve if int(at) == round] for round in range(4)]
    assert [len(of) for of in losses] == [4, 4, 4, 4]  # two jobs with two clients each
    assert max(losses[3]) < 0.5 * min(losses[0])

    net, chosen = example_net(), fedomc.CompressionPolicy("S1E3M7", fraction=0.7)
    fp32 = sum(value.nbytes for value in net.state_dict().values())
    logs = "\n".join(path.read_text() for path in (tmp_path / "S1E3M7").glob("*/log.txt"))
    pattern = r"round (\d), (to|from) (\S+): (\d+) of 10 .*, (\d+) -> (\d+) bytes; drawn to stay FP32: (.+)"
    found = {(int(r), way, client): rest for r, way, client, *rest in re.findall(pattern, logs)}
    assert len(found) == 4 * 2 * 2
    for (round, _, client), (count, before, after, left) in found.items():
        selection = chosen.select(net, round=round, client=client)
        assert int(count) == len(selection)
        assert set(left.split(", ")) == set(chosen.compressible(net)) - set(selection)
        dense = fp32 - sum(net.get_parameter(name).nbytes for name in selection)
        packed = sum(11 * net.get_parameter(name).numel() / 8 for name in selection)
        assert int(before) == fp32 and 0 <= int(after) - dense - packed < 100 * len(selection)
    assert len({left for *_, left in found.values()}) > 2
