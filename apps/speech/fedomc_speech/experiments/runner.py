"""Run many settings, with a process on each core. Finished runs are never repeated; stopped runs continue."""

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fedomc.flower.in_process import InProcess
from fedomc.flower.simulation import log_to
from fedomc_speech import corpus, federation, pretraining
from fedomc_speech.client import app as client_app
from fedomc_speech.errors import ExperimentError
from fedomc_speech.experiments.plan import Initial, key_of
from fedomc_speech.run_folder import RunFolder
from fedomc_speech.settings import Settings, Variant

LOG = "experiments.log"


@dataclass(frozen=True)
class _Done:
    """A worker's message that a round is done."""

    run: Settings
    number: int
    wer: float | None


class Runs:
    """The folder of all runs, each in a folder of its own.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, run: Settings) -> Path:
        """Return the folder of a run."""
        return self.path / key_of(run)

    def result(self, run: Settings) -> dict[str, Any] | None:
        """Return the result of a run; None if it is not finished.

        Raises:
            SettingsError: the run's file is damaged.
        """
        folder = self._opened(run)
        return None if folder is None or not folder.finished(str(run.variants[0])) else folder.runs[0]

    def rounds(self, run: Settings) -> int:
        """Return the number of rounds of a run that are done."""
        folder = self._opened(run)
        if folder is None:
            return 0
        if folder.finished(str(run.variants[0])):
            return run.rounds
        checkpoint = folder.load()
        return 0 if checkpoint is None else int(checkpoint.progress["round"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock on the folder, so that no other process runs experiments in it.

        Raises:
            ExperimentError: another process holds the lock.
        """
        try:
            with FileLock(self.path / "lock", blocking=False):
                yield
        except Timeout:
            raise ExperimentError(f"another process runs experiments in {self.path}: wait for it") from None

    def open(self, run: Settings) -> RunFolder:
        """Open the folder of a run, to start it or to continue."""
        return self._opened(run) or RunFolder(self.folder(run), run, resume=False)

    def _opened(self, run: Settings) -> RunFolder | None:
        path = self.folder(run)
        return RunFolder(path, run, resume=True) if (path / "results.json").exists() else None


def run_all(
    wanted: Sequence[Settings],
    runs: Runs,
    workers: int,
    console: Console,
    stop: Event,
    initials: Sequence[Initial] = (),
) -> bool:
    """Run all settings that are not finished.

    Args:
        wanted: the settings, in the order in which they start; duplicates are run once.
        runs: the folder of the runs.
        workers: number of runs at the same time, each on a core of its own.
        console: where to write progress; the same lines go into a log in the folder of the runs.
        stop: set it to stop all runs after the round that is under way.
        initials: models that runs begin with; each is trained when the first run needs it.

    Returns:
        False if it was stopped.

    Raises:
        ExperimentError: runs failed (raised after all others are done), or another process works in the same folder.
    """
    unique = list({key_of(run): run for run in wanted}.values())
    missing = [run for run in unique if runs.result(run) is None]
    if not missing:
        return True
    runs.path.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    stopping, events = context.Event(), context.Queue()
    making = {initial.name: (initial, context.Lock()) for initial in initials}
    failed: list[str] = []
    with (
        runs.locked(),
        _Shown(missing, runs, workers, console) as shown,
        ProcessPoolExecutor(workers, context, _prepare, (stopping, events, making)) as pool,
    ):
        futures: dict[Future[bool], Settings] = {pool.submit(_run, run, runs.path): run for run in missing}
        while not all(future.done() for future in futures):
            if stop.is_set() and not stopping.is_set():
                stopping.set()
                for future in futures:
                    future.cancel()
            try:
                shown.show(events.get(timeout=0.5))
            except queue.Empty:
                pass
        for future, run in futures.items():
            error = None if future.cancelled() else future.exception()
            if isinstance(error, BrokenProcessPool):
                killed = ExperimentError("a process was killed, perhaps out of memory: use fewer --workers")
                error = None if stop.is_set() else killed
            if error is not None:
                failed.append(f"{key_of(run)}: {error}")
    if failed:
        raise ExperimentError(f"{len(failed)} of {len(missing)} runs failed, the others are kept. {'; '.join(failed)}")
    return not stop.is_set()


class _Shown:
    """Shows the progress of the runs: a bar on a terminal, otherwise a line for each measurement; both are logged."""

    def __init__(self, missing: Sequence[Settings], runs: Runs, workers: int, console: Console) -> None:
        self.console = console
        self.runs, self.done_runs = len(missing), 0
        self.total = sum(run.rounds - runs.rounds(run) for run in missing)
        self.done, self.began = 0, time.monotonic()
        self.log = (runs.path / LOG).open("a", encoding="utf-8")
        self.bar = Progress(
            TextColumn("{task.fields[runs]}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total} rounds"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=self.total, runs=self._state())

    def __enter__(self) -> "_Shown":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.log.close()

    def show(self, event: _Done | str) -> None:
        if isinstance(event, str):
            self._line(event)
            return
        self.done += 1
        self.done_runs += event.number == event.run.rounds
        self.bar.update(self.task, completed=self.done, runs=self._state())
        if event.wer is None:
            return
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        self._line(
            f"{key_of(event.run)}: round {event.number}/{event.run.rounds}, "
            f"word error rate {event.wer:.1f}%; {self._state()}, {left / 60:.0f} minutes left"
        )

    def _line(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, file=self.log, flush=True)
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True, highlight=False)

    def _state(self) -> str:
        return f"{self.done_runs}/{self.runs} runs"


# ---- in a worker ---------------------------------------------------------------------------------------------------

_stopping: Any = None
_events: Any = None
_making: dict[str, tuple[Initial, Any]] = {}


class _Stopped(Exception):
    """A pre-training was stopped; it leaves no file."""


def _prepare(stopping: Any, events: Any, making: dict[str, tuple[Initial, Any]]) -> None:
    global _stopping, _events, _making
    _stopping, _events, _making = stopping, events, making
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this worker when its parent process ends, so that none is left behind when experiments start again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _make_initial(path: Path) -> None:
    """Train an initial model unless it exists; if another worker is training it, wait for that."""
    if path.name not in _making:
        return
    initial, lock = _making[path.name]
    with lock:
        if path.exists():
            return

        def progress(step: int, loss: float) -> None:
            if _stopping.is_set():
                raise _Stopped
            if step % 200 == 0:
                _events.put(f"{path.name}: step {step}/{initial.training.steps}, loss {loss:.2f}")

        path.parent.mkdir(parents=True, exist_ok=True)
        wer = pretraining.make(path, initial.start, initial.training, progress)
        _events.put(f"{path.name}: word error rate {wer:.1f}% on the test of {initial.start.corpus}")


class _Watcher:
    def __init__(self, run: Settings) -> None:
        self.run = run

    def started(self, variant: Variant, first_round: int) -> None:
        pass

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        _events.put(_Done(self.run, row["round"], row["wer"]))

    def stop_requested(self) -> bool:
        return bool(_stopping.is_set())


def _run(run: Settings, path: Path) -> bool:
    if _stopping.is_set():
        return False
    if run.initial:
        try:
            _make_initial(Path(run.initial))
        except _Stopped:
            return False
    loaded = corpus.load(run.corpus, run.corpus_path, run.corpus_digest)
    parts = corpus.split(loaded.train, run.split, run.clients or None, run.seed)
    folder = Runs(path).open(run)
    log_to(folder.path / "flower.log")
    done = federation.run(run, InProcess(client_app, len(parts)), folder, _Watcher(run))
    if done:
        folder.drop_checkpoint()  # there may be a hundred runs
    return done
