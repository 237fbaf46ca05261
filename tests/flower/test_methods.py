"""Every registered method, and one that only the tests know, through a round of Flower."""

from collections.abc import Iterator

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedomc import CompressionPolicy
from fedomc.flower import OMCStrategy, collect, install
from fedomc.methods import parse_method, register, unregister
from tests.conftest import randn
from tests.flower.test_aggregation import Nodes
from tests.methods.signs import Signs
from tests.methods.test_conformance import METHODS, SENT


@pytest.fixture(autouse=True, scope="module")
def signs() -> Iterator[None]:
    register(Signs)
    yield
    unregister(Signs)


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name in METHODS for part in ("{}", "S1E3M7+{}", "S1E4M9>{}") if ">" in part or name not in SENT],
)
def test_a_round_of_flower(name: str, part: str) -> None:
    """What is sent, held and sent back is of the method, and the server moves the way that the clients moved."""
    policy = CompressionPolicy.parse(part.format(name))
    torch.manual_seed(0)
    strategy = OMCStrategy(FedAvg(fraction_evaluate=0.0), policy)
    arrays, replies = collect(nn.Linear(70, 60)), []
    before = torch.from_numpy(arrays["weight"].numpy().copy())
    step = randn(60, 70) * 0.05
    for message in strategy.configure_train(1, arrays, ConfigRecord(), Nodes(3)):  # type: ignore[arg-type]
        with torch.device("meta"):
            model = install(nn.Linear(70, 60), message)
        encoding = model.weight.encoding
        assert (encoding.uplink or encoding.methods[-1]) == parse_method(name)
        with torch.no_grad():
            model.weight.sub_(step)
        content = RecordDict({"arrays": collect(model, message), "metrics": MetricRecord({"num-examples": 2})})
        replies.append(Message(content, reply_to=message))
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None and strategy.traffic[-1].received == 3
    moved = before - torch.from_numpy(result["weight"].numpy())
    assert float(torch.cosine_similarity(moved.view(-1), step.view(-1), dim=0)) > (0.2 if name == "SIGNS" else 0.6)
