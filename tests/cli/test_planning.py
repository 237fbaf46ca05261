import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, CLIPConfig, GPT2Config, LlamaConfig, T5Config

import fedomc
from fedomc.cli import planning
from tests.cli.conftest import refused, run

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
LLAMA = LlamaConfig(**SIZES, max_position_embeddings=64, architectures=["LlamaForCausalLM"])
SMALL = ("--batch", 2, "--tokens", 16)


def folder_of(config: Any, path: Path) -> Path:
    config.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the command say nothing about its time, which depends on the machine; and let transformers speak again."""
    monkeypatch.setattr(planning, "_PATIENCE", math.inf)
    logger = logging.getLogger("transformers")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folder_of(LLAMA, tmp_path / "llama")


def test_the_plan_is_that_of_python(llama: Path) -> None:
    found = json.loads(run("plan", llama, "--budget", "1 GB", *SMALL, "--optimizer", "SGD", "--json").stdout)
    torch.manual_seed(0)
    from transformers import LlamaForCausalLM

    model, ids = LlamaForCausalLM(LLAMA), torch.zeros(2, 16, dtype=torch.int64)
    model.config.use_cache = False
    expected = fedomc.plan(model, {"input_ids": ids, "labels": ids}, "1 GB")
    assert [row["peak_bytes"] for row in found["considered"]] == [each.peak_bytes for each in expected.considered]
    assert found["chosen"] == found["considered"][0]
    assert found["chosen"]["parameters"] is None and not found["chosen"]["checkpointing"]
    assert {row["checkpointing"] for row in found["considered"]} == {False, True}
    assert found["model"] == "LlamaForCausalLM" and found["budget_bytes"] == 10**9 and found["dtype"] == "float32"
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_table_of_80_columns_marks_what_fits(llama: Path) -> None:
    every = json.loads(run("plan", llama, "--budget", "1 GB", *SMALL, "--json").stdout)["considered"]
    smallest = min(every, key=lambda row: row["peak_bytes"])
    result = run("plan", llama, "--budget", smallest["peak_bytes"], *SMALL)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and max(map(len, lines)) <= 80
    (marked,) = (line for line in lines if line.startswith(">"))
    assert marked.split()[-4:] == [
        smallest["activations"] or "FP32", smallest["state"] or "FP32",
        "yes" if smallest["checkpointing"] else "no", smallest["parameters"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (BertConfig(**SIZES, architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (BertConfig(**SIZES, architectures=["BertModel"]), "BertModel"),
        (GPT2Config(n_layer=1, n_embd=64, n_head=4, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        (
            T5Config(
                num_layers=1, d_model=64, d_ff=96, vocab_size=512, decoder_start_token_id=0,
                architectures=["T5ForConditionalGeneration"],
            ),
            "T5ForConditionalGeneration",
        ),
    ],
)  # fmt: skip
def test_the_model_is_that_of_the_configuration(config: Any, model: str, tmp_path: Path) -> None:
    result = run("plan", folder_of(config, tmp_path), "--budget", "1 GB", *SMALL, "--optimizer", "momentum", "--json")
    found = json.loads(result.stdout)
    assert found["model"] == model and found["optimizer"] == "momentum"
    assert any(row["state"] for row in found["considered"])


def test_a_model_that_cannot_be_trained_as_it_is_configured_is_one_line(tmp_path: Path) -> None:
    config = T5Config(num_layers=1, d_model=64, d_ff=96, architectures=["T5ForConditionalGeneration"])
    line = refused(run("plan", folder_of(config, tmp_path), "--budget", "1 GB", *SMALL), 1)
    assert str(tmp_path) in line and "T5ForConditionalGeneration cannot be trained on shapes" in line
    assert "decoder_start_token_id" in line


def test_the_dtype_is_that_of_the_configuration(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    found = json.loads(run("plan", folder_of(config, tmp_path), "--budget", "1 GB", *SMALL, "--json").stdout)
    assert found["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--budget", "much"), 2, "is not an amount of memory"),
        (("--budget", "1 kB"), 1, "nothing fits into 0.0 MB: the smallest peak is"),
        (("--budget", "1 GB", "--tokens", 65), 2, "--tokens 65: the model takes at most 64"),
    ],
)
def test_what_cannot_be_planned_is_one_line(llama: Path, arguments: tuple[Any, ...], code: int, words: str) -> None:
    assert words in refused(run("plan", llama, *SMALL, *arguments), code)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, 2),
        ("{", 1),
        ("{}", 1),
        ('{"model_type": "nothing"}', 1),
        ('{"model_type": "llama", "hidden_size": "x"}', 1),
    ],
)
def test_a_folder_without_a_usable_configuration_is_one_line(text: str | None, code: int, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert str(tmp_path) in refused(run("plan", tmp_path, "--budget", "1 GB"), code)


def test_a_name_on_a_hub_is_not_downloaded() -> None:
    assert "nothing is downloaded" in refused(run("plan", "meta-llama/Llama-3.2-1B", "--budget", "1 GB"), 2)


def test_models_of_more_than_texts_are_refused(tmp_path: Path) -> None:
    assert "reads more than tokens" in refused(run("plan", folder_of(CLIPConfig(), tmp_path), "--budget", "1 GB"), 1)


@pytest.mark.parametrize(
    "arguments", [(), ("--budget", "1 GB", "--optimizer", "lion"), ("--budget", "1 GB", "--batch", 0)]
)
def test_options_that_do_not_exist_are_refused(llama: Path, arguments: tuple[Any, ...]) -> None:
    result = run("plan", llama, *arguments)
    assert result.exit_code == 2 and "Usage:" in result.stderr and not result.stdout


def test_a_long_plan_is_announced(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_PATIENCE", -1.0)
    result = run("plan", llama, "--budget", "1 GB", *SMALL)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("fedomc: "))
    assert line.startswith("fedomc: 8 ways of training are tried on shapes: about ")
