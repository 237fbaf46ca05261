"""Messages: a model is filled from packed arrays and given back packed; what is wrong changes nothing."""

import io
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedomc
from fedomc.errors import PolicyError
from fedomc.flower import OMCStrategy, client, collect, install
from fedomc.flower import arrays as arrays_module
from fedomc.flower.arrays import STYPE, packed_array, read_packed
from fedomc.flower.config import CONFIG, to_config
from fedomc.methods import encode
from fedomc.serialization import frame
from fedomc.training import module_state
from tests.conftest import allocations
from tests.flower.test_aggregation import Nodes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


POLICIES = {
    "fp32": None,
    "one part": fedomc.CompressionPolicy("S1E3M7", fraction=0.5),
    "two parts": fedomc.CompressionPolicy("S1E2M3", update_format="S1E2M1", rounding="stochastic"),
}


def payload(policy: fedomc.CompressionPolicy | None) -> tuple[Model, RecordDict]:
    """Make a model and the message that carries it."""
    torch.manual_seed(0)
    model = Model()
    if policy is None:
        return model, RecordDict({"arrays": collect(model)})
    base = fedomc.CompressionPolicy(policy.format, fraction=policy.fraction)
    fedomc.compress_(model, base.select(model, round=1, client="a"))
    return model, RecordDict({"arrays": collect(model), CONFIG: to_config(policy.encoding(round=1, client="a"))})


@pytest.mark.parametrize("name", POLICIES)
def test_install_gives_the_model_that_was_collected(name: str) -> None:
    sent, message = payload(POLICIES[name])
    with torch.device("meta"):
        model = Model()
    assert install(model, message) is model
    for key, value in sent.state_dict().items():
        got = model.state_dict()[key]
        assert torch.equal(
            got.dequantize() if isinstance(got, fedomc.CompressedTensor) else got,
            value.dequantize() if isinstance(value, fedomc.CompressedTensor) else value,
        ), key
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_a_base_lies_in_the_message_and_one_part_does_not() -> None:
    for name, shared in (("two parts", True), ("one part", False)):
        _, message = payload(POLICIES[name])
        model = install(Model(), message)
        compressed = {n: p for n, p in model.named_parameters() if isinstance(p, fedomc.CompressedTensor)}
        assert compressed
        for key, parameter in compressed.items():
            memory = np.frombuffer(message["arrays"][key].data, dtype=np.uint8)
            start = memory.__array_interface__["data"][0]
            inside = start <= parameter.base.codes.data_ptr() < start + len(memory)
            assert inside is shared


def test_training_after_install_changes_only_the_update_and_collect_gives_it() -> None:
    _, message = payload(POLICIES["two parts"])
    before = {key: array.data for key, array in message["arrays"].items()}
    model = install(Model(), message)
    fedomc.step_in_backward(model, torch.optim.SGD, lr=0.1)
    model(torch.randn(8, 40)).square().mean().backward()
    assert {key: array.data for key, array in message["arrays"].items()} == before
    reply = collect(model)
    key = "inner.0.weight"
    assert reply[key].stype == STYPE
    # 4 bits a value, 8 bytes of transformation and a header, against 6 bits down
    assert len(reply[key].data) <= 40 * 64 * 4 / 8 + 64 < len(before[key])


@pytest.mark.parametrize("name", POLICIES)
def test_a_consumed_model_gives_the_same_arrays_and_can_be_filled_again(name: str) -> None:
    _, message = payload(POLICIES[name])
    model, other = install(Model(), message), install(Model(), message)
    for parameter in model.parameters():
        parameter.grad = torch.ones(parameter.shape)
    consumed, kept = collect(model, message, consume=True), collect(other, message)
    assert {key: array.data for key, array in consumed.items()} == {key: array.data for key, array in kept.items()}
    assert list(consumed) == list(kept)
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    again = collect(install(model, message), message)
    assert {key: array.data for key, array in again.items()} == {key: array.data for key, array in kept.items()}


def test_a_consumed_model_is_let_go_of_one_parameter_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, message = payload(POLICIES["one part"])
    model = install(Model(), message)
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    counts, real = [], client._written

    def counted(tensor: torch.Tensor, *rest: Any) -> Array:
        if isinstance(tensor, nn.Parameter):
            counts.append(sum(parameter() is not None for parameter in held))
        return real(tensor, *rest)

    monkeypatch.setattr(client, "_written", counted)
    collect(model, message, consume=True)
    assert counts == list(range(len(held), 0, -1))


def test_a_consumed_model_with_tied_weights_is_empty_under_both_names() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    model[1].weight = model[0].weight
    arrays = collect(model, consume=True)
    assert list(arrays) == ["0.weight", "0.bias", "1.bias"]
    assert model[1].weight is model[0].weight
    assert model[1].weight.is_meta


def test_a_model_that_is_stepped_in_backward_is_not_consumed() -> None:
    model = Model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stepping = fedomc.step_in_backward(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(PolicyError, match=r"inner\.0\.weight is stepped in backward .* call remove"):
        collect(model, consume=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    stepping.remove()
    collect(model, consume=True)


def test_an_fp32_copy_is_never_made() -> None:
    """No float tensor of a compressed variable's size is made by installing it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if type(x) is torch.Tensor and x.is_floating_point() and not x.is_meta:
                    made.append(x.numel())
            return result

    _, message = payload(POLICIES["two parts"])
    with torch.device("meta"):
        model = Model()
    with Watch():
        install(model, message)
    assert max(made) < 10 * 64


def replaced(message: RecordDict, key: str, array: Array | None) -> RecordDict:
    record = ArrayRecord()
    for name, old in message["arrays"].items():
        if name != key:
            record[name] = old
        elif array is not None:
            record[name] = array
    if key not in message["arrays"] and array is not None:
        record[key] = array
    return RecordDict({**dict(message.items()), "arrays": record})


W = "inner.0.weight"


def claiming(shape: tuple[int, ...]) -> bytes:
    """Write the header of a numpy file that claims a shape and holds nothing."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: replaced(m, W, None), f"{W} missing"),
        (lambda m: replaced(m, "other", m["arrays"][W]), "other unknown"),
        (lambda m: replaced(m, W, Array(np.zeros((64, 41), np.float32))), "shape"),
        (lambda m: replaced(m, W, Array(np.zeros((64, 40), np.float64))), "dtype"),
        (lambda m: replaced(m, W, Array(np.full((64, 40), np.nan, np.float32))), "NaN"),
        (lambda m: replaced(m, W, Array(np.zeros((64, 40), np.longdouble))), f"{W}: .*type"),
        (lambda m: replaced(m, W, Array("float32", (64, 40), STYPE, m["arrays"][W].data[:-1])), W),
        (lambda m: replaced(m, W, Array("float32", (64, 40), "pickle", b"\x80\x04N.")), "unknown"),
        (lambda m: replaced(m, W, Array("float32", (64, 40), "numpy.ndarray", b"\x80\x04N." * 999)), "not a numpy"),
        (lambda m: replaced(m, W, Array("float32", (2**40, 2**20), "numpy.ndarray", b"")), "shape"),
        (lambda m: replaced(m, W, Array("float32", (64, 40), "numpy.ndarray", claiming((64, 2**50)))), "describe"),
        (lambda m: RecordDict({"arrays": m["arrays"]}), "no 'fedomc'"),
        (lambda m: RecordDict({}), "0 array records"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_refused_and_the_model_stays(change, says: str) -> None:  # type: ignore[no-untyped-def]
    _, message = payload(POLICIES["two parts"])
    model = Model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = change(message)
    with pytest.raises(fedomc.PayloadError, match=says):
        install(model, wrong if isinstance(wrong, RecordDict) else RecordDict(dict(wrong)))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_a_buffer_that_no_message_carries_must_be_real() -> None:
    model = Model()
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(fedomc.PayloadError, match="table"):
        install(model, payload(None)[1])


def test_tied_weights_travel_once() -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Embedding(50, 16), "b": nn.Linear(16, 50, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    sent = tied()
    record = collect(sent)
    assert list(record) == ["a.weight"]
    model = install(tied(), RecordDict({"arrays": record}))
    assert model["a"].weight is model["b"].weight
    assert torch.equal(model["b"].weight, sent["a"].weight)
    with pytest.raises(fedomc.PayloadError, match="collect"):
        install(tied(), RecordDict({"arrays": ArrayRecord(sent.state_dict())}))


def test_a_compressed_buffer_becomes_dense() -> None:
    model = nn.Linear(40, 40)
    model.register_buffer("table", torch.randn(40, 40))
    record = collect(model)
    fedomc.compress_(model, fedomc.CompressionPolicy("S1E3M7").select(model))
    record["table"] = collect(model)["weight"]
    how = to_config(fedomc.CompressionPolicy("S1E3M7").encoding())
    install(model, RecordDict({"arrays": record, CONFIG: how}))
    assert type(model.table) is torch.Tensor


# ---- entropy coding and the format of unquantized variables ---------------------------------------------------------


def sent_and_trained(policy: fedomc.CompressionPolicy, rest: str | None, coded: bool) -> tuple[RecordDict, Model]:
    """Make a message with unquantized variables in a format, and a model that it filled, trained by a step."""
    unquantized_format = None if rest is None else fedomc.FloatFormat.parse(rest)
    model, message = payload(policy)
    record = ArrayRecord()
    for name, array in message["arrays"].items():
        if array.stype != STYPE and len(array.shape) == 2 and unquantized_format is not None:
            packed = encode(torch.from_numpy(array.numpy()), unquantized_format)
            array = packed_array(packed, tuple(array.shape), frame.DENSE, entropy_coding=True)
        record[name] = array
    how = to_config(policy.encoding(round=1, client="a"), entropy_coding=coded, unquantized_format=unquantized_format)
    message = RecordDict({"arrays": record, CONFIG: how})
    model = install(Model(), message)
    fedomc.step_in_backward(model, torch.optim.SGD, lr=0.1)
    torch.manual_seed(1)
    model(torch.randn(8, 40)).square().mean().backward()
    return message, model


@pytest.mark.parametrize("name", ["one part", "two parts"])
def test_a_reply_entropy_coded_has_the_same_values(name: str) -> None:
    message, model = sent_and_trained(POLICIES[name], None, True)
    plain, smaller = collect(model), collect(model, message)
    assert plain.keys() == smaller.keys()
    for key, array in plain.items():
        assert len(smaller[key].data) <= len(array.data)
        if array.stype == STYPE:
            sent = read_packed(message["arrays"][key], key, copy=True).packed
            a, b = read_packed(array, key, copy=True), read_packed(smaller[key], key, copy=True, sent=sent)
            assert a.kind == b.kind and torch.equal(a.packed.codes, b.packed.codes)
        else:
            assert array.data == smaller[key].data
    assert len(smaller[W].data) < len(plain[W].data)
    assert smaller[W].data[14] == (name == "one part")  # an update is a difference already
    silent = RecordDict({**message, CONFIG: to_config(POLICIES[name].encoding())})
    assert {k: a.data for k, a in collect(model, silent).items()} == {k: a.data for k, a in plain.items()}


def test_a_message_entropy_coded_fills_the_same_model() -> None:
    _, message = payload(POLICIES["two parts"])
    smaller = ArrayRecord()
    for key, array in message["arrays"].items():
        if array.stype == STYPE:
            array = packed_array(read_packed(array, key, copy=True).packed, tuple(array.shape), entropy_coding=True)
            assert array.data[13]
        smaller[key] = array
    filled = install(Model(), RecordDict({"arrays": smaller, CONFIG: message[CONFIG]}))
    for key, value in collect(install(Model(), message)).items():
        assert collect(filled)[key].data == value.data


@pytest.mark.parametrize("rest", ["S1E5M10", "S1E8M23"])
def test_unquantized_variables_arrive_in_their_format_and_go_back_as_updates(rest: str) -> None:
    message, model = sent_and_trained(POLICIES["one part"], rest, True)
    key = next(k for k, a in message["arrays"].items() if a.stype == STYPE and a.data[5] == frame.DENSE)
    parameter = dict(model.named_parameters())[key]
    assert not isinstance(parameter, fedomc.CompressedTensor)
    reply = read_packed(collect(model, message)[key], key, copy=True)
    assert (reply.kind, str(reply.packed.method)) == (frame.UPDATE, rest)
    sent = read_packed(message["arrays"][key], key, copy=True).packed.decode(torch.empty(parameter.numel()))
    step = parameter.detach().view(-1) - sent
    got = reply.packed.decode(torch.empty(parameter.numel()))
    assert step.abs().max() > 0 and (got - step).abs().max() <= step.abs().max() * 2**-10
    if rest == "S1E8M23":
        assert torch.equal(got, step)
    assert torch.equal(dict(install(Model(), message).named_parameters())[key].detach().view(-1), sent)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"entropy_coding": 1}, "entropy_coding=1"),
        ({"unquantized_format": "S1E5"}, "S1E5"),
        ({"unquantized_format": "S1E4M9"}, "S1E4M9"),
    ],
)
def test_wrong_instructions_are_refused(fields: dict[str, object], says: str) -> None:
    message, _ = sent_and_trained(POLICIES["one part"], "S1E5M10", False)
    config = ConfigRecord({**message[CONFIG], **fields})
    with pytest.raises(fedomc.PayloadError, match=says):
        install(Model(), RecordDict({**message, CONFIG: config}))


def test_a_reply_to_another_message_is_refused() -> None:
    message, model = sent_and_trained(POLICIES["one part"], None, True)
    with pytest.raises(fedomc.PayloadError, match=W):
        collect(model, replaced(message, W, Array(np.zeros((64, 41), np.float32))))
    with pytest.raises(fedomc.PayloadError, match="0 array records"):
        collect(model, RecordDict({CONFIG: message[CONFIG]}))


@pytest.mark.parametrize("how", [{}, {"entropy_coding": "both"}, {"unquantized_format": "S1E5M10"}])
@pytest.mark.parametrize("name", POLICIES)
def test_what_holds_values_is_real_also_where_new_tensors_are_made_on_the_meta_device(
    name: str, how: dict[str, Any]
) -> None:
    """A whole round inside ``torch.device("meta")``, as a client that never leaves it would run it."""
    plain, x = collect(Model()), torch.randn(4, 40)
    strategy = OMCStrategy(FedAvg(fraction_evaluate=0.0), POLICIES[name], **how)
    with torch.device("meta"):
        (message, other) = strategy.configure_train(1, plain, ConfigRecord(), Nodes(2))  # type: ignore[arg-type]
        model = install(Model(), message)
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)
        replies = []
        for each, record in ((message, collect(model, message)), (other, collect(install(Model(), other), other))):
            content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})})
            replies.append(Message(content, reply_to=each))
        result, _ = strategy.aggregate_train(1, replies)
    assert result is not None and strategy.traffic[-1].received == 2
    assert not np.array_equal(result["inner.0.weight"].numpy(), plain["inner.0.weight"].numpy())


def test_a_dense_variable_is_checked_and_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does numpy make a copy of its own, and the model's state is listed once."""
    plain = nn.Linear(1024, 1024)
    message = RecordDict({"arrays": collect(plain)})
    listed, checked = [], []
    of, is_finite = module_state.ModuleState.of, module_state.is_finite
    monkeypatch.setattr(module_state.ModuleState, "of", lambda module: listed.append(module) or of(module))
    monkeypatch.setattr(module_state, "is_finite", lambda tensor: checked.append(tensor.shape) or is_finite(tensor))
    monkeypatch.setattr(arrays_module, "_all_finite", lambda values: checked.append(values.shape) or True)
    with torch.device("meta"):
        model = nn.Linear(1024, 1024)
    tracemalloc.start()
    made = [size for size in allocations(lambda: install(model, message)) if size >= 2**20]
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert listed == [model] and checked == [(1024, 1024), (1024,)]
    assert made == [4 * 2**20] and numpy_peak < 2**20
    assert torch.equal(model.weight, plain.weight)
    with torch.no_grad():
        model.weight.zero_()
    assert np.array_equal(message["arrays"]["weight"].numpy(), plain.weight.detach().numpy())
