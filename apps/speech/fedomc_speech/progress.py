"""Progress of runs and pre-training: bars on a terminal, plain lines elsewhere."""

import math
import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedomc_speech.report import megabytes
from fedomc_speech.settings import Settings, Variant

LINE_EVERY = 20.0  # seconds between plain lines
FIRST_STEPS = 10  # steps of a pre-training from which its duration is estimated


class RunProgress:
    """Shows the progress of a run, with a bar for each format; use it as a context manager.

    Args:
        settings: settings of the run.
        console: where to write.
        stop: set it to stop the run after the round that is under way.
    """

    def __init__(self, settings: Settings, console: Console, stop: threading.Event) -> None:
        self.settings = settings
        self.console = console
        self.stop = stop
        self._bars = Progress(
            TextColumn("[bold]{task.description:<16}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._word_error_rate: dict[str, float] = {}
        self._last_line = 0.0

    def __enter__(self) -> "RunProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, variant: Variant, first_round: int) -> None:
        """Add a bar for a format."""
        name = str(variant)
        self._tasks[name] = self._bars.add_task(name, total=self.settings.rounds, completed=first_round - 1, state="")

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        """Advance the bar of a format."""
        name = str(variant)
        if row["wer"] is not None:
            self._word_error_rate[name] = row["wer"]
        measured = self._word_error_rate.get(name)
        state = (
            f"{row['clients']} clients  loss {row['loss']:5.2f}  "
            f"WER {'  -  ' if measured is None else f'{measured:4.1f}%'}  "
            f"{megabytes(row['down_bytes'] + row['up_bytes'])}"
        )
        self._bars.update(self._tasks[name], completed=row["round"], state=state)
        now = time.monotonic()
        if not self.console.is_terminal and (
            now - self._last_line > LINE_EVERY or row["round"] == self.settings.rounds
        ):
            self._last_line = now
            left = (self.settings.rounds - row["round"]) * row["seconds"] / row["round"]
            self.console.print(
                f"{name}: round {row['round']}/{self.settings.rounds}  {state}  {left:.0f} s left", soft_wrap=True
            )

    def stop_requested(self) -> bool:
        """Return whether the run should stop before the next round."""
        return self.stop.is_set()


class PretrainingProgress:
    """Shows the progress of a pre-training, and after a few steps its expected duration; use it as a context manager.

    Args:
        steps: number of steps.
        console: where to write.
    """

    def __init__(self, steps: int, console: Console) -> None:
        self.steps = steps
        self.console = console
        self._bar = Progress(
            TextColumn("[bold]pretraining"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:5.2f}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, loss=math.nan)

    def __enter__(self) -> "PretrainingProgress":
        self._bar.start()
        self._began = self._last_line = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step_done(self, step: int, loss: float) -> None:
        """Advance the bar."""
        self._bar.update(self._task, completed=step, loss=loss)
        now = time.monotonic()
        left = (self.steps - step) * (now - self._began) / step
        if step == min(FIRST_STEPS, self.steps):
            self.console.print(f"{self.steps} steps will take about {minutes(left + now - self._began)}.")
        if not self.console.is_terminal and (now - self._last_line > LINE_EVERY or step == self.steps):
            self._last_line = now
            self.console.print(f"step {step}/{self.steps}  loss {loss:5.2f}  {left:.0f} s left", soft_wrap=True)


def minutes(seconds: float) -> str:
    """Format a duration in seconds or minutes."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
