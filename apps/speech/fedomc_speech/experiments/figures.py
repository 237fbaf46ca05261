"""The figures of the results, drawn from the experiments' JSON files; each as PNG and SVG."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fedomc_speech.experiments.results import summarize
from fedomc_speech.settings import FP32

KINDS = ("png", "svg")
_STYLE: Any = {"svg.hashsalt": "fedomc", "svg.fonttype": "path", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def draw_all(folder: Path, everything: Sequence[dict[str, Any]]) -> list[Path]:
    """Draw the figures of each experiment into a folder, and return the paths of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with rc_context(_STYLE):
        for gathered in everything:
            name = gathered["experiment"]
            made += _save(_curves(gathered), folder / f"{name}-curves")
            made += _save(_errors_by_layer(gathered), folder / f"{name}-layers")
            made += _save(_differences(gathered), folder / f"{name}-differences")
            made += _save(_front(gathered), folder / f"{name}-front")
    return made


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points, sorted by the first coordinate; smaller is better in both."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def _save(figure: Figure | None, path: Path) -> list[Path]:
    if figure is None:
        return []
    made = [path.with_name(f"{path.name}.{kind}") for kind in KINDS]
    for file in made:
        figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None})
    return made


def _axes(columns: int, title: str, height: float = 3.6, width: float = 4.8) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    figure.suptitle(title, wrap=True)
    found = figure.subplots(1, columns, squeeze=False)
    return figure, list(found[0])


def _logarithmic(axes: Axes, ticks: Sequence[float]) -> None:
    """Make the x axis logarithmic, with the given ticks."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _curves(gathered: dict[str, Any]) -> Figure:
    """Draw word error rate by round and by bytes sent: the mean over seeds, and their range."""
    figure, (by_round, by_bytes) = _axes(2, gathered["title"])
    for row in gathered["rows"]:
        histories = np.array([run["history"] for run in row["runs"]], dtype=float)  # [seeds, points, 3]
        rounds, sent = histories[0, :, 0], histories[:, :, 2].mean(0) / 1e9
        rates = histories[:, :, 1]
        for axes, x in ((by_round, rounds), (by_bytes, sent)):
            (line,) = axes.plot(x, rates.mean(0), label=row["name"], linewidth=1.2)
            axes.fill_between(x, rates.min(0), rates.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
    by_round.set(xlabel="round", ylabel="word error rate, %", ylim=(0, 100))
    by_bytes.set(xlabel="GB sent, down and up, all clients", ylim=(0, 100), xscale="log")
    by_round.legend(fontsize=7)
    return figure


def _errors_by_layer(gathered: dict[str, Any]) -> Figure | None:
    """Draw the error of each variable in the last round's broadcast, relative to the variable."""
    rows = [row for row in gathered["rows"] if row["runs"][0]["variables"]]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["runs"][0]["variables"]))
    figure, (axes,) = _axes(1, f"{gathered['title']}: error of the last broadcast by variable", 0.14 * len(names) + 1.5)
    for row in rows:
        found: dict[str, list[float]] = defaultdict(list)
        for run in row["runs"]:
            for name, error in run["variables"].items():
                found[name].append(error)
        at = [i for i, name in enumerate(names) if found[name]]
        axes.plot([100 * np.mean(found[names[i]]) for i in at], at, ".", label=row["name"])
    axes.set(xlabel="root mean square, % of the variable's")
    _logarithmic(axes, (0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100))
    axes.set_yticks(range(len(names)), [name.removeprefix("encoder.") for name in names], fontsize=5)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    return figure


def _differences(gathered: dict[str, Any]) -> Figure | None:
    """Draw each row's difference to FP32, with the interval over seeds."""
    rows = [row for row in summarize(gathered) if row["format"] != FP32]
    if not rows:
        return None
    figure, (axes,) = _axes(1, f"{gathered['title']}: difference to FP32", 0.25 * len(rows) + 1.3)
    for i, row in enumerate(rows):
        if row["ci_low"] is not None:
            axes.plot([row["ci_low"], row["ci_high"]], [i, i], color="C0", alpha=0.5, linewidth=3)
        axes.plot(row["difference"], i, "o", color="C0")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
    if any(abs(row["difference"]) > 20 for row in rows):
        _by_tens(axes)
    figure.supxlabel("word error rate, percent points; bars: 95% over seeds", fontsize="medium")
    axes.invert_yaxis()
    return figure


def _by_tens(axes: Axes) -> None:
    """Stretch the x axis near zero, where small differences would vanish beside much larger ones."""
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xticks([-10, -5, 0, 5, 10, 20, 50, 100], ["-10", "-5", "0", "5", "10", "20", "50", "100"])
    axes.minorticks_off()


def _label_beside(axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write the labels one above the other at the right, each with a line to its point, as the points lie close."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0]))
    low, high = axes.get_ylim()
    for i, at in zip(order, spread([(points[i][1] - low) / (high - low) for i in order], 0.045), strict=True):
        axes.annotate(
            labels[i], points[i], fontsize=6, xytext=(1.04, at), textcoords="axes fraction", va="center",
            arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.4, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places up, as little as possible, so that each is at least ``gap`` above the one before."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    return moved


def _front(gathered: dict[str, Any]) -> Figure | None:
    """Draw word error rate against bytes held and sent, and the Pareto front."""
    rows = summarize(gathered)
    if len(rows) < 4:
        return None
    figure, panels = _axes(2, f"{gathered['title']}: word error rate against bytes", 4.4, 6.4)
    costs = ("memory_ratio",), ("down_ratio", "up_ratio")
    for axes, keys in zip(panels, costs, strict=True):
        points = [(100 * sum(row[key] for key in keys) / len(keys), row["wer"]) for row in rows]
        front = pareto(points)
        axes.plot([points[i][0] for i in front], [points[i][1] for i in front], color="C1", linewidth=1)
        for i, point in enumerate(points):
            axes.plot(*point, "o", color="C1" if i in front else "C0", markersize=4)
        _logarithmic(axes, (5, 7, 10, 14, 20, 30, 40, 60, 80, 100))
        _label_beside(axes, points, [row["row"] for row in rows])
    panels[0].set(xlabel="bytes of a client's parameters, % of FP32", ylabel="word error rate, %")
    panels[1].set(xlabel="bytes sent, mean of down and up, % of FP32")
    return figure
