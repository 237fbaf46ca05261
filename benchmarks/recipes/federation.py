"""One run: a federation in this process, whose clients train as a cell says and whose server is one of Flower's."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx
from torch import Tensor, nn

import fedomc
from benchmarks.recipes.design import Cell
from benchmarks.recipes.tasks import CLIENTS, Examples, Task
from fedomc.flower import OMCStrategy, collect, install, step_metrics
from fedomc.flower.in_process import InProcess

FP32 = "FP32"
MOMENTUM = 0.9
"""Of the clients' SGD in an epoch, and of FedAvgM."""
PROXIMAL = 0.01
"""The weight of FedProx's term."""
CLIP_NORM = 1.0
STEP_KEPT = "fedomc.step-kept"


class RunError(Exception):
    """A client failed: no result would be one of the recipe."""


@dataclass(frozen=True)
class Rates:
    """The learning rates of a cell at its start; along the rounds one of them falls to zero on a half cosine.

    Attributes:
        client: of the clients' optimizer. It is the one that falls, but with FedAdam.
        server: of FedAdam, where it falls; 1 otherwise.
    """

    client: float
    server: float = 1.0


def policy_of(format: str, task: Task, seed: int) -> fedomc.CompressionPolicy | None:
    """Return the policy that a string such as ``S1E2M3+S1E3M0`` means here; None for FP32.

    Rounding is stochastic in one part and in two. With an uplink the change of all variables goes up in it, as no task
    has running statistics.
    """
    if format == FP32:
        return None
    return fedomc.CompressionPolicy.parse(
        format,
        rounding="stochastic",
        seed=seed,
        exclude=tuple(task.exclude),
        uplink_include=("*",) if ">" in format else (),
    )


def run(
    task: Task, cell: Cell, format: str, seed: int, rates: Rates, *, part: str = "test", rounds: int | None = None
) -> dict[str, Any]:
    """Train once and measure the server's last model.

    Args:
        task: the task that the cell names.
        cell: how to train.
        format: of the policy, or FP32.
        seed: of the first model, the split, the batches and all that is random in them, and of the policy.
        rates: the learning rates.
        part: what is measured: ``validation`` while rates are chosen, or ``test``.
        rounds: number of rounds; None is the task's.

    Returns:
        ``score``, ``memory_ratio``, ``down_ratio`` and ``up_ratio`` (of FP32's bytes, per client and round),
        ``step_kept`` (None if the clients do not report it), ``losses`` by round, ``warnings`` and ``seconds`` of
        computing, which do not grow with what else the machine does.

    Raises:
        RunError: a client failed.
    """
    began = time.process_time()
    rounds = rounds or task.rounds[cell.local]
    torch.manual_seed(seed)
    model = task.model()
    arrays = collect(model)
    fp32_bytes = sum(len(array.data) for array in arrays.values())
    nodes = Nodes(task, cell, seed, rates, rounds)
    with noted_warnings():  # Flower's, of fraction_evaluate
        inner = server(cell.server, rates)

    def lower(report: Any) -> None:  # before the next round
        if isinstance(inner, FedAdam):
            inner.eta = rates.server * remaining(report.round, rounds)

    strategy = OMCStrategy(inner, policy_of(format, task, seed), client_name=nodes.part_of, observers=[lower])
    with noted_warnings() as noted:
        result = strategy.start(nodes, arrays, num_rounds=rounds)  # type: ignore[arg-type]
    install(model, RecordDict({"arrays": result.arrays}))
    model.eval()
    with torch.no_grad():
        score = task.score(model, task.examples(part))
    metrics = list(result.train_metrics_clientapp.values())
    if not metrics:
        raise RunError(f"{cell}, {format}, seed {seed}: no client returned a model: {'; '.join(noted)}")
    kept = [float(row[STEP_KEPT]) for row in metrics if STEP_KEPT in row]  # type: ignore[arg-type]
    return {
        "score": score,
        "memory_ratio": mean([float(row["memory-ratio"]) for row in metrics]),  # type: ignore[arg-type]
        "down_ratio": mean([t.down_bytes / t.sent for t in strategy.traffic]) / fp32_bytes,
        "up_ratio": mean([t.up_bytes / t.received for t in strategy.traffic if t.received]) / fp32_bytes,
        "step_kept": mean(kept) if kept else None,
        "losses": [float(row["loss"]) for row in metrics if "loss" in row],  # type: ignore[arg-type]
        "warnings": noted,
        "seconds": time.process_time() - began,
    }


def server(name: str, rates: Rates) -> FedAvg:
    """Return Flower's strategy; its other settings are Flower's defaults."""
    if name == "FedAvgM":
        return FedAvgM(fraction_evaluate=0.0, server_momentum=MOMENTUM)
    if name == "FedAdam":
        return FedAdam(fraction_evaluate=0.0, eta=rates.server)
    if name == "FedProx":
        return FedProx(fraction_evaluate=0.0, proximal_mu=PROXIMAL)
    return FedAvg(fraction_evaluate=0.0)


def remaining(done: int, rounds: int) -> float:
    """Return the share of a learning rate that is left after some of the rounds."""
    return (1 + math.cos(math.pi * done / rounds)) / 2


class Nodes(InProcess):
    """The clients; each trains when its reply is pulled."""

    def __init__(self, task: Task, cell: Cell, seed: int, rates: Rates, rounds: int) -> None:
        super().__init__(ClientApp(), CLIENTS)
        self.task, self.cell, self.seed, self.rates, self.rounds = task, cell, seed, rates, rounds
        self.data = task.clients(cell.split, seed)

    def answers(self, message: Message) -> list[Message]:
        """Train the model that a message carries.

        A client whose training diverges answers with an error, as in any federation; another error ends the run.
        """
        part = self.part_of(message.metadata.dst_node_id)
        config: Any = message.content["config"]
        number = int(config["server-round"])
        falling = 1.0 if self.cell.server == "FedAdam" else remaining(number - 1, self.rounds)
        rate = self.rates.client * falling
        try:
            model = install(self.task.skeleton(), message)
            torch.manual_seed((self.seed * 1009 + number) * CLIENTS + part)
            loss, seen = train(self.task, self.cell.local, model, self.data[part], rate, proximal(config))
            held = fedomc.parameter_bytes(model).ratio
            figures = {"num-examples": seen, "loss": loss, "memory-ratio": held, **step_metrics(model)}
            content = RecordDict({"arrays": collect(model, message), "metrics": MetricRecord(figures)})
        except fedomc.NonFiniteError as error:
            return [Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)]
        except Exception as error:
            raise RunError(f"{self.cell}, seed {self.seed}, round {number}, client {part}: {error!r}") from error
        return [Message(content, reply_to=message)]


def proximal(config: ConfigRecord) -> float:
    """Return the weight of the proximal term that a strategy sends; 0 if it sends none."""
    return float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]


def train(
    task: Task, local: str, model: nn.Module, examples: Examples, rate: float, proximal: float = 0.0
) -> tuple[float, int]:
    """Do a client's work of a round.

    One step and four are steps of SGD in the backward pass; an epoch has an optimizer of torch.

    Args:
        task: what the model learns.
        local: one of ``design.LOCALS``.
        model: plain or compressed; it is trained in place.
        examples: the client's own.
        rate: the learning rate.
        proximal: the weight of FedProx's term, which holds the model to the one that was received.

    Returns:
        The mean loss, and the number of examples that were used.
    """
    model.train()
    received = [one.detach().clone() for one in model.parameters()] if proximal else []
    order = torch.randperm(len(examples)).split(task.batch)
    step: Callable[[], Any]
    if local.startswith("epoch"):
        chosen = order
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(model.parameters(), lr=rate)
            if local == "epoch-adamw"
            else torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
        )

        def step() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()

    else:
        steps = int(local.partition("-")[0])
        chosen = (order * steps)[:steps]
        fedomc.step_in_backward(model, torch.optim.SGD, lr=rate, clip_norm=CLIP_NORM)

        def step() -> None:
            pass

    losses, seen = [], 0
    for indices in chosen:
        loss = task.loss(model, examples[indices])
        losses.append(loss.item())
        if proximal:
            loss = loss + proximal / 2 * distance(model, received)
        loss.backward()  # type: ignore[no-untyped-call]
        step()
        seen += len(indices)
    return mean(losses), seen


def distance(model: nn.Module, received: list[Tensor]) -> Tensor:
    """Return the squared distance of a model from the one that was received."""
    pairs = zip(model.parameters(), received, strict=True)
    return torch.stack([(parameter - there).square().sum() for parameter, there in pairs]).sum()


def mean(values: list[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """Collect the warnings of a block, each text once, from the loggers of Flower and fedomc and from ``warnings``."""
    noted: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    def note(text: str) -> None:
        if text not in noted:
            noted.append(text)

    handler = Noting(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("flwr", "fedomc")]
    before = [(list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield noted
        for one in caught:
            if not issubclass(one.category, DeprecationWarning | FutureWarning):
                note(f"{one.category.__name__}: {one.message}")
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
