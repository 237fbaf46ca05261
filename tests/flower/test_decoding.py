"""Strategies that work value by value are given stretches: the same values, with less in memory at a time."""

import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, Strategy

import fedomc
from fedomc.codec import BLOCK
from fedomc.flower import OMCStrategy, decoding
from fedomc.flower.arrays import STYPE, packed_array, read_packed
from fedomc.methods import encode, parse_method
from fedomc.serialization import frame
from tests.flower.test_aggregation import Nodes

CLIENTS = 13  # the trimmed mean takes nine of them; numpy adds eight and more in another order if they are a column
INNER = {"median": FedMedian, "trimmed": lambda: FedTrimmedAvg(beta=0.2)}
POLICIES = {
    "one part": fedomc.CompressionPolicy(format="S1E3M7"),
    "two parts": fedomc.CompressionPolicy(format="S1E2M3", update_format="S1E2M3"),
    "blocks": fedomc.CompressionPolicy.parse("S1E2M3/64+S1E2M1/64"),
    "FP32": None,
}
SHAPES = {"odd": (3 * BLOCK + 1,), "weight": (5, BLOCK), "small": (3,), "none": (0, 4), "scalar": ()}


def model(shapes: dict[str, tuple[int, ...]]) -> ArrayRecord:
    draw = np.random.default_rng(0)
    values = {name: np.asarray(draw.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    return ArrayRecord({**{name: Array(one) for name, one in values.items()}, "steps": Array(np.array(41))})


def replies_to(messages: list[Message], lossless: bool = False) -> list[Message]:
    """Answer each message with changed values; every second one is entropy-coded if any is to be."""
    replies = []
    for message in messages:
        node, record = message.metadata.dst_node_id, ArrayRecord()
        draw = torch.Generator().manual_seed(node)
        policy = message.content.config_records.get("fedomc", {})
        for name, array in message.content["arrays"].items():
            step = torch.randn(tuple(array.shape), generator=draw) * 0.01
            if array.stype == STYPE:
                packed = read_packed(array, name, copy=True).packed
                is_update = policy.get("update_format") is not None
                value = step if is_update else packed.decode(torch.empty(packed.numel)).view(step.shape) + step
                method = parse_method(str(policy["update_format"])) if is_update else packed.method
                kind = frame.UPDATE if is_update else frame.VARIABLE
                changed = encode(value, method)
                record[name] = packed_array(changed, array.shape, kind, entropy_coding=lossless and node % 2 == 0)
            else:
                values = array.numpy()
                changed = values + (step.numpy() if values.dtype == np.float32 else 1)
                record[name] = Array(np.asarray(changed, values.dtype))
        metrics = MetricRecord({"num-examples": node})
        replies.append(Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message))
    return replies


def round_of(
    inner: Strategy, policy: fedomc.CompressionPolicy | None, aggregate: str, lossless: bool
) -> dict[str, np.ndarray]:
    strategy = OMCStrategy(inner, policy, aggregate=aggregate)
    messages = list(strategy.configure_train(1, model(SHAPES), ConfigRecord(), Nodes(CLIENTS)))  # type: ignore[arg-type]
    result, metrics = strategy.aggregate_train(1, replies_to(messages, lossless))
    assert result is not None and metrics is not None
    return {name: array.numpy() for name, array in result.items()}


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("aggregate", ["delta", "weights"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_stretches_give_the_bits_of_whole_variables(
    inner, policy, aggregate: str, lossless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    found = []
    for stretch in (BLOCK, 2 * BLOCK, 2**20):
        monkeypatch.setattr(decoding, "STRETCH", stretch)
        found.append(round_of(inner(), policy, aggregate, lossless))
    for other in found[1:]:
        assert list(other) == [*SHAPES, "steps"]
        for name, values in found[0].items():
            assert values.dtype == other[name].dtype and values.shape == SHAPES.get(name, ())
            np.testing.assert_array_equal(values, other[name])


def test_the_median_is_that_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "STRETCH", BLOCK)
    strategy = OMCStrategy(FedMedian(), None)
    messages = list(strategy.configure_train(1, model(SHAPES), ConfigRecord(), Nodes(CLIENTS)))  # type: ignore[arg-type]
    replies = replies_to(messages)
    sent = {name: np.stack([r.content["arrays"][name].numpy() for r in replies]) for name in SHAPES}
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None
    for name, values in sent.items():
        np.testing.assert_array_equal(result[name].numpy(), np.median(values, axis=0).astype(np.float32))


def test_names_of_variables_may_look_like_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "STRETCH", BLOCK)
    monkeypatch.setitem(SHAPES, f"weight[0:{BLOCK}]", (2 * BLOCK,))
    monkeypatch.setitem(SHAPES, f"weight[0:{BLOCK}][0:{BLOCK}]", (BLOCK,))
    found = round_of(FedMedian(), None, "delta", False)
    assert {name: values.shape for name, values in found.items() if name != "steps"} == SHAPES


def test_a_stretch_of_all_replies_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, replies = {"embedding": (2**11, 2**10)}, 16  # 8 MB, and 128 MB of all replies
    policy = fedomc.CompressionPolicy(format="S1E3M7")

    def peak(stretch: int) -> int:
        monkeypatch.setattr(decoding, "STRETCH", stretch)
        strategy = OMCStrategy(FedMedian(), policy)
        messages = list(strategy.configure_train(1, model(shapes), ConfigRecord(), Nodes(replies)))  # type: ignore[arg-type]
        answers = replies_to(messages)
        tracemalloc.start()
        try:
            strategy.aggregate_train(1, answers)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    size = 4 * 2**21
    assert peak(2**21) > 2 * replies * size  # stacked, and sorted in a copy
    assert peak(2**16) < 6 * size


def test_other_strategies_see_whole_variables() -> None:
    class Watching(FedMedian):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            replies = list(replies)
            assert [set(reply.content["arrays"]) for reply in replies] == [{*SHAPES, "steps"}] * CLIENTS
            return super().aggregate_train(server_round, replies)

    round_of(Watching(), POLICIES["one part"], "delta", False)
    round_of(Krum(num_malicious_nodes=1), POLICIES["one part"], "delta", False)
