import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fedomc.tensor.ops import products
from fedomc.tensor.ops.products import onednn_is_faster, product, project
from tests.conftest import randn, same_bits

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a build of torch without oneDNN")


@pytest.fixture(autouse=True, params=["auto", "blas", pytest.param("onednn", marks=needs_onednn)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = products.backend()
    products.use(request.param)
    yield request.param
    products.use(before)


SIZES = [(1, 3, 5), (50, 300, 200), (64, 128, 129), (7, 600, 600), (300, 1, 5000)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("onednn", [True, False])
def test_products_are_those_of_float64(sizes: tuple[int, int, int], onednn: bool) -> None:
    m, k, n = sizes
    a, b, bias = randn(m, k), randn(k, n, seed=1), randn(n, seed=2)
    with torch.backends.mkldnn.flags(enabled=onednn):
        found = product(a, b), product(a.t().contiguous().t(), b), project(a, b.t(), None), project(a, b.t(), bias)
    exact = a.double() @ b.double()
    bound = 1e-6 * k * (a.abs().double() @ b.abs().double()).max()
    for values, wanted in zip(found, (exact, exact, exact, exact + bias.double()), strict=True):
        assert (values.double() - wanted).abs().max() <= bound


def test_without_onednn_the_bits_are_those_of_torch() -> None:
    x, weight, bias = randn(4, 20, 300), randn(200, 300, seed=1), randn(200, seed=2)
    with torch.backends.mkldnn.flags(enabled=False):
        assert same_bits(project(x, weight, bias), F.linear(x, weight, bias))
        assert same_bits(product(x[0], weight.t()), x[0] @ weight.t())


def test_blas_is_torch_itself(backend: str) -> None:
    x, weight = randn(20, 300), randn(200, 300, seed=1)
    if backend == "blas":
        assert same_bits(project(x, weight, None), F.linear(x, weight))
        assert same_bits(product(x, weight.t()), x @ weight.t())


RULE = [
    # rows, inner, columns, across, Intel, AVX2, other
    (1, 4096, 4096, True, False, False, False),
    (4, 1024, 1024, True, False, False, False),
    (4, 4096, 4096, True, True, False, False),
    (8, 1024, 1024, True, True, False, True),
    (16, 512, 2048, True, True, False, True),
    (32, 512, 2048, True, False, False, True),
    (32, 1024, 1024, True, False, False, True),
    (32, 512, 512, True, False, False, True),
    (32, 1024, 64, True, True, False, True),
    (8, 1024, 64, True, False, False, False),
    (50, 2048, 512, True, False, False, True),
    (50, 2048, 1024, True, True, True, True),
    (1024, 4096, 64, True, True, False, True),
    (1024, 1024, 1024, True, False, False, True),
    (50, 512, 2048, False, False, False, True),
    (128, 4096, 1024, False, True, False, True),
    (8, 128, 128, False, False, False, False),
    (2048, 16, 1024, False, False, True, True),
    (64, 1024, 4096, False, False, True, True),
    (512, 1024, 4096, False, False, False, True),
]


@pytest.mark.parametrize(("rows", "inner", "columns", "across", "intel", "avx2", "other"), RULE)
def test_the_rule_knows_processor_and_shape(
    rows: int, inner: int, columns: int, across: bool, intel: bool, avx2: bool, other: bool
) -> None:
    for processor, faster in {"Intel": intel, "AVX2": avx2, "other": other}.items():
        assert onednn_is_faster(rows, inner, columns, across=across, processor=processor) is faster


def test_a_backend_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'mkl': use one of auto, blas, onednn"):
        products.use("mkl")


@pytest.mark.parametrize("name", ["blas", "auto"])
def test_the_environment_fixes_the_backend(name: str) -> None:
    code = "from fedomc.tensor.ops import products; print(products.backend())"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code],
        env={**os.environ, "FEDOMC_PRODUCTS": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == name


def test_a_result_is_no_view() -> None:
    assert project(randn(2, 20, 300), randn(200, 300), None)._base is None


TABLE = randn(129, 4, seed=2)
BIASES = {
    "a column": TABLE[:, 1],
    "one number for all": TABLE[:1, 1].expand(129),
    "every other": randn(258)[::2],
    "none": None,
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_of_any_stride(name: str) -> None:
    x, weight, bias = randn(64, 128), randn(129, 128, seed=1), BIASES[name]
    torch.testing.assert_close(project(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("shape", [(), (1,), (64, 1), (64, 129), (1, 129)])
def test_biases_of_any_shape(shape: tuple[int, ...]) -> None:
    x, weight, bias = randn(64, 128), randn(129, 128, seed=1), randn(*shape, seed=2)
    torch.testing.assert_close(project(x, weight, bias), F.linear(x, weight, bias))


FRAMES = randn(16_000).unfold(0, 512, 100)  # [155, 512], one over the other
OPERANDS = {
    "overlapping": FRAMES,
    "all rows one": randn(512).expand(64, 512),
    "all columns one": randn(64, 1).expand(64, 512),
    "every other column": randn(64, 1024)[:, ::2],
    "part of a row": randn(64, 600)[:, 7:519],
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_of_any_stride(name: str) -> None:
    a, b = OPERANDS[name], randn(512, 64, seed=1)
    found = product(a, b), product(b.t(), a.t()), product(a.t(), a), project(a, b.t(), None), project(b.t(), a, None)
    expected = a @ b, b.t() @ a.t(), a.t() @ a, a @ b, b.t() @ a.t()
    for values, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-4)
