import pytest
import torch
import torch.nn.functional as F

from fedomc.ops.multiply import product, project
from tests.conftest import randn, same_bits

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


def test_a_result_is_no_view() -> None:
    assert project(randn(2, 20, 300), randn(200, 300), None)._base is None
