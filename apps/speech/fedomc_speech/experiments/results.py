"""The results of experiments: a JSON file for each, a summary of all, and the tables in ``README.md``."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedomc.serialization.atomic_file import replace_text
from fedomc_speech.errors import SettingsError
from fedomc_speech.experiments.plan import SUMMARY, VERSION, Experiment, Row, chosen
from fedomc_speech.experiments.runner import Runs
from fedomc_speech.experiments.statistics import bootstrap, interval
from fedomc_speech.settings import FP32

TEXT = "README.md"

_MARKED = "<!-- table: {} -->\n{}<!-- end -->"
_KEPT = ("wer", "wer_compressed", "parameter_ratio", "down_ratio", "up_ratio", "down_bytes", "up_bytes")


def gather(experiment: Experiment, runs: Runs, earlier: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Collect the results of an experiment; None if no run is finished together with its baseline.

    Args:
        experiment: the experiment.
        runs: the folder of its runs. A row has the seeds for which it and its baseline are finished.
        earlier: earlier results of the experiment. They are kept where there is no run, if settings and corpus are the
            same.
    """
    known = {}
    if earlier is not None and earlier.get("version") == VERSION:
        known = {_identity(row["name"], row["settings"]): row["runs"] for row in earlier["rows"]}
    rows = []
    for row in experiment.rows:
        settings = {key: value for key, value in row.settings.to_dict().items() if key not in ("corpus_path", "seed")}
        settings["initial"] = Path(row.settings.initial).name
        old = known.get(_identity(row.name, settings), [])
        found = {run["seed"]: run for run in old if run["seed"] in experiment.seeds}
        found |= _pairs(row, experiment.seeds, runs)
        if found:
            rows.append({"name": row.name, "settings": settings, "runs": [found[seed] for seed in sorted(found)]})
    if not rows:
        return None
    return {
        "version": VERSION,
        "experiment": experiment.name,
        "title": experiment.title,
        "paper": experiment.paper,
        "model": experiment.model,
        "pooled": experiment.pooled,
        "rows": rows,
    }


def check_corpora(folder: Path, experiments: Sequence[Experiment]) -> None:
    """Check that the results in a folder were made with the same corpora as these experiments.

    Raises:
        SettingsError: a corpus of the same name has another digest, so that one table would mix the two.
    """
    known = {gathered["experiment"]: gathered for gathered in read_all(folder)}
    for experiment in experiments:
        digests = {row.settings.corpus: row.settings.corpus_digest for row in experiment.rows}
        for row in known.get(experiment.name, {"rows": ()})["rows"]:
            name, digest = row["settings"]["corpus"], row["settings"].get("corpus_digest", "")
            if name in digests and digest != digests[name]:
                raise SettingsError(
                    f"{folder / experiment.name}.json was made with another corpus {name}: the digest of its lists and "
                    f"transcriptions is {digest!r}, yours is {digests[name]!r}. Choose another folder for the tables "
                    "with --results"
                )


def _identity(name: str, settings: dict[str, Any]) -> str:
    """Return a string that identifies a row; settings at their defaults do not count."""
    return json.dumps([name, chosen(settings)], sort_keys=True)


def _pairs(row: Row, seeds: Iterable[int], runs: Runs) -> dict[int, dict[str, Any]]:
    found = {}
    for seed in seeds:
        own, baseline = (runs.result(one) for one in (row.run(seed), replace(row.baseline, seed=seed)))
        if own is not None and baseline is not None:
            found[seed] = {"seed": seed, **_shortened(own), "baseline": _shortened(baseline)}
    return found


def _shortened(run: dict[str, Any]) -> dict[str, Any]:
    measured = [row for row in run["history"] if row["wer"] is not None]
    return {
        **{key: run[key] for key in _KEPT},
        "utterances": run["utterances"],
        "history": [[row["round"], row["wer"], row["down_bytes"] + row["up_bytes"]] for row in measured],
        "variables": {
            name: row["compression-error"] for name, row in run["variables"].items() if "compression-error" in row
        },
    }


def summarize(gathered: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the summary: rates in percent, differences to FP32 of the same seed in percentage points."""
    rows = []
    for row in gathered["rows"]:
        runs, settings = row["runs"], row["settings"]
        over_seeds = interval(_differences_of(runs, "wer"))
        packed = interval(_differences_of(runs, "wer_compressed"))
        over_utterances = bootstrap(
            [run["utterances"]["errors"] for run in runs],
            [run["baseline"]["utterances"]["errors"] for run in runs],
            runs[0]["utterances"]["words"],
        )
        format, _, fraction = settings["formats"][0].partition("@")
        rows.append(
            {
                "experiment": gathered["experiment"],
                "row": row["name"],
                "model": gathered["model"],
                "split": settings["split"],
                "format": format,
                "fraction": float(fraction or 1),
                "seeds": [run["seed"] for run in runs],
                "wer": _mean(run["wer"] for run in runs),
                "wer_compressed": _mean(run["wer_compressed"] for run in runs),
                "wer_fp32": _mean(run["baseline"]["wer"] for run in runs),
                "difference": over_seeds.mean,
                "ci_low": _finite(over_seeds.low),
                "ci_high": _finite(over_seeds.high),
                "bootstrap_low": over_utterances.low,
                "bootstrap_high": over_utterances.high,
                "difference_compressed": packed.mean,
                "ci_low_compressed": _finite(packed.low),
                "ci_high_compressed": _finite(packed.high),
                "memory_ratio": _mean(run["parameter_ratio"] for run in runs),
                "down_ratio": _mean(run["down_ratio"] for run in runs),
                "up_ratio": _mean(run["up_ratio"] for run in runs),
            }
        )
    return rows


def pool(all_gathered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean difference of each row over all seeds of the pooled experiments."""
    runs: dict[str, list[dict[str, Any]]] = {}
    experiments: dict[str, list[str]] = {}
    for gathered in all_gathered:
        for row in gathered["rows"] if gathered["pooled"] else ():
            if row["settings"]["formats"] != [FP32]:
                runs.setdefault(row["name"], []).extend(row["runs"])
                experiments.setdefault(row["name"], []).append(gathered["experiment"])
    rows = []
    for name, paired in runs.items():
        found, packed = (interval(_differences_of(paired, key)) for key in ("wer", "wer_compressed"))
        rows.append(
            {
                "row": name,
                "experiments": experiments[name],
                "runs": len(paired),
                "difference": found.mean,
                "ci_low": _finite(found.low),
                "ci_high": _finite(found.high),
                "difference_compressed": packed.mean,
                "ci_low_compressed": _finite(packed.low),
                "ci_high_compressed": _finite(packed.high),
            }
        )
    return rows


def _differences_of(runs: Iterable[dict[str, Any]], key: str) -> list[float]:
    """Return the difference of each run to the FP32 run of the same seed, whose model has no packed copy."""
    return [run[key] - run["baseline"]["wer"] for run in runs]


def write(folder: Path, experiments: Sequence[Experiment], runs: Runs) -> list[dict[str, Any]]:
    """Write the results of experiments to a folder, and return the rows of the summary.

    Each experiment has a JSON file; results of other experiments in the folder stay. ``summary.json`` and the tables
    between the marks in ``README.md`` are made from all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {gathered["experiment"]: gathered for gathered in read_all(folder)}
    for experiment in experiments:
        found = gather(experiment, runs, there.get(experiment.name))
        if found is not None:
            replace_text(folder / f"{experiment.name}.json", json.dumps(found, indent=None) + "\n")
    return rewrite(folder)


def rewrite(folder: Path) -> list[dict[str, Any]]:
    """Write summary and tables from the experiments' JSON files in a folder, and return the rows of the summary."""
    everything = read_all(folder)
    rows = [row for gathered in everything for row in summarize(gathered)]
    replace_text(folder / f"{SUMMARY}.json", json.dumps(rows, indent=2) + "\n")
    text = folder / TEXT
    if text.exists():
        tables = {gathered["experiment"]: table(summarize(gathered)) for gathered in everything}
        tables["pooled"] = pooled_table(pool(everything))
        replace_text(text, with_tables(text.read_text(encoding="utf-8"), tables))
    return rows


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Read the experiments' JSON files in a folder; other tables there, such as the summary, name no experiment.

    Raises:
        SettingsError: a file is damaged.
    """
    everything = []
    for path in sorted(folder.glob("*.json")):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if "experiment" not in stored:
                continue
            summarize(stored)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise SettingsError(f"{path} is damaged ({error!r}): delete it, and run the experiment again") from None
        everything.append(stored)
    return everything


def with_tables(text: str, tables: dict[str, str]) -> str:
    """Return a text with each table between marks replaced, where its name is known."""

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        return _MARKED.format(name, tables[name]) if name in tables else match[0]

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of an experiment as a Markdown table."""
    lines = [
        "| | seeds | WER | packed | to FP32, points | 95% over seeds | 95% over utterances | memory | down | up |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        is_baseline = row["format"] == FP32
        name = row["row"] if not is_baseline else f"**{row['row']}**"
        cells = [
            name,
            str(len(row["seeds"])),
            f"{row['wer']:.1f}%",
            "" if is_baseline else f"{row['wer_compressed']:.1f}%",
            *(["", "", ""] if is_baseline else _differences(row)),
            *(f"{100 * row[f'{what}_ratio']:.3g}%" for what in ("memory", "down", "up")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pooled_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the pooled differences as a Markdown table."""
    lines = [
        "| | experiments | pairs of runs | to FP32, points | 95% | packed, to FP32 | 95% |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["row"], str(len(row["experiments"])), str(row["runs"])]
        for packed in ("", "_compressed"):
            cells += [f"{row[f'difference{packed}']:+.2f}", _range(row, packed)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _differences(row: dict[str, Any]) -> list[str]:
    resampled = f"{row['bootstrap_low']:+.1f} to {row['bootstrap_high']:+.1f}"
    return [f"{row['difference']:+.2f}", _range(row), resampled]


def _range(row: dict[str, Any], packed: str = "") -> str:
    low, high = row[f"ci_low{packed}"], row[f"ci_high{packed}"]
    return "" if low is None else f"{low:+.1f} to {high:+.1f}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
