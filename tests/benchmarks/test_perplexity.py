"""The perplexity of a language model in a format, of a model that is small and random."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import perplexity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of a few thousand parameters, whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_row_for_each_format(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = ["S1E8M23", "S1E3M7", "NF4", "NF4,*embed*=S1E3M7"]
    file = folder / "rows.json"
    arguments = ["benchmarks.perplexity", str(folder), "--tokens", "40", "--json", str(file), "--formats", *formats]
    monkeypatch.setattr(sys, "argv", arguments)
    threads = torch.get_num_threads()
    perplexity.main()
    torch.set_num_threads(threads)
    rows = {row["format"]: row for row in json.loads(file.read_text())}
    assert list(rows) == ["FP32", *formats]
    assert rows["FP32"]["perplexity"] == pytest.approx(256, rel=0.2)  # it knows nothing
    assert rows["S1E8M23"]["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    assert rows["S1E3M7"]["perplexity_ratio"] == pytest.approx(1, abs=0.02)
    assert rows["NF4"]["bits"] < rows["NF4,*embed*=S1E3M7"]["bits"] < rows["S1E3M7"]["bits"] < 13


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.perplexity", str(tmp_path / "missing")])
    with pytest.raises(SystemExit, match=r"missing does not exist"):
        perplexity.main()
