"""``fedomc bench``: how fast this machine decodes and updates a format, against memcpy."""

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from fedomc import codec
from fedomc.cli.output import INVALID_USE, Json, fail, print_json, print_table
from fedomc.methods import Encoding, encode

_ROUNDS = 5
_LEAST = 0.03  # seconds of one measurement

Operation = Callable[[], object]


def bench(
    format: Annotated[str, typer.Option("--format", help="A format that holds variables, in one part.")] = "S1E3M7",
    values: Annotated[int, typer.Option(min=1024, max=2**28, help="Values in the tensor.")] = 2**22,
    json: Json = False,
) -> None:
    """Measure decoding and updating a tensor against memcpy of its FP32 values; takes a few seconds."""
    how = Encoding.parse(format)
    if how.update_format is not None or how.uplink is not None:
        fail(f"{format} has more than one format: measure one at a time, such as {how.format}", INVALID_USE)
    method = how.format
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(values, generator=generator, dtype=torch.float32) * 0.05
    gradient = torch.randn(values, generator=generator, dtype=torch.float32)
    out = torch.empty_like(x)
    packed = encode(x, method, how.transform)
    operations: dict[str, Operation] = {
        "decode": lambda: packed.decode(out),
        "update": lambda: packed.add_(gradient, -1e-4, how.transform, "stochastic", how.seed, "variable"),
    }

    def memcpy() -> None:
        ctypes.memmove(out.data_ptr(), x.data_ptr(), x.nbytes)

    rows = []
    for name, operation in operations.items():
        seconds, ratio = _against(memcpy, operation)
        rows.append({"operation": name, "mvalues_per_s": values / seconds / 1e6, "memcpy_ratio": ratio})
    threads = torch.get_num_threads()
    if json:
        backend = codec.backend("cpu")
        print_json({"format": str(method), "values": values, "threads": threads, "codec": backend, "rows": rows})
        return
    print_table(
        ("M values/s", "x memcpy", "operation"),
        [(f"{row['mvalues_per_s']:.0f}", f"{row['memcpy_ratio']:.2f}", str(row["operation"])) for row in rows],
    )
    typer.echo(
        f"\n{method}, {values} values, {threads} threads, {codec.backend('cpu')} codec; memcpy is that of the FP32 "
        "values on one thread,\nand more than 1 is faster"
    )


def _against(baseline: Operation, operation: Operation) -> tuple[float, float]:
    """Return the median seconds of an operation, and the median of the baseline's over its own, taken in turn."""
    repeats = [max(1, round(_LEAST / _timed(each, 2))) for each in (baseline, operation)]
    pairs = [(_timed(baseline, repeats[0]), _timed(operation, repeats[1])) for _ in range(_ROUNDS)]
    return statistics.median(b for _, b in pairs), statistics.median(a / b for a, b in pairs)


def _timed(operation: Operation, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        operation()
    return (time.perf_counter() - began) / repeats
