"""The results of a run: a table for the terminal, and one HTML file that opens without a network."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedomc.cli.application import megabytes, print_whole
from fedomc.serialization.atomic_file import replace_text
from fedomc_llm.run_folder import REPORT
from fedomc_llm.settings import Settings
from fedomc_llm.training import perplexity

_COLUMNS = ("variant", "perplexity", "worst client", "memory", "down", "up")
_CAPTION = (
    "Perplexity of a token of the clients' held-out texts, before and after; worst client: after. Memory: a client's "
    "parameters and optimizer state while it trains. Down, up: bytes of the arrays that a client receives and sends in "
    "a round. The factor is to the model's parameters in FP32."
)
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem; border: 1px solid #8886; border-radius: .4rem; }
.note { opacity: .75; overflow-wrap: anywhere; }
"""


def print_table(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """Print the results of a run; in a pipe or a file, as wide as they are."""
    made = Table(title="Federated fine-tuning", caption=_CAPTION, caption_justify="left")
    for i, column in enumerate(_COLUMNS):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for run in runs:
        made.add_row(*_cells(run))
    print_whole(console, made)


def write_report(folder: Path, settings: Settings, runs: Sequence[dict[str, Any]]) -> Path:
    """Write ``report.html`` with the results, the losses by client and by round, and the samples; return its path."""
    chosen = ", ".join(f"{key}={value}" for key, value in settings.to_dict().items() if value not in ("", 0, False))
    sections = [
        f"<h1>Federated fine-tuning of a language model</h1>{_table(_COLUMNS, map(_cells, runs))}",
        f'<p class="note">{html.escape(_CAPTION)}</p>',
        f"<h2>Perplexity by client</h2>{_by_client(runs)}",
        f"<h2>Perplexity by round</h2>{_by_round(runs)}",
        f"<h2>Samples</h2>{''.join(map(_samples, runs))}",
        f'<p class="note">Settings: {html.escape(chosen)}</p>',
    ]
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fedomc: federated fine-tuning</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body>{"".join(sections)}</body></html>
"""
    path = folder / REPORT
    replace_text(path, text)
    return path


def _cells(run: dict[str, Any]) -> list[str]:
    worst = max(run["after"]["clients"].items(), key=lambda item: item[1])
    return [
        run["variant"],
        f"{run['before']['perplexity']:.2f} to {run['after']['perplexity']:.2f}",
        f"{worst[0]}: {perplexity(worst[1]):.2f}",
        *(f"{megabytes(run[f'{what}_bytes'])} ({run[f'{what}_ratio']:.3g}x)" for what in ("held", "down", "up")),
    ]


def _by_client(runs: Sequence[dict[str, Any]]) -> str:
    names = sorted({name for run in runs for name in run["after"]["clients"]})
    columns = ["client", *(f"{run['variant']}, {when}" for run in runs for when in ("before", "after"))]

    def cell(losses: dict[str, float], name: str) -> str:
        return f"{perplexity(losses[name]):.2f}" if name in losses else ""

    rows = ([n, *(cell(run[when]["clients"], n) for run in runs for when in ("before", "after"))] for n in names)
    return _table(columns, rows)


def _by_round(runs: Sequence[dict[str, Any]]) -> str:
    rounds = max((len(run["history"]) for run in runs), default=0)
    columns = ["round", *(run["variant"] for run in runs)]
    curves = [[run["before"]["loss"], *(row["loss"] for row in run["history"])] for run in runs]
    rows = ([str(i), *(f"{perplexity(c[i]):.2f}" if i < len(c) else "" for c in curves)] for i in range(rounds + 1))
    return _table(columns, rows)


def _samples(run: dict[str, Any]) -> str:
    both = "".join(f"<p>{when}</p><pre>{html.escape(text)}</pre>" for when, text in run["samples"].items())
    return f"<h3>{html.escape(run['variant'])}</h3>{both}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
