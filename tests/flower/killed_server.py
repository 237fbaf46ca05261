"""Servers for ``test_store`` that kill themselves at given moments, and their successors.

    python -m tests.flower.killed_server FOLDER SEED STRATEGY=COUNT...

For each strategy, a federation runs without interruption, then ``COUNT`` times again: it is killed at a moment drawn
with ``SEED``, and another process goes on from what it left. Moments are counted: each line of the library's or
Flower's Python code is one. Prints a row of JSON for each killed server. All servers are forks of this process, which
has done the imports.
"""

import json
import logging
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import xxhash
from flwr.serverapp import strategy as strategies

import fedomc
from fedomc.flower import Checkpoints, OMCStrategy
from fedomc.flower._flower import identify_process
from fedomc.flower.checkpointing import digest
from tests.flower.test_aggregation import Network, answer, model

ROUNDS = 3

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
    return xxhash.xxh3_64(repr(value).encode()).hexdigest()


def forked(folder: Path, name: str, moment: int, seed: int) -> tuple[int, int, str]:
    """Run in another process, which kills itself at a moment, if one is given.

    Returns:
        The signal that ended it, or 0; the number of moments; and what ``run`` returned.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with open(reader) as file:
            text = file.read()
        _, status = os.waitpid(child, 0)
        if not text:
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), 0, ""
        count, found = json.loads(text)
        return 0, count, found
    try:
        random.seed(seed)
        count = 0

        def local(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return local

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            return local if any(part in frame.f_code.co_filename for part in WATCHED) else None

        sys.settrace(trace)
        found = run(folder, name, ROUNDS)
        sys.settrace(None)
        os.write(writer, json.dumps([count, found]).encode())
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    """Run as the arguments say."""
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    identify_process()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    draw = random.Random(seed)  # noqa: S311
    for argument in sys.argv[3:]:
        name, _, number = argument.partition("=")
        _, count, whole = forked(folder / name, name, 0, 7)
        for i in range(int(number)):
            own, moment = folder / f"{name}-{i}", draw.randint(1, count)
            ended, _, _ = forked(own, name, moment, 7)
            left = sorted(path.name for path in own.glob("round-*")) if own.exists() else []
            _, _, found = forked(own, name, 0, 99 if left else 7)  # a state that was saved brings its own seed
            rest = sorted(path.name for path in own.iterdir() if path.name.startswith(".fedomc"))
            row = {"strategy": name, "moment": moment, "of": count, "signal": ended, "left": left, "rest": rest}
            print(json.dumps({**row, "found": found, "wanted": whole}), flush=True)


if __name__ == "__main__":
    main()
