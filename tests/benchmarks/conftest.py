"""What every test of a benchmark needs."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """Give the process its threads and Flower's log their settings back, which benchmarks change."""
    threads, level = torch.get_num_threads(), logging.getLogger("flwr").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("flwr").setLevel(level)
