"""What it takes to start: time and memory of ``import fedomc`` and of a client's process before it has a model.

    python -m benchmarks.startup [--json out.json] [--rounds 5]

Each statement runs in a process of its own, again in every round. Rows ``{statement, seconds, peak_rss_bytes,
modules, time_ratio, memory_ratio}``: processor time of the process and its peak of memory, medians over the rounds, and
the medians of their ratios to those of ``import torch`` in the same round. What is not installed is named and left out.
The processor's name is in the file.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedomc._torch import processor_name

STATEMENTS = {
    "import torch": "what everything here needs",
    "import fedomc": "the library",
    "import flwr.clientapp": "Flower's part of a client",
    "import fedomc.flower": "the library and Flower",
    "from transformers import ParakeetForCTC": "the class of the model in speech recognition",
    "import fedomc_speech.client": "the process of a client in speech recognition",
}
PROBE = """
import json, resource, sys
{statement}
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, len(sys.modules)]))
"""


def main() -> None:
    """Start the processes in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=5, help="how often each statement runs")
    options = parser.parse_args()
    runs: dict[str, list[Any]] = {statement: [] for statement in STATEMENTS}
    for _ in range(options.rounds):
        for statement, found in runs.items():
            done = subprocess.run(  # noqa: S603
                [sys.executable, "-c", PROBE.format(statement=statement)], capture_output=True, text=True
            )
            found.append(None if done.returncode else json.loads(done.stdout.splitlines()[-1]))
    rows = [summary(statement, found, runs["import torch"]) for statement, found in runs.items() if None not in found]
    for row in rows:
        print(
            f"{row['statement']:34}{row['seconds']:>7.2f} s {row['time_ratio']:>5.2f}x"
            f"{row['peak_rss_bytes'] / 1e6:>8.0f} MB {row['memory_ratio']:>5.2f}x{row['modules']:>7} modules"
        )
    for statement in runs.keys() - {row["statement"] for row in rows}:
        print(f"{statement:34} is not installed")
    if options.json:
        settings = {"processor": processor_name(), "rounds": options.rounds}
        options.json.write_text(json.dumps({**settings, "rows": rows}, indent=2))


def summary(statement: str, found: list[Any], reference: list[Any]) -> dict[str, Any]:
    """Sum up the runs of a statement, against those of ``import torch`` in the same rounds."""
    return {
        "statement": statement,
        "seconds": statistics.median(one[0] for one in found),
        "peak_rss_bytes": statistics.median(one[1] for one in found),
        "modules": found[0][2],
        "time_ratio": statistics.median(one[0] / other[0] for one, other in zip(found, reference, strict=True)),
        "memory_ratio": statistics.median(one[1] / other[1] for one, other in zip(found, reference, strict=True)),
    }


if __name__ == "__main__":
    main()
