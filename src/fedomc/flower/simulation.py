"""Flower's simulation: each client is a virtual node, and each core runs one client at a time."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedomc.flower._flower import logger

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves the clients beside anything else
}

_STOPPING = (signal.SIGINT, signal.SIGTERM)


def simulate(main: Callable[[Grid], None], client_app: ClientApp, clients: int, log_file: Path) -> None:
    """Run a function as the server of a simulated federation; its exceptions are raised here.

    Args:
        main: the function; it is called with the grid.
        client_app: the ClientApp of all nodes; it should be one that a module defines, as worker processes import it.
        clients: number of virtual nodes.
        log_file: file that Flower's log is appended to.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from flwr.simulation import run_simulation  # it reads the environment when it is imported

    log_to(log_file)
    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def run_main(grid: Grid, context: Context) -> None:
        try:
            main(grid)
        except BaseException as error:
            failures.append(error)

    _start_ray()
    backend: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0}}
    run_simulation(server_app, client_app, clients, backend_config=backend)
    if failures:
        raise failures[0]


def _start_ray() -> None:
    """Start Ray as Flower would, but keep the signal handlers of this process: Ray's own would end it."""
    import ray

    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    ray.init(
        num_cpus=os.cpu_count() or 1,
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def log_to(path: Path) -> None:
    """Write Flower's log to a file, and nowhere else."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


@contextmanager
def stop_on_signal(notify: Callable[[], None]) -> Iterator[threading.Event]:
    """Make the first SIGINT or SIGTERM set an event, for a run to stop after its round; a second one stops it at once.

    Args:
        notify: called when the first signal arrives, for instance to print that the round is still finished.
    """
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        notify()

    previous: Any = {number: signal.signal(number, request) for number in _STOPPING}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
