"""A model of a few thousand parameters that is pretrained in a moment, and texts of four clients."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from transformers import LlamaConfig, LlamaForCausalLM

from fedomc_llm import client, models, texts


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    models.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the beginnings of four roles."""
    folder = tmp_path_factory.mktemp("texts")
    for number, role in enumerate(texts.read()[:4]):
        (folder / f"{role.name}.{('txt', 'md')[number % 2]}").write_text(role.train[:4000], encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, an identity that Flower's messages need, no log, and nothing kept of the test before."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    threads, level = torch.get_num_threads(), logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.getLogger("flwr").setLevel(level)
    client.adapted.cache_clear()
    client.tokenized.cache_clear()
