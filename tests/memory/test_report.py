import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.architectures import ARCHITECTURES
from benchmarks.architectures import loss as loss_of
from fedomc import (
    DEFAULT,
    CompressedTensor,
    CompressionPolicy,
    FormatError,
    MemoryBytes,
    OMCError,
    PolicyError,
    compress_,
    memory_report,
    parameter_bytes,
    step_in_backward,
)
from fedomc._torch import tree_map
from fedomc.activations import slabs
from fedomc.codec.workspace import Workspace
from fedomc.flower import OMCStrategy, collect, install
from fedomc.flower.config import CONFIG, from_config
from fedomc.memory.report import FORMATS
from fedomc.training.selection import arrived_bytes
from tests.conftest import allocations, assert_same_parameters, compressed, randn
from tests.flower.conftest import identity  # noqa: F401  (an autouse fixture)
from tests.flower.test_aggregation import Nodes

BOUND = 0.03
"""How far prediction and measurement may be apart: kernels keep what no shape tells, such as an LSTM's workspace."""

PACKED_BOUND = 0.15
"""The same, with slabs: what is packed lies in slabs that are gone with the last of what is in them."""

SGD: dict[str, Any] = {"lr": 0.01}
MOMENTUM: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
ADAM: dict[str, Any] = {"optimizer_class": torch.optim.Adam, "lr": 0.001, "clip_norm": 1.0}


class Checkpointed(nn.Module):
    """Layers that keep their inputs and compute everything else again; or keep all of it."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        layers = (nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Tanh()) for _ in range(4))
        self.first, self.layers = nn.Linear(64, 64), nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x) if self.use_reentrant is None else checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


class Experts(nn.Module):
    """A layer that sees as many rows as values say."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[x[:, 0] > 0])


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)), randn(
        32, 64
    )


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(9216, 8)
    return nn.Sequential(*layers), randn(4, 3, 16, 16)


def checkpointed() -> tuple[nn.Module, Tensor]:
    return Checkpointed(use_reentrant=False), randn(128, 64)


def architecture(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    return next(each for each in ARCHITECTURES if each.name == name).make


MODELS = {
    "linear": linear,
    "conv": convolutions,
    "checkpointed": checkpointed,
    "lstm": architecture("torch.nn.LSTM"),
    "transformer": architecture("torch.nn.Transformer"),
    "gpt2": architecture("GPT2LMHeadModel"),
    "vit": architecture("ViTForImageClassification"),
    "resnet": architecture("ResNetForImageClassification"),
    "parakeet": architecture("ParakeetForCTC"),
}


POLICIES = {
    "FP32": None,
    "S1E4M14": CompressionPolicy("S1E4M14"),
    "S1E3M7": CompressionPolicy("S1E3M7"),
    DEFAULT: CompressionPolicy("S1E2M3/64", update_format="S1E2M1/64"),
}


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return MODELS[name]()


def in_dtype(x: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, x)


def sizes(model: nn.Module) -> list[int]:
    return [4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in ("linear", "conv", "transformer", "gpt2")), ("linear", torch.float16)],
)
def test_in_other_dtypes_a_weight_is_decoded_to_its_own(name: str, dtype: torch.dtype) -> None:
    model, batch = made(name)
    report = memory_report(model.to(dtype), in_dtype(batch, dtype), loss=lambda output: loss_of(output).float(), **SGD)
    for format in FORMATS:
        assert report.predicted[format].peak == pytest.approx(report.measured[format].peak, rel=BOUND), format


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("in_backward", "training"), [(True, SGD), (True, ADAM), (False, MOMENTUM)], ids=["sgd", "adam", "momentum"]
)
def test_prediction_and_measurement_agree(name: str, in_backward: bool, training: dict[str, Any]) -> None:
    model, batch = made(name)
    report = memory_report(model, batch, loss=loss_of, in_backward=in_backward, **training)
    assert list(report.predicted) == list(report.measured) == list(FORMATS)
    for format in FORMATS:
        predicted, measured = report.predicted[format], report.measured[format]
        assert (predicted.parameters, predicted.buffers) == (measured.parameters, measured.buffers)
        assert predicted.optimizer == measured.optimizer
        assert predicted.activations == pytest.approx(measured.activations, rel=BOUND)
        assert predicted.peak == pytest.approx(measured.peak, rel=BOUND), format
        assert predicted.gradients == measured.gradients


@pytest.mark.parametrize("name", ["linear", "checkpointed", "gpt2", "vit"])
def test_packed_activations_and_state_are_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 2**12)  # which are small next to these models
    model, batch = made(name)
    report = memory_report(
        model, batch, loss=loss_of, formats=["FP32", "S1E3M7"], activations=["FP32", "S1E4M3", "INT4"],
        state_formats=["FP32", "S1E4M3/64"], batch_size=64, optimizer_class=torch.optim.AdamW,
    )  # fmt: skip
    assert len(report.predicted) == len(report.measured) == 12
    plain = report.measured["FP32"]
    for row, predicted in report.predicted.items():
        measured = report.measured[row]
        assert predicted.parameters == measured.parameters
        assert predicted.activations == pytest.approx(measured.activations, rel=PACKED_BOUND, abs=2**15), row
        scratch = 2**20 if "state" in row else 2**15  # of the workspace, which the measurement does not see
        assert predicted.peak == pytest.approx(measured.peak, rel=PACKED_BOUND, abs=scratch), row
        # Adam counts the steps of each variable, and a variable in codes has a scalar less on shapes.
        assert predicted.optimizer == pytest.approx(measured.optimizer, rel=0.01)
        if "state" in row:
            assert predicted.optimizer < 0.4 * plain.optimizer
        if "INT4" in row:
            assert predicted.activations < 0.6 * report.predicted[row.replace("INT4", "S1E4M3")].activations + 2**16


@pytest.mark.parametrize("measure", [False, True])
def test_a_batch_of_another_size(measure: bool) -> None:
    model, batch = made("linear")
    small, same, large = (
        memory_report(model, batch, loss=loss_of, formats=["FP32"], batch_size=size, measure=measure, lr=0.1)
        for size in (16, 32, 64)
    )
    assert same == memory_report(model, batch, loss=loss_of, formats=["FP32"], measure=measure, lr=0.1)
    activations = [report.predicted["FP32"].activations for report in (small, same, large)]
    assert activations[1] - activations[0] == (activations[2] - activations[1]) / 2 > 0
    for wrong in ((batch, batch[:2]), torch.tensor(1.0), {}):
        with pytest.raises(OMCError, match="batch_size=8 needs a batch"):
            memory_report(model, wrong, loss=loss_of, batch_size=8, lr=0.1)


@pytest.mark.parametrize("optimizer", ["Adafactor", "AdamW", "ASGD", "RMSprop"])
def test_any_optimizer_can_be_predicted(optimizer: str) -> None:
    model, batch = made("checkpointed")
    report = memory_report(model, batch, loss=loss_of, optimizer_class=getattr(torch.optim, optimizer), lr=0.001)
    for format in FORMATS:
        predicted, measured = report.predicted[format], report.measured[format]
        assert predicted.optimizer == measured.optimizer > 0
        assert predicted.peak == pytest.approx(measured.peak, rel=BOUND)


@pytest.mark.parametrize("name", MODELS)
def test_the_kinds_are_what_arithmetic_says(name: str) -> None:
    model, batch = made(name)
    used = copy.deepcopy(model)
    loss_of(used(**batch) if isinstance(batch, dict) else used(batch)).backward()
    trained = [4 * p.numel() for p in used.parameters() if p.grad is not None]
    of_modules = [sum(p.nbytes for p in module.parameters(recurse=False)) for module in model.modules()]

    def held(**kwargs: Any) -> dict[str, MemoryBytes]:
        return memory_report(model, batch, loss=loss_of, measure=False, **kwargs).predicted

    stepped, plain = held(**MOMENTUM), held(**ADAM, in_backward=False)
    for format in FORMATS:
        assert stepped[format].buffers == sum(buffer.nbytes for buffer in model.buffers())
        assert max(trained) <= stepped[format].gradients <= max(of_modules)  # one operator's: weight and bias
        assert plain[format].gradients == sum(trained)
        assert stepped[format].optimizer == sum(trained)
        assert plain[format].optimizer == 2 * sum(trained) + 4 * len(trained)
        policy = POLICIES[format]
        packed = model if policy is None else compress_(copy.deepcopy(model), policy.select(model))
        assert stepped[format].parameters == plain[format].parameters == parameter_bytes(packed).total


def test_activations_are_what_autograd_saves() -> None:
    model, batch = made("linear")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {batch.untyped_storage().data_ptr()}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(batch).square().sum()
    expected = loss.nbytes + sum(x.nbytes for key, x in saved.items() if key not in own)
    report = memory_report(model, batch, loss=lambda output: output.square().sum(), formats=["FP32", "S1E2M3"])
    for held in (*report.predicted.values(), *report.measured.values()):
        assert held.activations == expected


@pytest.mark.parametrize("format", ["FP32", "S1E3M7", DEFAULT])
@pytest.mark.parametrize("in_backward", [True, False])
@pytest.mark.parametrize("name", ["linear", "checkpointed"])
def test_the_peak_is_what_the_allocator_says(
    name: str, in_backward: bool, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(
        self: Workspace, numel: int, device: torch.device, dtype: torch.dtype = torch.float32, **_: bool
    ) -> Tensor:
        return torch.empty(numel, device=device, dtype=dtype)

    monkeypatch.setattr(Workspace, "empty", empty)
    model, batch = made(name)
    held = memory_report(model, batch, loss=loss_of, formats=[format], in_backward=in_backward, lr=0.01).measured[
        format
    ]
    policy = POLICIES[format]
    if policy is not None:
        compress_(model, policy.select(model))
    if in_backward:
        step_in_backward(model, torch.optim.SGD, lr=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    parts = [part for p in model.parameters() if isinstance(p, CompressedTensor) for part in p.parts]

    def train() -> None:
        for part in parts:  # so that the profiler knows them, and sees them freed
            part.state = part.to("cpu").state
        for _ in range(2):
            loss_of(model(batch)).backward()
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad()

    with torch.backends.mkldnn.flags(enabled=False):  # whose own temporaries are not counted
        levels = itertools.accumulate(allocations(train))
    inside = sum(part.nbytes for part in parts)
    assert held.peak == pytest.approx(parameter_bytes(model).total - inside + max(levels), rel=BOUND)


@pytest.mark.parametrize("start", ["plain", "compressed", "stepped"])
def test_the_model_stays_as_it_is(start: str) -> None:
    model, batch = made("conv")
    if start != "plain":
        model = compressed(model, "S1E2M3", "scaled-affine")
    if start == "stepped":
        step_in_backward(model, torch.optim.SGD, lr=0.1)
        before_gradient = None
    else:
        model(batch).sum().backward()
        before_gradient = model[0].weight.grad.clone()
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    versions = [p._version for p in model.parameters()]
    memory_report(model, batch, loss=loss_of, **ADAM)
    assert_same_parameters(before, model)
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), model.buffers(), strict=True))
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert versions == [p._version for p in model.parameters()]
    gradient = model[0].weight.grad
    assert gradient is before_gradient is None if start == "stepped" else torch.equal(gradient, before_gradient)
    model(batch).sum().backward()  # and it goes on
    assert (type(model[0].weight.grad) is Tensor) == (start != "stepped")


def test_neither_the_batch_nor_random_numbers_are_changed() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(64, 64))
    batch, random = randn(4, 64), torch.get_rng_state()
    before = batch.clone()
    memory_report(model, batch, loss=loss_of, lr=0.1)
    assert torch.equal(batch, before) and torch.equal(random, torch.get_rng_state())


def test_reports_are_the_same_each_time() -> None:
    model, batch = made("gpt2")
    assert memory_report(model, batch, **ADAM) == memory_report(model, batch, **ADAM)


def test_stepping_in_backward_holds_the_gradients_of_one_layer() -> None:
    model, batch = made("linear")
    stepped, plain = (
        memory_report(model, batch, loss=loss_of, in_backward=in_backward, formats=["S1E3M7"], lr=0.01)
        for in_backward in (True, False)
    )
    for one, all_ in ((stepped.measured, plain.measured), (stepped.predicted, plain.predicted)):
        assert one["S1E3M7"].gradients == 4 * (512 * 512 + 512) < all_["S1E3M7"].gradients == sum(sizes(model))
        assert one["S1E3M7"].peak < all_["S1E3M7"].peak


def test_checkpoints_keep_less_and_compute_it_again() -> None:
    torch.manual_seed(0)
    batch = randn(128, 64)
    kept, again, reentrant = (
        memory_report(Checkpointed(use_reentrant), batch, loss=loss_of, in_backward=False, lr=0.01)
        for use_reentrant in (None, False, True)
    )
    for format in FORMATS:
        for report in (again, reentrant):
            for source in ("predicted", "measured"):
                few, many = getattr(report, source)[format], getattr(kept, source)[format]
                assert few.activations < 0.3 * many.activations and few.transients > many.transients
                assert few.peak < many.peak
            assert report.predicted[format].peak == pytest.approx(report.measured[format].peak, rel=BOUND)


@pytest.mark.parametrize("way", [{"measure": False}, {"predict": False}])
def test_stepping_in_a_reentrant_checkpoint_is_refused(way: dict[str, bool]) -> None:
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        memory_report(Checkpointed(use_reentrant=True), randn(2, 64), loss=loss_of, lr=0.01, **way)


def test_frozen_variables_stay_compressed_and_have_no_gradient() -> None:
    model, batch = made("linear")
    model[2].requires_grad_(False)
    whole = memory_report(made("linear")[0], batch, loss=loss_of, **MOMENTUM, in_backward=False)
    report = memory_report(model, batch, loss=loss_of, **MOMENTUM, in_backward=False)
    for source in ("predicted", "measured"):
        for format in FORMATS:
            held = getattr(report, source)[format]
            assert held.parameters == getattr(whole, source)[format].parameters
            assert held.gradients == held.optimizer == sum(sizes(model)) < 4 * 512 * 512
    model.requires_grad_(False)
    report = memory_report(model, batch, loss=loss_of, formats=["S1E3M7"])
    assert report.predicted["S1E3M7"].gradients == report.measured["S1E3M7"].gradients == 0


def test_tied_variables_count_once() -> None:
    model, batch = made("gpt2")
    held = memory_report(model, batch, formats=["FP32"], lr=0.01).measured["FP32"]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert held.parameters == sum(4 * p.numel() for p in model.parameters())


def test_fits_names_the_formats_within_a_budget() -> None:
    model, batch = made("gpt2")
    report = memory_report(model, batch, lr=0.01)
    peaks = {name: held.peak for name, held in report.measured.items()}
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    assert report.fits(max(peaks.values())) == list(FORMATS)
    assert report.fits(peaks["S1E3M7"]) == ["S1E3M7", DEFAULT]
    assert report.fits(peaks[DEFAULT] - 1) == []
    unmeasured = memory_report(model, batch, measure=False, lr=0.01)
    assert unmeasured.fits(unmeasured.predicted["S1E3M7"].peak) == ["S1E3M7", DEFAULT]


@pytest.mark.parametrize(
    ("policy", "label"),
    [
        (CompressionPolicy("S1E3M7", fraction=0.5, seed=1), "S1E3M7@0.5"),
        (
            CompressionPolicy("S1E2M1", update_format="S1E3M0", format_by_name={"*attn*": "S1E2M3"}),
            "S1E2M1+S1E3M0|S1E2M3+S1E3M0",
        ),
    ],
)
def test_policies_and_the_models_own_formats(policy: CompressionPolicy, label: str) -> None:
    model, batch = made("gpt2")
    compress_(model, policy.select(model))
    report = memory_report(model, batch, formats=["as is", policy, "FP32"], lr=0.01)
    assert list(report.measured) == ["as is", label, "FP32"]
    for held in (report.predicted, report.measured):
        assert held["as is"] == held[label]
        assert held["as is"].parameters == parameter_bytes(model).total < held["FP32"].parameters


def test_a_model_on_meta_is_predicted_and_allocates_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(50, 10_000), nn.Linear(10_000, 10_000), nn.LayerNorm(10_000))
    batch = torch.arange(8)
    reports = []
    levels = allocations(
        lambda: reports.append(memory_report(model, batch, loss=torch.sum, formats=["FP32", "S1E3M7"], measure=False))
    )
    assert max(itertools.accumulate(levels)) < 2**20
    held = reports[0].predicted["S1E3M7"]
    assert held.gradients == 4e8 + 4e4 and held.parameters == pytest.approx(1e8 * 11 / 8, rel=0.01)
    assert held.transients < 2e8  # no gigantic weight is decoded as a whole
    with pytest.raises(OMCError, match="measure=False"):
        memory_report(model, batch, loss=torch.sum)


def test_a_prediction_is_that_of_the_same_model_on_meta() -> None:
    model, batch = made("linear")
    on_meta = copy.deepcopy(model).to("meta")
    reports = [memory_report(each, batch, loss=loss_of, measure=False, lr=0.01) for each in (model, on_meta)]
    assert reports[0] == reports[1]


def test_what_cannot_be_told_is_an_error_with_a_way_out() -> None:
    model, batch = made("linear")
    with pytest.raises(OMCError, match="pass loss="):
        memory_report(model, batch)
    for format in ("S1E99M1", "S1E2M3+", "fp32"):
        with pytest.raises(FormatError, match="is not a number format"):
            memory_report(model, batch, formats=[format])
    with pytest.raises(PolicyError, match="the same name"):
        memory_report(model, batch, formats=["S1E3M7", CompressionPolicy("S1E3M7", transform="affine")])
    experts, rows = Experts(), randn(16, 64)
    with pytest.raises(OMCError, match="predict=False"):
        memory_report(experts, rows, loss=torch.sum)
    report = memory_report(experts, rows, loss=torch.sum, predict=False, lr=0.01)
    assert not report.predicted and report.measured["S1E3M7"].activations > 0


def test_batches_of_any_kind() -> None:
    model, x = nn.Bilinear(16, 16, 8), randn(2, 16)
    reports = [
        memory_report(model, batch, loss=torch.sum, lr=0.1) for batch in ((x, x), [x, x], {"input1": x, "input2": x})
    ]
    assert reports[0] == reports[1] == reports[2]


def test_sparse_gradients() -> None:
    model, batch = nn.Embedding(1000, 16, sparse=True), torch.arange(4)
    report = memory_report(model, batch, loss=torch.sum, formats=["FP32"], lr=0.1)
    assert report.measured["FP32"].gradients == 4 * (8 + 16 * 4)  # indices and rows
    assert report.predicted["FP32"].parameters == 64_000


def test_prints_a_table() -> None:
    model, batch = made("linear")
    report = memory_report(model, batch, loss=loss_of, formats=["FP32", "S1E3M7"], lr=0.01)
    head, *lines = str(report).splitlines()
    assert head.split() == [
        "MB", "parameters", "buffers", "gradients", "optimizer", "activations", "transients", "peak",
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines] == [
        ["FP32", "predicted"], ["FP32", "measured"], ["S1E3M7", "predicted"], ["S1E3M7", "measured"],
    ]  # fmt: skip
    assert lines[1].split()[-1] == f"{report.measured['FP32'].peak / 1e6:.3f}"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("S1E3M7", 0),
        ("S1E3M7>DRIVE1", 11 / 32),
        ("S1E3M7>S1E2M1@0.7", None),
        ("S1E2M3+S1E2M1>DRIVE2", 0),
        ("S1E2M3+S1E2M1>DRIVE2@0.7", None),
    ],
)
def test_what_arrived_counts_where_an_uplink_needs_it(text: str, kept: float | None) -> None:
    """It is exactly what is left of a message that a client has consumed."""
    model, batch = nn.Sequential(*[nn.Linear(96, 96) for _ in range(8)]), randn(4, 96)
    policy = CompressionPolicy.parse(text)
    plain, sent = str(policy).partition(">")[0], policy.select(model)
    report = memory_report(model, batch, loss=loss_of, formats=[policy], **SGD)
    assert report.predicted[text].arrived == report.measured[text].arrived == arrived_bytes(model, sent)
    whole = sum(4 * p.numel() for name, p in model.named_parameters() if name in policy.compressible(model))
    if kept is not None:
        assert report.predicted[text].arrived == kept * whole + 8 * len(sent) * (kept > 0)  # scale and offset
        without = memory_report(model, batch, loss=loss_of, formats=[plain], **SGD)
        for found, other in ((report.predicted, without.predicted), (report.measured, without.measured)):
            assert found[text].peak - other[plain].peak == found[text].arrived
    assert ("arrived" in str(report)) == (report.predicted[text].arrived > 0)

    strategy = OMCStrategy(FedAvg(), policy, client_name=lambda node: "")
    message, *_ = strategy.configure_train(0, collect(model), ConfigRecord(), Nodes(2))  # type: ignore[arg-type]
    assert from_config(message.content[CONFIG]).unquantized == frozenset(sent.unquantized if policy.uplink else ())
    install(copy.deepcopy(model), message, consume=True)
    left = sum(len(array.data) for array in message.content["arrays"].values())
    assert 0 <= left - report.predicted[text].arrived < 200 * len(sent) + 200 * len(sent.unquantized)
