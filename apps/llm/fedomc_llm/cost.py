"""What a run costs, measured before it starts: each variant's visit to one client, with one local step."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedomc.flower import collect
from fedomc.flower.in_process import InProcess
from fedomc_llm import federation, texts
from fedomc_llm.client import adapted, app
from fedomc_llm.settings import Settings, Variant


@dataclass(frozen=True)
class Cost:
    """The cost of a visit to a client.

    Attributes:
        step_seconds: of a local step on one core.
        down_bytes: of the arrays that a client receives.
        up_bytes: of those that it returns.
        held_bytes: of its parameters and its optimizer's state.
    """

    step_seconds: float
    down_bytes: int
    up_bytes: int
    held_bytes: int


class _NeverStopped:
    def started(self, variant: Variant) -> None:
        pass

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


def cost_of(settings: Settings, variant: Variant, place: str) -> Cost:
    """Have the first client train one step, and another one to time it.

    Raises:
        ModelError: the model cannot be read.
        TextError: the client's text is too short.
        RuntimeError: the client failed.
    """
    name = texts.read(settings.texts)[0].name
    model = federation.server_model(settings, variant, place)
    inner = federation.Averaging(replace(settings, cohort=1), [name], _NeverStopped())
    strategy = federation.strategy_of(settings, variant, inner, model)
    arrays = collect(model)
    del model
    grid: Any = InProcess(app, 1)
    taken = []
    for steps in (1, 2):
        config = federation.request(replace(settings, local_steps=steps), variant, place)
        [message] = strategy.configure_train(1, arrays, config, grid)
        content = RecordDict(dict(message.content.items()))
        began = time.perf_counter()
        [reply] = grid.send_and_receive([Message(content, message.metadata.dst_node_id, "train")])
        taken.append(time.perf_counter() - began)
        if reply.has_error():
            raise RuntimeError(f"{variant}: {reply.error.reason}")
    adapted.cache_clear()
    metrics = reply.content["metrics"]
    return Cost(
        step_seconds=max(taken[1] - taken[0], taken[1] / 4),
        down_bytes=_size(content.array_records.values()),
        up_bytes=_size(reply.content.array_records.values()),
        held_bytes=int(metrics["held-bytes"]),
    )


def _size(records: Iterable[ArrayRecord]) -> int:
    return sum(len(array.data) for record in records for array in record.values())
