"""Compiles the Triton kernels for a GPU that need not be there, and prints the resources that each of them uses."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedomc.codec.elements import FloatElement
from fedomc.codec.reference import working_bias
from fedomc.codec.triton_blocks import block_decode_kernel, block_encode_kernel, block_update_kernel
from fedomc.codec.triton_decode import add_difference_kernel, decode_kernel
from fedomc.codec.triton_encode import absmax_kernel, encode_kernel, sums_kernel
from fedomc.codec.triton_settle import WORDS, choose_exponent_kernel, keep_kernel
from fedomc.codec.triton_update import settle_kernel, update_kernel
from fedomc.codec.triton_words import BLOCKS, OPTIONS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    "words": "*i32", "other_words": "*i32", "scale_offset": "*fp32", "other_scale_offset": "*fp32",
    "values": "*fp32", "subtrahend": "*fp32", "exponent": "*i32", "row_sums": "*fp32", "sums": "*fp64",
    "n": "i32", "total": "i32", "other_total": "i32", "blocks": "i32", "start": "i64", "low": "i32", "high": "i32",
    "scales": "*u8", "other_scales": "*u8", "out_scales": "*u8", "count": "i32", "other_count": "i32",
    "status": "*i64", "weight": "fp32",
    "gradient": "*fp32", "alpha": "fp32", "plan": "*i32", "out_scale_offset": "*fp32",
}  # fmt: skip
"""The types of the kernels' arguments, which have the same names everywhere; of ``out`` each kernel has its own."""


def main(capability: int) -> None:
    for kernel, types, constants in kernels():
        arguments = [name for name in kernel.arg_names if name not in constants]
        signature = {name: (TYPES | types)[name] for name in arguments} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
        ptx = compiled.asm["ptx"]
        inexact = [word for word in (".ftz", ".approx", "div.full") if word in ptx]
        print(f"{kernel.__name__}: {resources(compiled.asm['cubin'])} inexact: {inexact}, fused: {ptx.count('fma.')}")


def resources(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        use = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    return use.splitlines()[-1].strip()


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Yield each kernel with the types of arguments that differ from ``TYPES``, and its constants."""
    for e, m, other, adding, out in [
        (2, 3, 0, False, "*bf16"), (3, 7, 0, False, "*fp32"), (3, 7, 1, False, "*fp32"), (8, 7, 0, True, "*fp32"),
        (3, 7, -1, True, "*fp32"), (7, 23, -1, True, "*fp32"),
    ]:  # fmt: skip
        constants = {f"OTHER_{name}": value for name, value in element(2, 1).items()}
        yield decode_kernel, {"out": out}, blocked(e, m) | constants | {"OTHER": other, "ADDING": adding}
    yield add_difference_kernel, {"out": "*fp32"}, {"BLOCKS": BLOCKS}
    yield absmax_kernel, {"out": "*i64"}, {"BLOCKS": BLOCKS}
    for e, m, stochastic, summing in [
        (2, 3, True, False),
        (3, 7, False, True),
        (7, 23, True, False),
        (8, 7, False, True),
    ]:
        types = {"row_sums": "*fp64" if e == 8 else "*fp32"}
        constants = blocked(e, m) | bias(e, m)
        yield encode_kernel, types, constants | {"STOCHASTIC": stochastic, "SUMMING": summing}
    yield sums_kernel, {}, {"E": 3} | bias(3, 7)
    for e, m, stochastic in [(2, 3, True), (3, 7, False), (7, 23, True), (8, 7, True)]:
        types = {"out": "*i32", "gradient": "*bf16" if e == 2 else "*fp32"}
        yield update_kernel, types, blocked(e, m) | bias(e, m) | {"STOCHASTIC": stochastic}
    limits = {"LARGEST_MANTISSA": 0x700000, "TOP": 4, "LEAST": -123, "MOST": 110, "MAX_VALUE": 31.0}
    yield settle_kernel, {}, {"E": 3, "RESCALE": True} | bias(3, 7) | limits
    del limits["MAX_VALUE"]
    yield choose_exponent_kernel, {}, {"SCALED": True} | limits
    yield keep_kernel, {"present": "*i32", "out": "*i32"}, {"WORDS": WORDS}
    others = {f"OTHER_{name}": value for name, value in element(2, 1).items()}
    yield block_decode_kernel, {"out": "*bf16"}, blocked(2, 3) | {"BLOCK": 64, "OTHER_BLOCK": 64, "SUM": True} | others
    for stochastic, block in [(True, 64), (False, 256)]:
        constants = blocked(2, 3) | {"BLOCK": block, "TOP": 2, "LARGEST_MANTISSA": 0x700000, "STOCHASTIC": stochastic}
        yield block_encode_kernel, {}, constants
        yield block_update_kernel, {"out": "*i32", "gradient": "*fp16" if stochastic else "*fp32"}, constants


def element(e: int, m: int) -> dict[str, int]:
    return {"E": e, "M": m, "MAX_CODE": FloatElement(e, m).max_code}


def blocked(e: int, m: int) -> dict[str, int]:
    return element(e, m) | {"BLOCKS": BLOCKS}


def bias(e: int, m: int) -> dict[str, int]:
    return {"BIAS": working_bias(FloatElement(e, m))}


if __name__ == "__main__":
    main(int(sys.argv[1]))
