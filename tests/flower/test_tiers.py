"""Tiers: what a node announces decides its format, and a round of mixed formats aggregates rightly."""

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import fedomc
from fedomc.flower import OMCStrategy, announce
from fedomc.flower.arrays import STYPE
from tests.flower.test_aggregation import Nodes, answer, decode, model

TIERS = fedomc.TieredPolicy(
    {
        "large": None,
        "middle": fedomc.CompressionPolicy(format="S1E3M7"),
        "small": fedomc.CompressionPolicy(format="S1E2M3", update_format="S1E2M1"),
    },
    default="middle",
)

CONFIGS: dict[int, dict[str, Any]] = {
    1: {"tier": "large"},
    2: {"tier": "small"},
    3: {"memory-bytes": 10**6},
    4: {"memory-bytes": 4000},
    5: {"memory-bytes": 1},
    6: {},
    7: {"tier": "unheard of"},
    8: {"memory-bytes": -3},
}
WANTED = {1: "FP32", 2: "S1E2M3", 3: "FP32", 4: "S1E3M7", 5: "S1E2M3", 6: "S1E3M7", 7: "S1E3M7", 8: "S1E3M7"}


class Announcing(Nodes):
    """Nodes whose app answers queries, but for the last, which has none."""

    def __init__(self) -> None:
        super().__init__(len(CONFIGS) + 1)
        self.asked: list[int] = []
        self.app = ClientApp()
        self.app.query("fedomc")(announce)

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(node)
            if node not in CONFIGS:
                replies.append(Message(Error(code=1, reason="no such query"), reply_to=message))
                continue
            context = Context(1, node, CONFIGS[node], RecordDict(), {})
            replies.append(self.app(message, context))
        return replies


def format_of(message: Message) -> str:
    config = message.content.config_records.get("fedomc")
    packed = message.content["arrays"]["weight"].stype == STYPE
    assert packed == (config is not None)
    return "FP32" if config is None else str(config["format"])


@pytest.mark.parametrize("aggregate", ["delta", "weights"])
def test_a_client_gets_its_tier_and_the_mixed_round_is_the_mean(aggregate: str) -> None:
    arrays: ArrayRecord = model()
    wrapped = OMCStrategy(FedAvg(), TIERS, aggregate=aggregate)
    grid = Announcing()
    messages = list(wrapped.configure_train(1, arrays, ConfigRecord(), grid))  # type: ignore[arg-type]
    assert {m.metadata.dst_node_id: format_of(m) for m in messages} == {**WANTED, 9: "S1E3M7"}
    shared: dict[str, set[int]] = {}
    for message in messages:
        shared.setdefault(format_of(message), set()).add(id(message.content["arrays"]["weight"]))
    assert {key: len(ids) for key, ids in shared.items()} == {"FP32": 1, "S1E3M7": 1, "S1E2M3": 1}
    replies = [answer(message, 1e-3) for message in messages]
    wanted, total = np.zeros(arrays["weight"].numpy().size), 0
    for message, reply in zip(messages, replies, strict=True):
        weight = message.metadata.dst_node_id
        was, (now, is_update) = decode(message, "weight")[0], decode(reply, "weight")
        start = was if aggregate == "weights" else arrays["weight"].numpy().ravel()
        wanted += weight * (start + (now if is_update else now - was))
        total += weight
    result, _ = wrapped.aggregate_train(1, iter(replies))
    assert result is not None
    np.testing.assert_allclose(result["weight"].numpy().ravel(), wanted / total, atol=1e-6)
    list(wrapped.configure_train(2, result, ConfigRecord(), grid))  # type: ignore[arg-type]
    assert sorted(grid.asked) == [*range(1, 10), 9]  # who has answered is not asked again


def test_nonsense_is_refused() -> None:
    for tiers, default in (({}, ""), ({"a": None}, "b")):
        with pytest.raises(fedomc.PolicyError):
            fedomc.TieredPolicy(tiers, default)
    with pytest.raises(fedomc.PolicyError, match="large, middle, small"):
        TIERS.choose(tier="huge")
    with pytest.raises(fedomc.PolicyError, match="positive"):
        TIERS.choose({"x": (40, 50)}, memory_bytes=0)


def test_the_budget_is_that_of_the_compressed_model_in_training() -> None:
    import torch

    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    for name, policy in list(TIERS.tiers.items())[1:]:
        assert policy is not None
        compressed = fedomc.compress_(
            torch.nn.Sequential(*map(torch.nn.Linear, (64, 128), (128, 64))), policy.select(network)
        )
        held = fedomc.parameter_bytes(compressed).total
        assert TIERS.choose(network, memory_bytes=held) is policy
        assert TIERS.choose(network, memory_bytes=held - 1) is not policy or name == "small"
