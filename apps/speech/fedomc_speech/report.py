"""The results of a run: a table for the terminal, and one HTML file that opens without a network."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedomc.cli.application import megabytes, print_whole
from fedomc.serialization.atomic_file import replace_text
from fedomc_speech.run_folder import REPORT
from fedomc_speech.settings import Settings

_COLUMNS = ("format", "WER", "packed", "memory", "down", "up", "rounds / min")
_CAPTION = (
    "WER: word error rate of the server's model on speakers that no client has; packed: the same of its copy with all "
    "matrices in the (base) format. Memory: bytes of a client's parameters while they train. "
    "Down, up: bytes of the arrays that a client receives and sends in a round. Percentages are of FP32."
)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
th:first-child, caption { text-align: left; }
figure { margin: 1.5rem 0; background: #fff; border-radius: .5rem; }
svg { width: 100%; min-width: 40rem; height: auto; }
.note { opacity: .75; overflow-wrap: anywhere; }
"""


def print_table(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """Print the results of a run; in a pipe or a file, as wide as they are."""
    print_whole(console, table(runs))


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Return the table of a run's results for the terminal."""
    made = Table(title="Federated speech recognition", caption=_CAPTION, caption_justify="left")
    for i, column in enumerate(_COLUMNS):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for run in runs:
        made.add_row(*_cells(run))
    return made


def write_report(folder: Path, settings: Settings, runs: Sequence[dict[str, Any]]) -> Path:
    """Write ``report.html`` with the table and the curves of word error rate, and return its path."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in _COLUMNS)
    rows = "".join(_row(_cells(run)) for run in runs)
    left_out = {"formats"} | ({"clients"} if settings.clients == 0 else set())  # 0 stands for one client a speaker
    given = {key: value for key, value in settings.to_dict().items() if key not in left_out and value != ""}
    chosen = ", ".join(f"{key}={value}" for key, value in given.items())
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fedomc: federated speech recognition</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body><main><h1>Federated speech recognition with compressed parameters</h1>
<div class="wide" tabindex="0" role="region" aria-label="Results"><table aria-describedby="columns">
<caption>Results by format</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
<p class="note" id="columns">{html.escape(_CAPTION)}</p>
<figure class="wide" tabindex="0" role="region" aria-label="Curves">{_figure(runs)}</figure>
<p class="note">Settings: {html.escape(chosen)}</p></main></body></html>
"""
    path = folder / REPORT
    replace_text(path, text)
    return path


def _row(cells: Sequence[str]) -> str:
    first, *others = (html.escape(cell) for cell in cells)
    return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"


def _cells(run: dict[str, Any]) -> list[str]:
    name = run["variant"] if run["finished"] else f"{run['variant']} to round {run['rounds']}"
    return [
        name,
        f"{run['wer']:.1f}%",
        f"{run['wer_compressed']:.1f}%",
        *(
            f"{megabytes(run[f'{what}_bytes'])} ({100 * run[f'{what}_ratio']:.3g}%)"
            for what in ("parameter", "down", "up")
        ),
        f"{run['rounds_per_minute']:.0f}",
    ]


def _figure(runs: Sequence[dict[str, Any]]) -> str:
    """Draw word error rate by round and by bytes sent, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        rows = [row for row in run["history"] if row["wer"] is not None]
        rates = [row["wer"] for row in rows]
        by_round.plot([row["round"] for row in rows], rates, marker=".", label=run["variant"])
        by_bytes.plot([(row["down_bytes"] + row["up_bytes"]) / 1e9 for row in rows], rates, marker=".")
    by_round.set(xlabel="round", ylabel="word error rate, %", ylim=(0, None))
    by_bytes.set(xlabel="GB sent, down and up, all clients")
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
    if runs:
        by_round.legend()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    named = '<svg role="img" aria-label="Word error rate by round, and by gigabytes sent"'
    return named + svg[svg.index("<svg") + len("<svg") :]
