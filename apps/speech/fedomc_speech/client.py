"""The ClientApp: it fills a model from the message, trains it packed and sends it back packed."""

import functools
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedomc.flower import collect, install, step_metrics
from fedomc_speech import corpus, model, training
from fedomc_speech.augmentation import Augmentation
from fedomc_speech.corpus.base import Utterance
from fedomc_speech.settings import Settings
from fedomc_speech.tokens import Tokenizer, tokenizer_for

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Answer with the part of the data that this node holds."""
    partition = MetricRecord({"partition-id": int(context.node_config["partition-id"])})
    return Message(RecordDict({"identity": partition}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's utterances for one round."""
    torch.set_num_threads(1)  # a simulation runs a client on each core
    partition = int(context.node_config["partition-id"])
    return Message(train_partition(message, partition), reply_to=message)


def train_partition(message: Message, partition: int) -> RecordDict:
    """Run one round of local training on one part of the data; the message is consumed."""
    config: Any = message.content["config"]
    settings = read_settings(config)
    clients, tokenizer = client_data(settings)
    network = model.build(settings.model, tokenizer.vocab_size, streaming=settings.streaming)
    install(network, message, consume=True)
    seed = settings.seed * 1_000_003 + int(config["server-round"]) * 1009 + partition
    result = training.train_locally(
        network,
        clients[partition],
        tokenizer,
        steps=settings.local_steps,
        batch=settings.batch,
        learning_rate=settings.client_learning_rate,
        clip_norm=settings.clip_norm,
        seed=seed,
        augment=Augmentation() if settings.augment else None,
        activations=settings.activations,
    )
    figures = {"num-examples": result.examples, "loss": result.loss, "parameter-bytes": result.parameter_bytes}
    metrics = MetricRecord({**figures, **step_metrics(network)})
    return RecordDict({"arrays": collect(network, message, consume=True), "metrics": metrics})


def write_settings(settings: Settings) -> ConfigRecord:
    """Return settings as a record for the clients."""
    return ConfigRecord(settings.to_dict())


def read_settings(config: ConfigRecord) -> Settings:
    """Return the settings that the server wrote into a record, to which Flower adds ``server-round``."""
    return Settings.from_mapping({key: value for key, value in config.items() if key != "server-round"})


def client_data(settings: Settings) -> tuple[list[tuple[Utterance, ...]], Tokenizer]:
    """Return the utterances of each client, and the tokenizer; a process loads the same corpus once.

    Raises:
        CorpusError: the corpus cannot be loaded or divided, or it is not the one that the settings name.
    """
    chosen = (settings.corpus, settings.corpus_path, settings.corpus_digest)
    return load_client_data(*chosen, settings.split, settings.clients, settings.seed)


@functools.lru_cache(maxsize=2)
def load_client_data(
    name: str, path: str, digest: str, split: str, clients: int, seed: int
) -> tuple[list[tuple[Utterance, ...]], Tokenizer]:
    """Do the work of ``client_data``."""
    loaded = corpus.load(name, path, digest)
    return corpus.split(loaded.train, split, clients or None, seed), tokenizer_for(loaded)
