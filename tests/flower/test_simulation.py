"""What runs federations on one machine: signals, and a federation in one process. Ray's is tested with the apps."""

import os
import signal

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedomc import OMCError
from fedomc.flower import FedBuff, OMCStrategy
from fedomc.flower.in_process import InProcess
from fedomc.flower.simulation import stop_on_signal

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    part = int(context.node_config["partition-id"])
    if part == 2:
        raise ValueError("no memory")
    return Message(RecordDict({"metrics": MetricRecord({"part": part})}), reply_to=message)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_the_second_stops(number: signal.Signals) -> None:
    before, calls = signal.getsignal(number), []
    with stop_on_signal(lambda: calls.append("notified")) as stop:
        os.kill(os.getpid(), number)
        assert stop.is_set() and calls == ["notified"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before and calls == ["notified"]


def test_nodes_answer_for_their_parts_and_an_error_ends_that_of_one_client_alone() -> None:
    nodes = InProcess(client, 3, first=10)
    assert nodes.get_node_ids() == [10, 11, 12]
    replies = nodes.send_and_receive([Message(RecordDict(), node, "train") for node in nodes.get_node_ids()])
    assert [reply.content["metrics"]["part"] for reply in replies[:2]] == [0, 1]
    assert replies[2].has_error() and replies[2].error.reason.endswith("no memory")


def test_each_node_works_once_whatever_is_pushed_before_its_reply_is_pulled() -> None:
    nodes = InProcess(client, 2, first=10)
    first, second = ([Message(RecordDict(), node, "train")] for node in (10, 11))
    names = [*nodes.push_messages(first), *nodes.push_messages(second), *nodes.push_messages(first)]
    assert len(set(names)) == 3
    assert [reply.content["metrics"]["part"] for reply in nodes.pull_messages(names)] == [0, 1, 0]
    assert nodes.pull_messages(names) == []


def test_a_strategy_that_waits_for_nodes_that_will_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    strategy = OMCStrategy(FedAvg(fraction_evaluate=0.0))  # which waits for two
    arrays = ArrayRecord({"x": Array(np.ones(3, np.float32))})
    with pytest.raises(OMCError, match=r"waits for more than the 1 nodes of InProcess.*min_available_nodes"):
        strategy.start(InProcess(ClientApp(), 1), arrays, num_rounds=1)


def test_an_asynchronous_run_takes_it_too() -> None:
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    strategy = FedBuff(FedAvg(fraction_train=0.5, fraction_evaluate=0.0), None, buffer_size=2)
    arrays = ArrayRecord({"x": Array(np.ones(3, np.float32))})
    strategy.start(InProcess(app, 8), arrays, num_rounds=3)
    assert [row.received for row in strategy.traffic] == [2, 2, 2]
