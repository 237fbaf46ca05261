"""The learning rates of each cell, chosen in FP32 on validation examples and used as they are for all formats.

``tuning.json`` has all that were tried, with their scores. With FedAdam the server's rate is chosen, and the clients'
is the middle one of the task; otherwise the clients' rate is chosen. One seed, which no measured run has.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.recipes.design import Cell
from benchmarks.recipes.federation import FP32, Rates, mean
from benchmarks.recipes.running import Results, Run
from benchmarks.recipes.tasks import Task, task

TABLE = Path(__file__).with_name("tuning.json")
SEED = 1000
MOMENTUM_SHARE = 0.3
"""Of the task's rates, with FedAvgM: its momentum makes the steps larger."""


class NotTunedError(Exception):
    """There are no rates for a cell."""


def tried(cell: Cell) -> list[Run]:
    """Return the runs that choose the rates of a cell."""
    return [Run(cell, FP32, SEED, rates, part="validation") for rates in _grid(task(cell.task), cell)]


def _grid(own: Task, cell: Cell) -> list[Rates]:
    clients = own.rates[cell.local]
    if cell.server == "FedAdam":
        return [Rates(clients[len(clients) // 2], rate) for rate in own.server_rates]
    share = MOMENTUM_SHARE if cell.server == "FedAvgM" else 1.0
    return [Rates(share * rate) for rate in clients]


def write(cells: Sequence[Cell], results: Results) -> None:
    """Write the scores of cells into the table; those of other cells stay."""
    table = {row["cell"]: row for row in _read()}
    for cell in cells:
        scores, seconds = [], []
        for one in tried(cell):
            found = results.get(one)
            if found is None:
                raise NotTunedError(f"{cell}: the run with {one.rates} is missing")
            seconds.append(found["seconds"])
            score = round(found["score"], 2)
            scores.append({"client": one.rates.client, "server": one.rates.server, "score": score})
        best = max(scores, key=lambda row: row["score"])
        table[str(cell)] = {
            "cell": str(cell), "client": best["client"], "server": best["server"],
            "seconds": round(mean(seconds), 1), "data": task(cell.task).digest, "tried": scores,
        }  # fmt: skip
    lines = ",\n".join(json.dumps(table[name]) for name in sorted(table))
    TABLE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def is_tuned(cell: Cell) -> bool:
    """Return whether rates were chosen for a cell."""
    return any(row["cell"] == str(cell) for row in _read())


def rates_of(cell: Cell) -> Rates:
    """Return the rates that were chosen for a cell.

    Raises:
        NotTunedError: none were.
    """
    row = _row(cell)
    return Rates(row["client"], row["server"])


def seconds_of(one: Run) -> float:
    """Return the seconds that the runs of a cell took while its rates were chosen; those with a format take longer."""
    try:
        plain = float(_row(one.cell)["seconds"])
    except NotTunedError:
        return 15.0
    return plain if one.format == FP32 else 1.6 * plain


def _row(cell: Cell) -> dict[str, Any]:
    for row in _read():
        if row["cell"] == str(cell):
            return row
    raise NotTunedError(f"{cell} has no learning rates in {TABLE.name} yet: without --dry-run they are chosen first")


def _read() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else []
