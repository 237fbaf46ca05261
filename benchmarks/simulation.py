"""Measures rounds of Flower's simulation with many nodes: seconds, the server's peak memory and bytes, against Flower.

    python -m benchmarks.simulation [--json out.json] [--nodes 1000] [--clients 100] [--rounds 5] [--repeats 3]
        [--layers 4] [--width 512] [--ways flower FP32 DEFAULT buffered]

``flower`` is Flower's FedAvg without fedomc; the other ways are ``OMCStrategy(FedAvg())`` with FP32 or a format, and
``buffered`` is ``FedBuff`` with the default format, whose steps take a tenth of the clients. Each client makes one step
of SGD on four random examples, with one core, so that the engine and the messages are what is measured. Each way is
run in a process of its own, and the ways take turns. Rows ``{way, nodes, clients, parameters, seconds, peak_rss_bytes,
up_bytes, down_bytes, seconds_ratio, peak_ratio}``, medians over the repeats: the seconds of a round or step, the first
one left out because workers start in it; the peak of the server's process above its level when the simulation begins,
with the objects of Flower's engine (the processes of the clients are not counted); the bytes of a round; and the
ratios to ``flower``.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.training import memory
from benchmarks.workers import run_worker

WAYS = ("flower", "FP32", "DEFAULT", "buffered")


def main() -> None:
    """Run all rows in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--nodes", type=int, default=1000, help="virtual nodes")
    parser.add_argument("--clients", type=int, default=100, help="that take part in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="how often each row is measured")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="flower, buffered, FP32, DEFAULT or a format")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(**json.loads(options.worker))))
        return
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: use 2 or more, as the first one is left out")
    size = {key: getattr(options, key) for key in ("nodes", "clients", "rounds", "layers", "width")}
    count = len(options.ways) * options.repeats
    print(f"{count} runs, about a minute each on two cores, and 2 GB of memory; Ctrl-C stops", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    for number in range(1, options.repeats + 1):
        for way, found in runs.items():
            found.append(run_worker("benchmarks.simulation", "--worker", json.dumps({"way": way, **size})))
            print(f"repeat {number}: {way} {found[-1]['seconds']:.2f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for way, found in runs.items():
        row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        for key in ("seconds", "peak_rss_bytes"):
            ratios = [one[key] / base[key] for one, base in zip(found, runs.get("flower", []), strict=False)]
            row[f"{key.partition('_')[0]}_ratio"] = statistics.median(ratios) if ratios else None
        rows.append({"way": way, "nodes": options.nodes, "clients": options.clients, **row})
    for row in rows:
        ratios = [f"{row[key]:.2f}x" if row[key] else "" for key in ("seconds_ratio", "peak_ratio")]
        print(
            f"{row['way']:<20} {row['seconds']:>6.2f} s {ratios[0]:>6} {row['peak_rss_bytes'] / 1e6:>6.0f} MB "
            f"{ratios[1]:>6} {row['down_bytes'] / 1e6:>6.0f} MB down {row['up_bytes'] / 1e6:>6.0f} MB up"
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))


# ---- one row, in its own process -----------------------------------------------------------------------------------


def run(way: str, nodes: int, clients: int, rounds: int, layers: int, width: int) -> dict[str, float]:
    """Run a simulation."""
    import logging

    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg, Strategy

    import fedomc
    from benchmarks import simulation_client
    from fedomc.flower import FedBuff, OMCStrategy, collect
    from fedomc.flower.simulation import simulate

    logging.getLogger("flwr").setLevel(logging.ERROR)
    model = simulation_client.build(layers, width)
    inner = FedAvg(fraction_train=clients / nodes + 1e-9, fraction_evaluate=0.0)
    strategy: Strategy = inner
    if way == "buffered":
        strategy = FedBuff(inner, buffer_size=max(1, clients // 10))
    elif way != "flower":
        strategy = OMCStrategy(inner, None if way == "FP32" else fedomc.DEFAULT if way == "DEFAULT" else way)
    moments, level = list[float](), 0

    def serve(grid: Grid) -> None:
        nonlocal level
        arrays = ArrayRecord(model.state_dict()) if way == "flower" else collect(model)
        while len(list(grid.get_node_ids())) < nodes:
            time.sleep(0.1)
        level = memory("VmRSS")
        config = ConfigRecord({"layers": layers, "width": width})

        def evaluate(number: int, arrays: ArrayRecord) -> None:
            moments.append(time.perf_counter())

        strategy.start(grid, arrays, num_rounds=rounds, train_config=config, evaluate_fn=evaluate)

    with tempfile.TemporaryDirectory() as folder:
        client = simulation_client.plain if way == "flower" else simulation_client.packed
        simulate(serve, client, nodes, Path(folder) / "log.txt")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    up = down = 4.0 * parameters * clients
    if isinstance(strategy, OMCStrategy):
        assert all(row.received for row in strategy.traffic)
        up, down = (
            statistics.median(getattr(row, key) for row in strategy.traffic) for key in ("up_bytes", "down_bytes")
        )
    return {
        "parameters": parameters,
        "seconds": statistics.median(b - a for a, b in itertools.pairwise(moments[1:])),
        "peak_rss_bytes": memory("VmHWM") - level,
        "up_bytes": up,
        "down_bytes": down,
    }


if __name__ == "__main__":
    main()
