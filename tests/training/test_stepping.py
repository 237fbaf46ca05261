import copy
import io
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedomc import CompressedTensor, CompressionPolicy, NonFiniteError, PolicyError, codec, compress_, step_in_backward
from fedomc.training.stepping import ReleasedGradient
from tests.conftest import allocations, assert_same_parameters, compressed, dense, randn

optim, schedules = torch.optim, torch.optim.lr_scheduler
OPTIMIZERS: list[tuple[Callable[..., optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    (optim.SGD, {"lr": 0.001, "weight_decay": 0.01, "maximize": True, "fused": True}),
    (optim.Adam, {"lr": 0.01}),
    (optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    (optim.Adam, {"lr": 0.01, "foreach": True}),
    (optim.Adam, {"lr": 0.01, "fused": True}),
    (optim.AdamW, {"lr": 0.01}),
    (optim.AdamW, {"lr": 0.01, "foreach": True}),
    (optim.AdamW, {"lr": 0.01, "fused": True, "amsgrad": True}),
    (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (optim.RMSprop, {"lr": 0.01, "foreach": True}),
    (optim.Adagrad, {"lr": 0.1}),
    (optim.Adagrad, {"lr": 0.1, "fused": True}),
    (optim.Adafactor, {"lr": 0.1}),
    (optim.Adadelta, {}),
    (optim.Adamax, {"weight_decay": 0.1}),
    (optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.RAdam, {"foreach": True}),
    (optim.ASGD, {"t0": 1}),
    (optim.Rprop, {}),
]
IDS = [f"{optimizer.__name__} {kwargs}" for optimizer, kwargs in OPTIMIZERS]


def model() -> nn.Module:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), shared, nn.Tanh(), shared, nn.LayerNorm(6), nn.Linear(6, 3))


def loss(module: nn.Module, step: int) -> torch.Tensor:
    return module(randn(4, 8, seed=step)).square().sum()


@pytest.mark.parametrize(("optimizer", "kwargs"), OPTIMIZERS, ids=IDS)
@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
def test_is_ordinary_training(
    optimizer: Callable[..., optim.Optimizer], kwargs: dict[str, Any], clip: float | None
) -> None:
    plain, packed, stepped = model(), compressed(model()), model()
    ordinary = optimizer(plain.parameters(), **kwargs)
    handles = [step_in_backward(m, optimizer, clip_norm=clip, **kwargs) for m in (packed, stepped)]
    names = [[name] for name, _ in plain.named_parameters()]
    assert all([group["param_names"] for group in handle.optimizer.param_groups] == names for handle in handles)
    for step in range(3):
        ordinary.zero_grad()
        loss(plain, step).backward()
        for p in plain.parameters():
            if clip is not None:
                nn.utils.clip_grad_norm_([p], clip)
        ordinary.step()
        for m in (packed, stepped):
            loss(m, step).backward()
            assert all(isinstance(p.grad, ReleasedGradient) for p in m.parameters())
    assert_same_parameters(plain, packed)
    assert_same_parameters(plain, stepped)
    assert all(isinstance(p, CompressedTensor) for p in packed.parameters())


SCHEDULES: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda o: schedules.StepLR(o, 2, 0.5),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 5),
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.2, total_steps=10),
    "warmup, then decay": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step", "ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_of_torch_set_all_learning_rates(name: str) -> None:
    plain, packed = model(), compressed(model())
    ordinary = optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    stepping = step_in_backward(packed, optim.SGD, lr=0.1, momentum=0.9)
    ours, theirs = SCHEDULES[name](stepping.optimizer), SCHEDULES[name](ordinary)
    rates = set()
    for step in range(6):
        ordinary.zero_grad()
        loss(plain, step).backward()
        ordinary.step()
        loss(packed, step).backward()
        ours.step()
        theirs.step()
        rates.add(theirs.get_last_lr()[0])
        assert set(ours.get_last_lr()) == {theirs.get_last_lr()[0]}
    assert len(rates) > 2
    assert_same_parameters(plain, packed)


def test_a_variable_can_have_options_of_its_own() -> None:
    plain, packed = model(), compressed(model())
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() <= 1]
    ordinary = optim.AdamW([{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}])
    stepping = step_in_backward(packed, optim.AdamW)
    for group in stepping.optimizer.param_groups:
        group["weight_decay"] = 0.5 if group["params"][0].dim() > 1 else 0.0
    for step in range(3):
        ordinary.zero_grad()
        loss(plain, step).backward()
        ordinary.step()
        loss(packed, step).backward()
    assert_same_parameters(plain, packed)


@pytest.mark.parametrize(("optimizer", "kwargs"), OPTIMIZERS, ids=IDS)
@pytest.mark.parametrize("format", ["S1E8M23", "S1E3M7"])
def test_saved_and_resumed_is_as_if_never_stopped(
    optimizer: Callable[..., optim.Optimizer], kwargs: dict[str, Any], format: str
) -> None:
    def start() -> tuple[nn.Module, optim.Optimizer, Any]:
        module = compressed(model(), format, "scaled-affine")
        stepping = step_in_backward(module, optimizer, **kwargs)
        return module, stepping.optimizer, schedules.StepLR(stepping.optimizer, 2, 0.5)

    def train(module: nn.Module, schedule: Any, steps: range) -> None:
        for step in steps:
            loss(module, step).backward()
            schedule.step()

    module, stepper, schedule = start()
    train(module, schedule, range(3))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (module, stepper, schedule)], file)
    train(module, schedule, range(3, 6))

    resumed = start()
    file.seek(0)
    for thing, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(state)
    train(resumed[0], resumed[2], range(3, 6))
    assert_same_parameters(module, resumed[0])


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [(optim.LBFGS, ValueError, "parameter groups"), (optim.SparseAdam, RuntimeError, "dense gradients")],
)
def test_optimizers_that_do_not_work_parameter_by_parameter(
    optimizer: Callable[..., optim.Optimizer], error: type[Exception], message: str
) -> None:
    module = compressed(model())
    with pytest.raises(error, match=message):
        step_in_backward(module, optimizer)
        loss(module, 0).backward()


def scaler() -> torch.amp.GradScaler:
    result = torch.amp.GradScaler("cpu")
    result.scale(torch.ones(()))
    return result


class TestTorchao:
    """Optimizers of torchao keep their state in 8 or 4 bits; they compile their step, which is long for a test."""

    @pytest.fixture(params=["AdamW8bit", "AdamW4bit", "_AdamW"])
    def optimizer(self, request: pytest.FixtureRequest) -> Callable[..., optim.Optimizer]:
        return getattr(pytest.importorskip("torchao.optim"), request.param)

    @staticmethod
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False))

    @staticmethod
    def loss(module: nn.Module, step: int) -> torch.Tensor:
        return module(randn(4, 64, seed=step)).square().sum()

    def test_is_ordinary_training(self, optimizer: Callable[..., optim.Optimizer]) -> None:
        plain, packed, stepped = self.model(), compressed(self.model()), compressed(self.model())
        ordinary = [optimizer(m.parameters(), lr=0.01) for m in (plain, packed)]
        stepping = step_in_backward(stepped, optimizer, lr=0.01)
        rates = [schedules.StepLR(o, 2, 0.5) for o in (*ordinary, stepping.optimizer)]
        for step in range(4):
            with torch.compiler.set_stance("force_eager"):
                for m, o in zip((plain, packed), ordinary, strict=True):
                    o.zero_grad()
                    self.loss(m, step).backward()
                    o.step()
            self.loss(stepped, step).backward()
            for rate in rates:
                rate.step()
        assert_same_parameters(plain, packed)
        assert_same_parameters(plain, stepped)

    def test_saved_and_resumed_is_as_if_never_stopped(self, optimizer: Callable[..., optim.Optimizer]) -> None:
        module = compressed(self.model(), "S1E3M7", "scaled-affine")
        stepper = step_in_backward(module, optimizer, lr=0.01).optimizer
        self.loss(module, 0).backward()
        file = io.BytesIO()
        torch.save([module.state_dict(), stepper.state_dict()], file)
        state_bytes = sum(x.nbytes for s in stepper.state.values() for x in s.values() if type(x) is torch.Tensor)
        self.loss(module, 1).backward()

        resumed = compressed(self.model(), "S1E3M7", "scaled-affine")
        stepper = step_in_backward(resumed, optimizer, lr=0.01).optimizer
        file.seek(0)
        for thing, state in zip((resumed, stepper), torch.load(file, weights_only=True), strict=True):
            thing.load_state_dict(state)
        self.loss(resumed, 1).backward()
        assert_same_parameters(module, resumed)
        if "bit" in optimizer.__name__:  # all that is kept in float32 is the count of steps
            assert state_bytes == 2 * 4


class TestAccumulation:
    @pytest.mark.parametrize("clip", [None, 0.05])
    def test_passes_inside_are_one_step(self, clip: float | None) -> None:
        plain, packed = model(), compressed(model())
        ordinary = optim.AdamW(plain.parameters())
        stepping = step_in_backward(packed, optim.AdamW, clip_norm=clip)
        for step in range(2):
            ordinary.zero_grad()
            for part in range(3):
                (loss(plain, 3 * step + part) / 3).backward()
            for p in plain.parameters():
                if clip is not None:
                    nn.utils.clip_grad_norm_([p], clip)
            ordinary.step()
            with stepping.accumulate():
                for part in range(3):
                    (loss(packed, 3 * step + part) / 3).backward()
            assert all(isinstance(p.grad, ReleasedGradient) for p in packed.parameters())
        for m, step in ((plain, ordinary.step), (packed, lambda: None)):  # and after it each pass is a step again
            m.zero_grad()
            loss(m, 9).backward()
            if clip is not None:
                for p in plain.parameters():
                    nn.utils.clip_grad_norm_([p], clip) if m is plain else None
            step()
        assert_same_parameters(plain, packed)

    def test_a_variable_that_only_some_passes_use_is_stepped_once(self) -> None:
        plain, packed = model(), compressed(model())
        ordinary = optim.SGD(plain.parameters(), lr=0.1)
        stepping = step_in_backward(packed, optim.SGD, lr=0.1)
        parts: list[Callable[[nn.Module], torch.Tensor]] = [lambda m: loss(m, 0), lambda m: m[0](randn(2, 8)).sum()]
        for part in parts:
            part(plain).backward()
        ordinary.step()
        with stepping.accumulate():
            for part in parts:
                part(packed).backward()
        assert_same_parameters(plain, packed)

    def test_a_norm_over_all_gradients_exists_inside(self) -> None:
        plain, packed = model(), compressed(model())
        ordinary = optim.SGD(plain.parameters(), lr=0.1)
        stepping = step_in_backward(packed, optim.SGD, lr=0.1)
        loss(plain, 0).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        ordinary.step()
        with stepping.accumulate():
            loss(packed, 0).backward()
            assert torch.equal(nn.utils.clip_grad_norm_(packed.parameters(), 0.1), norm)
        assert_same_parameters(plain, packed)

    def test_an_exception_drops_the_gradients_and_steps_nothing(self) -> None:
        plain, packed = model(), compressed(model())
        stepping = step_in_backward(packed, optim.SGD, lr=0.1)
        with pytest.raises(ZeroDivisionError), stepping.accumulate():
            loss(packed, 0).backward()
            raise ZeroDivisionError
        assert_same_parameters(plain, packed)
        with stepping.accumulate():
            pass
        assert_same_parameters(plain, packed)

    def test_without_it_each_pass_is_a_step(self) -> None:
        plain, packed = model(), compressed(model())
        ordinary = optim.SGD(plain.parameters(), lr=0.1)
        step_in_backward(packed, optim.SGD, lr=0.1)
        for step in range(2):
            ordinary.zero_grad()
            loss(plain, step).backward()
            ordinary.step()
            loss(packed, step).backward()
        assert_same_parameters(plain, packed)


class TestTheGradientIsGone:
    """Whoever wants it after the step is told, for compressed and for plain variables, and nothing is lost."""

    @pytest.mark.parametrize("kind", ["plain", "compressed"])
    @pytest.mark.parametrize(
        "use",
        [
            lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
            lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0, foreach=True),
            lambda m: nn.utils.clip_grad_norm_(m[6].weight, 1.0, norm_type=torch.inf),
            lambda m: nn.utils.get_total_norm([p.grad for p in m.parameters()]),
            lambda m: nn.utils.clip_grad_value_(m.parameters(), 1.0),
            lambda m: optim.SGD(m.parameters(), lr=0.1).step(),
            lambda m: optim.SGD(m.parameters(), lr=0.1, foreach=True).step(),
            lambda m: optim.Adam(m.parameters(), fused=True).step(),
            lambda m: scaler().unscale_(optim.SGD(m.parameters(), lr=0.1)),
            lambda m: sum(p.grad.square().sum() for p in m.parameters()),
            lambda m: [p.grad.clone() for p in m.parameters()],
            lambda m: torch.cat([p.grad.view(-1) for p in m.parameters()]),
            lambda m: [torch.zeros(p.shape).copy_(p.grad) for p in m.parameters()],
            lambda m: [float(p.grad.view(-1)[0]) for p in m.parameters()],
        ],
        ids=[
            "clip_grad_norm_", "clip_grad_norm_ foreach", "clip_grad_norm_ inf", "get_total_norm", "clip_grad_value_",
            "SGD", "SGD foreach", "Adam fused", "GradScaler", "square", "clone", "cat", "copy", "index",
        ],
    )  # fmt: skip
    def test_its_use_is_an_error_that_names_the_way_out(self, use: Callable[[nn.Module], Any], kind: str) -> None:
        module = compressed(model()) if kind == "compressed" else model()
        step_in_backward(module, optim.SGD, lr=0.1)
        loss(module, 0).backward()
        before = copy.deepcopy(module)
        with pytest.raises(RuntimeError, match=r"gradient of .*(weight|bias) has been released.*clip_norm="):
            use(module)
        assert_same_parameters(before, module)
        loss(module, 1).backward()
        assert all(isinstance(p.grad, ReleasedGradient) for p in module.parameters())

    def test_its_own_optimizer_is_not_to_be_called(self) -> None:
        module = compressed(model())
        stepping = step_in_backward(module, optim.SGD, lr=0.1)
        loss(module, 0).backward()
        with pytest.raises(RuntimeError, match="has been released"):
            stepping.optimizer.step()

    @pytest.mark.parametrize("to_none", [True, False])
    def test_it_is_zeroed_printed_and_copied(self, to_none: bool) -> None:
        plain, packed = model(), compressed(model())
        for module in (plain, packed):
            step_in_backward(module, optim.SGD, lr=0.1)
            loss(module, 0).backward()
            assert "6.weight" in repr(module[6].weight.grad) and module[6].weight.grad.shape == (3, 6)
            assert all(p.grad is None for p in copy.deepcopy(module).parameters())
            module.zero_grad(set_to_none=to_none)
            optim.SGD(module.parameters(), foreach=True).zero_grad(set_to_none=to_none)
            loss(module, 1).backward()
        assert_same_parameters(plain, packed)

    def test_it_moves_with_a_plain_model_and_is_shared(self) -> None:
        module = model()
        step_in_backward(module, optim.SGD, lr=0.1)
        loss(module, 0).backward()
        module.share_memory()
        module.double()
        assert all(p.grad.dtype is torch.float64 for p in module.parameters())
        before = module[0].weight.clone()
        module(randn(2, 8).double()).sum().backward()
        assert not torch.equal(before, module[0].weight)
        assert all(p.device.type == p.grad.device.type == "meta" for p in module.to("meta").parameters())

    def test_after_removal_gradients_are_real(self) -> None:
        module = compressed(model())
        stepping = step_in_backward(module, optim.SGD, lr=0.1)
        loss(module, 0).backward()
        stepping.remove()
        assert all(p.grad is None for p in module.parameters())
        loss(module, 0).backward()
        assert nn.utils.clip_grad_norm_(module.parameters(), 1e9) > 0


def test_clipping_bounds_each_variable() -> None:
    module = compressed(model())
    before = {name: p.dequantize() for name, p in module.named_parameters()}
    step_in_backward(module, optim.SGD, lr=1.0, clip_norm=0.01)
    loss(module, 0).backward()
    for name, p in module.named_parameters():
        assert float((p.dequantize() - before[name]).norm()) <= 0.01 * (1 + 1e-3)


def test_removed_hooks_leave_gradients() -> None:
    module = compressed(model())
    handle = step_in_backward(module, optim.SGD, lr=0.1)
    handle.remove()
    handle.remove()
    before = copy.deepcopy(module)
    loss(module, 0).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert_same_parameters(before, module)


def test_frozen_variables_have_no_optimizer() -> None:
    module = compressed(model())
    module[0].weight.requires_grad_(False)
    before = module[0].weight.dequantize()
    handle = step_in_backward(module, optim.SGD, lr=0.1)
    names = [group["param_names"][0] for group in handle.optimizer.param_groups]
    assert "0.weight" not in names and "0.bias" in names
    loss(module, 0).backward()
    assert torch.equal(module[0].weight.dequantize(), before)


def test_gradients_of_two_layers_never_exist_together() -> None:
    size = 256

    def peak(layers: int) -> int:
        module = compressed(nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))), "S1E2M3")
        step_in_backward(module, optim.SGD, lr=0.1)
        x = torch.randn(1, size)
        module(x).sum().backward()
        levels = list(itertools.accumulate(allocations(lambda: module(x).sum().backward())))
        assert levels[-1] < size * size
        return max(levels)

    assert peak(10) - peak(2) < 4 * size * size


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [
        (optim.SGD, {}),
        (optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (optim.SGD, {"weight_decay": 0.1}),
        (optim.Adam, {}),
        (optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
        (optim.AdamW, {}),
    ],
)
@pytest.mark.parametrize("update_format", [None, "S1E2M3"])
def test_a_step_never_decodes_a_whole_weight(
    optimizer: Callable[..., optim.Optimizer],
    kwargs: dict[str, Any],
    update_format: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = compressed(nn.Linear(1024, 300), "S1E3M7", "scaled-affine", update_format=update_format)
    decode_into, longest = CompressedTensor._decode_into, 0

    def watched(self: CompressedTensor, values: torch.Tensor, start: int) -> torch.Tensor:
        nonlocal longest
        longest = max(longest, values.numel())
        return decode_into(self, values, start)

    steps = optimizer(module.parameters(), **kwargs)
    before = module.weight.dequantize()
    for p in module.parameters():
        p.grad = randn(*p.shape)
    monkeypatch.setattr(CompressedTensor, "_decode_into", watched)
    module.weight.dequantize()
    assert longest == module.weight.numel()  # it watches
    longest = 0
    for _ in range(2):
        steps.step()
    assert longest <= codec.CHUNK < module.weight.numel()
    monkeypatch.undo()
    assert not torch.equal(module.weight.dequantize(), before)


def test_a_diverging_step_names_the_variable_and_the_model_goes_on() -> None:
    module = compressed(model())
    handle = step_in_backward(module, optim.SGD, lr=0.1)
    with pytest.raises(NonFiniteError, match=r"6\.(weight|bias)"):
        (loss(module, 0) * float("inf")).backward()
    for p in module.parameters():
        p.grad = None
        assert torch.isfinite(p.dequantize()).all()
    loss(module, 0).backward()
    handle.remove()


def test_what_is_stepped_cannot_be_replaced_or_stepped_twice() -> None:
    module = model()
    stepping = step_in_backward(module, optim.SGD, lr=0.1)
    with pytest.raises(PolicyError, match="stepped in backward already"):
        step_in_backward(module, optim.SGD, lr=0.1)
    policy = CompressionPolicy("S1E3M7")
    with pytest.raises(PolicyError, match="remove"):
        compress_(module, policy.select(module))
    stepping.remove()
    compress_(module, policy.select(module))
    step_in_backward(module, optim.SGD, lr=0.1)


@pytest.mark.parametrize("change", ["replace", "assign", "unfreeze"])
def test_a_variable_that_would_no_longer_be_trained_is_an_error(change: str) -> None:
    module = compressed(model())
    module[0].bias.requires_grad_(False)
    stepping = step_in_backward(module, optim.SGD, lr=0.1)
    loss(module, 0).backward()
    if change == "replace":
        module[6] = nn.Linear(6, 3)
    elif change == "assign":
        module.load_state_dict(model().state_dict(), assign=True)
    module[0].bias.requires_grad_(True)
    with pytest.raises(PolicyError, match=r"(weight|bias) requires a gradient but is not stepped.*remove\(\)"):
        loss(module, 0)
    with torch.no_grad():
        loss(module, 0)
    stepping.remove()
    stepping = step_in_backward(module, optim.SGD, lr=0.1)
    before = copy.deepcopy(module)
    loss(module, 0).backward()
    for name, p in module.named_parameters():
        assert not torch.equal(dense(p), dense(before.get_parameter(name))), name


@pytest.mark.parametrize("stepped_before", [True, False])
@pytest.mark.parametrize(
    "move", [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.to("meta").to_empty(device="cpu")]
)
def test_a_moved_model_is_stepped_on(move: Callable[[nn.Module], nn.Module], stepped_before: bool) -> None:
    plain, packed = model(), compressed(model())
    stepping = step_in_backward(packed, optim.SGD, lr=0.1)
    if stepped_before:
        loss(packed, 0).backward()
    calls: list[torch.Tensor] = []
    packed[0].weight.register_hook(calls.append)
    move(move(packed))
    packed.load_state_dict(plain.state_dict())
    step_in_backward(plain, optim.SGD, lr=0.1)
    for seed in (1, 2):
        for m in (plain, packed):
            loss(m, seed).backward()
    assert_same_parameters(plain, packed)
    assert len(calls) == 2
    stepping.remove()
    loss(packed, 3).backward()
    assert_same_parameters(plain, packed)


def test_a_model_is_stepped_on_in_another_precision() -> None:
    packed = compressed(model())
    step_in_backward(packed, optim.SGD, lr=0.1)
    packed.bfloat16()
    before = [dense(p).clone() for p in packed.parameters()]
    packed(randn(4, 8).bfloat16()).square().mean().backward()
    assert all(p.dtype is torch.bfloat16 for p in packed.parameters())
    assert any(not torch.equal(dense(p), value) for p, value in zip(packed.parameters(), before, strict=True))


def test_a_copy_of_the_model_is_not_stepped() -> None:
    module = compressed(model())
    step_in_backward(module, optim.SGD, lr=0.1)
    loss(module, 0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]  # noqa: S301
    for other in others:
        assert_same_parameters(module, other)
        loss(other, 0).backward()
        assert_same_parameters(module, other)
        assert all(p.grad.abs().sum() > 0 for p in other.parameters())


@pytest.mark.parametrize("removed", [True, False])
def test_a_model_that_is_dropped_is_freed(removed: bool) -> None:
    module = compressed(model())
    stepping = step_in_backward(module, optim.AdamW)
    loss(module, 0).backward()
    alive = [weakref.ref(p) for p in module.parameters()] + [weakref.ref(stepping.optimizer)]
    if removed:
        stepping.remove()
    del module, stepping
    assert not [reference for reference in alive if reference() is not None]


def test_what_was_stepped_must_be_kept() -> None:
    module = compressed(model())
    step_in_backward(nn.ModuleList([module]), optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"0\.6\.bias is no longer stepped.*keep a reference"):
        loss(module, 0).backward()
    module = compressed(model())
    stepping = step_in_backward(nn.ModuleList([module]), optim.SGD, lr=0.1)
    loss(module, 0).backward()
    assert len(stepping.optimizer.param_groups) == len(list(module.parameters()))


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(PolicyError, match="nothing to step"):
        step_in_backward(model().requires_grad_(False), optim.SGD, lr=0.1)
