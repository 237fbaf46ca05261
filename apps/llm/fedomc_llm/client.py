"""The ClientApp: it fills a model from the message, trains it on this node's text and returns what it trained."""

import functools
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedomc.flower import collect, install, step_metrics
from fedomc_llm import models, texts, training
from fedomc_llm.settings import LORA, Settings, Variant

app = ClientApp()

adapted = functools.lru_cache(maxsize=1)(models.adapted)
"""The last model with adapters, kept by a process: its base never changes, and each message fills the adapters."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    settings, variant, part = _request(message, context)
    model = _received(settings, variant, message)
    lora = variant.method == LORA
    result = training.train_locally(
        model,
        _sequences(settings, part)[0],
        steps=settings.local_steps,
        batch=settings.batch,
        learning_rate=settings.lora_learning_rate if lora else settings.learning_rate,
        seed=settings.seed * 1_000_003 + _round(message) * 1009 + part,
        checkpointing=settings.checkpointing,
        activations=settings.activations,
        head_slice=settings.head_slice,
    )
    figures = {"num-examples": result.tokens, "loss": result.loss, "held-bytes": result.held_bytes}
    metrics = MetricRecord({**figures, **step_metrics(model)})
    return Message(RecordDict({"arrays": collect(model, message), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the loss of this node's held-out text."""
    settings, variant, part = _request(message, context)
    model = _received(settings, variant, message)
    loss, tokens = training.held_out_loss(model, _sequences(settings, part)[1], settings.batch, settings.head_slice)
    metrics = MetricRecord({"num-examples": tokens, "loss": loss, "part": part})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _request(message: Message, context: Context) -> tuple[Settings, Variant, int]:
    """Return what the server asks for, and which text this node has; a node may have the model in another place."""
    torch.set_num_threads(1)  # a simulation runs a client on each core
    config: dict[str, Any] = dict(message.content["config"])
    variant = Variant.parse(config.pop("variant"))
    config.pop("server-round")
    place = context.node_config.get("model", config["model"])
    return Settings.from_mapping({**config, "model": place}), variant, int(context.node_config["partition-id"])


def _round(message: Message) -> int:
    config: Any = message.content["config"]
    return int(config["server-round"])


def _received(settings: Settings, variant: Variant, message: Message) -> nn.Module:
    if variant.method == LORA:
        chosen = (settings.model, variant.format, settings.rank, settings.targets, settings.seed)
        return install(adapted(*chosen), message)
    return install(models.skeleton(settings.model), message)


def _sequences(settings: Settings, part: int) -> tuple[Tensor, Tensor]:
    return tokenized(settings.texts, settings.model, settings.length, settings.held_out, part)


@functools.lru_cache(maxsize=64)
def tokenized(folder: str, model: str, length: int, held_out: int, part: int) -> tuple[Tensor, Tensor]:
    """Return a client's sequences, to train with and held out, ``[N, length]`` each."""
    client = texts.read(folder)[part]
    tokenizer = models.tokenizer(model)
    trained = texts.blocks(client.train, tokenizer, length, f"text of {client.name}")
    measured = texts.blocks(client.held_out, tokenizer, length, f"held-out text of {client.name}")
    return trained, measured[: held_out or None]
