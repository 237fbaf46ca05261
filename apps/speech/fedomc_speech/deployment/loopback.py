"""A SuperLink and its SuperNodes as processes of this machine, which only this machine can reach."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fedomc_speech.deployment.keys import make_keys
from fedomc_speech.errors import DeploymentError

APP = Path(__file__).parents[2]
"""The folder of the Flower app."""

NAME = "loopback"
"""The name of the connection in Flower's configuration."""

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the processes use the environment that they run in
}

_PATIENCE = 60.0
"""Seconds to wait for a process to start or to end."""


def app_with_client(folder: Path, client: Path) -> Path:
    """Copy the app to a folder, with another ClientApp, for benchmarks and tests.

    Args:
        folder: the folder, which must not exist.
        client: a Python file that defines a ClientApp ``app``.

    Returns:
        The folder.

    Raises:
        DeploymentError: the app's ``pyproject.toml`` does not name its own ClientApp exactly once.
    """
    shutil.copytree(APP / "fedomc_speech", folder / "fedomc_speech", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(client, folder)
    text = (APP / "pyproject.toml").read_text()
    for ours, theirs in (("fedomc_speech.client:app", f"{client.stem}:app"), ("fedomc_speech/**/*.py", "**/*.py")):
        if text.count(ours) != 1:
            raise DeploymentError(
                f"{APP / 'pyproject.toml'} has {ours!r} {text.count(ours)} times instead of once: "
                "the ClientApp cannot be replaced"
            )
        text = text.replace(ours, theirs)
    (folder / "pyproject.toml").write_text(text)
    return folder


class Loopback:
    """A federation of processes: a SuperLink with TLS, and SuperNodes that it authenticates by their keys.

    All files are in one folder: ``keys``, ``flwr`` (Flower's configuration and apps) and ``logs``. Use it as a context
    manager, which stops all processes at its end.

    Args:
        folder: the folder for all files; existing keys in it are used.
        nodes: number of SuperNodes; node i holds part i of the data.
        environment: additional environment variables for all processes.

    Attributes:
        node_ids: Flower's IDs of the SuperNodes.
        port: port of the SuperLink.
    """

    def __init__(self, folder: Path, nodes: int = 3, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder.absolute()
        self.nodes = nodes
        self.node_ids: list[int] = []
        self.port = _free_port()
        self.keys, self.logs, self._home = self.folder / "keys", self.folder / "logs", self.folder / "flwr"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        programs = str(Path(sys.executable).parent)
        self._environment = {
            **os.environ,
            **ENVIRONMENT,
            **(environment or {}),
            "FLWR_HOME": str(self._home),
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),  # Flower starts programs by name
        }

    def __enter__(self) -> "Loopback":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        for folder in (self.logs, self._home):
            folder.mkdir(parents=True, exist_ok=True)
        if not self.keys.exists():
            make_keys(self.keys, self.nodes)
        self._launch("superlink", ["flower-superlink", *self._where(), "--enable-supernode-auth"])
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.keys / "ca.crt"}"\n'
        )
        self._wait_for_port("superlink", self.port)
        for number in range(self.nodes):
            self._register(number)
        for number in range(self.nodes):
            self.start_node(number)
        self.wait_for_nodes()

    def _where(self) -> list[str]:
        return [
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.keys / "ca.crt")),
            *("--ssl-certfile", str(self.keys / "server.crt")),
            *("--ssl-keyfile", str(self.keys / "server.key")),
        ]

    def _register(self, number: int) -> None:
        answer = self.flwr("supernode", "register", str(self.keys / f"node-{number}.pub"), NAME)
        self.node_ids.append(int(answer["node-id"]))

    def start_node(self, number: int, keys: Path | None = None) -> None:
        """Start a SuperNode, or start it again after it ended.

        Args:
            number: of the node.
            keys: folder of its key and of the certificate that it trusts, if not those that were registered.
        """
        keys = keys or self.keys
        options = {
            "--superlink": f"127.0.0.1:{self.port}",
            "--port": str(_free_port()),
            "--root-certificates": str(keys / "ca.crt"),
            "--auth-supernode-private-key": str(keys / f"node-{number}"),
            "--node-config": f"partition-id={number} num-partitions={self.nodes}",
        }
        self._launch(f"node-{number}", ["flower-supernode", *(word for option in options.items() for word in option)])

    def wait_for_nodes(self) -> None:
        """Wait until all nodes are online.

        Raises:
            DeploymentError: one has ended, or it takes too long.
        """
        deadline = time.monotonic() + _PATIENCE
        while not set(self.node_ids) <= self.online():
            for number in range(self.nodes):
                self._check(f"node-{number}", deadline)

    def online(self) -> set[int]:
        """Return the IDs of the nodes that the SuperLink lists as online."""
        answer = self.flwr("supernode", "list", NAME)
        return {int(node["node-id"]) for node in answer["nodes"] if node["status"] == "online"}

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Call ``flwr`` and return its answer.

        Raises:
            DeploymentError: the call fails.
        """
        done = subprocess.run(  # noqa: S603
            ["flwr", *arguments, "--format", "json"],  # noqa: S607
            env=self._environment, capture_output=True, text=True, timeout=_PATIENCE, check=False,
        )  # fmt: skip
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            answer = {}
        if done.returncode or not answer.get("success"):
            raise DeploymentError(f"flwr {' '.join(arguments)} failed: {(done.stdout + done.stderr).strip()}")
        return answer

    def submit(self, run_config: str, app: Path = APP, log: str | None = None) -> subprocess.Popen[bytes]:
        """Start a run of the app, and stream its log.

        Args:
            run_config: settings that differ from those in the app's ``pyproject.toml``, as ``flwr run`` takes them.
            app: folder of the app.
            log: name of a file in ``logs`` for the run's log; None writes it to this process's own output.

        Returns:
            The process, which ends when the run does. It exits with 0 even if the run failed; see the run's results.
        """
        return self._launch(log, ["flwr", "run", str(app), NAME, "--stream", "--run-config", run_config])

    def log(self, name: str) -> str:
        """Return the contents of a log: ``superlink``, ``node-0`` or the name that was given to ``submit``."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def pid(self, name: str) -> int:
        """Return the process id of ``superlink`` or ``node-0``."""
        return self._processes[name].pid

    def stop(self) -> None:
        """Stop all processes that were started here, the SuperLink last, and wait for them."""
        for name in [*reversed(self._processes)]:
            self.stop_one(name)

    def stop_one(self, name: str) -> None:
        """Stop one process and its child processes, and wait for it."""
        process = self._processes.pop(name)
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE / 4)
        _signal_group(process.pid, signal.SIGKILL)  # the rest of its group
        process.wait()

    def _launch(self, name: str | None, command: list[str]) -> subprocess.Popen[bytes]:
        with ExitStack() as stack:
            log = None if name is None else stack.enter_context(open(self.logs / f"{name}.log", "ab"))
            process = subprocess.Popen(  # noqa: S603
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._processes[name or "run"] = process
        return process

    def _wait_for_port(self, name: str, port: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            self._check(name, deadline)

    def _check(self, name: str, deadline: float) -> None:
        """Wait a moment; raise a DeploymentError if the process has ended or the time is over."""
        if self._processes[name].poll() is not None or time.monotonic() > deadline:
            raise DeploymentError(f"{name} did not start: {self.log(name)[-2000:]}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, number)
