"""Tests of how replies are looked for: together where they are in this process, else one at a time."""

from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedomc.flower import StreamingGrid
from fedomc.flower import grid as grid_module
from fedomc.flower import in_flight as in_flight_module
from fedomc.flower.in_flight import InFlight


class Delayed(StreamingGrid):
    """A grid in which one more reply arrives at each look, the last message's first."""

    def __init__(self) -> None:
        self.sent: dict[str, Message] = {}
        self.looks: list[list[str]] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        named = {str(message.metadata.dst_node_id): message for message in messages}
        for key, message in named.items():
            message.metadata.__dict__["_message_id"] = key
        self.sent |= named
        return list(named)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.looks.append(list(message_ids))
        here = list(self.sent)[-len(self.looks) :]
        return [Message(RecordDict(), reply_to=self.sent.pop(key)) for key in self.looks[-1] if key in here]


def messages(count: int) -> list[Message]:
    return [Message(RecordDict({"c": ConfigRecord()}), node, "train") for node in range(1, count + 1)]


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "POLL_INTERVAL", 0.0)


@pytest.mark.parametrize(("held", "in_order", "looks"), [(True, False, 4), (False, False, 10), (True, True, 7)])
def test_each_reply_is_given_once(held: bool, in_order: bool, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "holds_replies", lambda grid: held)
    inner = Delayed()
    replies = StreamingGrid(inner, in_order=in_order).send_and_receive(messages(4))
    nodes = [reply.metadata.src_node_id for reply in replies]
    assert sorted(nodes) == [1, 2, 3, 4] and (not in_order or nodes == [1, 2, 3, 4])
    assert len(inner.looks) <= looks and (held and not in_order) == any(len(look) > 1 for look in inner.looks)


@pytest.mark.parametrize("held", [True, False])
def test_an_asynchronous_step_that_ends_between_two_replies_loses_none(
    held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "holds_replies", lambda grid: held)
    inner = Delayed()
    in_flight = InFlight(StreamingGrid(inner), timeout=60)
    in_flight.send(messages(4), None)  # type: ignore[arg-type]
    inner.looks = [[]] * 4  # all replies are there
    nodes = list[int]()
    while len(in_flight):
        flight, _ = next(in_flight.poll())  # a step ends after each reply
        nodes.append(flight.node)
    assert sorted(nodes) == [1, 2, 3, 4]


def test_a_reply_that_came_in_time_counts_however_long_the_steps_between_two_looks_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(in_flight_module.time, "monotonic", lambda: now)
    inner = Delayed()
    in_flight = InFlight(StreamingGrid(inner), timeout=60)
    in_flight.send(messages(3), None)  # type: ignore[arg-type]
    inner.looks = [[]]  # the first node's reply is not there when it is looked for, those of the others are
    assert next(in_flight.poll())[0].node == 2
    now = 1000.0  # the step that the reply completed took its time, in which the first node replied
    inner.looks = [[]] * 3
    found = [(flight.node, reply is not None) for _ in range(2) for flight, reply in in_flight.poll()]
    assert sorted(found) == [(1, True), (3, True)]
