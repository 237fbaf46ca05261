"""The Triton kernels: the same bits as the reference under Triton's interpreter, and no spilled registers on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedomc import FloatFormat, codec
from fedomc.codec import reference, triton_dispatch
from tests.conftest import bits_of, scaling

triton_kernels = pytest.importorskip("fedomc.codec.triton_kernels", reason="Triton is not installed")

FORMATS = "S1E1M0 S1E1M2 S1E2M3 S1E3M4 S1E3M7 S1E4M14 S1E5M10 S1E7M23 S1E8M7 S1E8M23".split()
AHEAD = Path(__file__).parent / "compiled_ahead.py"


def random_words(n: int, fmt: FloatFormat, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(-(2**31), 2**31, codec.words_of(n, fmt.bits), dtype=np.int64)).int()


def results(
    backend: object, fmt: FloatFormat, n: int, scale: float, offset: float, device: str = "cpu"
) -> dict[str, Tensor]:
    other = FloatFormat(2, 1)
    first = random_words(n, fmt, 0).to(device), scaling(scale, offset).to(device), fmt.exponent_bits, fmt.mantissa_bits
    second = random_words(n, other, 1).to(device), scaling(0.1, 0.01).to(device), 2, 1
    room = {name: torch.ones(n + 7, device=device) for name in triton_dispatch.OPERATORS}
    backend.decode(*first, room["decode"][:n])
    backend.decode_add(*first, 0.3, room["decode_add"][:n])
    backend.decode_sum(*first, *second, room["decode_sum"][:n])
    backend.decode_add_difference(*first, *second, 0.3, room["decode_add_difference"][:n])
    return {name: out.cpu() for name, out in room.items()}


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (-0.01, 0.3)])
@pytest.mark.parametrize("n", [0, 33, 5000])
@pytest.mark.parametrize("name", FORMATS)
def test_decoding_has_the_bits_of_the_reference(name: str, n: int, scale: float, offset: float) -> None:
    fmt = FloatFormat.parse(name)
    expected = results(reference, fmt, n, scale, offset)
    for operator, out in results(triton_kernels, fmt, n, scale, offset).items():
        np.testing.assert_array_equal(bits_of(out), bits_of(expected[operator]), err_msg=operator)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_a_device_decodes_the_bits_of_the_reference(name: str) -> None:
    fmt = FloatFormat.parse(name)
    expected = results(reference, fmt, 5000, -0.01, 0.3)
    for operator, out in results(torch.ops.fedomc, fmt, 5000, -0.01, 0.3, "cuda").items():
        np.testing.assert_array_equal(bits_of(out), bits_of(expected[operator]), err_msg=operator)


@pytest.mark.parametrize("capability", [80, 90])
def test_no_register_is_spilled(capability: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0"}
    command = [sys.executable, str(AHEAD), str(capability)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: S603
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line)
        assert found is not None, line
        registers, stack, local = map(int, found.groups())
        assert registers <= 128 and stack == local == 0, line
        assert "flushing: False, fused: False" in line
