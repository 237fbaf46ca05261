"""The C++ kernels on aarch64, under qemu: the bits of this machine, the vectors' values (``make test-aarch64``)."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import pack_by_design

ROOT = Path(__file__).parents[2]
TOOLCHAIN = ROOT / "cmake/aarch64-linux-gnu.cmake"
FRAMES = sorted(path.with_suffix(".json") for path in (ROOT / "tests/vectors").glob("*.frame"))
NEEDED = {  # programs, and the Debian packages that they are in
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-objdump": "binutils-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
INTEGERS = {"INT8": 8, "INT4": 4, "DRIVE1": 1, "DRIVE2": 2}
OCP = {"MXFP8": (4, 3), "MXFP8E5M2": (5, 2), "MXFP6": (2, 3), "MXFP6E3M2": (3, 2), "MXFP4": (2, 1)}
pytestmark = pytest.mark.aarch64


def build(folder: Path, *settings: str) -> Path:
    """Build the program that runs the kernels without Python."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=search)
    assert cmake, "cmake is missing: pip install cmake"
    for command in ([cmake, "-S", str(ROOT), "-B", str(folder), "-DFEDOMC_DIGESTS=ON", *settings],
                    [cmake, "--build", str(folder), "--parallel", "2"]):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "digests"


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="session")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        pytest.fail(f"Debian packages are missing: apt-get install {' '.join(missing)}", pytrace=False)
    settings = (f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", "-DCMAKE_EXE_LINKER_FLAGS=-static")
    return build(tmp_path_factory.mktemp("aarch64"), *settings)


def output(*command: str | Path, given: bytes = b"") -> bytes:
    done = subprocess.run(command, input=given, capture_output=True)  # noqa: S603
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="session")
def digests(aarch64: Path) -> list[str]:
    return output("qemu-aarch64", aarch64).decode().splitlines()


def test_the_kernels_use_neon(aarch64: Path) -> None:
    [kernels] = aarch64.parent.rglob("kernels.cpp.o")
    instructions = output("aarch64-linux-gnu-objdump", "-d", kernels).decode()
    for neon in ("fmul", "fadd", "ushr", "fcmgt"):  # an instruction on four lanes
        assert len(re.findall(rf"\b{neon}\tv\d+\.4s", instructions)) >= 4, neon


def test_every_format_operation_and_rounding_is_there(digests: list[str]) -> None:
    floats = [f"S1E{e}M{m}" for e, m in product(range(1, 9), range(24))]
    blocks = [f"blocks of S1E{e}M{m}/{block} {rounding}" for e, m, block, rounding in
              product(range(1, 6), range(7), (32, 64, 128, 256), ("nearest", "stochastic"))]  # fmt: skip
    expected = {
        *(f"{operation} {name} {rounding}" for operation, name, rounding in
          product(("encode", "update"), floats, ("nearest", "stochastic"))),
        *(f"{operation} {name}" for operation, name in
          product(("decode", "decode two parts", "decode_add", "decode_add of a difference"), floats)),
        *(f"{operation} {name}" for operation, name in
          product(("block_encode", "block_decode", "block_decode_sum", "block_update"), blocks)),
        *(f"rotated {name} {kind}" for name, kind in product(("DRIVE1", "DRIVE2"), ("unbiased", "of least error"))),
        "add_difference", "largest",
    }  # fmt: skip
    tails = r" (n=|ordinary|any|scale |shift )"
    assert expected <= {re.split(tails, line)[0] for line in digests}


def test_the_bits_are_those_of_this_machine(here: Path, digests: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    levels = output(here, "levels").decode().split()
    for level in levels:
        expected = output(here, level).decode().splitlines()
        different = [f"{a} | {b}" for a, b in zip(expected, digests, strict=True) if a != b]
        assert not different, f"{len(different)} operations differ from {level}'s, first " + "\n".join(different[:10])
    with capsys.disabled():
        print(f"\naarch64 with NEON, under qemu, has the bits of {platform.machine()} ({', '.join(levels)}).")
        print(digests[-1])


def arguments(method: str) -> list[str]:
    """Describe a method to the program: its kind, e, m and block."""
    name, _, block = method.partition("/")
    if name in INTEGERS:
        rotated = name.startswith("DRIVE")
        return ["drive" if rotated else "integer", str(INTEGERS[name]), "0", "1024" if rotated else block or "64"]
    if name == "NF4":
        return ["normal", "0", "0", block or "64"]
    if name in OCP:
        return ["ocp", *map(str, OCP[name]), "32"]
    e, m = re.fullmatch(r"S1E(\d)M(\d+)", name).groups()  # type: ignore[union-attr]
    return ["block", e, m, block] if block else ["float", e, m, "1"]


def width(kind: str, e: str, m: str) -> int:
    return {"integer": int(e), "drive": int(e), "normal": 4}.get(kind, 1 + int(e) + int(m))


@pytest.mark.parametrize("path", FRAMES, ids=lambda path: path.stem)
def test_the_vectors_have_the_values_that_are_written_beside_them(path: Path, aarch64: Path) -> None:
    expected = json.loads(path.read_text())
    kind, e, m, block = arguments(expected["method"])
    given = pack_by_design(expected["codes"], width(kind, e, m)).tobytes()
    if kind == "float":
        given += np.float32([expected["factor"], expected["offset"]]).tobytes()
    else:
        given += np.array(expected["scales"], dtype=np.uint8 if kind in ("ocp", "block") else np.float32).tobytes()
    if kind == "drive":
        given += np.int64(expected["seed"]).tobytes()
    values = np.array(expected["values"], dtype=np.float32)
    found = output("qemu-aarch64", aarch64, "decode", kind, e, m, block, str(values.size), given=given)
    assert found == values.tobytes()
