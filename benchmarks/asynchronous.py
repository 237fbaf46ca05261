"""Measures test error against wall-clock time when clients are of uneven speed, in rounds that wait and that need not.

    python -m benchmarks.asynchronous [--json out.json] [--figure out.svg] [--seeds 3] [--minutes 60]
        [--formats FP32 DEFAULT] [--ways synchronous small-rounds over-selection buffered]

A network of 100 clients trains a perceptron of 50 000 parameters on scikit-learn's digits, on a virtual clock: a client
takes as long as its speed says, and all else takes no time, neither the server nor the network. A client's median time
is drawn once, from a log-normal distribution with a median of 10 s and sigma 1; the time of each training is this
times a log-normal factor with sigma 0.2. One training in 50 never ends; after 120 s, the server gives it up. Each
client has other classes more than others (Dirichlet, 1.0), and makes 8 steps of SGD, with learning rate 0.1 and 16
examples. The ways:

- ``synchronous``: FedAvg, 20 clients a round;
- ``small-rounds``: FedAvg, 5 clients a round, since a step for few replies is an advantage of its own;
- ``over-selection``: 26 clients a round, of which the first 20 count;
- ``buffered``: ``FedBuff``, 20 clients train at any time, a step for every 5 replies.

Rows ``{way, format, seed, steps, replies, up_bytes, down_bytes, seconds, errors}``, with the error on 360 test images
at each of the given moments (the mean over the last five steps), and for each way and format a summary ``{way, format,
seconds_to_error, speedup, final_error}``: the time from which the error stays at 8% or less, the median over the seeds,
None if most runs never get there; how many times faster this is than the synchronous FP32; and the mean error at the
end.
"""

import argparse
import json
import logging
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedomc
from benchmarks.virtual_grid import VirtualGrid
from fedomc.flower import FedBuff, OMCStrategy, collect, install
from fedomc.flower._flower import identify_process

WAYS = ("synchronous", "small-rounds", "over-selection", "buffered")
CLIENTS, COHORT, OVER_SELECTION, BUFFER = 100, 20, 1.3, 5
MEDIAN_SECONDS, SPEED_SIGMA, TRAINING_SIGMA = 10.0, 1.0, 0.2
DYING, TIMEOUT = 0.02, 120.0
STEPS, RATE, EXAMPLES = 8, 0.1, 16
TARGET = 0.08
MOMENTS = 40  # at which a row has the error


class TimeIsUpError(Exception):
    """The virtual clock has reached the end."""


class Task:
    """Digits in unequal parts, clients of unequal speed, and the way in which a client trains.

    Args:
        seed: determines parts, speeds and batches.
    """

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        draw = np.random.default_rng(seed)
        images, labels = load_digits(return_X_y=True)
        order = draw.permutation(len(labels))
        self.images = torch.tensor(images[order] / 16, dtype=torch.float32)
        self.labels = torch.tensor(labels[order])
        train = len(labels) - 360
        shares = draw.dirichlet(np.ones(10), CLIENTS) + 1e-3  # [clients, classes]
        owner = [draw.choice(CLIENTS, p=shares[:, y] / shares[:, y].sum()) for y in self.labels[:train].tolist()]
        parts = [np.flatnonzero(np.array(owner) == client) for client in range(CLIENTS)]
        self.parts = [part if len(part) else draw.choice(train, 1) for part in parts]
        self.test = slice(train, None)
        self.speeds = MEDIAN_SECONDS * np.exp(SPEED_SIGMA * draw.standard_normal(CLIENTS))
        self.seed = seed

    def build(self) -> nn.Module:
        """Make the model, the same for every call."""
        torch.manual_seed(self.seed)
        return nn.Sequential(
            *(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))  # 51 000 parameters
        )

    def draw(self, message: Message, what: int) -> np.random.Generator:
        """Return the random generator of one client in one round."""
        number = message.content["config"]["server-round"]
        return np.random.default_rng([self.seed, message.metadata.dst_node_id, int(number), what])  # type: ignore[arg-type]

    def seconds(self, message: Message) -> float:
        """Return how long a client trains; infinity if it never ends."""
        draw = self.draw(message, 0)
        if draw.random() < DYING:
            return math.inf
        return float(self.speeds[message.metadata.dst_node_id - 1] * np.exp(TRAINING_SIGMA * draw.standard_normal()))

    def train(self, message: Message) -> Message:
        """Train as a client does, and reply."""
        with torch.device("meta"):
            model = self.build()
        install(model, message)
        fedomc.step_in_backward(model, torch.optim.SGD, lr=RATE)
        part, draw = self.parts[message.metadata.dst_node_id - 1], self.draw(message, 1)
        for _ in range(STEPS):
            chosen = torch.from_numpy(draw.choice(part, EXAMPLES))
            nn.functional.cross_entropy(model(self.images[chosen]), self.labels[chosen]).backward()
        metrics = MetricRecord({"num-examples": len(part)})
        return Message(RecordDict({"arrays": collect(model, message), "metrics": metrics}), reply_to=message)

    def error(self, arrays: ArrayRecord) -> float:
        """Return the error on the test images."""
        model = self.build()
        model.load_state_dict({name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()})
        with torch.no_grad():
            wrong = model(self.images[self.test]).argmax(1) != self.labels[self.test]
        return wrong.float().mean().item()


def run(way: str, format: str, seed: int, minutes: float) -> dict[str, Any]:
    """Train until the virtual clock has reached the end, and return the row."""
    import random

    random.seed(seed)  # by which nodes are drawn
    task, end = Task(seed), 60 * minutes
    grid = VirtualGrid(range(1, CLIENTS + 1), task.train, task.seconds)
    policy = None if format == "FP32" else fedomc.CompressionPolicy.parse(format, seed=seed)
    selected = {"small-rounds": BUFFER, "over-selection": COHORT * OVER_SELECTION}.get(way, COHORT)
    inner = FedAvg(fraction_train=selected / CLIENTS + 1e-9, fraction_evaluate=0.0)
    strategy: OMCStrategy
    if way == "buffered":
        strategy = FedBuff(inner, policy, buffer_size=BUFFER)
    else:
        strategy = OMCStrategy(inner, policy, over_selection=OVER_SELECTION if way == "over-selection" else 1.0)
    curve: list[tuple[float, float]] = []

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        if grid.now > end:
            raise TimeIsUpError
        curve.append((grid.now, task.error(arrays)))

    try:
        with grid.as_grid() as connected:
            strategy.start(connected, collect(task.build()), 10**6, TIMEOUT, evaluate_fn=evaluate)
    except TimeIsUpError:
        pass
    moments = [end * (i + 1) / MOMENTS for i in range(MOMENTS)]
    return {
        "way": way,
        "format": format,
        "seed": seed,
        "steps": len(curve) - 1,
        "replies": sum(row.received for row in strategy.traffic),
        "up_bytes": sum(row.up_bytes for row in strategy.traffic),
        "down_bytes": sum(row.down_bytes for row in strategy.traffic),
        "seconds": moments,
        "errors": [smooth(curve, moment) for moment in moments],
        "seconds_to_error": reached(curve, TARGET),
    }


def smooth(curve: list[tuple[float, float]], moment: float) -> float:
    """Return the mean error of the last five steps up to a moment."""
    return statistics.fmean([error for at, error in curve if at <= moment][-5:])


def reached(curve: list[tuple[float, float]], target: float) -> float | None:
    """Return the time from which the mean error of five steps stays at a target or below."""
    above = [at for at, _ in curve if smooth(curve, at) > target]
    after = [at for at, _ in curve if at > max(above, default=-1.0)]
    return after[0] if after else None


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the summary of each way and format."""
    found = []
    for way, format in dict.fromkeys((row["way"], row["format"]) for row in rows):
        runs = [row for row in rows if (row["way"], row["format"]) == (way, format)]
        times = [math.inf if row["seconds_to_error"] is None else row["seconds_to_error"] for row in runs]
        found.append(
            {
                "way": way,
                "format": format,
                "seconds_to_error": None if math.isinf(statistics.median(times)) else statistics.median(times),
                "final_error": statistics.fmean(row["errors"][-1] for row in runs),
                "replies": round(statistics.fmean(row["replies"] for row in runs)),
                "bytes_per_reply": sum(r["up_bytes"] for r in runs) / max(1, sum(r["replies"] for r in runs)),
            }
        )
    for row in found:
        base = next((r for r in found if (r["way"], r["format"]) == ("synchronous", "FP32")), None)
        own, their = row["seconds_to_error"], None if base is None else base["seconds_to_error"]
        row["speedup"] = None if own is None or their is None else their / own
    return found


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean error of each way and format against the time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fedomc"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        for format in dict.fromkeys(row["format"] for row in rows):
            runs = [row for row in rows if (row["way"], row["format"]) == (way, format)]
            mean = np.mean([row["errors"] for row in runs], axis=0)
            style = "-" if format == "FP32" else "--"
            axes.plot(
                np.array(runs[0]["seconds"]) / 60, 100 * mean, style, color=f"C{number}", label=f"{way}, {format}"
            )
    axes.set(xlabel="minutes on the virtual clock", ylabel="test error, %", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run all rows in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows and the summary")
    parser.add_argument("--figure", type=Path, help="SVG file for the curves; needs matplotlib")
    parser.add_argument("--seeds", type=int, default=3, help="how often each row is run")
    parser.add_argument("--minutes", type=float, default=60.0, help="on the virtual clock")
    parser.add_argument("--formats", nargs="+", default=["FP32", fedomc.DEFAULT], help="of the clients")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    identify_process()
    jobs = [(w, f, s) for s in range(options.seeds) for f in options.formats for w in options.ways]
    cost = math.ceil(options.minutes * len(jobs) / 60)
    print(f"{len(jobs)} runs, about {cost} minutes on one core, 0.5 GB of memory; Ctrl-C keeps the rows", flush=True)
    rows: list[dict[str, Any]] = []
    try:
        for way, format, seed in jobs:
            began = time.perf_counter()
            rows.append(run(way, format, seed, options.minutes))
            steps, error = rows[-1]["steps"], rows[-1]["errors"][-1]
            print(
                f"{len(rows)}/{len(jobs)} {way:<15} {format:<20} seed {seed}: {steps} steps, error {error:.1%}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    except KeyboardInterrupt:
        print("interrupted")
    summary = summarize(rows)
    for row in summary:
        to, gain = row["seconds_to_error"], row["speedup"]
        print(
            f"{row['way']:<15} {row['format']:<20} {'never' if to is None else f'{to:.0f} s':>7} to {TARGET:.0%} error"
            f"{'' if gain is None else f', {gain:.2f}x'}; {row['final_error']:.1%} at the end; "
            f"{row['replies']} replies of {row['bytes_per_reply'] / 1e3:.0f} kB"
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "summary": summary}, indent=2))
    if options.figure:
        draw_figure(rows, options.figure)


if __name__ == "__main__":
    main()
