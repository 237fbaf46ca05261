"""``omc_mod``: a client that only knows FP32 arrays, in a round of compressed messages."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import FitIns, Parameters
from flwr.compat.common.recorddict_compat import fitins_to_recorddict
from flwr.serverapp.strategy import FedAvg

import fedomc
from fedomc.flower import OMCStrategy, omc_mod
from fedomc.flower.arrays import STYPE, array_of, packed_array
from fedomc.flower.config import to_config
from fedomc.methods import Packed, encode
from fedomc.serialization import frame
from tests.conftest import allocations
from tests.flower.test_aggregation import SHAPE, Nodes, decode, model

STEP = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32) * 1e-3


def plain_client(change: Any = None) -> ClientApp:
    """Train with numpy alone."""
    app = ClientApp(mods=[omc_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        assert {array.stype for array in record.values()} == {"numpy.ndarray"}
        new = ArrayRecord({name: Array(array.numpy()) for name, array in record.items()})
        new["weight"] = Array(record["weight"].numpy() + STEP)
        if change is not None:
            new["weight"] = Array(change)
        content = RecordDict({"arrays": new, "metrics": MetricRecord({"num-examples": 3})})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        shape = message.content["arrays"]["weight"].numpy().shape
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": shape[0]})}), reply_to=message)

    return app


def context(node: int) -> Context:
    return Context(1, node, {}, RecordDict(), {})


POLICIES = [
    {"format": "S1E3M7"},
    {"format": "S1E4M8", "rounding": "stochastic"},
    {"format": "S1E2M1", "format_by_name": {"weight": "S1E3M7"}},
    {"format": "S1E2M3", "update_format": "S1E2M3"},
    {"format": "S1E2M3", "update_format": "S1E2M1", "rounding": "stochastic"},
]


@pytest.mark.parametrize("how", POLICIES)
def test_a_plain_client_takes_part_and_only_its_messages_are_compressed(how: dict[str, Any]) -> None:
    arrays, app = model(), plain_client()
    wrapped = OMCStrategy(FedAvg(), fedomc.CompressionPolicy(**how))  # type: ignore[arg-type]
    messages = list(wrapped.configure_train(1, arrays, ConfigRecord(), Nodes(3)))  # type: ignore[arg-type]
    sent = decode(messages[0], "weight")[0].reshape(SHAPE)
    replies = [app(message, context(message.metadata.dst_node_id)) for message in messages]
    up, is_update = decode(replies[0], "weight")
    assert {name: a.stype for name, a in replies[0].content["arrays"].items() if a.stype == STYPE} == {"weight": STYPE}
    assert is_update == ("update_format" in how)
    returned = up.reshape(SHAPE) if is_update else up.reshape(SHAPE) - sent
    whole = fedomc.FloatFormat.parse(
        how.get("update_format", how.get("format_by_name", {}).get("weight", how["format"]))
    )
    reach = np.abs(STEP if is_update else sent).max() * 2.0**-(whole.mantissa_bits)
    assert np.abs(returned - STEP).max() <= reach
    result, _ = wrapped.aggregate_train(1, replies)
    assert result is not None and wrapped.traffic[-1].received == 3
    moved = result["weight"].numpy() - arrays["weight"].numpy()
    assert np.abs(moved - STEP).max() <= reach + 1e-6
    assert wrapped.traffic[-1].up_bytes < 0.5 * 3 * sum(len(array.data) for array in arrays.values())


@pytest.mark.parametrize("text", [None, "S1E3M7", "S1E2M3+S1E2M1", "S1E3M7>S1E2M3", "S1E3M7>S1E2M3@0.5"])
def test_a_model_in_bfloat16_is_float32_to_a_plain_client_and_returns_as_it_came(text: str | None) -> None:
    arrays = ArrayRecord()
    for name, array in model().items():
        arrays[name] = array if array.dtype == "int64" else array_of(array.numpy(), "bfloat16")
    wrapped = OMCStrategy(FedAvg(), text)
    messages = list(wrapped.configure_train(1, arrays, ConfigRecord(), Nodes(3)))  # type: ignore[arg-type]
    app = plain_client()
    replies = [app(message, context(message.metadata.dst_node_id)) for message in messages]
    result, _ = wrapped.aggregate_train(1, replies)
    assert result is not None and wrapped.traffic[-1].received == 3
    assert {name: array.dtype for name, array in result.items()} == {name: a.dtype for name, a in arrays.items()}
    moved = result["weight"].numpy() - arrays["weight"].numpy()
    assert np.abs(moved - STEP).max() < 2e-3 and np.array_equal(result["bias"].numpy(), arrays["bias"].numpy())


def test_fp32_messages_evaluation_and_errors_pass_through() -> None:
    app = plain_client()
    for policy in (None, fedomc.CompressionPolicy(format="S1E3M7")):
        wrapped = OMCStrategy(FedAvg(), policy)
        for message in wrapped.configure_train(1, model(), ConfigRecord(), Nodes(2)):  # type: ignore[arg-type]
            packed = {array.stype for array in message.content["arrays"].values()} != {"numpy.ndarray"}
            assert packed == (policy is not None)
            reply = app(message, context(1))
            assert (reply.content["arrays"]["weight"].stype == STYPE) == packed
        for message in wrapped.configure_evaluate(1, model(), ConfigRecord(), Nodes(2)):  # type: ignore[arg-type]
            assert app(message, context(1)).content["metrics"]["num-examples"] == SHAPE[0]
    message = next(iter(OMCStrategy(FedAvg(), policy).configure_train(1, model(), ConfigRecord(), Nodes(2))))  # type: ignore[arg-type]
    failed = omc_mod(message, context(1), lambda m, c: Message(Error(code=1, reason="no"), reply_to=m))
    assert failed.has_error()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (np.zeros((3, 3), np.float32), fedomc.PayloadError),
        (np.zeros(SHAPE), fedomc.PayloadError),
        (np.full(SHAPE, np.nan, np.float32), fedomc.NonFiniteError),
    ],
)
def test_what_cannot_go_back_is_named(change: np.ndarray, error: type[Exception]) -> None:
    wrapped = OMCStrategy(FedAvg(), fedomc.CompressionPolicy(format="S1E3M7"))
    message = next(iter(wrapped.configure_train(1, model(), ConfigRecord(), Nodes(2))))  # type: ignore[arg-type]
    with pytest.raises(error, match="weight"):
        plain_client(change)(message, context(1))


def test_a_legacy_app_is_told_where_the_mod_belongs() -> None:
    app = ClientApp(lambda context: NumPyClient().to_client(), mods=[omc_mod])
    content = fitins_to_recorddict(FitIns(Parameters([b"1"], "numpy.ndarray"), {}), True)
    with pytest.raises(fedomc.PolicyError, match=r"legacy app .* flwr\.clientapp\.ClientApp .* flwr\.serverapp"):
        app(Message(content, 1, "train"), context(1))


def bomb(numel: int) -> tuple[Array, int]:
    """Return an array of zeros whose frame is far smaller than its values, and the bytes of these."""
    zeros = Packed.zeros(fedomc.FloatFormat(1, 0), numel, "cpu")
    return packed_array(zeros, (numel,), entropy_coding=True), 4 * numel


def test_a_small_message_does_not_become_a_huge_one() -> None:
    """Nothing is decoded before the whole message is known to be in proportion."""
    array, size = bomb(2**24)
    assert size > 10_000 * len(array.data)
    config = to_config(fedomc.CompressionPolicy(format="S1E1M0").encoding())
    for records in ({"arrays": {"zeros": array}}, {str(i): {"zeros": bomb(2**20)[0]} for i in range(16)}):
        arrays = {key: ArrayRecord(record) for key, record in records.items()}
        message = Message(RecordDict({**arrays, "fedomc": config}), 1, "train")

        def attempt(message: Message = message) -> None:
            says = r"zeros would expand to \d+ bytes .* fedomc\.flower\.install"
            with pytest.raises(fedomc.PayloadError, match=says):
                omc_mod(message, context(1), lambda m, c: m)

        assert sum(size for size in allocations(attempt) if size > 0) < 2**20


def test_a_variable_of_zeros_in_an_honest_message_is_decoded() -> None:
    zeros, size = bomb(2**18)
    assert size > frame.MAX_EXPANSION * len(zeros.data)
    weights = packed_array(encode(torch.randn(2**14), fedomc.FloatFormat(3, 7)), (2**14,))
    config = to_config(fedomc.CompressionPolicy(format="S1E3M7").encoding())
    arrays = ArrayRecord({"lora.A": weights, "lora.B": zeros})
    message = Message(RecordDict({"arrays": arrays, "fedomc": config}), 1, "train")
    found = omc_mod(message, context(1), lambda m, c: Message(m.content, reply_to=m))
    assert {name: array.stype for name, array in found.content["arrays"].items()} == {"lora.A": STYPE, "lora.B": STYPE}


def test_only_the_record_that_was_sent_goes_back_compressed() -> None:
    """As with SCAFFOLD, whose control variates are named as the variables."""
    wrapped = OMCStrategy(FedAvg(), fedomc.CompressionPolicy(format="S1E3M7"))
    messages = list(wrapped.configure_train(1, model(), ConfigRecord(), Nodes(2)))  # type: ignore[arg-type]

    def client(message: Message, _: Context) -> Message:
        arrays = message.content["arrays"]
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"control": arrays, "arrays": arrays, "metrics": metrics}), reply_to=message)

    replies = [omc_mod(message, context(1), client) for message in messages]
    assert replies[0].content["arrays"]["weight"].stype == STYPE
    assert replies[0].content["control"]["weight"].stype == "numpy.ndarray"
    assert wrapped.aggregate_train(1, replies)[0] is not None
