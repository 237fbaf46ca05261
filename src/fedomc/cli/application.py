"""What the command lines of applications share: progress, wide tables, amounts, and errors as one line."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedomc.errors import OMCError

LINE_EVERY = 20.0
"""Seconds between the lines that stand for bars where there is no terminal."""


class ProgressBars:
    """Shows bars on a terminal, and plain lines elsewhere; use it as a context manager.

    Args:
        console: where to write.
        width: the number of characters for the names of the bars.
    """

    def __init__(self, console: Console, width: int) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn(f"[bold]{{task.description:<{width}}}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, name: str, done: int, total: int, state: str, line: str | None = None) -> None:
        """Advance a bar, which is added if there is none of this name.

        Args:
            name: of the bar.
            done: how much is done.
            total: of how much.
            state: what stands behind the bar.
            line: what is written instead where there is no terminal, from time to time and at the end.
        """
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, state=state)
        self._bars.update(self._tasks[name], completed=done, state=state)
        now = time.monotonic()
        if line is not None and not self.console.is_terminal and (now - self._last_line > LINE_EVERY or done == total):
            self._last_line = now
            self.console.print(line, soft_wrap=True)


def print_whole(console: Console, table: Table) -> None:
    """Print a table; in a pipe or a file, as wide as it is."""
    if not console.is_terminal:
        table.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table, crop=False)


def minutes(seconds: float) -> str:
    """Format a duration in seconds or minutes."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def megabytes(size: float) -> str:
    """Format a number of bytes as MB or GB."""
    return f"{size / 1e6:.2f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


@contextmanager
def clear_errors() -> Iterator[None]:
    """Print an error that the user can mend as one line, and exit with code 2."""
    try:
        yield
    except OMCError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
