"""Which of torch's two CPU backends computes a layer's products faster, and whether fedomc picks that one.

    python -m benchmarks.products [--json out.json] [--seconds 0.02] [--rows 1 32 1024] [--sizes 64 512 4096]

A layer with W ``[out, in]`` computes three products for a batch of rows: ``x W^T``, and for the gradient g of its
output ``g W`` and ``g^T x``. Each row of the table is one of them at one size: ``{product, rows, in, out, blas_seconds,
onednn_seconds, picked, loss}``. The times are the least of several on one thread, measured in turn, by the thread's own
clock, so that what else the machine does matters little; ``loss`` is how much longer than the faster one the one takes
that the rule of ``fedomc.tensor.ops.products`` picks: 0.1 is ten percent. The processor's name is in the file.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product as every
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedomc._torch import processor_name
from fedomc.tensor.ops import products

ROWS = (1, 8, 16, 32, 64, 128, 256, 1024)
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
LEAST = 5


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--seconds", type=float, default=0.02, help="time for each product")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="rows of a batch")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="columns and rows of a weight")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor_name() or 'unknown processor'}, one thread; three products at each size", flush=True)
    found = []
    for count, inside, outside in every(options.rows, options.sizes, options.sizes):
        for row in measure(count, inside, outside, options.seconds):
            found.append(row)
            print(
                f"{row['product']:7} rows {count:>5} in {inside:>5} out {outside:>5}   "
                f"blas {row['blas_seconds'] * 1e6:>9.0f} us   oneDNN {row['onednn_seconds'] * 1e6:>9.0f} us   "
                f"{row['picked']:6} {row['loss']:>+6.0%}",
                flush=True,
            )
    worst = max(found, key=lambda row: row["loss"])
    print(f"{sum(row['loss'] > 0.1 for row in found)} of {len(found)} lose more than 10%; most: {worst['loss']:.0%}")
    if options.json:
        options.json.write_text(json.dumps({"processor": processor_name(), "rows": found}, indent=2))


def measure(rows: int, inside: int, outside: int, seconds: float) -> list[dict[str, Any]]:
    """Time the three products of a layer on both backends."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inside), (outside, inside), (rows, outside))
    )
    layers: dict[str, tuple[Callable[[], Tensor], bool]] = {
        "x W^T": (
            lambda: products.project(x, weight, None),
            products.onednn_is_faster(rows, inside, outside, across=True),
        ),
        "g W": (
            lambda: products.product(gradient, weight),
            products.onednn_is_faster(rows, outside, inside, across=False),
        ),
        "g^T x": (
            lambda: products.product(gradient.t(), x),
            products.onednn_is_faster(outside, rows, inside, across=False),
        ),
    }
    found = []
    for name, (compute, by_onednn) in layers.items():
        times = least_times(compute, seconds)
        picked = "onednn" if by_onednn else "blas"
        found.append(
            {
                "product": name, "rows": rows, "in": inside, "out": outside, "blas_seconds": times["blas"],
                "onednn_seconds": times["onednn"], "picked": picked, "loss": times[picked] / min(times.values()) - 1,
            }
        )  # fmt: skip
    return found


def least_times(compute: Callable[[], object], seconds: float) -> dict[str, float]:
    """Return the least time of a product on each backend, measured in turn for about so many seconds."""
    times = {"blas": float("inf"), "onednn": float("inf")}
    before, begin, count = products.backend(), time.perf_counter(), 0
    try:
        while count < LEAST + 1 or time.perf_counter() - begin < seconds:
            for name in times:
                products.use(name)
                start = time.thread_time_ns()
                compute()
                took = (time.thread_time_ns() - start) / 1e9
                times[name] = min(times[name], took) if count else float("inf")  # the first prepares kernels
            count += 1
    finally:
        products.use(before)
    return times


if __name__ == "__main__":
    main()
