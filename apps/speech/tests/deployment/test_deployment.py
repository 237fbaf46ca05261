"""A real federation on this machine: processes, TLS, node keys; what a run gives is what one process gives."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from misbehaving import FAULTS
from nodes import Faults, Nodes, results_of, run_in_process, state_of

from fedomc.serialization.checkpointing import Checkpoint
from fedomc_speech import corpus
from fedomc_speech.deployment import Loopback, make_keys
from fedomc_speech.deployment.loopback import APP, app_with_client
from fedomc_speech.run_folder import CHECKPOINT
from fedomc_speech.settings import Settings

pytestmark = [pytest.mark.deployment, pytest.mark.usefixtures("identity")]

REPOSITORY = APP.parents[1]
FORMAT = "S1E2M3+S1E2M1"
PATIENCE = 900.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus.load("digits")  # made before the processes look for it
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def faults(folder: Path) -> Path:
    path = folder / "faults.json"
    path.write_text("{}")
    return path


@pytest.fixture(scope="module")
def federation(folder: Path, faults: Path) -> Iterator[Loopback]:
    with Loopback(folder, 3, {FAULTS: str(faults), "OMP_NUM_THREADS": "1"}) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def misbehaving_app(folder: Path) -> Path:
    """The app with the ClientApp of the tests."""
    return app_with_client(folder / "app", APP / "tests" / "misbehaving.py")


def settings(round_timeout: float = 600.0) -> Settings:
    return Settings(
        formats=(FORMAT,), split="iid", clients=3, cohort=3, rounds=3, evaluate_every=3, round_timeout=round_timeout
    )


def run_config(chosen: Settings, output: Path, *, resume: bool = False) -> str:
    names = ("split", "clients", "cohort", "rounds", "evaluate_every", "round_timeout")
    config = {name.replace("_", "-"): getattr(chosen, name) for name in names}
    config |= {"formats": " ".join(chosen.formats), "output": str(output), "resume": resume}
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def left_out(log: str) -> list[tuple[int, int, str]]:
    """Round, node and reason of each client that was left out."""
    found = re.findall(r"round (\d+): left out node (\d+): (.*)", log)
    return [(int(number), int(node), why) for number, node, why in found]


def check(chosen: Settings, output: Path, absent: Faults, scratch: Path) -> None:
    """Compare with a run in this process that just misses those clients."""
    run_in_process(chosen, scratch, Nodes(3, faults=absent))
    assert results_of(output) == results_of(scratch)
    assert state_of(output) == state_of(scratch)


def test_bad_replies(federation: Loopback, misbehaving_app: Path, faults: Path, tmp_path: Path) -> None:
    faults.write_text(json.dumps({"2": {"0": "garbage", "1": "shapes"}, "3": {"2": "nan"}}))
    chosen = settings()
    assert federation.submit(run_config(chosen, tmp_path / "out"), misbehaving_app, "bad").wait(PATIENCE) == 0
    named = left_out(federation.log("bad"))
    assert [(number, node) for number, node, _ in sorted(named)] == sorted(
        [(2, federation.node_ids[0]), (2, federation.node_ids[1]), (3, federation.node_ids[2])]
    )
    why = {node: reason for _, node, reason in named}
    for part, reason in enumerate(("not a compressed variable", "shape", "NaN")):
        assert reason in why[federation.node_ids[part]]
    absent = {"2": {"0": "absent", "1": "absent"}, "3": {"2": "absent"}}
    check(settings(0.5), tmp_path / "out", absent, tmp_path / "expected")


def test_a_late_client_and_one_that_is_killed(
    federation: Loopback, misbehaving_app: Path, faults: Path, tmp_path: Path
) -> None:
    faults.write_text(json.dumps({"2": {"1": "late"}, "3": {"2": "killed"}}))
    run = federation.submit(run_config(settings(120.0), tmp_path / "out"), misbehaving_app, "late")
    wait_until(lambda: (faults.parent / "killed-3-2").exists() or run.poll() is not None)
    os.kill(federation.pid("node-2"), signal.SIGKILL)
    try:
        assert run.wait(PATIENCE) == 0
        named = left_out(federation.log("late"))
        assert [(number, node) for number, node, _ in named] == [
            (2, federation.node_ids[1]),
            (3, federation.node_ids[2]),
        ]
        assert "no reply came in time" in named[0][2] and "Node Unavailable" in named[1][2]
        absent = {"2": {"1": "absent"}, "3": {"2": "absent"}}
        check(settings(0.5), tmp_path / "out", absent, tmp_path / "expected")
    finally:
        federation.stop_one("node-2")
        federation.start_node(2)
        federation.wait_for_nodes()


def test_a_server_app_that_is_killed_resumes_to_the_same_bits(federation: Loopback, tmp_path: Path) -> None:
    chosen, output = settings(), tmp_path / "out"
    first = federation.submit(run_config(chosen, output), log="first")
    wait_until(lambda: (output / CHECKPOINT).exists() or first.poll() is not None)
    (server,) = [pid for pid, name in descendants(federation.pid("superlink")) if name == "flwr-serverapp"]
    os.kill(server, signal.SIGKILL)
    finished = Checkpoint.read(output / CHECKPOINT).progress["history"]
    first.wait(PATIENCE)
    assert 1 <= len(finished) < chosen.rounds
    assert federation.submit(run_config(chosen, output, resume=True), log="second").wait(PATIENCE) == 0
    assert f"from round {len(finished) + 1}" in federation.log("second")
    (run,) = json.loads((output / "results.json").read_text())["runs"]
    assert run["history"][: len(finished)] == finished
    check(chosen, output, {}, tmp_path / "expected")


def test_strangers_do_not_get_in(federation: Loopback, tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", 4)
    shutil.copy(federation.keys / "ca.crt", tmp_path / "keys")
    federation.start_node(3, tmp_path / "keys")
    try:
        wait_until(lambda: "Failed to activate SuperNode" in federation.log("node-3"))
        assert federation.online() == set(federation.node_ids)
    finally:
        federation.stop_one("node-3")


def test_the_superlink_is_who_the_authority_says(federation: Loopback, tmp_path: Path) -> None:
    make_keys(tmp_path, 1)
    assert shakes_hands(federation, federation.keys, "127.0.0.1")
    assert not shakes_hands(federation, federation.keys, "127.0.0.2")
    assert not shakes_hands(federation, tmp_path, "127.0.0.1")


def shakes_hands(federation: Loopback, keys: Path, name: str) -> bool:
    context = ssl.create_default_context(cafile=keys / "ca.crt")
    try:
        with (
            socket.create_connection(("127.0.0.1", federation.port)) as plain,
            context.wrap_socket(plain, server_hostname=name),
        ):
            return True
    except ssl.SSLCertVerificationError:
        return False


@pytest.mark.parametrize("language, rounds", [("console", 1), ("bash", 2)])
def test_the_walk_through(language: str, rounds: int, folder: Path, tmp_path: Path) -> None:
    """All at once, and step by step."""
    text = (REPOSITORY / "docs" / "deployment.md").read_text()
    script = "\n".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert script.count("rounds=") == 1
    script = re.sub(r"rounds=\d+", f"rounds={rounds}", script)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),  # where the corpus is
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    with open(tmp_path / "log", "wb") as log:
        shell = subprocess.Popen(  # noqa: S603
            ["bash", "-euo", "pipefail", "-c", script],  # noqa: S607
            cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            assert shell.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    results = results_of(tmp_path / "fedomc-deployment" / "results")
    assert results[FORMAT]["finished"] and [row["clients"] for row in results[FORMAT]["history"]] == [3] * rounds
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 9443)) != 0


def descendants(pid: int) -> list[tuple[int, str]]:
    """List the processes below one, with their names."""
    command = ["ps", "-eo", "pid=,ppid=,comm="]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    rows = [(int(own), int(parent), name) for own, parent, name in (line.split(None, 2) for line in shown.splitlines())]
    below = {pid}
    while more := {own for own, parent, _ in rows if parent in below} - below:
        below |= more
    return [(own, name) for own, _, name in rows if own in below - {pid}]
