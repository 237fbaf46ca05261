"""Compiles the Triton kernels for a GPU that need not be there, and prints the resources that each of them uses."""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedomc.codec.elements import FloatElement
from fedomc.codec.triton_kernels import BLOCKS, OPTIONS, decode_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"words": "*i32", "scale_offset": "*fp32", "other_words": "*i32", "other_scale_offset": "*fp32"}
NUMBERS = {"out": "*fp32", "n": "i32", "total": "i32", "other_total": "i32", "weight": "fp32"}


def main(capability: int) -> None:
    for e, m, other, adding in [(2, 3, 0, False), (3, 7, 0, False), (3, 7, 1, False), (8, 7, 0, True),
                                (3, 7, -1, True), (7, 23, -1, True)]:  # fmt: skip
        constants = {
            "BLOCKS": BLOCKS, "E": e, "M": m, "MAX_CODE": FloatElement(e, m).max_code,
            "OTHER_E": 2, "OTHER_M": 1, "OTHER_MAX_CODE": FloatElement(2, 1).max_code,
            "OTHER": other, "ADDING": adding,
        }  # fmt: skip
        signature = {**POINTERS, **NUMBERS, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=decode_kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
            use = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
        ptx = compiled.asm["ptx"]
        print(f"{use.splitlines()[-1].strip()} flushing: {'.ftz' in ptx}, fused: {'fma.' in ptx}")


main(int(sys.argv[1]))
