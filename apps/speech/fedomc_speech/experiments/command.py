"""The command ``experiments``: announce the cost, run what is missing, and write the results."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedomc.cli.application import minutes
from fedomc_speech.cost import Cost, cost_of
from fedomc_speech.experiments import figures, results
from fedomc_speech.experiments.plan import SUMMARY, Experiment, Initial, key_of
from fedomc_speech.experiments.runner import Runs, run_all
from fedomc_speech.settings import FP32, Settings

VISIT_SECONDS, ROUND_SECONDS = 0.017, 0.12
"""The seconds that a visit takes besides its steps, and a round besides its visits, with the tiny model."""


def run(
    experiments: Sequence[Experiment],
    rows: Sequence[str],
    seeds: Sequence[int],
    runs: Runs,
    folder: Path,
    workers: int,
    console: Console,
    stop: threading.Event,
    *,
    further: bool = True,
) -> bool:
    """Run experiments and write the results to a folder; earlier results of other rows and seeds are kept.

    Args:
        experiments: the experiments to run.
        rows: names of the rows to run; empty means all.
        seeds: the seeds to run; empty means all.
        runs: the folder of the runs.
        folder: the folder for tables and figures.
        workers: number of runs at the same time.
        console: where to write progress.
        stop: set it to stop after the round that is under way.
        further: whether "all" rows include the further ones.

    Returns:
        False if it was stopped before the end.

    Raises:
        SettingsError: the folder holds results that were made with other corpora.
        ExperimentError: runs failed, or another process runs experiments in the same folder.
    """
    results.check_corpora(folder, experiments)
    wanted = _in_order([experiment.only(rows, seeds, further=further) for experiment in experiments])
    initials = list({e.initial.name: e.initial for e in experiments if e.initial}.values())
    console.print(_announce(wanted, runs, workers, initials), soft_wrap=True)
    try:
        return run_all(wanted, runs, workers, console, stop, initials)
    finally:
        written = results.write(folder, experiments, runs)
        figures.draw_all(folder / "figures", results.read_all(folder))
        console.print(f"{len(written)} rows in {folder / SUMMARY}.json")


def _in_order(experiments: Sequence[Experiment]) -> list[Settings]:
    """List the runs seed by seed, so that someone who stops early has some of every experiment."""
    listed = {
        key_of(one): (experiment.seeds.index(one.seed), one) for experiment in experiments for one in experiment.runs()
    }
    return [one for _, one in sorted(listed.values(), key=lambda pair: pair[0])]


def _announce(wanted: Sequence[Settings], runs: Runs, workers: int, initials: Sequence[Initial]) -> str:
    """Describe what is left to run and what that will take, estimated from one local step of each kind."""
    missing = [one for one in wanted if runs.result(one) is None]
    needed = {one.initial for one in missing if one.initial and not Path(one.initial).exists()}
    untrained = [initial for initial in initials if initial.name in {Path(path).name for path in needed}]
    known: dict[tuple[Any, ...], Cost] = {}
    seconds, sent = 0.0, 0.0
    for one in missing:
        kind = (one.corpus, one.corpus_path, one.model, one.streaming, one.batch, one.augment, one.formats)
        if kind not in known:
            known[kind] = cost_of(replace(one, initial=""), one.variants[0])
        left = one.rounds - runs.rounds(one)
        visit = one.local_steps * known[kind].step_seconds + VISIT_SECONDS
        seconds += left * (one.cohort * visit + ROUND_SECONDS)
        sent += left * one.cohort * known[kind].visit_bytes
    for initial in untrained:
        start = replace(initial.start, formats=(FP32,), batch=initial.training.batch)
        seconds += initial.training.steps * cost_of(start, start.variants[0]).step_seconds
    training = f"{len(untrained)} initial models will be trained first. " if untrained else ""
    return (
        f"{len(wanted) - len(missing)} of {len(wanted)} runs are finished. {training}The others will send about "
        f"{sent / 1e9:.1f} GB of messages within this machine and take about {minutes(seconds / workers)} with "
        f"{workers} at a time, not counting measurements of the word error rate. Ctrl-C stops after the round; an "
        "initial model that is being trained is lost. The same command continues."
    )
