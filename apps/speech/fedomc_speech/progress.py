"""Progress of runs and pre-training: bars on a terminal, plain lines elsewhere."""

import threading
import time
from typing import Any, Self

from rich.console import Console

from fedomc.cli.application import ProgressBars, megabytes, minutes
from fedomc_speech.settings import Settings, Variant

FIRST_STEPS = 10  # steps of a pre-training from which its duration is estimated


class RunProgress(ProgressBars):
    """Shows the progress of a run, with a bar for each format; use it as a context manager.

    Args:
        settings: settings of the run.
        console: where to write.
        stop: set it to stop the run after the round that is under way.
    """

    def __init__(self, settings: Settings, console: Console, stop: threading.Event) -> None:
        super().__init__(console, width=16)
        self.settings = settings
        self.stop = stop
        self._word_error_rate: dict[str, float] = {}

    def started(self, variant: Variant, first_round: int) -> None:
        """Add a bar for a format."""
        self.show(str(variant), first_round - 1, self.settings.rounds, "")

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        """Advance the bar of a format."""
        name, done, total = str(variant), row["round"], self.settings.rounds
        if row["wer"] is not None:
            self._word_error_rate[name] = row["wer"]
        measured = self._word_error_rate.get(name)
        state = (
            f"{row['clients']} clients  loss {row['loss']:5.2f}  "
            f"WER {'  -  ' if measured is None else f'{measured:4.1f}%'}  "
            f"{megabytes(row['down_bytes'] + row['up_bytes'])}"
        )
        left = (total - done) * row["seconds"] / done
        self.show(name, done, total, state, f"{name}: round {done}/{total}  {state}  {left:.0f} s left")

    def stop_requested(self) -> bool:
        """Return whether the run should stop before the next round."""
        return self.stop.is_set()


class PretrainingProgress(ProgressBars):
    """Shows the progress of a pre-training, and after a few steps its expected duration; use it as a context manager.

    Args:
        steps: number of steps.
        console: where to write.
    """

    def __init__(self, steps: int, console: Console) -> None:
        super().__init__(console, width=11)
        self.steps = steps

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        self.show("pretraining", 0, self.steps, "")
        return super().__enter__()

    def step_done(self, step: int, loss: float) -> None:
        """Advance the bar."""
        passed = time.monotonic() - self._began
        left = (self.steps - step) * passed / step
        if step == min(FIRST_STEPS, self.steps):
            self.console.print(f"{self.steps} steps will take about {minutes(left + passed)}.")
        state = f"loss {loss:5.2f}"
        self.show("pretraining", step, self.steps, state, f"step {step}/{self.steps}  {state}  {left:.0f} s left")
