"""Whether a format trains as FP32 does in the recipes that people run: tasks, local work, servers and splits.

    python -m benchmarks.recipes [--only digits text] [--squares 2] [--formats S1E3M7 ...] [--seeds 0 1 2] [--jobs 2]

It says what it will cost, makes the runs that are missing in ``--folder``, and prints a row for each cell and format
with the difference to FP32 in points, paired by seed. Ctrl-C stops it, and the same command goes on. The learning rates
of cells that have none in ``tuning.json`` are chosen first, for FP32 on validation examples; ``--tune`` chooses all of
them again. ``--json`` writes ``{"rows", "pooled", "conditions"}``, ``--markdown`` the tables of
``docs/results/recipes.md``.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.recipes import table, tuning
from benchmarks.recipes.design import TASKS, cells
from benchmarks.recipes.federation import FP32
from benchmarks.recipes.running import Results, Run, code_digest, measured_seconds, run_all
from benchmarks.recipes.tasks import UnavailableError, task

FORMATS = (
    "S1E3M7@0.9", "S1E3M7", "S1E3M4", "S1E2M3",
    "S1E2M1+S1E3M0", "S1E2M3+S1E3M0", "S1E2M3+S1E2M3", "S1E4M3+S1E2M1", "S1E3M7+S1E3M0",
)  # fmt: skip
SEEDS = (0, 1, 2)


def main() -> None:
    """Make the runs that are missing, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="tasks")
    parser.add_argument("--squares", type=int, choices=(1, 2, 3, 4), default=1, help="four cells of each task for each")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="policy strings")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, each with one thread")
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"), help="of the results, a file for each run")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    parser.add_argument("--tune", action="store_true", help="choose all learning rates again, in FP32 on validation")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and show what there is")
    options = parser.parse_args()
    results, chosen = Results(options.folder), cells(available(options.only), options.squares)
    untuned = [cell for cell in chosen if options.tune or not tuning.is_tuned(cell)]
    if untuned and not options.dry_run:
        say(f"learning rates of {len(untuned)} cells, in FP32 on validation examples:")
        wanted = [one for cell in untuned for one in tuning.tried(cell)]
        if not run_all(wanted, results, options.jobs, measured_seconds(results, wanted, tuning.seconds_of), say):
            sys.exit(1)
        tuning.write(untuned, results)
    formats = [one for one in options.formats if one != FP32]
    try:
        runs = {
            (cell, format, seed): Run(cell, format, seed, tuning.rates_of(cell))
            for seed in options.seeds
            for cell in chosen
            for format in (FP32, *formats)
        }
    except tuning.NotTunedError as error:
        sys.exit(str(error))
    wanted = list(runs.values())
    expected = measured_seconds(results, wanted, tuning.seconds_of)
    complete = True
    if options.dry_run:
        seconds = sum(expected(one) for one in wanted if results.get(one) is None)
        say(f"about {seconds / options.jobs / 60:.0f} minutes with {options.jobs} processes are missing")
    else:
        complete = run_all(wanted, results, options.jobs, expected, say)
    rows = table.rows(chosen, formats, options.seeds, lambda *which: results.get(runs[which]))
    report(rows, options.json, options.markdown, [found for one in wanted if (found := results.get(one))])
    sys.exit(not complete)


def available(tasks: list[str]) -> list[str]:
    """Return the tasks that can run here, and say which cannot and why."""
    found = []
    for name in tasks:
        try:
            task(name).digest  # noqa: B018
            found.append(name)
        except UnavailableError as error:
            say(f"skipped: {error}")
    if not found:
        sys.exit("none of the tasks can run here")
    return found


def report(rows: list[dict], file: Path | None, text: Path | None, results: list[dict]) -> None:  # type: ignore[type-arg]
    """Print the rows, and write them if files are given."""
    pooled = table.pooled(rows)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table.shown(rows))
    console.print(table.shown_pooled(pooled))
    codes = sorted({result["code"] for result in results})
    if len(codes) > 1:
        say(
            f"the results are of {len(codes)} states of the code ({', '.join(codes)}); the code here is {code_digest()}"
        )
    if file:
        keys = ("fedomc", "torch", "version")
        conditions = {"code": codes, **{key: sorted({str(r["run"][key]) for r in results}) for key in keys}}
        conditions["data"] = {r["run"]["cell"]["task"]: r["run"]["data"] for r in results}  # type: ignore[assignment]
        file.write_text(json.dumps({"rows": rows, "pooled": pooled, "conditions": conditions}, indent=1) + "\n")
    if text:
        text.write_text(table.markdown(rows, pooled))


def say(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
