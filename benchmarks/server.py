"""Measures the server's cost of aggregation: peak memory by the size of the cohort, and time against memcpy.

    python -m benchmarks.server [--json out.json] [--rounds 3] [--clients 4 16 64] [--formats S1E3M7@0.9]
        [--model large] [--apps FedAvg FedAdam] [--replies 4 16 64 128] [--billion]

Each row of ``rows`` is a round of ``OMCStrategy(FedAvg())`` with the application's large model (about 115 M
parameters), or the size that ``--model`` names, on one thread. The replies are made here one after the other, as a
network would deliver them, each in its own memory. Rows ``{format, clients, peak_rss_bytes, seconds, memcpy_ratio,
peak_ratio}``: the peak is that of the process above its level before the server's model exists; the seconds are those
of ``aggregate_train`` without making the replies; ``memcpy_ratio`` is the time of a memcpy of the FP32 model for each
client, measured between the replies, divided by the seconds, so a value above 1 is faster than memcpy; ``peak_ratio``
is relative to the smallest cohort. Each row is the median of runs in separate processes.

Each row of ``apps`` is a whole ``start`` with checkpoints, of two rounds, whose initial model is a file, with messages
that Flower serializes in both directions (``benchmarks.server_app``); ``framework`` is ``fedomc``, or ``flower`` for
the strategy without fedomc, whose model is in memory. Rows ``{framework, strategy, format, clients, rounds,
peak_anonymous_bytes, peak_file_bytes, model_ratio, seconds, memcpy_ratio}``: anonymous memory and file pages, which the
system may drop, are counted apart, above their levels before the run; ``model_ratio`` is that of the anonymous peak to
the FP32 model; the seconds are those of a round without making replies. Rows of Flower alone whose replies do not fit
into the memory are left out. ``--billion`` runs a model of 1 B parameters instead, four clients and three rounds; it
takes about 40 GB of disk.
"""

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.training import memory, values
from benchmarks.workers import run_worker

FORMATS = ("S1E2M3+S1E2M1", "S1E3M7@0.9", "FP32")
CLIENTS = (4, 16, 64)
LEAST_CLIENTS = 2
APPS = ("FedAvg", "FedAdam")
REPLIES = (4, 16, 64, 128)
VOCABULARY = 1024
STRATEGY = "the name of Flower's, such as FedAdam, or a DifferentialPrivacy...FixedClipping, around FedAvg"
BUFFER = 2**26  # bytes: larger than the caches


def main() -> None:
    """Run all rows in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=3, help="how often each row is measured")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS), help="sizes of the cohort")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="of the clients, as the application's")
    parser.add_argument("--strategy", default="FedAvg", help=STRATEGY)
    parser.add_argument("--model", default="large", help="size of the application's model: large or tiny")
    parser.add_argument("--apps", nargs="*", default=list(APPS), help="strategies of Flower to run as a ServerApp")
    parser.add_argument("--replies", type=int, nargs="+", default=list(REPLIES), help="cohorts of the ServerApps")
    parser.add_argument("--billion", action="store_true", help="run a model of 1 B parameters instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--app-worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.clients) < LEAST_CLIENTS:
        parser.error(f"--clients {min(options.clients)}: Flower's strategies wait for {LEAST_CLIENTS} clients or more")
    if options.worker:
        print(json.dumps(run(**json.loads(options.worker), size=options.model)))
        return
    if options.app_worker:
        print(json.dumps(run_app(**json.loads(options.app_worker), size=options.model)))
        return
    if options.billion:
        billion = {"strategy": options.strategy, "format": options.formats[0], "clients": 4, "rounds": 3}
        write(options.json, {"apps": apps([{"framework": "fedomc", **billion}], "billion")})
        return
    jobs = [{"format": f, "clients": c, "strategy": options.strategy} for f in options.formats for c in options.clients]
    print(f"{len(jobs)} rows x {options.rounds} rounds, 5 to 60 seconds each, about 3 GB of memory", flush=True)
    runs: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for number in range(1, options.rounds + 1):
        for job, found in zip(jobs, runs, strict=True):
            found.append(worker("--worker", job, options.model))
        print(f"round {number} of {options.rounds} done", flush=True)
    rows = [
        {**job, **{k: statistics.median(one[k] for one in f) for k in f[0]}} for job, f in zip(jobs, runs, strict=True)
    ]
    print(f"{'':<16} {'clients':>7} {'peak':>9} {'':>6} {'seconds':>9} {'a client':>9}")
    for row in rows:
        least = next(r for r in rows if r["format"] == row["format"])
        row["peak_ratio"] = row["peak_rss_bytes"] / least["peak_rss_bytes"]
        peak, each = row["peak_rss_bytes"] / 1e6, row["seconds"] / row["clients"]
        print(
            f"{row['format']:<16} {row['clients']:>7} {peak:>6.0f} MB {row['peak_ratio']:>5.2f}x "
            f"{row['seconds']:>7.2f} s {each:>7.3f} s {row['memcpy_ratio']:>6.2f} x memcpy"
        )
    write(options.json, {"rows": rows})
    runs = [
        {"framework": framework, "strategy": name, "format": format, "clients": clients, "rounds": 2}
        for name in options.apps
        for framework, format in (("flower", "FP32"), *(("fedomc", format) for format in options.formats))
        for clients in options.replies
    ]
    write(options.json, {"rows": rows, "apps": apps(runs, options.model)})


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Write the rows so far: a run may be stopped."""
    if path is not None:
        path.write_text(json.dumps(content, indent=2))


def worker(mode: str, job: dict[str, Any], model: str) -> dict[str, Any]:
    """Run a row in a process of its own."""
    return run_worker("benchmarks.server", "--model", model, mode, json.dumps(job))


def apps(jobs: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """Run the rows of ServerApps, and print them."""
    rows: list[dict[str, Any]] = []
    if jobs:
        print(f"{'':<28} {'clients':>7} {'anonymous':>12} {'':>6} {'file pages':>12} {'a round':>9}")
    for job in jobs:
        found = worker("--app-worker", job, model)
        if not found:
            continue
        rows.append({**job, **found, "model_ratio": found["peak_anonymous_bytes"] / found["model_bytes"]})
        row = rows[-1]
        print(
            f"{row['framework']:<7}{row['strategy']:<8}{row['format']:<13} {row['clients']:>7} "
            f"{row['peak_anonymous_bytes'] / 1e6:>9.0f} MB {row['model_ratio']:>5.2f}x "
            f"{row['peak_file_bytes'] / 1e6:>9.0f} MB {row['seconds']:>7.1f} s"
            + (f" {row['memcpy_ratio']:>6.2f} x memcpy" if row["memcpy_ratio"] else ""),
            flush=True,
        )
    return rows


def run_app(framework: str, clients: int, size: str, **job: Any) -> dict[str, Any]:
    """Run one ServerApp; give nothing if its replies do not fit into the memory."""
    from benchmarks import server_app

    if size == "billion":
        shapes = server_app.billion()
    else:
        from fedomc_speech.model import build

        model = build(size, VOCABULARY)
        shapes = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in values(model)}
        del model
    alone = framework == "flower"
    bytes_in_all = clients * sum(math.prod(shape) * 4 for _, shape in shapes.values())
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if alone and 2 * bytes_in_all > free:
        return {}
    return server_app.run(clients=clients, shapes=shapes, alone=alone, **job)


# ---- one row, in its own process -----------------------------------------------------------------------------------


class Nodes:
    """As much of a grid as choosing nodes takes."""

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def get_node_ids(self) -> list[int]:
        """List the nodes."""
        return list(range(1, self.clients + 1))


def run(format: str, clients: int, strategy: str, size: str) -> dict[str, float]:
    """Aggregate one round."""
    import logging

    import torch
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import strategy as strategies

    import fedomc
    from fedomc.flower import OMCStrategy
    from fedomc.flower._flower import identify_process
    from fedomc.flower.arrays import STYPE, packed_array
    from fedomc.methods import encode
    from fedomc.serialization import frame
    from fedomc_speech.model import build

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    identify_process()
    policy = None if format == "FP32" else fedomc.CompressionPolicy.parse(format)
    one, other = torch.zeros(BUFFER // 4), torch.ones(BUFFER // 4)
    model = build(size, VOCABULARY)
    private = strategy.startswith("DifferentialPrivacy")  # which refuses counters

    def drawn() -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, value) for name, value in values(model) if value.is_floating_point() or not private)

    def compressed(name: str, update_like: torch.Tensor) -> Array:
        assert policy is not None
        method = policy.encoding().methods[-1]
        packed = encode(update_like, method, name=name)
        kind = frame.VARIABLE if policy.update_format is None else frame.UPDATE
        return packed_array(packed, tuple(update_like.shape), kind)

    # What a client returns for each variable, packed and in FP32, before the level of memory is taken.
    torch.manual_seed(1)
    scale = 1.0 if policy is None or policy.update_format is None else 0.01
    dense = {name: Array(value.numpy()) for name, value in drawn()}
    packed = {
        n: compressed(n, torch.from_numpy(a.numpy()) * scale)
        for n, a in dense.items()
        if policy and a.dtype == "float32"
    }
    start = memory("VmRSS")

    torch.manual_seed(0)
    arrays = ArrayRecord({name: Array(value.numpy()) for name, value in drawn()})
    fp32_bytes = sum(len(array.data) for array in arrays.values())
    kind = getattr(strategies, strategy)
    wrapped = OMCStrategy(kind(strategies.FedAvg(), 0.1, 1.0, clients) if private else kind(), policy)
    messages = list(wrapped.configure_train(1, arrays, ConfigRecord(), Nodes(clients)))  # type: ignore[arg-type]
    outside = 0.0
    memcpy: list[float] = []

    def replies() -> Iterator[Message]:
        nonlocal outside
        for message in messages:
            began = time.perf_counter()
            ctypes.memmove(one.data_ptr(), other.data_ptr(), BUFFER)
            memcpy.append((time.perf_counter() - began) * fp32_bytes / BUFFER)
            record = ArrayRecord()
            for name, array in message.content["arrays"].items():
                own = (packed if array.stype == STYPE else dense)[name]
                record[name] = Array(own.dtype, own.shape, own.stype, bytes(bytearray(own.data)))
            content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 7, "loss": 1.0})})
            reply = Message(content, reply_to=message)
            del record, content
            outside += time.perf_counter() - began
            yield reply
            del reply

    began = time.perf_counter()
    result, _ = wrapped.aggregate_train(1, replies())
    seconds = time.perf_counter() - began - outside
    assert result is not None and wrapped.traffic[-1].received == clients
    return {
        "peak_rss_bytes": memory("VmHWM") - start,
        "seconds": seconds,
        "memcpy_ratio": clients * statistics.median(memcpy) / seconds,
    }


if __name__ == "__main__":
    main()
