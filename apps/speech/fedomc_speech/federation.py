"""The rounds of a run: each format trains the same model on the same clients, and is measured."""

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from logging import INFO
from typing import Any, Protocol, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam

import fedomc
from fedomc.flower import OMCStrategy, RoundReport, StreamingGrid, collect, install
from fedomc.flower.tensorboard import TensorBoard
from fedomc.methods import Packed
from fedomc.serialization import frame
from fedomc.serialization.checkpointing import Checkpoint
from fedomc_speech import corpus, model, pretraining, training
from fedomc_speech.client import write_settings
from fedomc_speech.errors import RoundError, SettingsError
from fedomc_speech.run_folder import RunFolder
from fedomc_speech.settings import Settings, Variant
from fedomc_speech.tokens import Tokenizer, tokenizer_for

BETA_1, BETA_2 = 0.9, 0.99
TAU = 1e-7  # Flower's default of 1e-3 is larger than the updates and would stop the training
QUERY_TIMEOUT = 600.0  # seconds


class Observer(Protocol):
    """An observer of a run; it may ask to stop it."""

    def started(self, variant: Variant, first_round: int) -> None:
        """Called when a variant starts, or continues, with a round."""

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        """Called after each round with its row of the history."""

    def stop_requested(self) -> bool:
        """Return whether the run should stop before the next round."""
        return False


@dataclass(frozen=True)
class Clients:
    """The nodes of a federation.

    Attributes:
        nodes: the nodes' IDs, ordered by the part of the data that each holds.
    """

    nodes: tuple[int, ...]

    @classmethod
    def identify(cls, grid: Grid, expected: int, wait: float = 60.0) -> "Clients":
        """Ask all nodes which part of the data they hold, so that a seed chooses the same clients in every run.

        Args:
            grid: the grid of the nodes.
            expected: number of parts.
            wait: seconds to wait for so many nodes.

        Raises:
            SettingsError: the nodes do not hold all parts from 0 to ``expected - 1``, or one does not answer.
        """
        deadline = time.monotonic() + wait
        while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < deadline:
            time.sleep(0.2)
        messages = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
        parts: dict[int, int] = {}
        for reply in grid.send_and_receive(messages, timeout=QUERY_TIMEOUT):
            if reply.has_error():
                asked = {sent.metadata.message_id: sent.metadata.dst_node_id for sent in messages}
                node = asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
                raise SettingsError(f"node {node} does not answer: {reply.error.reason}")
            parts[int(cast(Any, reply.content["identity"])["partition-id"])] = reply.metadata.src_node_id
        if not set(range(expected)) <= set(parts):
            raise SettingsError(
                f"{len(nodes)} nodes hold {len(parts)} parts of the data, but there are {expected} clients: start as "
                f"many nodes, for instance with flwr run ... --federation-config 'num-supernodes={expected}'"
            )
        log(INFO, "parts 0, 1, ... of the data are held by nodes %s", ", ".join(str(parts[i]) for i in range(expected)))
        return cls(tuple(parts[i] for i in range(expected)))

    def name_of(self, node: int) -> int:
        """Return the part of the data that a node holds."""
        return self.nodes.index(node)


class _Cohort:
    """A view of a grid with only the nodes of one round's cohort."""

    def __init__(self, nodes: list[int]) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> list[int]:
        return self._nodes


def run(settings: Settings, grid: Grid, folder: RunFolder, observer: Observer, *, tensorboard: bool = False) -> bool:
    """Run all variants that are not finished, from the folder's checkpoint if it has one.

    Args:
        settings: settings of the run.
        grid: the grid of the nodes.
        folder: the folder for results and checkpoints.
        observer: the observer to notify.
        tensorboard: whether to write files for TensorBoard into the folder.

    Returns:
        False if the observer stopped the run.

    Raises:
        CorpusError: the corpus cannot be loaded, or is not the one that the settings name.
        RoundError: no client returned a model in a round.
        SettingsError: the settings do not fit the corpus, the nodes or the checkpoint.
    """
    loaded = corpus.load(settings.corpus, settings.corpus_path, settings.corpus_digest)
    parts = corpus.split(loaded.train, settings.split, settings.clients or None, settings.seed)
    check_cohort(settings, len(parts))
    clients = Clients.identify(grid, len(parts))
    tokenizer = tokenizer_for(loaded)

    def measure(network: model.SpeechModel) -> training.Errors:
        return training.word_errors(network, loaded.test, tokenizer)

    for variant in settings.variants:
        if not folder.finished(str(variant)):
            boards = [TensorBoard(folder.path / "tensorboard" / str(variant))] if tensorboard else []
            rounds = _Rounds(settings, variant, clients, tokenizer, measure, boards)
            if not rounds.run(grid, folder, observer):
                return False
    return True


def check_cohort(settings: Settings, clients: int) -> None:
    """Check that a round's cohort is not larger than the number of clients.

    Raises:
        SettingsError: it is larger.
    """
    if settings.cohort > clients:
        raise SettingsError(f"cohort={settings.cohort}, but there are only {clients} clients: make it smaller")


def bytes_of_a_visit(network: model.SpeechModel, unquantized: Collection[str] = ()) -> int:
    """Return the bytes of the arrays that a client with this model receives and sends in a round.

    Args:
        network: the model, compressed as the client holds it.
        unquantized: the names of the variables that partial quantization left in FP32.
    """
    held = sum(len(array.data) for array in collect(network).values())
    up, parameters = held, dict(network.named_parameters())
    compressed = {name: p for name, p in parameters.items() if isinstance(p, fedomc.CompressedTensor)}
    if (uplink := next((p.encoding.uplink for p in compressed.values()), None)) is not None:
        sent = [*compressed, *unquantized]
        sizes = [frame.size_of(Packed.zeros(uplink, parameters[n].numel(), "cpu"), parameters[n].shape) for n in sent]
        others = [array for name, array in collect(network).items() if name not in sent]
        up = sum(sizes) + sum(len(array.data) for array in others)
    update_bytes = sum(p.nbytes - p.base.nbytes for p in network.parameters() if isinstance(p, fedomc.CompressedTensor))
    return up + (fedomc.parameter_bytes(network).total - update_bytes if update_bytes else held)


def _noting_errors(replies: Iterator[Message], reasons: set[str]) -> Iterator[Message]:
    for reply in replies:
        if reply.has_error():
            reasons.add(str(reply.error.reason))
        yield reply
        del reply  # before the next one is there


class _Rounds:
    """The rounds of one variant."""

    def __init__(
        self,
        settings: Settings,
        variant: Variant,
        clients: Clients,
        tokenizer: Tokenizer,
        measure: Callable[[model.SpeechModel], training.Errors],
        boards: Sequence[TensorBoard],
    ) -> None:
        self.settings = settings
        self.variant = variant
        self.clients = clients
        self.measure = measure
        self.inner = FedAdam(
            fraction_evaluate=0.0,
            eta=settings.server_learning_rate,
            beta_1=BETA_1,
            beta_2=BETA_2,
            tau=TAU,
            min_train_nodes=1,
        )
        self.inner.min_available_nodes = 1
        self.strategy = OMCStrategy(
            self.inner,
            variant.policy(settings),
            aggregate=settings.aggregate,
            client_name=clients.name_of,
            entropy_coding=settings.entropy_coding,
            unquantized_format=settings.unquantized_format or None,
            observers=boards,
        )
        self.network = pretraining.starting_model(settings, tokenizer)
        self.arrays = collect(self.network)
        self.fp32_bytes = sum(len(array.data) for array in self.arrays.values())
        self.fp32_parameter_bytes = fedomc.parameter_bytes(self.network).fp32
        self.history: list[dict[str, Any]] = []
        self.variables: dict[str, dict[str, int | float]] = {}  # of the last round
        self.totals = {"seconds": 0.0, "messages": 0, "replies": 0, "down": 0, "up": 0, "held": 0.0, "rounds": 0}

    def run(self, grid: Grid, folder: RunFolder, observer: Observer) -> bool:
        """Run the missing rounds; return False if the observer stopped them."""
        first = self._resume(folder.load())
        observer.started(self.variant, first)
        for number in range(first, self.settings.rounds + 1):
            if observer.stop_requested():
                folder.add(self._result(finished=False))
                return False
            row = self._round(number, grid)
            self.history.append(row)
            folder.save(self._checkpoint(number))
            observer.round_done(self.variant, row)
        folder.add(self._result(finished=True))
        return True

    def _round(self, number: int, grid: Grid) -> dict[str, Any]:
        settings = self.settings
        began = time.monotonic()
        self.inner.eta = settings.server_learning_rate_in(number)
        draw = random.Random(f"{settings.seed} cohort {number}")  # noqa: S311
        cohort = _Cohort([self.clients.nodes[i] for i in draw.sample(range(len(self.clients.nodes)), settings.cohort)])
        messages = self.strategy.configure_train(number, self.arrays, write_settings(settings), cast(Grid, cohort))
        messages = sorted(messages, key=lambda message: self.clients.name_of(message.metadata.dst_node_id))
        reasons: set[str] = set()
        replies = StreamingGrid(grid, in_order=True).send_and_receive(messages, timeout=settings.round_timeout)
        arrays, metrics = self.strategy.aggregate_train(number, _noting_errors(replies, reasons))
        if arrays is None or metrics is None:
            raise RoundError(
                f"round {number}: no client returned a model: {'; '.join(sorted(reasons)) or 'see the log'}"
            )
        self.arrays = arrays
        traffic, report = self.strategy.traffic[-1], cast(RoundReport, self.strategy.report)
        self.variables = report.by_variable()
        for key, value in (
            ("messages", traffic.sent),
            ("replies", traffic.received),
            ("down", traffic.down_bytes),
            ("up", traffic.up_bytes),
            ("held", float(cast(float, metrics["parameter-bytes"]))),
            ("rounds", 1),
            ("seconds", time.monotonic() - began),
        ):
            self.totals[key] += value
        wer = None
        if number % settings.evaluate_every == 0 or number == settings.rounds:
            wer = self.measure(self._server_model()).word_error_rate
        return {
            "round": number,
            "loss": float(cast(float, metrics["loss"])),
            "clients": traffic.received,
            "down_bytes": self.totals["down"],
            "up_bytes": self.totals["up"],
            "seconds": self.totals["seconds"],
            "server_seconds": {
                "encode": report.encode_seconds,
                "decode": report.decode_seconds,
                "aggregate": report.aggregate_seconds,
            },
            "compression_error": report.compression_error,
            "wer": wer,
        }

    def _server_model(self) -> model.SpeechModel:
        install(self.network, RecordDict({"arrays": self.arrays}))
        return self.network

    def _result(self, *, finished: bool) -> dict[str, Any]:
        network = self._server_model()
        full = compressed = self.measure(network)
        policy = self.variant.policy(self.settings)
        if policy is not None:
            transform = policy.encoding().transform  # of the base, as it was sent
            whole = replace(policy, fraction=1.0, update_format=None, transform=transform, rounding="nearest")
            compressed = self.measure(cast(Any, fedomc.compress_(network, whole.select(network))))
            fedomc.decompress_(network)
        totals = self.totals
        held = totals["held"] / max(1, totals["rounds"])
        down = totals["down"] / max(1, totals["messages"])
        up = totals["up"] / max(1, totals["replies"])
        return {
            "variant": str(self.variant),
            "format": self.variant.format,
            "fraction": self.variant.fraction,
            "finished": finished,
            "rounds": len(self.history),
            "wer": full.word_error_rate,
            "wer_compressed": compressed.word_error_rate,
            "utterances": {
                "words": list(full.words),
                "errors": list(full.errors),
                "errors_compressed": list(compressed.errors),
            },
            "parameter_bytes": round(held),
            "parameter_ratio": held / self.fp32_parameter_bytes,
            "down_bytes": round(down),
            "up_bytes": round(up),
            "down_ratio": down / self.fp32_bytes,
            "up_ratio": up / self.fp32_bytes,
            "rounds_per_minute": 60 * len(self.history) / totals["seconds"] if totals["seconds"] else 0.0,
            "variables": self.variables,
            "history": self.history,
        }

    def _checkpoint(self, number: int) -> Checkpoint:
        progress = {
            "variant": str(self.variant),
            "round": number,
            "history": self.history,
            "totals": self.totals,
            "variables": self.variables,
        }
        arrays = {
            "model": {name: array.numpy() for name, array in self.arrays.items()},
            "m": dict(self.inner.m_t or {}),
            "v": dict(self.inner.v_t or {}),
        }
        return Checkpoint(progress, arrays)

    def _resume(self, checkpoint: Checkpoint | None) -> int:
        """Restore a checkpoint of this variant, and return the first round to run."""
        if checkpoint is None or checkpoint.progress.get("variant") != str(self.variant):
            return 1
        stored = checkpoint.arrays.get("model", {})
        if {n: v.shape for n, v in stored.items()} != {n: tuple(a.shape) for n, a in self.arrays.items()}:
            raise SettingsError("the checkpoint is of another model: start again without --resume")
        record = ArrayRecord()
        for name in self.arrays:
            record[name] = Array(np.ascontiguousarray(stored[name]))
        self.arrays = record
        self.inner.m_t = dict(checkpoint.arrays.get("m", {})) or None
        self.inner.v_t = dict(checkpoint.arrays.get("v", {})) or None
        try:
            self.history = list(checkpoint.progress["history"])
            self.totals = dict(checkpoint.progress["totals"])
            self.variables = dict(checkpoint.progress["variables"])
        except KeyError as error:
            raise SettingsError(f"the checkpoint has no {error}: start again without --resume, or delete it") from None
        return int(checkpoint.progress["round"]) + 1
