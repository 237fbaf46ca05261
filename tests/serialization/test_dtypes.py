"""Files of models in bfloat16 and float16, and what is wrong with a forged dtype."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fedomc
from fedomc.errors import PayloadError
from fedomc.serialization import model_file


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 8)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", ["S1E3M7", "S1E2M3/64+S1E2M1/64"])
def test_a_file_keeps_the_dtype(tmp_path: Path, dtype: torch.dtype, text: str) -> None:
    saved = fedomc.compress_(model(dtype), text)
    fedomc.save_model(saved, tmp_path / "model")
    with torch.device("meta"):
        loaded = model(dtype)
    fedomc.load_model(loaded, tmp_path / "model")
    assert loaded[0].weight.dtype is dtype and isinstance(loaded[0].weight, fedomc.CompressedTensor)
    x = torch.ones(2, 64, dtype=dtype)
    assert torch.equal(loaded(x), saved(x))
    with pytest.raises(PayloadError, match=r"has dtype torch\.b?float16, but torch\.float32"):
        fedomc.load_model(model(torch.float32), tmp_path / "model")


def test_narrow_values_fill_a_packed_model(tmp_path: Path) -> None:
    plain = model(torch.bfloat16)
    with torch.device("meta"):
        empty = model(torch.bfloat16)
    fedomc.materialize_(empty, plain.state_dict(), "S1E3M7")
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    assert torch.equal(empty(x), fedomc.compress_(copy.deepcopy(plain), "S1E3M7")(x))


@pytest.mark.parametrize("dtype", ["float64", "int8", "", None, 3, ["bfloat16"]])
def test_a_forged_dtype_is_refused(dtype: object) -> None:
    layer = fedomc.compress_(model(torch.bfloat16), "S1E3M7")[0]
    fields = model_file.describe(layer.weight)
    assert fields["dtype"] == "bfloat16"
    with pytest.raises(PayloadError, match="w: the metadata have dtype"):
        model_file._read_fields("w", {**fields, "dtype": dtype})
