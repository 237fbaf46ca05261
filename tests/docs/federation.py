"""Runs the server and the clients that a page defines, as Flower's engines do, in this process."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedomc.flower import OMCStrategy
from tests.flower.test_aggregation import Network

NODES = 2


@dataclass
class Federation:
    """What a run gave.

    Attributes:
        strategy: the strategy that the server started.
        initial: the arrays that it started with.
        result: what it returned.
        replies: of the clients, in their order.
    """

    strategy: OMCStrategy
    initial: ArrayRecord
    result: Any
    replies: list[Message]


def federate(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Federation:
    """Run the ``server`` and the ``client`` of a page with two nodes."""
    started: list[tuple[OMCStrategy, ArrayRecord, Any]] = []
    replies: list[Message] = []
    start = OMCStrategy.start

    def watched(strategy: OMCStrategy, grid: Any, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
        started.append((strategy, initial_arrays, start(strategy, grid, initial_arrays, *args, **kwargs)))
        return started[-1][2]

    def answer(message: Message) -> Message:
        context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
        try:
            reply: Message = names["client"](copy.copy(message), context)
        except Exception as error:
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)
        replies.append(reply)
        return reply

    monkeypatch.setattr(OMCStrategy, "start", watched)
    names["server"](Network(NODES, answer), Context(1, 0, {}, RecordDict(), {}))
    ((strategy, initial, result),) = started
    return Federation(strategy, initial, result, replies)
