from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fedomc
from fedomc import CompressionPolicy, PolicyError
from fedomc.serialization import file_compression
from fedomc.serialization.file_compression import compress_file


class Layer(torch.nn.Linear):
    """A layer that counts."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(64, 64, dtype=dtype)
        self.register_buffer("steps", torch.tensor(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_of_any_dtype_is_read_back(dtype: torch.dtype, path: Path, tmp_path: Path) -> None:
    model = Layer(dtype)
    model.steps.fill_(3)
    save_file(model.state_dict(), path)
    seen: dict[str, int] = {}
    compress_file(path, tmp_path / "out", "S1E4M3", seen.__setitem__)
    assert seen == {name: value.nbytes for name, value in model.state_dict().items()}
    read = fedomc.load_model(Layer(dtype), tmp_path / "out")
    expected = fedomc.CompressedTensor.from_dense(model.weight.detach(), "S1E4M3")
    assert int(read.steps) == 3 and torch.equal(read.bias, model.bias)
    assert read.weight.dtype is dtype and torch.equal(read.weight.dequantize(), expected.dequantize())


def test_the_source_itself_can_be_replaced(path: Path) -> None:
    save_file({"weight": torch.randn(64, 64), "bias": torch.zeros(64)}, path)
    distances = compress_file(path, path, CompressionPolicy("INT8"))
    assert list(distances) == ["weight"] and 0 < distances["weight"].lost_share < 0.02
    assert isinstance(fedomc.load_model(torch.nn.Linear(64, 64), path).weight, fedomc.CompressedTensor)


def test_one_tensor_is_encoded_at_a_time(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"w{i}": torch.randn(64, 64) for i in range(4)}, path)
    events: list[str] = []
    encode = file_compression.compress_measured
    monkeypatch.setattr(
        file_compression,
        "compress_measured",
        lambda values, how, name, distances: (events.append(f"+{name}"), encode(values, how, name, distances))[1],
    )
    compress_file(path, tmp_path / "out", "S1E3M7", lambda name, nbytes: events.append(f"-{name}"))
    assert events == [f"{sign}w{i}" for i in range(4) for sign in "+-"]


def test_integers_are_not_compressed(path: Path, tmp_path: Path) -> None:
    save_file({"table": torch.ones(64, 64, dtype=torch.int32)}, path)
    with pytest.raises(PolicyError, match="none of 0 variables"):
        compress_file(path, tmp_path / "out", "S1E3M7")
