"""Predicts bytes, the server's seconds and memory, and the time of a round, and checks the predictions against runs.

    python -m benchmarks.scale [--json out.json] [--format S1E3M7@0.9] [--strategy FedAvg] [--repeats 3]
        [--calibration 10 40] [--sizes 262144 2097152] [--nodes 10 100 1000] [--parameters 1048576]

Four runs of ``benchmarks.server_app``, with each number of ``--calibration`` nodes and each of the two ``--sizes``,
give the constants: a round takes a core of the server ``a + b P + n (c + d P)`` seconds for ``P`` parameters and
``n`` replies, and memory and bytes grow with ``P``. ``checks`` has what they predict for ``--nodes`` and
``--parameters``, none of which was measured for the constants but the least number of nodes, beside what is measured
there; ``extrapolated`` has what they predict for cohorts and models that are not run. Each run has a process of its
own, and the least seconds and the median memory of ``--repeats`` runs count. ``docs/scale.md`` has the assumptions.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers import run_worker

SIDE = 256
"""The columns of the model's variables."""

BATCH = 64
"""From more replies than these on, the sums of replies take 8 more bytes a parameter."""

COHORTS = ((1_000, 115_000_000), (1_000, 1_000_000_000), (10_000, 1_000_000_000), (100_000, 10_000_000))
"""The clients that take part in a round, and the parameters, of the extrapolation."""

SERVER_LINK, CLIENT_LINK = 10e9 / 8, 20e6 / 8  # bytes a second
TRAINING = 60.0  # seconds of a client

Row = dict[str, Any]


def main() -> None:
    """Measure, predict, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--format", default="S1E3M7@0.9", help="of the policy, or FP32")
    parser.add_argument("--strategy", default="FedAvg", help="the name of Flower's")
    parser.add_argument("--repeats", type=int, default=3, help="how often each run is measured")
    parser.add_argument("--calibration", type=int, nargs=2, default=[10, 40], help="nodes")
    parser.add_argument("--sizes", type=int, nargs=2, default=[2**18, 2**21], help="parameters, multiples of 2048")
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000], help="of the checks")
    parser.add_argument("--parameters", type=int, default=2**20, help="of the checks, a multiple of 2048")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(**json.loads(options.worker))))
        return
    how = options.format, options.strategy, options.repeats
    calibration = [measured(n, size, *how) for n in options.calibration for size in options.sizes]
    constants = fit(calibration)
    checks = []
    for n in options.nodes:
        found, expected = measured(n, options.parameters, *how), predicted(constants, n, options.parameters)
        checks.append({"nodes": n, "parameters": options.parameters, "measured": found, "predicted": expected})
        print(f"{n} nodes, {options.parameters:,} parameters:")
        for key, value in expected.items():
            if key in found:
                print(
                    f"    {key:<20} {value:>14,.6g} predicted {found[key]:>14,.6g} measured {value / found[key]:.2f}x"
                )
    extrapolated = [{"nodes": n, "parameters": size, **predicted(constants, n, size)} for n, size in COHORTS]
    for row in extrapolated:
        print(" ".join(f"{key}={value:.4g}" for key, value in row.items()))
    if options.json:
        rows = {"calibration": calibration, "constants": constants, "checks": checks, "extrapolated": extrapolated}
        options.json.write_text(json.dumps({"format": options.format, "strategy": options.strategy, **rows}, indent=2))


def fit(rows: list[Row]) -> dict[str, float]:
    """Return the constants of the model of costs.

    Args:
        rows: measured with two numbers of nodes and with two sizes.
    """
    terms = np.array([[1, row["parameters"], row["nodes"], row["nodes"] * row["parameters"]] for row in rows], float)
    seconds = np.array([row["cpu_seconds"] for row in rows])
    solved = np.linalg.solve(terms, seconds)
    large = [row for row in rows if row["parameters"] == max(one["parameters"] for one in rows)]
    small = [row for row in rows if row not in large]
    constants = dict(zip(("round", "round_parameter", "reply", "reply_parameter"), map(float, solved), strict=True))
    for key in ("down_bytes", "up_bytes"):
        constants[key] = statistics.median(row[key] / row["nodes"] / row["parameters"] for row in large)
    for key in ("peak_anonymous_bytes", "peak_file_bytes"):
        low, high = (statistics.median(row[key] for row in some) for some in (small, large))
        constants[key] = (high - low) / (large[0]["parameters"] - small[0]["parameters"])
        constants[f"{key}_fixed"] = low - constants[key] * small[0]["parameters"]
    return constants


def predicted(constants: dict[str, float], nodes: int, parameters: int) -> Row:
    """Return the costs of a round.

    ``round_seconds`` is that of a round whose clients all begin together: a client's transfers and training, and the
    longer of the server's transfers and computation.
    """
    seconds = constants["round"] + constants["round_parameter"] * parameters
    seconds += nodes * (constants["reply"] + constants["reply_parameter"] * parameters)
    down, up = (constants[key] * parameters for key in ("down_bytes", "up_bytes"))
    further = 8 * parameters if nodes > BATCH else 0
    return {
        "cpu_seconds": seconds,
        "down_bytes": nodes * down,
        "up_bytes": nodes * up,
        "peak_anonymous_bytes": constants["peak_anonymous_bytes_fixed"]
        + constants["peak_anonymous_bytes"] * parameters,
        "peak_file_bytes": constants["peak_file_bytes_fixed"] + constants["peak_file_bytes"] * parameters + further,
        "round_seconds": (down + up) / CLIENT_LINK + TRAINING + max(seconds, nodes * (down + up) / SERVER_LINK),
    }


def measured(nodes: int, parameters: int, format: str, strategy: str, repeats: int) -> Row:
    """Measure the costs of a round on the server."""
    found = []
    for _ in range(repeats):
        given = json.dumps({"nodes": nodes, "parameters": parameters, "format": format, "strategy": strategy})
        found.append(run_worker("benchmarks.scale", "--worker", given))
    row = {key: statistics.median(one[key] for one in found) for key in found[0]}
    row |= {"nodes": nodes, "parameters": parameters, "cpu_seconds": min(one["cpu_seconds"] for one in found)}
    print(f"{nodes} nodes, {parameters:,} parameters: {row['cpu_seconds']:.3f} s", flush=True)
    return row


def run(nodes: int, parameters: int, format: str, strategy: str) -> Row:
    """Run a ServerApp for two rounds, in this process."""
    from benchmarks import server_app

    rows = max(1, parameters // SIDE // 8)
    shapes: server_app.Shapes = {f"{i}.weight": ("float32", (rows, SIDE)) for i in range(parameters // SIDE // rows)}
    return server_app.run(format, strategy, nodes, 2, shapes, False)


if __name__ == "__main__":
    main()
