"""The command ``experiments``: say what it will cost, run what is missing, write the results."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedomc_speech.cost import Cost, cost_of, minutes
from fedomc_speech.experiments import figures, results
from fedomc_speech.experiments.plan import Experiment, key_of
from fedomc_speech.experiments.runner import Runs, run_all
from fedomc_speech.settings import Settings

IN_PROCESS_SECONDS = 0.12
"""What a round takes besides the clients, with the tiny model."""


def run(
    experiments: Sequence[Experiment], runs: Runs, folder: Path, workers: int, console: Console, stop: threading.Event
) -> bool:
    """Run experiments and write what is known to ``folder``; False if it was stopped before the end."""
    wanted = _in_order(experiments)
    console.print(_announce(wanted, runs, workers), soft_wrap=True)
    done = run_all(wanted, runs, workers, console, stop)
    rows = results.write(folder, experiments, runs)
    figures.draw_all(folder / "figures", results.read_all(folder))
    console.print(f"{len(rows)} rows in {folder / results.SUMMARY}")
    return done


def _in_order(experiments: Sequence[Experiment]) -> list[Settings]:
    """Take the first seed of everything first: whoever stops early has a bit of all."""
    listed = {
        key_of(one): (experiment.seeds.index(one.seed), one) for experiment in experiments for one in experiment.runs()
    }
    return [one for _, one in sorted(listed.values(), key=lambda pair: pair[0])]


def _announce(wanted: Sequence[Settings], runs: Runs, workers: int) -> str:
    """Say how much is left and what it takes, from one local step of each kind."""
    missing = [one for one in wanted if runs.result(one) is None]
    known: dict[tuple[Any, ...], Cost] = {}
    seconds, sent = 0.0, 0.0
    for one in missing:
        kind = (one.corpus, one.corpus_path, one.model, one.batch, one.formats)
        if kind not in known:
            known[kind] = cost_of(one, one.variants[0])
        left = one.rounds - runs.rounds(one)
        seconds += left * (one.cohort * one.local_steps * known[kind].step_seconds + IN_PROCESS_SECONDS)
        sent += left * one.cohort * known[kind].visit_bytes
    return (
        f"{len(wanted) - len(missing)} of {len(wanted)} runs are there. The others send about {sent / 1e9:.1f} GB of "
        f"messages within this machine and take about {minutes(seconds / workers)} with {workers} at a time. "
        "Ctrl-C stops after the round; the same command goes on."
    )
