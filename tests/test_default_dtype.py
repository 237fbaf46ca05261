"""``torch.set_default_dtype`` changes nothing: compressed variables are float32 whatever it says."""

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedomc
from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    compress_,
    load_model,
    memory_report,
    save_model,
    step_in_backward,
)
from tests.conftest import dense, randn

SOURCE = Path(fedomc.__file__).parent
CREATING = {"arange", "empty", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}
HOW = {"one part": {"format": "S1E3M7"}, "two parts": {"format": "S1E2M3", "update_format": "S1E2M1"}}


def test_every_tensor_is_made_with_a_dtype() -> None:
    without = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr) in {("torch", name) for name in CREATING}
        and not any(keyword.arg == "dtype" for keyword in node.keywords)
        and not any(ast.unparse(argument).startswith(("torch.", "codec.SUMS")) for argument in node.args)
    ]
    assert not without


@pytest.fixture
def other_dtype(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(20, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.recurrent, self.output = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.convolution(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.output(self.recurrent(x)[0])


def operators(how: dict[str, str]) -> list[Tensor]:
    p = CompressedTensor.from_dense(randn(70, 33), **how)
    other = randn(70, 33, seed=1)
    found = [p.dequantize(), p + 1, p.t() @ other, torch.zeros_like(p), torch.ones_like(p), p.new_zeros(3), p[1:3] * 2]
    p.add_(other, alpha=0.1).mul_(0.9).addcmul_(other, other, value=0.1).add_(0.5)
    p[3].mul_(2)
    integers = CompressedTensor.from_dense(torch.arange(6), **how)
    return [*found, p.dequantize(), integers.dequantize(), p.decode_rows(2, 5).clone()]


def training(model: nn.Module, how: dict[str, str], file: Path) -> list[Tensor]:
    policy = CompressionPolicy(**how, rounding="stochastic", weight_matrices_only=False)
    compress_(model, policy.select(model))
    stepping = step_in_backward(model, torch.optim.SGD, lr=0.1, clip_norm=1.0)
    ids = torch.arange(14).view(2, 7)
    found = []
    for _ in range(2):
        output = model(ids)
        found.append(output.detach())
        output.square().sum().backward()
    stepping.remove()
    save_model(model, file)
    loaded = load_model(Model().float(), file)
    return [*found, *(dense(p) for p in (*model.parameters(), *loaded.parameters()))]


@pytest.mark.parametrize("other_dtype", [torch.float64, torch.bfloat16], indirect=True, ids=str)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
class TestSameValues:
    def test_operators(self, how: dict[str, str], other_dtype: Callable[[], None]) -> None:
        expected = operators(how)
        other_dtype()
        for a, b in zip(operators(how), expected, strict=True):
            assert a.dtype is b.dtype and torch.equal(a, b)

    def test_training_and_files(self, how: dict[str, str], other_dtype: Callable[[], None], tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = Model()
        other = copy.deepcopy(model)
        expected = training(model, how, tmp_path / "expected.safetensors")
        other_dtype()
        for a, b in zip(training(other, how, tmp_path / "found.safetensors"), expected, strict=True):
            assert a.dtype is b.dtype and torch.equal(a, b)
        files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("expected", "found")]
        assert files[0] == files[1]


@pytest.mark.parametrize("other_dtype", [torch.float64, torch.bfloat16], indirect=True, ids=str)
def test_memory_report(other_dtype: Callable[[], None]) -> None:
    model = Model()
    reports = []
    for _ in range(2):
        reports.append(memory_report(model, torch.arange(14).view(2, 7), loss=torch.sum, lr=0.1))
        other_dtype()
    assert str(reports[0]) == str(reports[1])
