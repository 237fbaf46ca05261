"""Models in bfloat16 and float16 on their way: dense variables arrive as they are, packed ones as codes."""

import io
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg
from torch import nn

import fedomc
from fedomc.errors import PayloadError
from fedomc.flower import OMCStrategy, collect, install
from fedomc.flower.arrays import BFLOAT16, array_of, read_dense, view_dense
from fedomc.flower.config import CONFIG, to_config
from tests.conftest import randn
from tests.flower.test_aggregation import Nodes

NARROW = [torch.bfloat16, torch.float16]


def model(dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 8)).to(dtype)


def content(arrays: ArrayRecord, policy: fedomc.CompressionPolicy | None = None) -> RecordDict:
    config = {} if policy is None else {CONFIG: to_config(policy.encoding())}
    return RecordDict({"arrays": arrays, **config})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("policy", ["", "S1E3M7>S1E2M1"])
def test_a_variable_in_another_order_in_memory_arrives_as_it_is(dtype: torch.dtype, policy: str) -> None:
    """A transposed parameter is columns first to numpy, whose files have an order of their own."""
    sender, receiver = nn.Linear(3, 5).to(dtype), nn.Linear(3, 5).to(dtype)
    sender.weight = nn.Parameter(torch.arange(15).view(3, 5).t().to(dtype))
    assert not sender.weight.is_contiguous()
    message = content(collect(sender), fedomc.CompressionPolicy.parse(policy) if policy else None)
    assert np.array_equal(message["arrays"]["weight"].numpy(), sender.weight.detach().double().numpy())
    assert torch.equal(install(receiver, message).weight, sender.weight)
    assert torch.equal(install(receiver, content(collect(sender, message))).weight, sender.weight)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("text", ["", "S1E3M7", "S1E2M3/64+S1E2M1/64", "S1E3M7>S1E2M1"])
def test_a_model_arrives_and_returns(dtype: torch.dtype, text: str) -> None:
    sent, policy = model(dtype), fedomc.CompressionPolicy.parse(text) if text else None
    if policy is not None:
        fedomc.compress_(sent, fedomc.CompressionPolicy.parse(text.partition("+")[0].partition(">")[0]))
    message = content(collect(sent), policy)
    dense = 2 * sum(p.numel() for p in sent.parameters() if not isinstance(p, fedomc.CompressedTensor))
    held = sum(p.nbytes for p in sent.parameters() if isinstance(p, fedomc.CompressedTensor))
    assert sum(len(array.data) for array in message["arrays"].values()) < dense + held + 1500
    with torch.device("meta"):
        received = model(dtype)
    install(received, message)
    x = randn(4, 64).to(dtype)
    assert torch.equal(received(x), sent(x)) and all(p.dtype is dtype for p in received.parameters())
    received(x).square().mean().backward()
    torch.optim.SGD(received.parameters(), lr=0.5).step()
    reply = collect(received, message)
    assert {array.dtype for array in reply.values() if array.stype == BFLOAT16} <= {"bfloat16"}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("text", ["", "S1E3M7", "S1E2M3/64+S1E2M1/64", "S1E3M7>S1E2M1"])
@pytest.mark.parametrize("inner", [FedAvg, FedAdam], ids=lambda cls: cls.__name__)
def test_the_server_aggregates_in_float32(dtype: torch.dtype, text: str, inner: type[FedAvg]) -> None:
    """In float16 or bfloat16 the sum of large opposite changes would leave nothing of the small ones."""
    policy, initial = fedomc.CompressionPolicy.parse(text) if text else None, collect(model(dtype))
    strategy = OMCStrategy(inner(fraction_evaluate=0.0, min_available_nodes=2), policy)
    (one, other) = strategy.configure_train(1, initial, ConfigRecord(), Nodes(2))  # type: ignore[arg-type]
    replies = []
    for message, changes in ((one, (0.25, 1e4)), (other, (0.5, -1e4))):
        trained = install(model(dtype, 1), message)
        with torch.no_grad():
            for place, change in enumerate(changes):
                trained[0].bias[place] = change
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": collect(trained, message), "metrics": metrics})
        replies.append(Message(content, reply_to=message))
    result, _ = strategy.aggregate_train(1, replies)
    assert result is not None
    assert {name: array.dtype for name, array in result.items()} == {name: a.dtype for name, a in initial.items()}
    mean = read_dense(result["0.bias"], "0.bias")
    assert mean.dtype is dtype
    if inner is FedAvg:
        assert mean[:2].tolist() == pytest.approx([0.375, 0.0], abs=1e-3)
    assert install(model(dtype, 2), RecordDict({"arrays": result}))[0].weight.dtype is dtype


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_values_are_read_as_they_were_written(shape: tuple[int, ...]) -> None:
    values = randn(*shape).bfloat16()
    array = array_of(values.float().numpy(), "bfloat16")
    assert (array.dtype, array.stype, len(array.data)) == ("bfloat16", BFLOAT16, 2 * values.numel())
    assert torch.equal(read_dense(array, "x", check=False), values) and torch.equal(read_dense(array, "x"), values)
    assert np.array_equal(array.numpy(), values.float().numpy()) and np.array_equal(
        view_dense(array, "x"), array.numpy()
    )


def written(shape: tuple[int, ...], *, columns_first: bool = False) -> Array:
    """Return an array of 0, 1, 2, ... as numpy writes it, in any order and of any shape that multiplies up."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": columns_first, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    values = np.arange(math.prod(shape), dtype=np.float32)
    return Array("float32", shape, "numpy.ndarray", file.getvalue() + values.tobytes())


def test_values_that_are_stored_columns_first_are_in_the_order_of_rows_afterwards() -> None:
    values = view_dense(written((2, 3), columns_first=True), "x")
    assert values.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert values.flags.c_contiguous  # a stretch of the flat values is then none of a copy of all
    assert not view_dense(written((2, 3)), "x").flags.owndata


@pytest.mark.parametrize(
    ("array", "wrong"),
    [
        (Array("bfloat16", (3,), BFLOAT16, b"\0" * 5), "x: 5 bytes do not hold"),
        (Array("bfloat16", (-1,), BFLOAT16, b""), "x: 0 bytes do not hold"),
        (Array("bfloat16", (-1, -3), BFLOAT16, b"\0" * 6), "x: 6 bytes do not hold"),
        (written((-1, -3)), "x: the data describe float32"),
        (Array("float32", (3,), BFLOAT16, b"\0" * 6), "do not hold float32"),
        (Array("bfloat16", (1,), BFLOAT16, b"\x80\x7f"), "x has a value that is NaN or infinite"),
    ],
)
def test_hostile_arrays_are_refused(array: Array, wrong: str) -> None:
    with pytest.raises(PayloadError, match=wrong):
        view_dense(array, "x")


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_another_dtype_is_refused(other: torch.dtype) -> None:
    with pytest.raises(PayloadError, match=r"weight has dtype torch\.float\d\d, but torch\.bfloat16 in the model"):
        install(model(torch.bfloat16), content(collect(model(other))))


def test_infinity_in_the_dtype_of_the_model_is_refused() -> None:
    sent = model(torch.float32)
    with torch.no_grad():
        sent[0].weight.fill_(1e6)
    fedomc.compress_(sent, policy := fedomc.CompressionPolicy("S1E3M7"))
    arrays = collect(sent)
    narrow = collect(model(torch.float16))
    for name in ("0.bias", "1.weight", "1.bias", "2.bias"):
        arrays[name] = narrow[name]
    with pytest.raises(PayloadError, match=r"0\.weight has a value that is NaN or infinite"):
        install(model(torch.float16), content(arrays, policy))
    assert math.isfinite(float(sent[0].weight.dequantize().max()))
