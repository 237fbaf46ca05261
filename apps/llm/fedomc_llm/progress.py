"""Progress of pretraining and runs: bars on a terminal, plain lines elsewhere."""

import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedomc_llm.report import megabytes
from fedomc_llm.settings import Variant
from fedomc_llm.training import perplexity

LINE_EVERY = 20.0
"""Seconds between plain lines."""


class RunProgress:
    """Shows bars for the pretraining and for each variant; use it as a context manager.

    Args:
        rounds: of each variant.
        console: where to write.
        stop: is set when the run should stop.
    """

    def __init__(self, rounds: int, console: Console, stop: threading.Event) -> None:
        self.rounds, self.console, self.stop = rounds, console, stop
        self._bars = Progress(
            TextColumn("[bold]{task.description:<28}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._sent: dict[str, int] = {}
        self._last_line = 0.0

    def __enter__(self) -> "RunProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def pretraining(self, steps: int, step: int, loss: float) -> bool:
        """Show a step of the pretraining, and return whether to stop."""
        self._show("pretraining", step, steps, f"loss {loss:5.2f}")
        return self.stop.is_set()

    def started(self, variant: Variant) -> None:
        """Add a bar for a variant."""
        self._show(str(variant), 0, self.rounds, "")

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        """Advance the bar of a variant."""
        name = str(variant)
        self._sent[name] = self._sent.get(name, 0) + row["down_bytes"] + row["up_bytes"]
        measured = f"loss {row['loss']:5.3f}  perplexity {perplexity(row['loss']):6.2f}"
        self._show(name, row["round"], self.rounds, f"{measured}  {megabytes(self._sent[name])}")

    def stop_requested(self) -> bool:
        """Return whether the run should stop before the next round."""
        return self.stop.is_set()

    def _show(self, name: str, done: int, total: int, state: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, state=state)
        self._bars.update(self._tasks[name], completed=done, state=state)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._last_line > LINE_EVERY or done == total):
            self._last_line = now
            self.console.print(f"{name}: {done}/{total}  {state}", soft_wrap=True)


def minutes(seconds: float) -> str:
    """Format a duration in seconds or minutes."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
