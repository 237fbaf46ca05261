"""Views of compressed tensors: what is read through them, what is written through them, and their gradients."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedomc import CompressedTensor, NonFiniteError
from tests.conftest import lossless, randn


def padded(p: Tensor, y: Tensor) -> Tensor:
    y[1:7] = p
    return y


def assigned(index: object, value: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """Return a function that writes to an index of a copy."""

    def function(p: Tensor) -> Tensor:
        q = p.clone()
        q[index] = value(p)
        return q

    return function


ASSIGNMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "into a dense tensor": lambda p: padded(p, torch.zeros(8, 8)),
    "into a dense tensor with a history": lambda p: padded(p, torch.zeros(8, 8) + p.sum()),
    "into a dense tensor twice": lambda p: padded(p * 2, padded(p, torch.zeros(8, 8))),
    "into float64": lambda p: padded(p, torch.zeros(8, 8, dtype=torch.float64)).float(),
    "a row": assigned(0, lambda p: 0),
    "a mask": assigned(randn(6, 8) > 0, lambda p: 0.5),
    "rows of a tensor of indices": assigned(torch.tensor([0, 3]), lambda p: p[1:3]),
    "a column, of two columns": assigned((slice(None), 2), lambda p: p[:, 1] * p[:, 0]),
    "everything": assigned(..., lambda p: p[0] * p),
    "a step and a new dimension": assigned((None, slice(0, 6, 2)), lambda p: p[None, 1::2]),
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_assignment_to_an_index_has_the_gradient_of_the_plain_tensor(name: str) -> None:
    p = nn.Parameter(lossless(randn(6, 8)))
    plain = nn.Parameter(randn(6, 8))
    for x in (p, plain):
        y = ASSIGNMENTS[name](x)
        (y * randn(*y.shape, seed=1)).sin().sum().backward()
    assert torch.equal(p.grad, plain.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_assignment_to_an_index_of_a_parameter(mode: Callable[[], torch.no_grad]) -> None:
    p, plain = nn.Parameter(lossless(randn(6, 8))), nn.Parameter(randn(6, 8))
    for x in (p, plain):
        with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
            x[0] = 0
        with mode():
            x[0] = 0
            x[torch.arange(6) > 3] = 2.0
            x[1:2, 3] = x[5, 5]
            x[2][3:5] = x[1][:2]
    assert torch.equal(p.dequantize(), plain.detach())
    p.square().sum().backward()


def rows(name: str = "layer.weight") -> CompressedTensor:
    return lossless(torch.arange(12.0).view(3, 4), name=name)


def test_a_refused_write_changes_no_view() -> None:
    p, before = rows(), torch.arange(12.0).view(3, 4)
    row, flat = p[0], p.view(-1)
    for write in (lambda: row.fill_(math.nan), lambda: flat[3:].div_(0), lambda: torch._foreach_div_([row, flat], 0)):
        with pytest.raises(NonFiniteError, match=r"layer\.weight.*nothing was changed"):
            write()
        assert torch.equal(row + 0, before[0]) and torch.equal(flat + 0, before.view(-1))
        assert torch.equal(p.dequantize(), before)
    row[1] = 5
    assert float(p.sum()) == float(before.sum()) + 4


def test_a_write_that_fails_changes_no_view() -> None:
    p = rows()
    row = p[0]
    with pytest.raises(RuntimeError):
        row.copy_(torch.ones(7))
    assert torch.equal(row + 0, torch.arange(4.0))


CHANGES_OF_GEOMETRY: dict[str, Callable[[Tensor], object]] = {
    "unsqueeze_": lambda p: p[1].unsqueeze_(0),
    "squeeze_": lambda p: p[1:2].squeeze_(),
    "transpose_": lambda p: p[:, :3].transpose_(0, 1),
    "t_": lambda p: p[:2].t_(),
    "resize_": lambda p: p[1].resize_(2),
    "resize_ beyond": lambda p: p[1].resize_(100),
    "set_": lambda p: p[1].set_(torch.ones(4)),
    "as_strided_": lambda p: p[1].as_strided_((2,), (2,)),
    "dropout3d": lambda p: nn.functional.dropout3d(p[1].view(1, 2, 2, 1), inplace=True),
    "out": lambda p: torch.add(torch.ones(2, 2), 1, out=p[1]),
    "out beyond": lambda p: torch.add(torch.ones(20, 2), 1, out=p[1]),
    "data": lambda p: setattr(p[1], "data", torch.ones(4)),
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", CHANGES_OF_GEOMETRY)
def test_a_change_of_geometry_in_place_is_an_error_that_changes_nothing(name: str) -> None:
    p = rows()
    view = p[1]
    with pytest.raises(RuntimeError, match=r"view of layer\.weight, which is compressed"):
        CHANGES_OF_GEOMETRY[name](p)
    assert torch.equal(p.dequantize(), torch.arange(12.0).view(3, 4))
    assert torch.equal(view + 0, torch.arange(4.0, 8.0)) and view.shape == (4,)


ONES, INDICES = torch.ones(3, 4), torch.empty(3, 4, dtype=torch.int64)
OUT: dict[str, Callable[[Tensor], object]] = {
    "kron": lambda p: torch.kron(torch.ones(3, 1), torch.arange(4.0).view(1, 4), out=p),
    "kron into a view": lambda p: torch.kron(torch.ones(2, 1), torch.arange(4.0).view(1, 4), out=p[1:]),
    "multi_dot": lambda p: torch.linalg.multi_dot([torch.ones(3, 2), torch.ones(2, 5), torch.ones(5, 4)], out=p),
    "tensordot": lambda p: torch.tensordot(torch.ones(3, 2), torch.ones(2, 4), 1, out=p),
    "linear": lambda p: nn.functional.linear(torch.ones(3, 2), torch.ones(4, 2), out=p),
    "one of two": lambda p: torch.max(torch.stack([ONES, 2 * ONES]), 0, out=(p, INDICES)),
    "itself": lambda p: torch.mul(p, p, out=p),
    "apply_": lambda p: p.apply_(lambda x: x + 1),
    "apply_ of a view": lambda p: p[1].apply_(lambda x: x + 1),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OUT)
def test_functions_that_write_to_out(name: str, mode: Callable[[], Any]) -> None:
    p, plain = rows(), torch.arange(12.0).view(3, 4)
    version = p._version
    with mode():
        result = OUT[name](p)
        OUT[name](plain)
    assert torch.equal(p.dequantize(), plain)
    if "view" not in name:
        assert p._version > version and (result[0] if isinstance(result, tuple) else result) is p


def test_out_of_a_trained_parameter_is_an_error_as_in_torch() -> None:
    p = nn.Parameter(rows())
    with pytest.raises(RuntimeError, match=r"out=.*layer\.weight"):
        torch.kron(torch.ones(3, 1), torch.ones(1, 4), out=p)
    with torch.no_grad():
        torch.kron(torch.ones(3, 1), torch.ones(1, 4), out=p)
    assert torch.equal(p.dequantize(), torch.ones(3, 4))


@pytest.mark.parametrize("make", [torch.ones, lambda *shape: lossless(torch.ones(*shape))], ids=["plain", "compressed"])
@pytest.mark.parametrize(
    ("keep", "collected"),
    [(lambda t: t.detach()[0], True), (lambda t: t.detach().view(-1), True), (lambda t: t[0], False)],
)
def test_a_tensor_that_holds_its_own_view_is_collected_where_a_plain_one_is(
    make: Callable[..., Tensor], keep: Callable[[Tensor], Tensor], collected: bool
) -> None:
    """Autograd's reference from a view to its base is one that the garbage collector does not see through."""
    tensor = make(4, 4)
    reference = weakref.ref(tensor)
    tensor.view_of_itself = keep(tensor)
    del tensor
    gc.collect()
    assert (reference() is None) == collected


def test_what_shares_no_memory_is_not_written_silently() -> None:
    p = rows()
    for x in (p, p[0]):
        with pytest.raises(ValueError, match="read-only"):
            x.numpy()[0] = 1
        assert x.numpy(force=True).flags.writeable


def test_copies_of_a_view_are_plain_tensors() -> None:
    p = rows()
    row = copy.deepcopy({"row": [p[1]]})["row"][0]
    assert type(row) is Tensor and torch.equal(row, torch.arange(4.0, 8.0))
    row.zero_()
    assert float(p[1].sum()) == 22
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(p.requires_grad_()[1])
    assert type(copy.deepcopy(p.detach()[1])) is Tensor
