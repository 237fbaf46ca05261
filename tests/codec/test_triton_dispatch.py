"""Which implementation decodes on a CUDA device; there need not be one."""

import subprocess
import sys

import pytest
import torch

from fedomc import codec
from fedomc.codec import reference, triton_dispatch


def test_cuda_tensors_have_kernels_of_their_own() -> None:
    for name in triton_dispatch.MODULES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fedomc::{name}", "CUDA")


def test_without_triton_the_reference_serves_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    triton_dispatch.is_installed.cache_clear()
    out = torch.ones(1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="install triton"):
        triton_dispatch.operator("absmax", reference.absmax)(torch.tensor([-2.0]), out)
    assert int(out) == 0x40000000
    triton_dispatch.is_installed.cache_clear()


def test_importing_fedomc_does_not_import_triton() -> None:
    code = "import sys, fedomc; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0  # noqa: S603


def test_the_backend_is_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert codec.backend("cuda") == "triton"
    assert codec.backend("mps") == "reference"
    monkeypatch.setattr(triton_dispatch, "is_installed", lambda: False)
    assert codec.backend("cuda:1") == "reference"
