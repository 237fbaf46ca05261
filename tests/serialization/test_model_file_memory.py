"""Memory: filling a model holds one dense variable at a time, or none."""

import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedomc import (
    CompressionPolicy,
    load_model,
    materialize_,
    save_model,
)
from tests.conftest import allocations

WIDTH, LAYERS = 512, 8
DENSE = 4 * WIDTH * WIDTH
"""Bytes of one dense variable."""


def stack() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def peak_and_kept(fill: Callable[[], object], mapped: Path | None = None) -> tuple[int, int]:
    """Return the peak of what torch allocates and what is left, in bytes; a mapped file is neither."""
    sizes = allocations(fill)
    if mapped is not None:
        sizes.remove(mapped.stat().st_size)
        sizes.remove(-mapped.stat().st_size)
    totals = list(accumulate(sizes))
    return max(totals), totals[-1]


@pytest.mark.parametrize("update_format", [None, "S1E2M1"])
def test_one_dense_variable_at_a_time(path: Path, update_format: str | None) -> None:
    """The 8 MB of FP32 never exist: beyond what the model keeps there is one variable and the codec's chunks."""
    policy = CompressionPolicy("S1E2M3", update_format=update_format)
    packed = LAYERS * WIDTH * WIDTH * (10 if update_format else 6) / 8
    models: list[nn.Module] = []

    def from_stream() -> None:
        model = stack()
        names = [name for name, _ in model.named_parameters()]
        stream = ((name, torch.randn(WIDTH, WIDTH)) for name in names)
        models.append(materialize_(model, stream, policy.select(model)))

    peak, kept = peak_and_kept(from_stream)
    assert kept == pytest.approx(packed, rel=0.01)
    assert DENSE < peak < kept + 1.3 * DENSE

    save_model(models[0], path)
    peak, kept = peak_and_kept(lambda: models.append(load_model(stack(), path)), path)
    assert kept == pytest.approx(packed, rel=0.01) and peak < kept + 0.3 * DENSE  # no dense variable at all
    peak, kept = peak_and_kept(lambda: load_model(models[0], path), path)
    assert peak < packed + 0.3 * DENSE  # the new packed model beside the old one

    save_file({f"{i}.weight": torch.randn(WIDTH, WIDTH) for i in range(LAYERS)}, path)
    model = stack()
    peak, kept = peak_and_kept(lambda: materialize_(model, path, policy.select(model)), path)
    assert kept == pytest.approx(packed, rel=0.01) and peak < kept + 0.5 * DENSE  # it lies in the file


def test_resident_memory_of_a_big_file(path: Path) -> None:
    """256 MB of FP32 become 48 MB of codes; besides, the process never holds as much as one variable of 16 MB."""
    count, width = 16, 2048
    save_file({f"{i}.weight": torch.full((width, width), 0.1 * (i + 1)) for i in range(count)}, path)
    script = f"""
import sys, threading, torch, fedomc
from torch import nn

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

torch.set_num_threads(1)
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear({width}, {width}, bias=False) for _ in range({count})))
selection = fedomc.CompressionPolicy("S1E2M3").select(model)
nn.Parameter(fedomc.CompressedTensor.from_dense(torch.ones(70000), "S1E2M3"))  # what is set up once
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
fedomc.materialize_(model, sys.argv[1], selection)
done.set()
watcher.join()
print(max(peak, anonymous()) - before, fedomc.parameter_bytes(model).total / 2**20)
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    peak, held = map(float, done.stdout.split())
    assert held == pytest.approx(48, rel=0.01)
    assert held - 4 < peak < held + 12
