"""Libraries that look for the memory of a tensor: they name the way out, or get the values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from fedomc import decompress_, load_model, save_model
from tests.conftest import compressed, lossless, randn

SAVE: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save_file": lambda m, path: safetensors.torch.save_file(m.state_dict(), path),
    "save": lambda m, path: safetensors.torch.save(m.state_dict()),
    "save_model": lambda m, path: safetensors.torch.save_model(m, str(path)),
}


@pytest.mark.parametrize("name", SAVE)
def test_safetensors(name: str, tmp_path: Path) -> None:
    model = compressed(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    with pytest.raises(RuntimeError, match=r"0\.(weight|bias) is compressed.*fedomc\.save_model.*decompress_"):
        SAVE[name](model, tmp_path / "file")
    assert not list(tmp_path.iterdir())
    SAVE[name](decompress_(model), tmp_path / "file")


def test_save_pretrained(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    plain = transformers.BertModel(config)
    model = compressed(plain)
    with pytest.raises(RuntimeError, match=r"is compressed.*fedomc\.save_model.*save_pretrained"):
        model.save_pretrained(tmp_path / "compressed")
    save_model(model, tmp_path / "ours.safetensors")
    load_model(transformers.BertModel(config), tmp_path / "ours.safetensors")
    decompress_(model).save_pretrained(tmp_path / "plain")
    again = transformers.BertModel.from_pretrained(tmp_path / "plain")
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model, x = compressed(plain), randn(2, 8)
    with pytest.raises(Exception, match=r"0\.weight is compressed and cannot be exported: decompress_"):
        torch.export.export(model, (x,), strict=strict)
    exported = torch.export.export(decompress_(model), (x,), strict=strict)
    assert torch.equal(exported.module()(x), plain(x))


def test_format_of_one_value() -> None:
    one, row = lossless(torch.tensor(2.5)), lossless(torch.tensor([1.0, 2.5]))
    assert f"{one:.2f} {row[1]:6.1f}" == "2.50    2.5"
    assert f"{one}" == str(one) and f"{row}" == str(row)
    with pytest.raises(TypeError, match="unsupported format string"):
        f"{row:.2f}"


def test_linear_with_out() -> None:
    x, weight, out = randn(3, 4), randn(5, 4, seed=1), torch.empty(3, 5)
    assert nn.functional.linear(x, lossless(weight), out=out) is out
    assert torch.equal(out, nn.functional.linear(x, weight))
