"""Operands of any kind: the result of the plain function, or its error."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc import CompressedTensor
from tests.conftest import compressed, lossless, randn

WEIGHT, X = randn(40, 30), randn(20, 30, seed=1)
LINEAR: dict[str, tuple[Any, ...]] = {  # x and bias, or another weight as well
    "one number": (X, randn(1)[0]),
    "bias of one value": (X, randn(1)),
    "bias of a column": (X, randn(20, 1)),
    "bias of a matrix": (X, randn(20, 40)),
    "bias of a row": (X, randn(1, 40)),
    "bias too long": (X, randn(41)),
    "bias too short": (X, randn(39)),
    "double": (X.double(), None),
    "double bias": (X, randn(40).double()),
    "half": (X.half(), None),
    "bfloat16 and its bias": (X.bfloat16(), randn(40).bfloat16()),
    "integers": (X.long(), None),
    "complex": (X.to(torch.complex64), None),
    "sparse": (X.to_sparse(), None),
    "sparse rows": (X.to_sparse_csr(), None),
    "nested": (torch.nested.nested_tensor([X[:3], X[3:]]), None),
    "no rows": (X[:0], randn(40)),
    "another width": (X[:, :29], None),
    "no columns": (X[:, :0], randn(40), WEIGHT[:, :0]),
    "no outputs": (X, None, WEIGHT[:0]),
    "a vector as weight": (X, None, WEIGHT[0]),
}


def outcome(function: Callable[..., Tensor], *operands: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Return output and gradients, or the type of the error."""
    operands = tuple(
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in operands
    )
    try:
        output = function(*operands, **kwargs)
        if output.is_nested:
            return tuple(output.unbind())
        if output.requires_grad:
            output.float().sum().backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return (type(error),)
    return (output, *(x.grad for x in operands if isinstance(x, Tensor) and x.layout is torch.strided))


def assert_same_outcome(function: Callable[..., Tensor], x: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16) if kwargs.pop("autocast") else nullcontext() as context:
        rough = context is not None or x.dtype in (torch.half, torch.bfloat16)
        expected, found = (outcome(function, x, w, *rest, **kwargs) for w in (weight, lossless(weight)))
    assert len(found) == len(expected), (found, expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0.05 if rough else 1e-5, atol=0.2 if rough else 1e-4)
        else:
            assert a == b


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.tensor.compressed.PANEL_BYTES", 2**10)
    x, bias, weight = (*LINEAR[name], WEIGHT)[:3]
    assert_same_outcome(F.linear, x, weight, bias, autocast=autocast)


@pytest.mark.parametrize("shape", [(0, 4), (0,), (4, 0), (5, 3)])
def test_panels_cover_all_rows(shape: tuple[int, ...]) -> None:
    panels = lossless(torch.zeros(shape)).panels()
    assert [row for start, stop in panels for row in range(start, stop)] == list(range(shape[0]))
    assert len(panels) == 1


KERNEL, SERIES = randn(40, 30, 5), randn(2, 30, 12, seed=1)
CONVOLUTION: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "tuples": (SERIES, {"stride": (2,), "padding": (1,), "dilation": (2,)}),
    "double": (SERIES.double(), {}),
    "half": (SERIES.half(), {}),
    "integers": (SERIES.long(), {}),
    "double bias": (SERIES, {"bias": randn(40).double()}),
    "half bias": (SERIES, {"bias": randn(40).half()}),
    "bias too long": (SERIES, {"bias": randn(41)}),
    "bias of one value": (SERIES, {"bias": randn(1)}),
    "one number": (SERIES, {"bias": randn(1)[0]}),
    "bias of a matrix": (SERIES, {"bias": randn(40, 12)}),
    "too few channels": (SERIES[:, :29], {}),
    "other channels": (randn(2, 40, 12), {}),
    "sparse": (SERIES.to_sparse(), {}),
    "two strides": (SERIES, {"stride": (1, 1)}),
    "no strides": (SERIES, {"stride": ()}),
    "fractions": (SERIES, {"padding": 0.5}),
    "padding by name": (SERIES, {"padding": "same"}),
    "padding by an unknown name": (SERIES, {"padding": "some"}),
    "shorter than the kernel": (SERIES[..., :4], {}),
    "no examples": (SERIES[:0], {}),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("function", [F.conv1d, F.conv_transpose1d])
@pytest.mark.parametrize("name", CONVOLUTION)
def test_convolution(
    name: str, function: Callable[..., Tensor], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedomc.tensor.compressed.PANEL_BYTES", 2**12)
    x, kwargs = CONVOLUTION[name]
    kwargs = dict(kwargs)
    bias = kwargs.pop("bias", None)
    weight = KERNEL.transpose(0, 1).contiguous() if function is F.conv_transpose1d else KERNEL
    assert_same_outcome(function, x, weight, bias, autocast=autocast, **kwargs)


@pytest.mark.parametrize("make", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_channels_last(make: Callable[..., torch.nn.Module], order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedomc.tensor.compressed.PANEL_BYTES", 2**12)
    layer, x = make(20, 30, 3), randn(2, 20, 9, 9).to(memory_format=order)
    packed = compressed(layer, exclude=("bias",))
    assert isinstance(packed.weight, CompressedTensor) and len(packed.weight.panels()) > 2
    assert packed(x).stride() == layer(x).stride()
