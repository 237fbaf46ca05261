"""Helpers of all tests."""

import copy
import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gfloat
import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import settings
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fedomc import CompressedTensor, CompressionPolicy, FloatFormat, compress_

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: its kernels then run on the CPU
torch.set_num_threads(1)
settings.register_profile("fedomc", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("fedomc")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run without a device what needs one; keep what is imported out of garbage collections."""
    gc.freeze()  # tests that collect after each message would look at all of it each time
    needing = [item for item in session.items if item.get_closest_marker("gpu")]
    if needing and not session.config.option.collectonly and not torch.cuda.is_available():
        pytest.exit(f"there is no CUDA device here: {len(needing)} tests that need one were NOT run", returncode=1)


def pytest_sessionfinish() -> None:
    """Let the interpreter collect at its end what was kept out."""
    gc.unfreeze()


def bits_of(values: Tensor) -> np.ndarray:
    """Return the bits of float32 values, which tell -0 from 0."""
    return values.detach().contiguous().view(torch.int32).numpy()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and np.array_equal(bits_of(a), bits_of(b))


def pack_by_design(codes: Sequence[int], width: int) -> np.ndarray:
    """Pack codes as design and frame describe the layout, each lane one big integer: the oracle of the packing."""
    words: list[int] = []
    for at in range(0, len(codes), 1024):
        block = codes[at : at + 1024]
        rows = math.ceil(len(block) / 32)
        lanes = [sum(int(code) << (row * width) for row, code in enumerate(block[lane::32])) for lane in range(32)]
        words += [lane >> (32 * j) & 0xFFFFFFFF for j in range(math.ceil(rows * width / 32)) for lane in lanes]
    return np.array(words, dtype=np.uint32).view(np.int32)


def scaling(scale: float, offset: float) -> Tensor:
    """Make the tensor of scale and offset that floats have beside their codes."""
    return torch.tensor([scale, offset])


def gfloat_format(fmt: FloatFormat) -> gfloat.FormatInfo:
    """Describe a format to gfloat, the oracle of the number formats."""
    return gfloat.FormatInfo(
        name=str(fmt),
        k=1 + fmt.exponent_bits + fmt.mantissa_bits,
        precision=fmt.mantissa_bits + 1,
        bias=2 ** (fmt.exponent_bits - 1) - 1,
        is_signed=True,
        domain=gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)) * scale


def lossless(values: Tensor, **kwargs: object) -> CompressedTensor:
    """Compress with every bit kept."""
    return CompressedTensor.from_dense(values, "S1E8M23", transform="none", **kwargs)


def compressed(model: nn.Module, format: str = "S1E8M23", transform: str = "none", **kwargs: object) -> nn.Module:
    """Return a compressed copy of a model, biases included; by default every bit is kept."""
    policy = CompressionPolicy(format, transform=transform, **{"weight_matrices_only": False, **kwargs})
    model = copy.deepcopy(model)
    return compress_(model, policy.select(model))


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


def dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, CompressedTensor) else tensor.detach()


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    others = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        assert same_bits(dense(parameter), dense(others[name])), name


def allocations(function: Callable[[], object]) -> list[int]:
    """Run a function and return what torch allocated (positive) and freed (negative), in bytes, in order."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    tree = list(profiler.profiler.kineto_results.experimental_event_tree())
    events = []
    while tree:
        event = tree.pop()
        tree += event.children
        if event.name == "[memory]":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    del result
    sizes, known = [], set()
    for _, address, size in sorted(events, key=lambda event: event[0]):
        # The profiler also reports what is freed at an address that it knows from another run.
        if size > 0:
            known.add(address)
        if address in known:
            sizes.append(size)
    return sizes


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def run_processes(target: Callable[..., None], count: int, *args: Any) -> None:
    """Run a function in new processes, for a minute at most."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, *args)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * count
    finally:
        for process in processes:
            process.kill()
            process.join()
