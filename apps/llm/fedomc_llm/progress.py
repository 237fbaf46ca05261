"""Progress of pretraining and runs: bars on a terminal, plain lines elsewhere."""

import threading
from typing import Any

from rich.console import Console

from fedomc.cli.application import ProgressBars, megabytes
from fedomc_llm.settings import Variant
from fedomc_llm.training import perplexity


class RunProgress(ProgressBars):
    """Shows bars for the pretraining and for each variant; use it as a context manager.

    Args:
        rounds: of each variant.
        console: where to write.
        stop: is set when the run should stop.
    """

    def __init__(self, rounds: int, console: Console, stop: threading.Event) -> None:
        super().__init__(console, width=28)
        self.rounds, self.stop = rounds, stop
        self._sent: dict[str, int] = {}

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
        self.show(name, done, total, state, f"{name}: {done}/{total}  {state}")
