"""How fast values become codes and codes values, against memcpy of the same tensor and against peers.

    python -m benchmarks.codec [--json out.json] [--seconds 0.3] [--values 16777216] [--backends native]

Each row is one operation of one backend: ``{format, op, backend, threads, values, mvalues_per_s, memcpy_ratio}``;
``decode_bfloat16`` and ``decode_float16`` decode to these dtypes. The
ratio is the median over rounds of the time of memcpy of the FP32 tensor (one thread, between allocated buffers) by the
time of the operation, measured in turn; more than 1 is faster than memcpy. Peers that are not installed are named and
left out: torch half and float8 are always there, ml_dtypes comes with the development tools, torchao, qtorch and
bitsandbytes are the user's to install.
"""

import argparse
import ctypes
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedomc import FloatFormat, codec
from fedomc.codec import native, reference, reference_blocks, reference_rotation
from fedomc.methods import parse_method
from fedomc.methods.blockwise import Blockwise
from fedomc.methods.floats import scaling_exponent

FORMATS = ("S1E2M3", "S1E4M3", "S1E3M7", "S1E5M10", "S1E4M14")
BLOCKWISE = ("INT8", "INT4", "NF4", "MXFP8", "MXFP8E5M2", "MXFP6", "MXFP6E3M2", "MXFP4", "S1E2M3/64", "S1E2M1/64")
ROTATED = ("DRIVE1", "DRIVE2")
SIZES = (2**24, 2**17)  # in memory, in the cache
ROUNDS = 7
BACKENDS = ("reference", "native", "peers")

Operation = Callable[[], object]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--seconds", type=float, default=0.05, help="least time of one measurement")
    parser.add_argument("--values", nargs="+", type=int, default=list(SIZES), help="values in a tensor")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options = parser.parse_args()
    threads = sorted({1, torch.get_num_threads()})
    formats = ", ".join(FORMATS + BLOCKWISE + ROTATED)
    print(f"memcpy, {formats}; {options.values} values; {threads} threads: some minutes")
    rows = []
    for values in options.values:
        x = torch.randn(values, generator=torch.Generator().manual_seed(0)) * 0.05
        copy = torch.empty_like(x)

        def memcpy(x: torch.Tensor = x, copy: torch.Tensor = copy) -> None:
            ctypes.memmove(copy.data_ptr(), x.data_ptr(), x.nbytes)

        for count in threads:
            torch.set_num_threads(count)
            for format, backend, op, operation in operations(x, options.backends, count):
                seconds, ratio = against(memcpy, operation, options.seconds)
                row = {
                    "format": format, "op": op, "backend": backend, "threads": count, "values": values,
                    "mvalues_per_s": values / seconds / 1e6, "memcpy_ratio": ratio,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{values:>9} {count} {backend:<24} {format:<8} {op:<22} "
                    f"{row['mvalues_per_s']:>8.0f} M/s {ratio:>6.2f} x memcpy",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({"level": level(), "rows": rows}, indent=2))


def level() -> str:
    """Name the instruction set of the kernels."""
    return "none" if native.extension is None else str(native.extension.level())


def against(baseline: Operation, operation: Operation, least: float) -> tuple[float, float]:
    """Return the median seconds of an operation and the median ratio of the baseline's to it, in turn."""
    repeats = [max(1, round(least / timed(each, 1))) for each in (baseline, operation)]
    pairs = [(timed(baseline, repeats[0]), timed(operation, repeats[1])) for _ in range(ROUNDS)]
    return statistics.median(b for _, b in pairs), statistics.median(a / b for a, b in pairs)


def timed(operation: Operation, repeats: int) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    for _ in range(repeats):
        operation()
    return (time.perf_counter() - began) / repeats


def operations(x: torch.Tensor, backends: Sequence[str], threads: int) -> Iterator[tuple[str, str, str, Operation]]:
    """Give all operations as format, backend, name and call; those of peers on one thread alone."""
    for row in (*ours(x), *blockwise(x), *rotated(x)):
        if row[1] in backends:
            yield row
    if threads == 1 and "peers" in backends:
        yield from peers(x)


def ours(x: torch.Tensor) -> Iterator[tuple[str, str, str, Operation]]:
    """Give the operations of both backends in all formats."""
    backends = [("reference", reference)] + ([("native", native)] if native.extension is not None else [])
    gradient, out, narrow = torch.randn_like(x), torch.empty_like(x), narrow_rooms(x)
    status = torch.zeros(2, dtype=torch.int64)
    sums = torch.empty(-(-x.numel() // codec.CHUNK), codec.SUMS, dtype=torch.float64)
    for name in FORMATS:
        fmt = FloatFormat.parse(name)
        e, m = fmt.exponent_bits, fmt.mantissa_bits
        words = torch.empty(codec.words_of(x.numel(), fmt.bits), dtype=torch.int32)
        again, scale = torch.empty_like(words), torch.empty(2)
        k = scaling_exponent(codec.absmax_bits(x), fmt)
        present = (words, torch.tensor([2.0**-k, 0.0]), e, m)
        for backend, at in backends:
            yield name, backend, "encode", partial(at.encode, x, e, m, k, None, 0, words, sums, status)
            yield name, backend, "decode", partial(at.decode, *present, out)
            for op, room in narrow.items():
                yield name, backend, op, partial(at.decode, *present, room)
            yield name, backend, "decode_add", partial(at.decode_add, *present, 0.5, out)
            yield (
                name,
                backend,
                "decode_add_difference",
                partial(at.decode_add_difference, *present, *present, 0.5, out),
            )
            yield (
                name,
                backend,
                "update",
                partial(at.update, *present, gradient, -1e-4, True, None, again, scale, status),
            )


def narrow_rooms(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return room for the values of a tensor in narrower dtypes, by the name of the operation that decodes to it."""
    return {f"decode_{name}": torch.empty_like(x, dtype=getattr(torch, name)) for name in ("bfloat16", "float16")}


def blockwise(x: torch.Tensor) -> Iterator[tuple[str, str, str, Operation]]:
    """Give the operations of both backends in the methods with a scale by block."""
    backends = [("reference", reference_blocks)] + ([("native", native)] if native.extension is not None else [])
    gradient, out, status = torch.randn_like(x), torch.empty_like(x), torch.zeros(2, dtype=torch.int64)
    narrow = narrow_rooms(x)
    for name in BLOCKWISE:
        method = parse_method(name)
        assert isinstance(method, Blockwise)
        packed, again = method.zeros(x.numel(), "cpu"), method.zeros(x.numel(), "cpu")
        how = (*codec.numbers_of(method.element), method.block)
        for backend, at in backends:
            yield name, backend, "encode", partial(at.block_encode, x, *how, None, 0, *packed, status)
            yield name, backend, "decode", partial(at.block_decode, *packed, *how, out)
            for op, room in narrow.items():
                yield name, backend, op, partial(at.block_decode, *packed, *how, room)
            yield (
                name,
                backend,
                "update",
                partial(at.block_update, *packed, *how, gradient, -1e-4, None, *again, status),
            )


def rotated(x: torch.Tensor) -> Iterator[tuple[str, str, str, Operation]]:
    """Give the operations of both backends in the methods with random rotations."""
    backends = [("reference", reference_rotation)] + ([("native", native)] if native.extension is not None else [])
    out, narrow = torch.empty_like(x), narrow_rooms(x)
    for name in ROTATED:
        method = parse_method(name)
        words, scales, _ = method.zeros(x.numel(), "cpu")
        for backend, at in backends:
            yield name, backend, "encode", partial(at.rotated_encode, x, method.code_bits, 1, 0, True, words, scales)
            yield name, backend, "decode", partial(at.rotated_decode, words, scales, method.code_bits, 1, 0, out)
            for op, room in narrow.items():
                yield name, backend, op, partial(at.rotated_decode, words, scales, method.code_bits, 1, 0, room)


def peers(x: torch.Tensor) -> Iterator[tuple[str, str, str, Operation]]:
    """Give the round trips of peers that are installed."""
    out = torch.empty_like(x)
    for name, dtype in (("half", torch.float16), ("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        narrow = x.to(dtype)
        yield name, "torch", "encode", partial(narrow.copy_, x)
        yield name, "torch", "decode", partial(out.copy_, narrow)
    if ml_dtypes := optional("ml_dtypes"):
        values = x.numpy()
        for name in ("float6_e2m3fn", "float8_e4m3fn"):
            dtype = getattr(ml_dtypes, name)
            coded = values.astype(dtype)
            yield name, "ml_dtypes", "encode", partial(values.astype, dtype)
            yield name, "ml_dtypes", "decode", partial(coded.astype, np.float32)
    if floatx := optional("torchao.prototype.custom_fp_utils"):
        coded = floatx._f32_to_floatx_unpacked(x, 2, 3)
        yield "S1E2M3", "torchao floatx", "encode", lambda: floatx._f32_to_floatx_unpacked(x, 2, 3)
        yield "S1E2M3", "torchao floatx", "decode", lambda: floatx._floatx_unpacked_to_f32(coded, 2, 3)
    if qtorch := optional("qtorch.quant"):
        yield "S1E3M7", "qtorch", "encode", lambda: qtorch.float_quantize(x, 3, 7, "nearest")
    if blockwise := optional("bitsandbytes.functional"):
        coded, state = blockwise.quantize_blockwise(x)
        yield "int8", "bitsandbytes", "encode", lambda: blockwise.quantize_blockwise(x)
        yield "int8", "bitsandbytes", "decode", lambda: blockwise.dequantize_blockwise(coded, state)


_missing: set[str] = set()


def optional(name: str) -> Any:
    """Import a module, or say once that it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if name not in _missing:
            _missing.add(name)
            print(f"{name} is not installed: left out")
        return None


if __name__ == "__main__":
    main()
