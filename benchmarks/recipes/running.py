"""Runs and their results: one JSON file for each, made by as many processes as asked for; none is made twice."""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

import fedomc
from benchmarks.recipes.design import Cell
from benchmarks.recipes.federation import FP32, Rates, run
from benchmarks.recipes.tasks import CLIENTS, task
from fedomc.serialization.atomic_file import replace_text

VERSION = 3
"""Part of every key. Raise it with each change to the tasks or to training after which runs give other results."""


@dataclass(frozen=True)
class Run:
    """What decides a result.

    Attributes:
        cell: how to train.
        format: of the policy, or FP32.
        seed: of all random numbers.
        rates: the learning rates.
        part: what is measured, ``test`` or ``validation``.
        rounds: number of rounds; 0 is the task's.
    """

    cell: Cell
    format: str
    seed: int
    rates: Rates
    part: str = "test"
    rounds: int = 0

    def __str__(self) -> str:
        return f"{self.cell} {self.format} seed {self.seed}"

    @property
    def described(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        own = task(self.cell.task)
        return {
            **dataclasses.asdict(self),
            "rounds": self.rounds or own.rounds[self.cell.local],
            "batch": own.batch,
            "clients": CLIENTS,
            "data": own.digest,
            "version": VERSION,
            "fedomc": fedomc_version(),
            "torch": torch.__version__,
        }

    @property
    def key(self) -> str:
        """The name of the result's file, without its suffix."""
        text = json.dumps(self.described, sort_keys=True)
        name = f"{self.cell}-{self.format}-{self.seed}".replace("/", "-").replace("<", "-down-").replace(">", "-up-")
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Results:
    """The folder of the results.

    Args:
        folder: is made when the first result is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, wanted: Run) -> dict[str, Any] | None:
        """Return the result of a run, or None if it was not made.

        Raises:
            SystemExit: the file is damaged.
        """
        path = self.path(wanted)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            sys.exit(f"{path} is damaged ({error}): delete it, and the run is made again")
        return found

    def add(self, made: Run, result: dict[str, Any]) -> None:
        """Write a result; whoever reads at the same time sees the whole file or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"run": made.described, "code": code_digest(), **result}
        replace_text(self.path(made), json.dumps(whole, indent=1) + "\n")

    def path(self, wanted: Run) -> Path:
        """Return the file of a run's result."""
        return self.folder / f"{wanted.key}.json"


def run_all(
    wanted: Sequence[Run],
    results: Results,
    jobs: int,
    expected: Callable[[Run], float],
    say: Callable[[str], None] = print,
) -> bool:
    """Make the results that are missing.

    Ctrl-C ends it after the runs under way; a second time ends it at once. Either leaves whole files only.

    Args:
        wanted: the runs, in the order in which they start.
        results: where the results are, and go.
        jobs: number of processes, each with one thread.
        expected: the seconds that a run takes, as far as is known.
        say: prints a line.

    Returns:
        Whether all were made.
    """
    missing = [one for one in dict.fromkeys(wanted) if results.get(one) is None]
    seconds = {one: expected(one) for one in missing}
    say(
        f"{len(dict.fromkeys(wanted))} runs, {len(missing)} of them missing: about "
        f"{sum(seconds.values()) / jobs / 60:.0f} minutes with {jobs} processes, each with a core of its own"
    )
    if not missing:
        return True
    began, done, failed = time.monotonic(), 0.0, list[str]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _prepare) as pool:
        futures = {pool.submit(_make, one, results): one for one in missing}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                one = futures[future]
                done += seconds[one]
                left = (time.monotonic() - began) * (sum(seconds.values()) / done - 1) / 60
                error = future.exception()
                if error is not None:
                    failed.append(f"{one}: {error}")
                outcome = f"failed: {error}" if error else f"{future.result():.1f}"
                say(f"{count}/{len(missing)} {one}: {outcome}; {left:.0f} minutes left")
        except KeyboardInterrupt:
            say("stopping after the runs under way; Ctrl-C again stops at once")
            _let_finish(pool)
            return False
    if failed:
        say(f"{len(failed)} of {len(missing)} runs failed, the others are kept:\n" + "\n".join(failed))
    return not failed


def _let_finish(pool: ProcessPoolExecutor) -> None:
    try:
        pool.shutdown(cancel_futures=True)
    except KeyboardInterrupt:
        os._exit(130)  # the workers end with this process


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(one: Run, results: Results) -> float:
    result = run(
        task(one.cell.task), one.cell, one.format, one.seed, one.rates, part=one.part, rounds=one.rounds or None
    )
    results.add(one, result)
    return float(result["score"])


def measured_seconds(results: Results, known: Sequence[Run], prior: Callable[[Run], float]) -> Callable[[Run], float]:
    """Return a function that estimates a run's seconds from those of finished runs of its task and local work.

    Args:
        results: the finished runs.
        known: which runs to look for.
        prior: the seconds of a run of which there are none like it.
    """
    found: dict[tuple[str, str, bool], list[float]] = {}
    for one in known:
        result = results.get(one)
        if result is not None:
            found.setdefault(_kind(one), []).append(result["seconds"])
    means = {kind: sum(values) / len(values) for kind, values in found.items()}
    return lambda one: means.get(_kind(one)) or prior(one)


def _kind(one: Run) -> tuple[str, str, bool]:
    return one.cell.task, one.cell.local, one.format == FP32


@functools.cache
def fedomc_version() -> str:
    """Return the library's version."""
    from importlib.metadata import version

    return version("fedomc")


@functools.cache
def code_digest() -> str:
    """Digest the sources of the library and of this package; it is in every result, beside the key."""
    roots = [Path(fedomc.__file__).parent, Path(fedomc.__file__).parents[2] / "csrc", Path(__file__).parent]
    found = hashlib.sha256()
    for root in roots:
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.?pp")]):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]
