"""The rounds of a run: each variant fine-tunes the same model on the same texts, and is measured."""

import random
import re
import time
from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import nn

import fedomc
from fedomc.flower import Checkpoints, OMCStrategy, collect, install
from fedomc_llm import models, texts, training
from fedomc_llm.errors import RunStopped, SettingsError
from fedomc_llm.run_folder import RunFolder
from fedomc_llm.settings import LORA, Settings, Variant

WAIT = 60.0
"""Seconds to wait for all nodes."""


class Observer(Protocol):
    """An observer of a run; it may ask to stop it."""

    def started(self, variant: Variant) -> None:
        """Called when a variant starts or continues."""

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        """Called after each round with its row of the history."""

    def stop_requested(self) -> bool:
        """Return whether the run should stop before the next round."""
        return False


class Averaging(FedAvg):
    """Federated averaging over all or some clients; it notes the held-out loss of each, and stops when asked.

    Args:
        settings: of the run.
        names: of the clients, by the number of their text.
        observer: is asked before each round whether to stop.

    Attributes:
        loss: the mean held-out loss of the last measurement.
    """

    def __init__(self, settings: Settings, names: list[str], observer: Observer) -> None:
        self._names, self._observer = names, observer
        self._parts: dict[int, int] = {}
        self.loss = float("nan")
        cohort = settings.cohort or len(names)
        super().__init__(
            fraction_train=cohort / len(names),
            min_train_nodes=cohort,
            min_evaluate_nodes=len(names),
            min_available_nodes=len(names),
        )

    def part_of(self, node: int) -> int:
        """Return the number of the text that a node has, by which random numbers are drawn: node IDs are random."""
        return self._parts.get(node, node)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the clients of a round.

        Raises:
            RunStopped: the observer wants to stop.
        """
        if self._observer.stop_requested():
            raise RunStopped("the run was stopped")
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the losses, and keep that of each client under its name."""
        messages = list(replies)
        metrics = super().aggregate_evaluate(server_round, messages)
        if metrics is None:
            return None
        losses, self.loss = {}, float(cast(float, metrics["loss"]))
        for message in messages:
            if not message.has_error():
                figures = cast(MetricRecord, message.content["metrics"])
                self._parts[message.metadata.src_node_id] = part = int(cast(int, figures["part"]))
                losses[f"loss/{self._names[part]}"] = float(cast(float, figures["loss"]))
        return MetricRecord({"loss": self.loss, **dict(sorted(losses.items()))})


def run(settings: Settings, place: str, grid: Grid, folder: RunFolder, observer: Observer) -> None:
    """Run all variants that are not finished, each from its last checkpoint.

    Args:
        settings: of the run.
        place: of the model, a folder or a GGUF file.
        grid: the grid of the nodes.
        folder: the folder for results and checkpoints.
        observer: the observer to notify.

    Raises:
        ModelError: the model cannot be read.
        RunStopped: the observer stopped the run.
        SettingsError: the settings do not fit the texts or the nodes.
        TextError: the texts cannot be used.
    """
    names = [client.name for client in texts.read(settings.texts)]
    check_cohort(settings, len(names))
    _wait_for_nodes(grid, len(names))
    for variant in settings.parsed:
        if not folder.finished(str(variant)):
            folder.add(_run_variant(settings, variant, place, names, grid, folder, observer))


def check_cohort(settings: Settings, clients: int) -> None:
    """Check that a round's cohort is not larger than the number of clients.

    Raises:
        SettingsError: it is larger.
    """
    if settings.cohort > clients:
        raise SettingsError(f"cohort={settings.cohort}, but there are only {clients} texts: make it smaller")


def server_model(settings: Settings, variant: Variant, place: str) -> nn.Module:
    """Return the model as the server has it: in FP32, or adapters on a base as the clients hold it."""
    if variant.method == LORA:
        return models.adapted(place, variant.format, settings.rank, settings.targets, settings.seed)
    return models.load(place)


def strategy_of(
    settings: Settings, variant: Variant, inner: Averaging, model: nn.Module, checkpoints: Checkpoints | None = None
) -> OMCStrategy:
    """Return the strategy of a variant; with adapters, clients with another base model are refused."""
    return OMCStrategy(
        inner,
        variant.policy(settings.seed),
        client_name=inner.part_of,
        checkpoints=checkpoints,
        base=fedomc.base_digest(model) if variant.method == LORA else (),
    )


def request(settings: Settings, variant: Variant, place: str) -> ConfigRecord:
    """Return the config that clients get with each message."""
    return ConfigRecord({**settings.to_dict(), "model": place, "variant": str(variant)})


def _run_variant(
    settings: Settings,
    variant: Variant,
    place: str,
    names: list[str],
    grid: Grid,
    folder: RunFolder,
    observer: Observer,
) -> dict[str, Any]:
    observer.started(variant)
    torch.set_num_threads(1)  # results do not depend on the machine
    model = server_model(settings, variant, place)
    inner = Averaging(settings, names, observer)
    checkpoints = Checkpoints(folder.path / "checkpoints" / re.sub(r"[^\w.+-]", "_", str(variant)), keep=1)
    strategy = strategy_of(settings, variant, inner, model, checkpoints)
    config = request(settings, variant, place)
    arrays = collect(model)
    tokenizer = models.tokenizer(place)

    def say(found: ArrayRecord) -> str:
        told = install(model, RecordDict({"arrays": found}), check_base=False)
        return training.sample(told, tokenizer, settings.prompt, settings.sample_tokens, settings.seed)

    before = _measure(strategy, grid, arrays, config, settings)  # it also finds out which node has which text
    random.seed(settings.seed)  # Flower's choice of clients
    began = time.monotonic()

    def note(number: int, _: ArrayRecord) -> None:
        if number:
            traffic = strategy.traffic[-1]
            row = {"round": number, "seconds": time.monotonic() - began, "clients": traffic.received}
            bytes_sent = {"down_bytes": traffic.down_bytes, "up_bytes": traffic.up_bytes}
            observer.round_done(variant, {**row, **bytes_sent, "loss": inner.loss})

    first = say(arrays)
    result = strategy.start(
        grid,
        arrays,
        num_rounds=settings.rounds,
        timeout=settings.round_timeout,
        train_config=config,
        evaluate_config=config,
        evaluate_fn=note,
    )
    return {
        **_figures(variant, result, strategy, models.fp32_bytes(place)),
        "before": before,
        "samples": {"before": first, "after": say(result.arrays)},
    }


def _measure(
    strategy: OMCStrategy, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, settings: Settings
) -> dict[str, Any]:
    """Have all clients measure a model before it is trained."""
    messages = strategy.configure_evaluate(0, arrays, config, grid)
    replies = list(grid.send_and_receive(messages, timeout=settings.round_timeout))
    metrics = strategy.aggregate_evaluate(0, replies)
    if metrics is None:
        reasons = sorted({str(reply.error.reason) for reply in replies if reply.has_error()})
        raise SettingsError(f"no client can measure the model: {'; '.join(reasons) or 'none answered'}")
    return _losses(metrics)


def _losses(metrics: MetricRecord) -> dict[str, Any]:
    losses = {key: float(cast(float, value)) for key, value in metrics.items()}
    clients = {key.removeprefix("loss/"): loss for key, loss in losses.items() if key != "loss"}
    return {"loss": losses["loss"], "perplexity": training.perplexity(losses["loss"]), "clients": clients}


def _figures(variant: Variant, result: Result, strategy: OMCStrategy, fp32_bytes: int) -> dict[str, Any]:
    trained = {number: dict(row) for number, row in result.train_metrics_clientapp.items()}
    measured = {number: _losses(row) for number, row in result.evaluate_metrics_clientapp.items()}
    if not trained or not measured:
        raise SettingsError(f"{variant}: no client returned a model: see the log")
    down = sum(t.down_bytes for t in strategy.traffic) / max(1, sum(t.sent for t in strategy.traffic))
    up = sum(t.up_bytes for t in strategy.traffic) / max(1, sum(t.received for t in strategy.traffic))
    held = max(float(cast(float, row["held-bytes"])) for row in trained.values())
    return {
        "variant": str(variant),
        "method": variant.method,
        "format": variant.format,
        "adapter_format": variant.adapter_format,
        "after": measured[max(measured)],
        "held_bytes": round(held),
        "down_bytes": round(down),
        "up_bytes": round(up),
        "held_ratio": held / fp32_bytes,
        "down_ratio": down / fp32_bytes,
        "up_ratio": up / fp32_bytes,
        "fp32_bytes": fp32_bytes,
        "history": [
            {"round": number, "training_loss": trained[number]["loss"], "loss": row["loss"]}
            for number, row in sorted(measured.items())
            if number in trained
        ],
    }


def _wait_for_nodes(grid: Grid, clients: int) -> None:
    deadline = time.monotonic() + WAIT
    while (found := len(list(grid.get_node_ids()))) < clients and time.monotonic() < deadline:
        time.sleep(0.2)
    if found != clients:
        raise SettingsError(
            f"there are {found} nodes, but {clients} texts: start a node for each, for instance with flwr run ... "
            f"--federation-config 'num-supernodes={clients}'"
        )
