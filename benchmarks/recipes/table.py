"""The rows of the matrix: differences to FP32, paired by seed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.recipes.design import Cell
from benchmarks.recipes.federation import FP32, mean
from benchmarks.recipes.tasks import task
from fedomc_speech.experiments.statistics import interval

LOST = 3.0
"""Points: a format that loses more must have warned."""

Found = Callable[[Cell, str, int], "dict[str, Any] | None"]
"""Returns the result of a cell, a format and a seed, or None."""


def rows(cells: Sequence[Cell], formats: Sequence[str], seeds: Sequence[int], found: Found) -> list[dict[str, Any]]:
    """Return a row for each cell and format of which at least one seed is there in FP32 and in the format.

    The interval is Student's, of the seeds' differences; it is None for one seed. Beside what was measured a row has
    ``warned``: how many of its runs gave a warning.
    """
    made = []
    for cell in cells:
        plain = {seed: result for seed in seeds if (result := found(cell, FP32, seed))}
        for format in formats:
            own = {seed: result for seed in plain if (result := found(cell, format, seed))}
            if own:
                made.append(_row(cell, format, own, {seed: plain[seed] for seed in own}))
    return made


def _row(cell: Cell, format: str, own: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> dict[str, Any]:
    difference = interval([own[seed]["score"] - plain[seed]["score"] for seed in own])
    kept = [result["step_kept"] for result in own.values() if result["step_kept"] is not None]
    held, _, sent = format.partition(">")
    results = list(own.values())
    return {
        "task": cell.task,
        "local": cell.local,
        "server": cell.server,
        "split": cell.split if cell.split == "iid" else task(cell.task).skew,
        "format": held,
        "uplink": sent or None,
        "seeds": list(own),
        "score": mean([result["score"] for result in results]),
        "score_fp32": mean([result["score"] for result in plain.values()]),
        "difference": difference.mean,
        "ci_low": None if math.isnan(difference.low) else difference.low,
        "ci_high": None if math.isnan(difference.high) else difference.high,
        **{
            name: mean([result[name] for result in results]) for name in ("memory_ratio", "down_ratio", "up_ratio")
        },
        "step_kept": mean(kept) if kept else None,
        "warned": sum(bool(result["warnings"]) for result in results),
    }  # fmt: skip


def pooled(made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each format: the mean of its differences over cells, each cell counting once.

    ``lost`` are the cells in which it loses more than 3 points, ``lost_silently`` those of them in which not every run
    warned, and ``false_alarms`` the cells with a warning in which it loses less than 1 point.
    """
    found = []
    for name in dict.fromkeys(format_of(row) for row in made):
        own = [row for row in made if format_of(row) == name]
        difference = interval([row["difference"] for row in own])
        lost = [row for row in own if row["difference"] < -LOST]
        found.append({
            "format": name,
            "cells": len(own),
            "difference": difference.mean,
            "ci_low": None if math.isnan(difference.low) else difference.low,
            "ci_high": None if math.isnan(difference.high) else difference.high,
            "worst": min(row["difference"] for row in own),
            "lost": len(lost),
            "lost_silently": sum(row["warned"] < len(row["seeds"]) for row in lost),
            "false_alarms": sum(bool(row["warned"]) and row["difference"] > -1 for row in own),
        })  # fmt: skip
    return found


def format_of(row: dict[str, Any]) -> str:
    """Return the policy string of a row."""
    return f"{row['format']}>{row['uplink']}" if row["uplink"] else str(row["format"])


def shown(made: Sequence[dict[str, Any]]) -> Table:
    """Return the rows for a terminal."""
    table = Table(
        "task", "local", "server", "split", "format", "seeds", "score", "to FP32", "95%", "held", "down", "up"
    )
    table.add_column("step kept")
    for row in made:
        cells = [row["task"], row["local"], row["server"], row["split"], format_of(row), str(len(row["seeds"]))]
        cells += [f"{row['score']:.1f}", f"{row['difference']:+.2f}", _range(row)]
        cells += [f"{100 * row[name]:.0f}%" for name in ("memory_ratio", "down_ratio", "up_ratio")]
        cells.append("" if row["step_kept"] is None else f"{100 * row['step_kept']:.0f}%")
        table.add_row(*cells, style="red" if row["difference"] < -LOST else None)
    return table


def shown_pooled(made: Sequence[dict[str, Any]]) -> Table:
    """Return the pooled rows for a terminal."""
    table = Table("format", "cells", "to FP32", "95% over cells", "worst cell", "lost", "silently", "false alarms")
    for row in made:
        counts = [str(row[name]) for name in ("lost", "lost_silently", "false_alarms")]
        difference = [f"{row['difference']:+.2f}", _range(row), f"{row['worst']:+.2f}"]
        table.add_row(row["format"], str(row["cells"]), *difference, *counts)
    return table


def markdown(made: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> str:
    """Return the pooled rows, and the differences of all cells by format, as two tables in Markdown."""
    lines = ["| format | cells | to FP32, points | 95% over cells | worst cell | cells that lose more than 3 |"]
    lines.append("|---|---|---|---|---|---|")
    for row in summary:
        lines.append(
            f"| {row['format']} | {row['cells']} | {row['difference']:+.2f} | {_range(row)} | {row['worst']:+.2f} "
            f"| {row['lost']} |"
        )
    formats = [row["format"] for row in summary]
    lines += ["", f"| cell | FP32 | {' | '.join(formats)} |", "|---|---|" + "---|" * len(formats)]
    for cell in dict.fromkeys((r["task"], r["local"], r["server"], r["split"]) for r in made):
        own = {format_of(r): r for r in made if (r["task"], r["local"], r["server"], r["split"]) == cell}
        score = next(iter(own.values()))["score_fp32"]
        cells = [f"{own[f]['difference']:+.2f} ({_range(own[f])})" if f in own else "" for f in formats]
        lines.append(f"| {', '.join(cell)} | {score:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(row: dict[str, Any]) -> str:
    return "" if row["ci_low"] is None else f"{row['ci_low']:+.1f} to {row['ci_high']:+.1f}"
