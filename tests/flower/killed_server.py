"""A server for ``test_store``: runs a small federation in a folder, and may kill itself at a moment of its run.

    python -m tests.flower.killed_server FOLDER STRATEGY ROUNDS MOMENT

Moments are counted: each line of the library's or Flower's Python code that is run in a round is one. At ``MOMENT`` the
process gets SIGKILL, as from ``kill -9``. With 0 it finishes, and prints the number of moments and the digest of the
result.
"""

import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from flwr.serverapp import strategy as strategies
from flwr.supercore.task_identity import TaskIdentity

import fedomc
from fedomc.flower import Checkpoints, OMCStrategy
from fedomc.flower.checkpointing import digest
from tests.flower.test_aggregation import Network, answer, model

WATCHED = ("/fedomc/flower/", "/fedomc/serialization/", "/flwr/serverapp/")


def run(folder: Path, name: str, rounds: int) -> str:
    """Run the federation, or go on with it; return a digest of the model, the moments and the metrics."""
    kwargs: dict[str, Any] = {"FedAvgM": {"server_momentum": 0.9}}.get(name, {})
    inner = getattr(strategies, name)(fraction_train=0.5, fraction_evaluate=0.5, **kwargs)
    policy = fedomc.CompressionPolicy("S1E3M7", fraction=0.5, rounding="stochastic")
    wrapped = OMCStrategy(inner, policy, checkpoints=Checkpoints(folder, keep=2))
    grid = Network(6, lambda message: answer(message, 1e-2))
    result = wrapped.start(grid, model(), num_rounds=rounds)  # type: ignore[arg-type]
    stored = Checkpoints(folder).load()
    assert stored is not None
    moments = {kind: {n: v.tobytes().hex() for n, v in each.items()} for kind, each in stored.arrays.items()}
    received = [(row.round, row.received, row.up_bytes) for row in wrapped.traffic]
    return f"{digest(result.arrays)} {hash_of(moments)} {received} {hash_of(stored.progress['random'])}"


def hash_of(value: object) -> str:
    """Return a short digest of what ``repr`` says."""
    import xxhash

    return xxhash.xxh3_64(repr(value).encode()).hexdigest()


def main() -> None:
    """Run as the arguments say."""
    folder, name, rounds, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    for attribute in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, attribute, 1)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    random.seed(7)
    np.random.seed(7)
    count = 0

    def local(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return local

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return local if any(part in frame.f_code.co_filename for part in WATCHED) else None

    sys.settrace(trace)
    found = run(folder, name, rounds)
    sys.settrace(None)
    print(f"{count} | {found}")


if __name__ == "__main__":
    main()
