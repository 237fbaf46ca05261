"""What a run shows while it runs: a rich progress bar a format on a terminal, plain lines elsewhere."""

import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedomc_speech.report import megabytes
from fedomc_speech.settings import Settings, Variant

LINE_EVERY = 20.0  # seconds between plain lines


class RunProgress:
    """Watches a run; use it as a context manager.

    Args:
        settings: of the run.
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
        """Add a bar."""
        name = str(variant)
        self._tasks[name] = self._bars.add_task(name, total=self.settings.rounds, completed=first_round - 1, state="")

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        """Move the bar on."""
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
        """Tell whether to stop."""
        return self.stop.is_set()
