"""Flower's simulation: each client is a virtual node, and each core runs one client at a time."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.serverapp import Grid, ServerApp

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves the clients beside anything else
}


def simulate(main: Callable[[Grid], None], clients: int, log_file: Path) -> None:
    """Run a function as the server of a simulated federation; its exceptions are raised here.

    Args:
        main: the function; it is called with the grid.
        clients: number of virtual nodes.
        log_file: file that Flower's log is appended to.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from flwr.simulation import run_simulation  # it reads the environment when it is imported

    from fedomc_speech.client import app as client_app

    log_to(log_file)
    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def run_main(grid: Grid, context: Context) -> None:
        try:
            main(grid)
        except BaseException as error:
            failures.append(error)

    backend: BackendConfig = {
        "init_args": {"num_cpus": os.cpu_count() or 1, "log_to_driver": False, "logging_level": logging.ERROR},
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
    }
    run_simulation(server_app, client_app, clients, backend_config=backend)
    if failures:
        raise failures[0]


def log_to(path: Path) -> None:
    """Write Flower's log to a file, and nowhere else."""
    logger = logging.getLogger("flwr")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
